"""From prompts, frames and sound to the model's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature

from fastav.messages import Media
from fastav.models._native_processing import (
    ClipProcessor,
    batch_of,
    checked_frames,
    checked_sound,
    joined,
    per_prompt,
    require_rate,
)
from fastav.models._pixels import pixel_values
from fastav.models._whisper import RATE, spectrograms
from fastav.models.video_salmonn2.configuration import VideoSalmonn2Config
from fastav.models.video_salmonn2.reading import read_clip
from fastav.models.video_salmonn2.scheme import Scheme

VIDEO, AUDIO = "<video>", "<audio>"


class VideoSalmonn2Processor(ClipProcessor):
    """Tokenizer, frames and sound of video-SALMONN 2.

    One prompt shows one clip: its frames, its sound, or both. Of each prompt the first `<video>` (the first `<audio>`
    where there is no video) stands for the clip; later ones are plain text.
    """

    model_config = VideoSalmonn2Config
    scheme_class = Scheme
    places: ClassVar[Mapping[str, str]] = {"video": f"{VIDEO}\n\n", "audio": f"{AUDIO}\n\n"}
    clip_arguments: ClassVar[Mapping[str, str]] = {"videos": "video", "audio": "audio", "video_seconds": "seconds"}

    def read(self, media: Media) -> dict[str, Any]:
        """See `ClipProcessor`."""
        return read_clip(media, self.media)

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
        prompts, videos, sounds = batch_of(text, videos, audio, images, padding, return_tensors)
        require_rate(sampling_rate, RATE)
        clips = [None if clip is None else checked_frames(clip) for clip in videos]
        sounds = [None if sound is None else checked_sound(sound) for sound in sounds]
        times = per_prompt("video_seconds", video_seconds, len(prompts), 0)
        rows = [self._row(*row) for row in zip(prompts, clips, sounds, times, strict=True)]
        self._refuse_empty_places(prompts, clips, sounds)
        data = self._pad([row.ids for row in rows])
        if any(clip is not None for clip in clips):
            size = self.media.image_size
            data["pixel_values_videos"] = joined([pixel_values(clip, size) for clip in clips if clip is not None])
        if with_sound := [row for row in rows if row.mel is not None]:
            data |= self._join(with_sound)
        return BatchFeature(data)

    def _row(
        self, prompt: str, clip: np.ndarray | None, sound: np.ndarray | None, seconds: float | int | None
    ) -> "_Row":
        scheme, mel, columns = self.media, None, None
        frames = 0 if clip is None else len(clip)
        length: float | int = frames / scheme.video_fps if seconds is None else seconds
        if sound is not None:
            sound = sound[: round(RATE * (length if frames else scheme.max_time))]
            mel, columns = spectrograms(sound, scheme.mel_bins)
        run, index = self._block(frames, 0 if mel is None else len(mel), length)
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

    def _tokens_after(self, text: str) -> list[int]:
        """The newline after a clip is tokenized apart from the rest."""
        newline = "\n" if text.startswith("\n") else ""
        return [*self._tokens(newline), *self._tokens(text.removeprefix("\n"))]

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
