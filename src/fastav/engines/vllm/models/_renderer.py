"""From chat messages, or a prompt's text, to the token ids that our processors make."""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any

from fastav.engines.vllm.compat import (
    HfRenderer,
    VLLMValidationError,
    parse_chat_messages,
    parse_chat_messages_async,
    safe_apply_chat_template,
)
from fastav.engines.vllm.models._clips import KINDS, as_validation_error
from fastav.models._conversations import flat

SOUNDS = {"audio_url": ("url",), "input_audio": ("data", "format")}  # parts that show a sound: their fields


class ClipRenderer(HfRenderer):
    """Renders chats by the processor's template; a clip's placeholder never merges with text into one token.

    Sound files enter as videos do: as bytes that our own decoder reads.
    """

    @property
    def _info(self) -> Any:
        return self.get_mm_processor().info

    @cached_property
    def _processor(self) -> Any:
        """The family's processor, with vLLM's tokenizer, which several threads may use at once."""
        processor = copy(self._info.get_hf_processor())
        processor.tokenizer = self.get_tokenizer()
        return processor

    def get_eos_token_id(self) -> int | None:
        """The end token of the model's configuration: the originals' tokenizers name another."""
        end = self.model_config.hf_config.eos_token_id
        return end[0] if isinstance(end, list) else end

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        """The parsed conversation and its prompt, with its clip."""
        as_video, kind = as_videos(messages)
        conversation, media, uuids = parse_chat_messages(
            as_video, self.model_config, "openai", **_loading_options(params)
        )
        turns = self._turns(conversation, kind)
        text = safe_apply_chat_template(self.model_config, self.get_tokenizer(), turns, **self._options(params))
        return conversation, _prompt(text, kind, media, uuids)

    async def render_messages_async(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        """Like `render_messages`."""
        as_video, kind = as_videos(messages)
        conversation, media, uuids = await parse_chat_messages_async(
            as_video, self.model_config, "openai", **_loading_options(params)
        )
        turns = self._turns(conversation, kind)
        text = await self._render_with_timeout(
            self._apply_chat_template_async(self.model_config, self.get_tokenizer(), turns, **self._options(params))
        )
        return conversation, _prompt(text, kind, media, uuids)

    def _turns(self, conversation: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
        """The conversation with text as the contents of its turns."""
        with as_validation_error():
            return flat([_with_kind(turn, kind) for turn in conversation], self._processor.places)

    def _options(self, params: Any) -> dict[str, Any]:
        """The options of the chat template, which is the processor's by default."""
        template = params.chat_template or self._processor.chat_template
        return params.get_apply_chat_template_kwargs() | {"chat_template": template, "tokenize": False}

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        media = prompt.get("multi_modal_data") or {}
        kind = next((kind for kind in KINDS if media.get(kind) is not None), None)
        if kind is None:
            return super()._tokenize_prompt(prompt, params)
        placeholder = [self._info.placeholder_id(kind)], self._info.placeholder(kind)
        with as_validation_error():
            ids = self._processor.splice(prompt["prompt"], *placeholder)
        return self._build_tokens_prompt(ids, prompt)


def as_videos(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Any], str]:
    """The messages with sounds marked as videos, and the kind of their clip: `audio` if one was a sound."""
    marked, kind = [], "video"
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [_as_video(part) for part in content]
            kind = "audio" if parts != content else kind
            message = {**message, "content": parts}
        marked.append(message)
    return marked, kind


def _as_video(part: Any) -> Any:
    """A part that shows a sound, as one that shows a video.  Raises: VLLMValidationError for what is no sound."""
    if not isinstance(part, Mapping):
        return part
    kind = part.get("type") or next((kind for kind in SOUNDS if kind in part), None)
    if kind not in SOUNDS:
        return part
    uuid, sound = part.get("uuid"), part.get(kind)
    if uuid and not sound:  # a sound that was sent before
        return {"type": "video_url", "video_url": None, "uuid": uuid}
    fields = SOUNDS[kind]
    if not isinstance(sound, Mapping) or not all(isinstance(sound.get(name), str) for name in fields):
        raise VLLMValidationError(f"{kind} must be an object with {' and '.join(fields)}, which are texts")
    url = sound["url"] if kind == "audio_url" else f"data:audio/{sound['format']};base64,{sound['data']}"
    return {"type": "video_url", "video_url": {"url": url}} | ({"uuid": uuid} if uuid else {})


def _with_kind(turn: Mapping[str, Any], kind: str) -> dict[str, Any]:
    content = turn.get("content") or ""
    if isinstance(content, list):
        content = [{**part, "type": kind} if part["type"] == "video" else part for part in content]
    return {**turn, "content": content}


def _loading_options(params: Any) -> dict[str, Any]:
    return {"media_io_kwargs": params.media_io_kwargs}


def _prompt(text: str, kind: str, media: Any, uuids: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": text}
    if others := sorted({*(media or {}), *(uuids or {})} - {"video"}):
        raise VLLMValidationError(f"this model takes video_url, audio_url and input_audio, not {', '.join(others)}")
    if media is not None:
        prompt["multi_modal_data"] = {kind: media["video"]}
    if uuids is not None:
        prompt["multi_modal_uuids"] = {kind: uuids["video"]}
    return prompt
