"""What the processors share: rendered conversations, checked media, padded token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from fastav.adapter import Prompt, Request
from fastav.errors import MediaError
from fastav.models._checkpoint import HUB_OPTIONS

QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ClipProcessor(ProcessorMixin):
    """A processor of prompts that show one clip each.

    A family declares `model_config`, its configuration's class, whose `scheme` stands in for absent processor files,
    and `places`: what a message's "video" (with or without its audio) and its "audio" alone become in the text.
    """

    model_config: ClassVar[Any]
    places: ClassVar[Mapping[str, str]]

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers' own; the scheme is the model configuration's where there is no processor file."""
        hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name)}
        found, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "scheme" not in found:
            found["scheme"] = asdict(cls.model_config.from_pretrained(pretrained_model_name_or_path, **hub).scheme)
        return found, rest

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render a conversation (or a list of them); a string unless `tokenize=True`.

        Contents may be strings, or lists of parts of type "video", "audio" and "text": the clip comes first, as
        `places` has it, then the text.
        Raises: MediaError for parts of another type, and for audio without video if the model cannot hear that.
        """
        if conversation and isinstance(conversation[0], Mapping):
            messages: Any = flat(conversation, self.places)
        else:
            messages = [flat(one, self.places) for one in conversation]
        kwargs.setdefault("tokenize", False)
        return self.tokenizer.apply_chat_template(messages, chat_template=chat_template or self.chat_template, **kwargs)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _pad(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Ids and mask [batch, prompt], padded at the left."""
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), 0 if pad is None else pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        return {"input_ids": ids, "attention_mask": mask}


def shown_whole(processor: Any, request: Request) -> Prompt:
    """What vLLM is given for a request about a clip that our own processor decodes there: the clip as it is.

    Raises: MissingTrack.
    """
    video, audio = request.tracks
    return Prompt(
        text=processor.prompt(request.question, video=video, audio=audio),
        media={"video" if video else "audio": request.clip},
        options={"use": str(request.use)} if video else {},
    )


def per_prompt(name: str, value: Any, prompts: int, ndim: int) -> list[Any]:
    """One value per prompt: a lone one (of `ndim` dimensions) or None goes to all, a list must have as many."""
    if value is None or (ndim == 0 and np.ndim(value) == 0):
        return [value] * prompts
    if isinstance(value, np.ndarray) and value.ndim == ndim:
        value = [value]
    if len(value) != prompts:
        raise MediaError(
            f"{name} must have one entry per prompt ({prompts}), got {len(value)}", "None where it has none"
        )
    return list(value)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors joined along their first axis; one alone is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def checked_frames(clip: Any) -> np.ndarray:
    """A video's frames [frames, height, width, 3].  Raises: MediaError if they are none."""
    frames = np.asarray(clip)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise MediaError(
            f"a video must be uint8 frames [frames, height, width, 3], got {frames.dtype} {list(frames.shape)}"
        )
    return frames


def checked_sound(sound: Any) -> np.ndarray:
    """Mono samples [samples].  Raises: MediaError if they are none."""
    samples = np.asarray(sound)
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise MediaError("sound must be mono float samples in [-1, 1]")
    return samples


def flat(conversation: Sequence[Mapping[str, Any]], places: Mapping[str, str]) -> list[dict[str, Any]]:
    """The messages with contents that are strings; `places` as in `ClipProcessor`."""
    return [{**message, "content": _content(message["content"], places)} for message in conversation]


def _content(content: Any, places: Mapping[str, str]) -> str:
    if isinstance(content, str):
        return content
    kinds = [part["type"] for part in content]
    if unknown := set(kinds) - {"video", "audio", "text"}:
        raise MediaError(f"a message part cannot be of type {', '.join(sorted(unknown))}", "use video, audio and text")
    shown = next((kind for kind in ("video", "audio") if kind in kinds), None)
    if shown and shown not in places:
        raise MediaError("this model hears sound only along with a picture", "add the video part")
    place = places[shown] if shown else ""
    return place + "".join(part["text"] for part in content if part["type"] == "text")
