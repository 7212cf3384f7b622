"""From chat messages, or a prompt's text, to token ids: the same as our processors give."""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any

from vllm.renderers.chat_utils import (  # pyright: ignore[reportMissingImports]
    parse_chat_messages,
    parse_chat_messages_async,
)
from vllm.renderers.hf import HfRenderer, safe_apply_chat_template  # pyright: ignore[reportMissingImports]

from fastav.engines.vllm.families._clips import KINDS, refused
from fastav.models._conversations import flat


class ClipRenderer(HfRenderer):
    """Chat messages become a prompt's text by the processor, and a clip's place in it is never part of a token.

    Sound files come in by the same door as videos: as bytes that our own decoder reads.
    """

    @property
    def _info(self) -> Any:
        return self.get_mm_processor().info

    @cached_property
    def _processor(self) -> Any:
        """Ours, with the tokenizer that vLLM lets several threads use at once."""
        processor = copy(self._info.get_hf_processor())
        processor.tokenizer = self.get_tokenizer()
        return processor

    def get_eos_token_id(self) -> int | None:
        """The model's, as tokenizers of originals name another."""
        end = self.model_config.hf_config.eos_token_id
        return end[0] if isinstance(end, list) else end

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        """A conversation and its prompt, with the clip that it shows."""
        shown, kind = as_videos(messages)
        conversation, media, names = parse_chat_messages(shown, self.model_config, "openai", **_loading(params))
        turns = self._turns(conversation, kind)
        text = safe_apply_chat_template(self.model_config, self.get_tokenizer(), turns, **self._options(params))
        return conversation, _prompt(text, kind, media, names)

    async def render_messages_async(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        """As `render_messages`."""
        shown, kind = as_videos(messages)
        conversation, media, names = await parse_chat_messages_async(
            shown, self.model_config, "openai", **_loading(params)
        )
        turns = self._turns(conversation, kind)
        text = await self._render_with_timeout(
            self._apply_chat_template_async(self.model_config, self.get_tokenizer(), turns, **self._options(params))
        )
        return conversation, _prompt(text, kind, media, names)

    def _turns(self, conversation: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
        """The conversation with contents that are text."""
        with refused():
            return flat([_of_kind(turn, kind) for turn in conversation], self._processor.places)

    def _options(self, params: Any) -> dict[str, Any]:
        """Of the chat template, by default the processor's."""
        template = params.chat_template or self._processor.chat_template
        return params.get_apply_chat_template_kwargs() | {"chat_template": template, "tokenize": False}

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        media = prompt.get("multi_modal_data") or {}
        kind = next((kind for kind in KINDS if media.get(kind) is not None), None)
        if kind is None:
            return super()._tokenize_prompt(prompt, params)
        with refused():
            ids = self._processor.splice(prompt["prompt"], [self._info.mark(kind)], self._info.place(kind))
        return self._build_tokens_prompt(ids, prompt)


def as_videos(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Any], str]:
    """The messages with sounds said to be videos, and how their clip is shown: `audio` if one was a sound."""
    shown, kind = [], "video"
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [_as_video(part) for part in content]
            kind = "audio" if parts != content else kind
            message = {**message, "content": parts}
        shown.append(message)
    return shown, kind


def _as_video(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    url = part.get("audio_url")
    if sound := part.get("input_audio"):
        url = {"url": f"data:audio/{sound.get('format', '')};base64,{sound.get('data', '')}"}
    if not url:
        return part
    video = {"type": "video_url", "video_url": url}
    return video | ({"uuid": part["uuid"]} if part.get("uuid") else {})


def _of_kind(turn: Mapping[str, Any], kind: str) -> dict[str, Any]:
    content = turn.get("content") or ""
    if isinstance(content, list):
        content = [{**part, "type": kind} if part["type"] == "video" else part for part in content]
    return {**turn, "content": content}


def _loading(params: Any) -> dict[str, Any]:
    return {"media_io_kwargs": params.media_io_kwargs}


def _prompt(text: str, kind: str, media: Any, names: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": text}
    if media is not None:
        prompt["multi_modal_data"] = {kind: media["video"]}
    if names is not None:
        prompt["multi_modal_uuids"] = {kind: names["video"]}
    return prompt
