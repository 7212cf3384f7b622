"""What our own processors share: rendered conversations, checked media, padded token ids."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any, ClassVar, NamedTuple, no_type_check

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _get_template_variables

from fastav.adapter import Transcript, VllmInputs
from fastav.errors import CheckpointError, FastAVError, MediaError
from fastav.messages import Kind, Media
from fastav.models._checkpoint import HUB_OPTIONS
from fastav.models._conversations import flat, media_of, only_clip
from fastav.request import Request

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

    chat_template: by default the one that the original hard-wires.
    scheme: the fields of the family's `Scheme`; of the release if None. Checkpoints of the original have no processor
    files, so `from_pretrained` then takes it from the model's configuration.
    Raises: CheckpointError if the ids of placeholders do not fit the tokenizer.

    A family declares `model_config`, its configuration's class; `scheme_class`; `places`, what a message's "video"
    (with or without its audio) and its "audio" alone become in the text; `clip_arguments`, the arguments of `__call__`
    and what they are called in what `read` gives; and `own_template`, whether a tokenizer's template is used.
    """

    model_config: ClassVar[Any]
    scheme_class: ClassVar[Any]
    places: ClassVar[Mapping[str, str]]
    clip_arguments: ClassVar[Mapping[str, str]]
    own_template: ClassVar[bool] = False

    @no_type_check  # transformers reads this function's own argument names, which a checking wrapper would hide
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: Any = None,
        scheme: Mapping[str, Any] | None = None,
    ) -> None:
        own = tokenizer.chat_template if self.own_template else None
        super().__init__(tokenizer, chat_template=chat_template or own or QWEN2_TEMPLATE)
        self.scheme = asdict(self.scheme_class(**(scheme or {})))
        self._require_ids(len(tokenizer))

    def _require_ids(self, entries: int) -> None:
        """Raise CheckpointError if a tokenizer with so many entries uses the ids of placeholders."""
        names = sorted(self.model_config.placeholder_names)
        free = min(self.scheme[name] for name in names)
        if entries > free:
            raise CheckpointError(
                f"the tokenizer has {entries} entries, but ids from {free} on must be free for placeholders",
                f"is this the model's own tokenizer? else set {', '.join(names)} in config.json",
            )

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers' own; the scheme is the model configuration's where there is no processor file."""
        hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name)}
        written, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "scheme" not in written:
            written["scheme"] = asdict(cls.model_config.from_pretrained(pretrained_model_name_or_path, **hub).scheme)
        return written, rest

    @property
    def media(self) -> Any:
        """How a clip becomes tokens."""
        return self.scheme_class(**self.scheme)

    @abstractmethod
    def read(self, media: Media) -> Mapping[str, Any]:
        """A clip's frames and sound as this family samples them, "video" and "audio"; None where it has none."""

    def media_arguments(self, clips: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
        """Arguments of `__call__` for what `read` gave, one for each prompt, None where it has no clip."""
        return {argument: [clip and clip[name] for clip in clips] for argument, name in self.clip_arguments.items()}

    def render(self, request: Request) -> str:
        """The conversation of a request, rendered up to where the model answers.  Raises: as `transcript`."""
        return self.transcript(request, Transcript())[1]

    def transcript(self, request: Request, earlier: Transcript) -> tuple[Transcript, str]:
        """A conversation with new messages, and the text that they add, up to where the model answers.

        Raises: MediaError for several clips, images, and texts that hold the words of a clip's place; FastAVError for
        tools if the template takes none.
        """
        tools = request.tools or earlier.tools
        if tools and "tools" not in self._template(None):
            raise FastAVError("this model's chat template takes no tools", "describe them in a message")
        media = only_clip(request)
        if media is not None and any(isinstance(message["content"], list) for message in earlier.messages):
            raise MediaError(
                f"{media.name}: this model takes one clip per conversation, and an earlier message has shown one",
                "start a new chat about this clip",
            )
        shown = request.media[:1]  # where the clip stands; a sound of its own beside it has no place
        parts = [{"type": "audio" if media is not None and media.kind is Kind.AUDIO else "video"}]
        new = [message.to_dict(lambda one: parts if one in shown else []) for message in request.messages]
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}

        def render(messages: Sequence[Mapping[str, Any]]) -> str:
            return self.apply_chat_template(list(messages), add_generation_prompt=True, **options)

        return replace(earlier, tools=tools).continued(new, render)

    def prompt(self, question: str, *, video: bool | None = None, audio: bool = False) -> str:
        """One question about a clip, rendered up to where the model answers.

        video, audio: what the clip shows; None for video unless it is audio alone.
        """
        video = not audio if video is None else video
        parts = [{"type": "video" if video else "audio"}] if video or audio else []
        content = [*parts, {"type": "text", "text": question}]
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

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
        `places` has it, then the text. A conversation shows one clip; `media_of` says how its parts name it.
        chat_template: the name of one of the processor's own templates, which read contents as strings; or a template,
        which reads the messages as they are and writes the places itself.
        tokenize: read the clips and give `input_ids`, or all inputs if `return_dict`; otherwise a string.
        load_audio_from_video: whether a video is shown with its sound; None: if it has any, as `fastav.pipeline` does.
        processor_kwargs: further arguments of `__call__`, which may also stand among the others; what is left goes to
        the template.

        Raises: MediaError for parts or arguments that mean nothing here; as `media_of` and `__call__`.
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
        shown = [media_of(talk, load_audio_from_video) for talk in talks]
        clips = [None if media is None else self.read(media) for media in shown]
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

    def splice(self, prompt: str, run: Sequence[int], place: str) -> list[int]:
        """Token ids with a run in its place; each side of it is tokenized by itself.

        Raises: MediaError if there is a run and no place for it.
        """
        before, mark, after = prompt.partition(place) if run else (prompt, "", "")
        if run and not mark:
            raise MediaError(f"the prompt has no {place} for its clip: {prompt!r}", "use processor.prompt(question)")
        return [*self._tokens(before), *run, *self._tokens_after(after)]

    def _tokens_after(self, text: str) -> list[int]:
        """The ids of the text after a clip."""
        return self._tokens(text)

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
    """A request as vLLM takes it: the clip as it is, which our own processor decodes there.

    Raises: MissingTrack; as `ClipProcessor.render`.
    """
    text, media = processor.render(request), only_clip(request)
    if media is None:
        return VllmInputs(text=text, media={}, options={})
    video, _ = media.tracks
    return VllmInputs(
        text=text,
        media={"video" if video else "audio": media.clip},
        options={"use": str(media.use)} if video else {},
    )


