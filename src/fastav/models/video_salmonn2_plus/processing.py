"""From prompts, frames and sound to the model's inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, no_type_check

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fastav.errors import CheckpointError, MediaError
from fastav.models.video_salmonn2_plus.audio import spectrograms
from fastav.models.video_salmonn2_plus.configuration import VideoSalmonn2PlusConfig
from fastav.models.video_salmonn2_plus.positions import Grid, row_positions
from fastav.models.video_salmonn2_plus.scheme import RATE, Scheme, audio_per_step, audio_tokens
from fastav.models.video_salmonn2_plus.video import patches, resized
from fastav.models.videollama2.processing import HUB_OPTIONS, QWEN2_TEMPLATE

VIDEO = "<video>"
ANSWER = "<|im_start|>assistant\n"
ANSWER_TOKENS = 3  # what the original keeps of it: all, with the release's tokenizer


class _Video(NamedTuple):
    """A prompt's video: scaled frames, its tokens along time, height and width, and seconds from step to step."""

    frames: np.ndarray
    grid: Grid
    step_seconds: float


class VideoSalmonn2PlusProcessor(ProcessorMixin):
    """Tokenizer, frames and sound of video-SALMONN 2+.

    One prompt shows one clip: its frames, with or without its sound. Of each prompt the first `<video>` stands for the
    clip; a question may hold the same word, later ones are plain text.

    scheme: the fields of `Scheme`; of the release if None. Checkpoints of the original have no settings of the kind, so
    `from_pretrained` then takes it from the model's configuration; `positions=` chooses another than there.
    Raises: CheckpointError if the tokenizer is too small for the ids of the placeholders.
    """

    @no_type_check  # transformers reads this function's own argument names, which a checking wrapper would hide
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: Any = None,
        scheme: Mapping[str, Any] | None = None,
        positions: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or QWEN2_TEMPLATE)
        chosen = {} if positions is None else {"positions": positions}
        self.scheme = asdict(Scheme(**{**(scheme or {}), **chosen}))
        last = max(
            self.media.video_token_id, self.media.vision_end_token_id
        )  # audio's may be missing: no text holds it
        if len(tokenizer) <= last:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} entries, but placeholders go up to {last}",
                "is this the model's own tokenizer?",
            )

    @property
    def media(self) -> Scheme:
        """How a clip becomes tokens."""
        return Scheme(**self.scheme)

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers' own; the scheme is the model configuration's where there is no processor file."""
        hub = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name)}
        found, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "scheme" not in found:
            config = VideoSalmonn2PlusConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            found["scheme"] = asdict(config.scheme)
        return found, rest

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Render a conversation (or a list of them); a string unless `tokenize=True`.

        Contents may be strings, or lists of parts of type "video", "audio" and "text": a video, with or without its
        audio, becomes `<video>` and a newline.
        Raises: MediaError for parts of another type, and for audio without video.
        """
        if conversation and isinstance(conversation[0], Mapping):
            messages: Any = _flat(conversation)
        else:
            messages = [_flat(one) for one in conversation]
        kwargs.setdefault("tokenize", False)
        return self.tokenizer.apply_chat_template(messages, chat_template=chat_template or self.chat_template, **kwargs)

    def prompt(self, question: str, *, video: bool = True) -> str:
        """One question about a clip, rendered up to where the model answers."""
        content = f"{VIDEO}\n{question}" if video else question
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def __call__(
        self,
        text: str | Sequence[str],
        videos: Any = None,
        audio: Any = None,
        *,
        seconds: float | Sequence[float | None] | None = None,
        sampling_rate: int = RATE,
        padding: bool = True,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Inputs of the model's `forward` for a batch of prompts, padded at the left.

        text: rendered prompts. videos: one per prompt (None where it has none), each the sampled uint8 frames
        [frames, height, width, 3], of any size. audio: one per prompt (or None), each mono float samples at 16 kHz in
        [-1, 1]. seconds: how long each video is; by default its frames are taken to be `frame_seconds` apart.

        Returns `input_ids` and `attention_mask` [batch, prompt], `position_ids` [3, batch, prompt],
        `pixel_values_videos` [patches, values], `video_grid_thw` [videos, 3], `input_features` [pieces, bins, rows],
        `feature_attention_mask` [pieces, rows] (True where a row holds sound).
        Raises: MediaError if media and prompts do not fit.
        """
        if return_tensors != "pt" or not padding:
            raise MediaError("this processor makes padded PyTorch tensors only", "leave return_tensors and padding out")
        if sampling_rate != RATE:
            raise MediaError(f"sound must be at {RATE} Hz, got {sampling_rate}", "resample it first")
        prompts = [text] if isinstance(text, str) else list(text)
        lengths = _per_prompt("seconds", seconds, len(prompts), ndim=0)
        clips = [
            None if clip is None else self._video(clip, length)
            for clip, length in zip(_per_prompt("videos", videos, len(prompts), ndim=4), lengths, strict=True)
        ]
        sounds = [
            None if sound is None else _sound(sound) for sound in _per_prompt("audio", audio, len(prompts), ndim=1)
        ]
        rows = [self._ids(*one) for one in zip(prompts, clips, sounds, strict=True)]
        data = self._pad(rows, clips)
        if shown := [clip for clip in clips if clip is not None]:
            data["pixel_values_videos"] = torch.cat([patches(clip.frames, self.media) for clip in shown])
            merge = self.media.merge
            data["video_grid_thw"] = torch.tensor([[t, h * merge, w * merge] for t, h, w in (c.grid for c in shown)])
        if heard := [spectrograms(sound, self.media.mel_bins) for sound in sounds if sound is not None]:
            data["input_features"] = torch.cat([features for features, _ in heard])
            data["feature_attention_mask"] = torch.cat([mask for _, mask in heard])
        return BatchFeature(data)

    def _video(self, clip: Any, seconds: float | None) -> _Video:
        frames = np.asarray(clip)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise MediaError(
                f"a video must be uint8 frames [frames, height, width, 3], got {frames.dtype} {list(frames.shape)}"
            )
        scheme, (count, height, width, _) = self.media, frames.shape
        lasting = float(count * scheme.frame_seconds if seconds is None else seconds)
        if not lasting > 0:
            raise MediaError(f"a video must last more than 0 seconds, got {lasting}")
        size = scheme.size(count, height, width)
        return _Video(resized(frames, size), scheme.grid(count, *size), scheme.step_seconds(count, lasting))

    def _ids(self, prompt: str, clip: _Video | None, sound: np.ndarray | None) -> list[int]:
        """Token ids with the media's placeholders; each side of the clip is tokenized by itself."""
        if clip is None:
            if sound is not None:
                raise MediaError("this model hears sound only along with a picture", "give a video with the sound")
            return self._tokens(prompt)
        before, found, after = prompt.partition(VIDEO)
        if not found:
            raise MediaError(f"the prompt has no {VIDEO} for its clip: {prompt!r}", "use processor.prompt(question)")
        scheme, (steps, height, width) = self.media, clip.grid
        tokens = 0 if sound is None else audio_tokens(len(sound))
        run = [scheme.vision_start_token_id]
        for count in audio_per_step(steps, clip.step_seconds, tokens):
            run += [scheme.video_token_id] * (height * width) + [scheme.audio_token_id] * count
        return [*self._tokens(before), *run, scheme.vision_end_token_id, *self._tokens(after)]

    def _tokens(self, text: str) -> list[int]:
        asked = text.removesuffix(ANSWER)
        ids = self.tokenizer(asked, add_special_tokens=False)["input_ids"] if asked else []
        if asked != text:
            ids = ids + self.tokenizer(ANSWER, add_special_tokens=False)["input_ids"][:ANSWER_TOKENS]
        if reserved := set(ids) & set(self.media.placeholders):
            words = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(reserved)))
            raise MediaError(f"the text holds {words}, which stands for media", "write it differently")
        return ids

    def _pad(self, rows: list[list[int]], clips: list[_Video | None]) -> dict[str, Tensor]:
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), 0 if pad is None else pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        positions = torch.zeros(3, len(rows), width, dtype=torch.long)
        for row, (tokens, clip) in enumerate(zip(rows, clips, strict=True)):
            grid, step = (None, None) if clip is None else (clip.grid, clip.step_seconds)
            start = width - len(tokens)
            ids[row, start:] = torch.tensor(tokens)
            mask[row, start:] = 1
            positions[:, row, start:] = torch.from_numpy(row_positions(np.array(tokens), grid, step, self.media))
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _sound(sound: Any) -> np.ndarray:
    samples = np.asarray(sound)
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise MediaError("sound must be mono float samples in [-1, 1]")
    return samples


def _per_prompt(name: str, value: Any, prompts: int, ndim: int) -> list[Any]:
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


def _flat(conversation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "content": _content(message["content"])} for message in conversation]


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    kinds = [part["type"] for part in content]
    if unknown := set(kinds) - {"video", "audio", "text"}:
        raise MediaError(f"a message part cannot be of type {', '.join(sorted(unknown))}", "use video, audio and text")
    if "audio" in kinds and "video" not in kinds:
        raise MediaError("this model hears sound only along with a picture", "add the video part")
    place = f"{VIDEO}\n" if "video" in kinds else ""
    return place + "".join(part["text"] for part in content if part["type"] == "text")
