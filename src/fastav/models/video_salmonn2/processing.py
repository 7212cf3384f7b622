"""From prompts, frames and sound to the model's inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple, no_type_check

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fastav.adapter import Request
from fastav.errors import CheckpointError, MediaError
from fastav.models._pixels import pixel_values
from fastav.models._prompts import (
    QWEN2_TEMPLATE,
    ClipProcessor,
    checked_frames,
    checked_sound,
    joined,
    per_prompt,
    refuse_call,
)
from fastav.models.video_salmonn2.audio import log_mel
from fastav.models.video_salmonn2.configuration import VideoSalmonn2Config
from fastav.models.video_salmonn2.reading import read_clip
from fastav.models.video_salmonn2.scheme import RATE, Scheme

VIDEO, AUDIO = "<video>", "<audio>"


class VideoSalmonn2Processor(ClipProcessor):
    """Tokenizer, frames and sound of video-SALMONN 2.

    One prompt shows one clip: its frames, its sound, or both. Of each prompt the first `<video>` (the first `<audio>`
    where there is no video) stands for the clip; later ones are plain text.

    chat_template: by default the one the original hard-wires, whatever the tokenizer's.
    scheme: the fields of `Scheme`; of the release if None. Checkpoints of the original have no processor files, so
    `from_pretrained` then takes it from the model's configuration.
    Raises: CheckpointError if the tokenizer uses the ids of the placeholders.
    """

    model_config = VideoSalmonn2Config
    places: ClassVar[Mapping[str, str]] = {"video": f"{VIDEO}\n\n", "audio": f"{AUDIO}\n\n"}

    @no_type_check  # transformers reads this function's own argument names, which a checking wrapper would hide
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: Any = None,
        scheme: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or QWEN2_TEMPLATE)
        self.scheme = asdict(Scheme(**(scheme or {})))
        free = min(self.media.video_token_id, self.media.audio_token_id, self.media.blank_token_id)
        if len(tokenizer) > free:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} entries, but ids from {free} on must be free for placeholders",
                "is this the model's own tokenizer? else set video_token_id, audio_token_id and blank_token_id in "
                "config.json",
            )

    @property
    def media(self) -> Scheme:
        """How a clip becomes tokens."""
        return Scheme(**self.scheme)

    def read(self, request: Request) -> dict[str, Any]:
        """See `ClipProcessor`."""
        return read_clip(request, self.media)

    def media_arguments(self, clips: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
        """See `ClipProcessor`."""
        names = {"videos": "video", "audio": "audio", "video_seconds": "seconds"}
        return {argument: [clip and clip[name] for clip in clips] for argument, name in names.items()}

    def prompt(self, question: str, *, video: bool, audio: bool = False) -> str:
        """One question about a clip, rendered up to where the model answers."""
        parts = [{"type": "video" if video else "audio"}] if video or audio else []
        content = [*parts, {"type": "text", "text": question}]
        return self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def __call__(
        self,
        text: str | Sequence[str],
        videos: Any = None,
        audio: Any = None,
        *,
        video_seconds: float | int | Sequence[float | int | None] | None = None,
        sampling_rate: int = RATE,
        images: Any = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Inputs of the model's `forward` for a batch of prompts, padded at the left.

        text: rendered prompts. videos: one per prompt (None where it has none), each the sampled uint8 frames
        [frames, height, width, 3]. audio: one per prompt (or None), each mono float samples at 16 kHz in [-1, 1].
        video_seconds: how long each video lasts; sound is cut there. By default one second a frame (at 1 fps).

        Returns `input_ids` and `attention_mask` [batch, prompt], `pixel_values_videos` [frames, 3, S, S],
        `input_features` [pieces, bins, columns], `feature_attention_mask` [pieces, columns] (True where a column holds
        sound), `audio_index` [audio placeholders] and `piece_index` [pieces], which the model's `forward` explains.
        Raises: MediaError if media and prompts do not fit.
        """
        refuse_call(images, padding, return_tensors)
        if sampling_rate != RATE:
            raise MediaError(f"sound must be at {RATE} Hz, got {sampling_rate}", "resample it first")
        prompts = [text] if isinstance(text, str) else list(text)
        clips = [
            None if clip is None else checked_frames(clip) for clip in per_prompt("videos", videos, len(prompts), 4)
        ]
        sounds = [None if one is None else checked_sound(one) for one in per_prompt("audio", audio, len(prompts), 1)]
        times = per_prompt("video_seconds", video_seconds, len(prompts), 0)
        rows = [self._row(*row) for row in zip(prompts, clips, sounds, times, strict=True)]
        self._refuse_empty_places(prompts, clips, sounds)
        data = self._pad([row.ids for row in rows])
        if any(clip is not None for clip in clips):
            size = self.media.image_size
            data["pixel_values_videos"] = joined([pixel_values(clip, size) for clip in clips if clip is not None])
        heard = [row for row in rows if row.mel is not None]
        if heard:
            data |= self._join(heard)
        return BatchFeature(data)

    def _row(
        self, prompt: str, clip: np.ndarray | None, sound: np.ndarray | None, seconds: float | int | None
    ) -> "_Row":
        scheme, mel, columns = self.media, None, None
        frames = 0 if clip is None else len(clip)
        if seconds is None:
            seconds = frames / scheme.video_fps
        if sound is not None:
            mel, columns = log_mel(sound[: round(RATE * (seconds if frames else scheme.max_time))], scheme)
        run, index = self._block(frames, 0 if mel is None else len(mel), seconds)
        return _Row(self.splice(prompt, run, VIDEO if frames else AUDIO), index, mel, columns)

    def _block(self, frames: int, pieces: int, seconds: float | int) -> tuple[list[int], np.ndarray]:
        """What stands for a clip in `input_ids`, and which of its audio tokens each audio placeholder is."""
        scheme = self.media
        tokens = pieces * scheme.piece_tokens
        if not frames:
            return [scheme.audio_token_id] * tokens, np.arange(tokens)
        each, rest = scheme.spread(tokens, frames, seconds)
        tails = [[scheme.audio_token_id] * each.shape[1]] * frames
        if not pieces and scheme.time_tokens:
            tails = self._times(frames, seconds)
        picture = [scheme.video_token_id] * scheme.frame_tokens
        run = [token for tail in tails for token in (*picture, *tail)]
        return run + [scheme.audio_token_id] * len(rest), np.concatenate([each.ravel(), rest])

    def _times(self, frames: int, seconds: float | int) -> list[list[int]]:
        """The second at which each frame's share of the clip ends, as text, padded to the longest."""
        texts = [self._tokens(str(round(seconds / frames * number, 1))) for number in range(1, frames + 1)]
        longest = max(map(len, texts))
        return [text + [self.media.blank_token_id] * (longest - len(text)) for text in texts]

    def splice(self, prompt: str, run: Sequence[int], place: str) -> list[int]:
        """Token ids with a run in its place; what is before it, the newline after it, and the rest are tokenized apart.

        Raises: MediaError if there is a run and no place for it.
        """
        before, found, after = prompt.partition(place) if run else (prompt, "", "")
        if run and not found:
            raise MediaError(f"the prompt has no {place} for its clip: {prompt!r}", "use processor.prompt(question)")
        newline = "\n" if after.startswith("\n") else ""
        rest = after.removeprefix("\n")
        return [*self._tokens(before), *run, *self._tokens(newline), *self._tokens(rest)]

    def _join(self, rows: "list[_Row]") -> dict[str, Tensor]:
        """The sounds of a batch one after another; indices count through all of them."""
        pieces = [len(row.mel) for row in rows]
        starts = np.cumsum([0, *pieces[:-1]]) * self.media.piece_tokens
        return {
            "input_features": torch.cat([row.mel for row in rows]),
            "feature_attention_mask": torch.cat([row.columns for row in rows]),
            "audio_index": torch.cat([torch.from_numpy(row.index + s) for row, s in zip(rows, starts, strict=True)]),
            "piece_index": torch.cat([torch.arange(count) for count in pieces]),
        }


class _Row(NamedTuple):
    """One prompt: its ids, which audio token each audio placeholder is, and its sound, if it has any."""

    ids: list[int]
    index: np.ndarray
    mel: Any
    columns: Any