class Batch(NamedTuple):
    """The prompts of a call, and the video and the sound of each, None where it has none."""

    prompts: list[str]
    videos: list[Any]
    sounds: list[Any]


def batch_of(text: Any, videos: Any, audio: Any, images: Any, padding: Any, return_tensors: Any) -> Batch:
    """The prompts and media of a call of a processor.

    Raises: MediaError for images, for rows that are not padded tensors, and as `per_prompt`.
    """
    if images is not None:
        raise MediaError("this processor takes clips, not images", "give an image as a video of one frame")
    if return_tensors != "pt" or padding not in (True, "longest"):
        raise MediaError("this processor makes padded PyTorch tensors only", "leave return_tensors and padding out")
    prompts = [text] if isinstance(text, str) else list(text)
    sounds = per_prompt("audio", audio, len(prompts), ndim=1)
    return Batch(prompts, per_prompt("videos", videos, len(prompts), ndim=4), sounds)


def require_rate(given: int, rate: int, what: str = "sound") -> None:
    """Raise MediaError if samples are given at another rate."""
    if given != rate:
        raise MediaError(f"{what} must be at {rate} Hz, got {given}", "resample it first")


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
    """A video's frames [frames, height, width, 3].  Raises: MediaError for anything else."""
    frames = np.asarray(clip)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise MediaError(
            f"a video must be uint8 frames [frames, height, width, 3], got {frames.dtype} {list(frames.shape)}"
        )
    return frames


def checked_sound(sound: Any) -> np.ndarray:
    """Mono samples [samples].  Raises: MediaError for anything else."""
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
