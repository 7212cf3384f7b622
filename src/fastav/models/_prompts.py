"""What the processors share: rendered conversations, checked media, padded token ids."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import _get_template_variables

from fastav.adapter import Request, VllmInputs
from fastav.errors import MediaError
from fastav.models._checkpoint import HUB_OPTIONS
from fastav.models._conversations import flat, request_of

TEMPLATE_ARGUMENTS = frozenset({"tools", "documents", "add_generation_prompt", "continue_final_message"})
CALL_ARGUMENTS = frozenset({"padding", "return_tensors"})
MEDIA_ARGUMENTS = frozenset({"images", "videos", "audio"})

QWEN2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ClipProcessor(ProcessorMixin, ABC):
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

    @abstractmethod
    def read(self, request: Request) -> Mapping[str, Any]:
        """A clip's frames and sound as this family samples them."""

    @abstractmethod
    def media_arguments(self, clips: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
        """Arguments of `__call__` for what `read` gave, one for each prompt, None where it has no clip."""

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        load_audio_from_video: bool | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation (or a list of them), or make the model's inputs of it.

        Contents may be strings, or lists of parts of type "video", "audio" and "text": the clip comes first, as
        `places` has it, then the text. A conversation shows one clip; `request_of` says how its parts name it.
        chat_template: the name of one of the processor's own templates, which read contents as strings; or a template,
        which reads the messages as they are and writes the places itself.
        tokenize: read the clips and give `input_ids`, or all inputs if `return_dict`; otherwise a string.
        load_audio_from_video: whether a video is shown with its sound; None: if it has any, as `fastav.pipeline` does.
        processor_kwargs: further arguments of `__call__`, which may also stand among the others; what is left goes to
        the template.

        Raises: MediaError for parts or arguments that mean nothing here; as `request_of` and `__call__`.
        """
        batched = not (conversation and isinstance(conversation[0], Mapping))
        talks = list(conversation) if batched else [conversation]
        messages = [flat(talk, self.places) for talk in talks]
        template = self._template(chat_template)
        if template not in self._templates.values():
            messages = talks
        given = dict(processor_kwargs or {})
        if tokenize:
            given |= {name: kwargs.pop(name) for name in list(kwargs) if name in CALL_ARGUMENTS | MEDIA_ARGUMENTS}
            _refuse_unknown(kwargs, given, template)
        texts = self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
        if not tokenize:
            return texts if batched else texts[0]
        requests = [request_of(talk, load_audio_from_video) for talk in talks]
        clips = [None if request is None else self.read(request) for request in requests]
        given["return_tensors"] = return_tensors or given.get("return_tensors") or "pt"
        inputs = self(texts, **self.media_arguments(clips), **given)
        return inputs if return_dict else inputs["input_ids"]

    def _template(self, name: str | None) -> str:
        """A template by its name, as it stands, or the default one."""
        known = self._templates
        return known["default"] if name is None else known.get(name, name)

    @property
    def _templates(self) -> Mapping[str, str]:
        """The processor's own templates, by name."""
        held: Any = self.chat_template
        return held if isinstance(held, Mapping) else {"default": held}

    def _refuse_empty_places(self, prompts: Sequence[str], clips: Sequence[Any], sounds: Sequence[Any]) -> None:
        """Raise MediaError if a prompt that comes without a clip has a place for one.

        Such a place begins or ends a line; within a line, the same word is plain text.
        """
        for prompt, clip, sound in zip(prompts, clips, sounds, strict=True):
            missing = () if clip is not None else ("video",) if sound is not None else ("video", "audio")
            for kind in missing:
                mark = self.places[kind].strip() if kind in self.places else ""
                if mark and re.search(f"^{re.escape(mark)}|{re.escape(mark)}$", prompt, re.MULTILINE):
                    raise MediaError(
                        f"the prompt has a place for {kind}, {mark}, but none was given: {prompt!r}",
                        f"give the {kind} with it, or take {mark} out",
                    )

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


def shown_whole(processor: Any, request: Request) -> VllmInputs:
    """What vLLM is given for a request about a clip that our own processor decodes there: the clip as it is.

    Raises: MissingTrack.
    """
    video, audio = request.tracks
    return VllmInputs(
        text=processor.prompt(request.question, video=video, audio=audio),
        media={"video" if video else "audio": request.clip},
        options={"use": str(request.use)} if video else {},
    )


def refuse_call(images: Any, padding: Any, return_tensors: Any) -> None:
    """Raise MediaError for what no processor of ours makes: inputs of images, and rows of other kinds."""
    if images is not None:
        raise MediaError("this processor takes clips, not images", "give an image as a video of one frame")
    if return_tensors != "pt" or padding not in (True, "longest"):
        raise MediaError("this processor makes padded PyTorch tensors only", "leave return_tensors and padding out")


def per_prompt(name: str, value: Any, prompts: int, ndim: int) -> list[Any]:
    """One value per prompt: a lone one (of `ndim` dimensions) or None goes to all, a list must have as many.

    Raises: MediaError for a list of another length, and for paths.
    """
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, str | PathLike):
            raise MediaError(
                f"{name} must be arrays, got the path {os.fspath(one)!r}",
                "name it in a message of apply_chat_template(..., tokenize=True), which reads it",
            )
    if value is None or (ndim == 0 and np.ndim(value) == 0):
        return [value] * prompts
    if isinstance(value, np.ndarray | Tensor) and value.ndim == ndim:
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


def _refuse_unknown(options: Mapping[str, Any], given: Mapping[str, Any], template: str) -> None:
    """Raise MediaError for options that neither the template nor `__call__` knows, instead of dropping them."""
    if media := sorted(MEDIA_ARGUMENTS & set(given)):
        raise MediaError(
            f"apply_chat_template reads media from the messages, got {', '.join(media)} too",
            "name the clip in its part, or render with tokenize=False and call the processor",
        )
    known = TEMPLATE_ARGUMENTS | _get_template_variables(template)
    unknown = {name for name, value in options.items() if name not in known and value not in (None, False)}
    unknown |= set(given) - CALL_ARGUMENTS
    if unknown:
        raise MediaError(
            f"neither this processor nor its template takes {', '.join(sorted(unknown))}",
            "clips are sampled as the model was trained, and prompts are never cut",
        )
