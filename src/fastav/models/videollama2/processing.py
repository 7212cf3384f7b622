"""From prompts, frames and sound to the model's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature

from fastav.errors import MediaError
from fastav.messages import Media
from fastav.models._native_processing import (
    ClipProcessor,
    batch_of,
    checked_frames,
    checked_sound,
    per_prompt,
    require_rate,
)
from fastav.models.videollama2.audio import file_features, soundtrack_features
from fastav.models.videollama2.configuration import VideoLlama2Config
from fastav.models.videollama2.reading import read_clip
from fastav.models.videollama2.scheme import RATE, Scheme
from fastav.models.videollama2.video import pixel_values

VIDEO, AUDIO = "<video>", "<audio>"


class VideoLlama2Processor(ClipProcessor):
    """Tokenizer, frames and sound of VideoLLaMA2.1-7B-AV.

    One prompt shows one clip: its frames, its soundtrack, both, or a sound file. Of each prompt the first `<video>`
    (the first `<audio>` where there is no video) stands for the clip, video before soundtrack
    unless the scheme interleaves them. A question may hold the
    same words: later ones are plain text.
    """

    model_config = VideoLlama2Config
    scheme_class = Scheme
    places: ClassVar[Mapping[str, str]] = {"video": f"{VIDEO}\n", "audio": f"{AUDIO}\n"}
    clip_arguments: ClassVar[Mapping[str, str]] = {"videos": "video", "audio": "audio", "sampling_rate": "rate"}
    own_template = True

    def read(self, media: Media) -> dict[str, Any]:
        """See `ClipProcessor`."""
        return read_clip(media, self.media)

    def __call__(
        self,
        text: str | Sequence[str],
        videos: Any = None,
        audio: Any = None,
        *,
        audio_from_video: bool | Sequence[bool] | None = None,
        sampling_rate: int | Sequence[int | None] = RATE,
        images: Any = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Inputs of the model's `forward` for a batch of prompts, padded at the left.

        text: rendered prompts. videos: one per prompt (None where it has none), each the sampled uint8 frames
        [frames, height, width, 3]. audio: one per prompt (or None), each mono float samples in [-1, 1] (or, of a
        soundtrack, the list of its pieces already cut at `clip_bounds`).
        audio_from_video: cut the sound as a video's soundtrack (at 16 kHz); False: as a sound file of `sampling_rate`.
        By default a soundtrack where the prompt has a video.

        Returns `input_ids` and `attention_mask` [batch, prompt], `pixel_values_videos` [videos, frames, 3, S, S],
        `input_features` [audios, rows, bins], `feature_attention_mask` [audios, rows] (True where a row holds sound).
        Raises: MediaError if media and prompts do not fit.
        """
        prompts, clips, sounds = batch_of(text, videos, audio, images, padding, return_tensors)
        schemes = per_prompt("audio_from_video", audio_from_video, len(prompts), ndim=0)
        rates = per_prompt("sampling_rate", sampling_rate, len(prompts), ndim=0)
        pixels = [self._pixels(clip) for clip in clips if clip is not None]
        features = [
            self._sound(sound, clip is not None if scheme is None else scheme, rate)
            for sound, clip, scheme, rate in zip(sounds, clips, schemes, rates, strict=True)
            if sound is not None
        ]
        rows = [
            self.splice(prompt, self._run(clip, sound is not None), AUDIO if clip is None else VIDEO)
            for prompt, clip, sound in zip(prompts, clips, sounds, strict=True)
        ]
        self._refuse_empty_places(prompts, clips, sounds)
        data = self._pad(rows)
        if pixels:
            if len({len(frames) for frames in pixels}) > 1:
                raise MediaError("the videos of a batch must have as many frames each", "sample `num_frames` of each")
            data["pixel_values_videos"] = torch.stack(pixels)
        if features:
            banks, masks = zip(*features, strict=True)
            data["input_features"], data["feature_attention_mask"] = torch.stack(banks), torch.stack(masks)
        return BatchFeature(data)

    def _pixels(self, clip: Any) -> Tensor:
        return pixel_values(checked_frames(clip), self.media.image_size, self.media.num_frames, self.media.most_frames)

    def _sound(self, sound: Any, soundtrack: bool, rate: int) -> tuple[Tensor, Tensor]:
        pieces = sound if isinstance(sound, list | tuple) and sound and np.ndim(sound[0]) else [sound]
        arrays = [checked_sound(piece) for piece in pieces]
        if not soundtrack:
            return file_features(np.concatenate(arrays), rate, self.media)
        require_rate(rate, RATE, "a soundtrack")
        return soundtrack_features(arrays[0] if pieces is not sound else arrays, self.media)

    def _run(self, clip: Any, sound: bool) -> list[int]:
        """What stands for a clip in `input_ids`."""
        frames = 0 if clip is None else max(len(checked_frames(clip)), self.media.num_frames)
        video, audio = self.media.video_tokens(min(frames, self.media.most_frames)), self.media.audio_tokens * sound
        run = np.repeat([self.media.video_token_id, self.media.audio_token_id], [video, audio])
        return run[self.media.order(video, audio)].tolist()
