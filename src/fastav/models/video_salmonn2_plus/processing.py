"""From prompts, frames and sound to the model's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, no_type_check

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fastav.errors import CheckpointError, MediaError
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
from fastav.models._pixels import resize
from fastav.models._whisper import RATE, spectrograms
from fastav.models.video_salmonn2_plus.configuration import VideoSalmonn2PlusConfig
from fastav.models.video_salmonn2_plus.positions import Grid, row_positions
from fastav.models.video_salmonn2_plus.reading import read_clip
from fastav.models.video_salmonn2_plus.scheme import Scheme, audio_per_step, audio_tokens
from fastav.models.video_salmonn2_plus.video import patches

VIDEO = "<video>"
ANSWER = "<|im_start|>assistant\n"
ANSWER_TOKENS = 3  # what the original keeps of it: all, with the release's tokenizer


class _Video(NamedTuple):
    """A prompt's video: scaled frames, its tokens along time, height and width, and seconds from step to step."""

    frames: np.ndarray
    grid: Grid
    step_seconds: float


class VideoSalmonn2PlusProcessor(ClipProcessor):
    """Tokenizer, frames and sound of video-SALMONN 2+.

    One prompt shows one clip: its frames, with or without its sound. Of each prompt the first `<video>` stands for the
    clip; a question may hold the same word, later ones are plain text.

    positions: the scheme's `positions`, if it is to be another than there.
    """

    model_config = VideoSalmonn2PlusConfig
    scheme_class = Scheme
    places: ClassVar[Mapping[str, str]] = {"video": f"{VIDEO}\n"}
    clip_arguments: ClassVar[Mapping[str, str]] = {"videos": "video", "audio": "audio", "seconds": "seconds"}

    @no_type_check  # transformers reads this function's own argument names, which a checking wrapper would hide
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: Any = None,
        scheme: Mapping[str, Any] | None = None,
        positions: str | None = None,
    ) -> None:
        chosen = {} if positions is None else {"positions": positions}
        super().__init__(tokenizer, chat_template, {**(scheme or {}), **chosen})

    def _require_ids(self, entries: int) -> None:
        """Raise CheckpointError if a tokenizer is too small for the ids of placeholders that its text may hold."""
        last = max(self.media.video_token_id, self.media.vision_end_token_id)  # no text holds audio's
        if entries <= last:
            raise CheckpointError(
                f"the tokenizer has {entries} entries, but placeholders go up to {last}",
                "is this the model's own tokenizer?",
            )

    def read(self, media: Media) -> dict[str, Any]:
        """See `ClipProcessor`."""
        return read_clip(media, self.media)

    def __call__(
        self,
        text: str | Sequence[str],
        videos: Any = None,
        audio: Any = None,
        *,
        seconds: float | Sequence[float | None] | None = None,
        sampling_rate: int = RATE,
        images: Any = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
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
        prompts, videos, sounds = batch_of(text, videos, audio, images, padding, return_tensors)
        require_rate(sampling_rate, RATE)
        lengths = per_prompt("seconds", seconds, len(prompts), ndim=0)
        clips = [
            None if clip is None else self._video(clip, length) for clip, length in zip(videos, lengths, strict=True)
        ]
        sounds = [None if sound is None else checked_sound(sound) for sound in sounds]
        rows = [self._ids(*one) for one in zip(prompts, clips, sounds, strict=True)]
        self._refuse_empty_places(prompts, clips, sounds)
        data = self._pad(rows)
        data["position_ids"] = self._positions(rows, clips, data["input_ids"].shape[1])
        if shown := [clip for clip in clips if clip is not None]:
            data["pixel_values_videos"] = joined([patches(clip.frames, self.media) for clip in shown])
            merge = self.media.merge
            data["video_grid_thw"] = torch.tensor([[t, h * merge, w * merge] for t, h, w in (c.grid for c in shown)])
        if features := [spectrograms(sound, self.media.mel_bins) for sound in sounds if sound is not None]:
            mels, masks = zip(*features, strict=True)
            data["input_features"], data["feature_attention_mask"] = torch.cat(mels), torch.cat(masks)
        return BatchFeature(data)

    def _video(self, clip: Any, seconds: float | None) -> _Video:
        frames = checked_frames(clip)
        scheme, (count, height, width, _) = self.media, frames.shape
        lasting = float(count * scheme.frame_seconds if seconds is None else seconds)
        if not lasting > 0:
            raise MediaError(f"a video must last more than 0 seconds, got {lasting}")
        size = scheme.size(count, height, width)
        return _Video(resize(frames, size), scheme.grid(count, *size), scheme.step_seconds(count, lasting))

    def _ids(self, prompt: str, clip: _Video | None, sound: np.ndarray | None) -> list[int]:
        """Token ids with the media's placeholders; each side of the clip is tokenized by itself."""
        if clip is None:
            if sound is not None:
                raise MediaError("this model takes sound only along with a picture", "give a video with the sound")
            return self._tokens(prompt)
        scheme, (steps, height, width) = self.media, clip.grid
        tokens = 0 if sound is None else audio_tokens(len(sound))
        run = [scheme.vision_start_token_id]
        for count in audio_per_step(steps, clip.step_seconds, tokens):
            run += [scheme.video_token_id] * (height * width) + [scheme.audio_token_id] * count
        return self.splice(prompt, [*run, scheme.vision_end_token_id], VIDEO)

    def _tokens(self, text: str) -> list[int]:
        before = text.removesuffix(ANSWER)
        ids = super()._tokens(before)
        if before != text:
            ids = ids + super()._tokens(ANSWER)[:ANSWER_TOKENS]
        if reserved := set(ids) & set(self.media.placeholders):
            words = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(reserved)))
            raise MediaError(f"the text holds {words}, which stands for media", "write it differently")
        return ids

    def _positions(self, rows: list[list[int]], clips: list[_Video | None], width: int) -> Tensor:
        """Positions [3, batch, width], 0 in the padding at the left."""
        positions = torch.zeros(3, len(rows), width, dtype=torch.long)
        for row, (tokens, clip) in enumerate(zip(rows, clips, strict=True)):
            grid, step = (None, None) if clip is None else (clip.grid, clip.step_seconds)
            places = row_positions(np.array(tokens), grid, step, self.media)
            positions[:, row, width - len(tokens) :] = torch.from_numpy(places)
        return positions
