"""video-SALMONN 2+: Qwen2.5-VL's tower and decoder, and an audio encoder. Parameters have the original's names."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, Qwen2_5_VLTextModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from fastav.cache_argument import as_argument, either_name, in_arguments, of_output
from fastav.errors import MediaError
from fastav.models._checkpoint import StrictLoading, refuse_differences
from fastav.models._merging import ids_of, merged, starts_prompt
from fastav.models._native_modeling import MediaGeneration
from fastav.models._native_modeling import positions as text_positions
from fastav.models.video_salmonn2_plus.configuration import VideoSalmonn2PlusConfig
from fastav.models.video_salmonn2_plus.positions import row_positions
from fastav.models.video_salmonn2_plus.scheme import PIECE_TOKENS
from fastav.models.video_salmonn2_plus.speech import SpeechTower

DELTA = "rope_deltas"  # of a cache: what to add to a later token's place in its row to get its position


class VideoSalmonn2PlusPreTrainedModel(Qwen2_5_VLPreTrainedModel):
    """What both models share: the configuration and the handling of checkpoints."""

    config: VideoSalmonn2PlusConfig
    config_class = VideoSalmonn2PlusConfig
    base_model_prefix = ""
    input_modalities = ("video", "audio", "text")
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock", "WhisperEncoderLayer"]  # noqa: RUF012
    # a table of 0, 1, 2, ... that older versions of BERT saved and queries do not use
    _keys_to_ignore_on_load_unexpected = [r"qformer\.bert\.embeddings\.position_ids$"]  # noqa: RUF012


class VideoSalmonn2PlusModel(StrictLoading, VideoSalmonn2PlusPreTrainedModel):
    """The encoders and the decoder without its head."""

    def __init__(self, config: VideoSalmonn2PlusConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.audio = SpeechTower._from_config(config.audio_config, out_hidden_size=text.hidden_size)
        self.model = Qwen2_5_VLTextModel._from_config(text)
        self._add_head(text)
        self.post_init()

    def _add_head(self, text: Any) -> None:
        """Nothing; the whole model has one."""

    def _complete(self, info: dict[str, Any], source: str) -> None:
        """A model without a head leaves the checkpoint's unread."""
        unknown = [key for key in info["unexpected_keys"] if hasattr(self, "lm_head") or key != "lm_head.weight"]
        refuse_differences({**info, "unexpected_keys": unknown}, source)

    def get_decoder(self) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Qwen2.5-VL's text model."""
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        """Of text."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace those of text."""
        self.model.embed_tokens = value  # pyright: ignore[reportAttributeAccessIssue]

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: Float[Tensor, "patches values"],
        video_grid_thw: Int[Tensor, "videos 3"],
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """What Qwen2.5-VL's tower returns; as `pooler_output` the tokens [tokens, hidden] of each video.

        They go by time, row, column. kwargs: as the tower takes them (`output_hidden_states`, ...).
        """
        pixels, kwargs["return_dict"] = pixel_values_videos.to(self.visual.dtype), True
        seen: Any = self.visual(pixels, grid_thw=video_grid_thw, **kwargs)
        sizes = (video_grid_thw.prod(-1) // self.visual.spatial_merge_size**2).tolist()
        seen.pooler_output = torch.split(seen.pooler_output, sizes)
        return seen

    @can_return_tuple
    def get_audio_features(
        self, input_features: Float[Tensor, "pieces bins rows"], **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """What Whisper's encoder returns; as `pooler_output` the tokens [pieces, tokens, hidden] of each piece of 30 s.

        kwargs: as the encoder takes them (`output_hidden_states`, ...).
        """
        return self.audio(input_features, **kwargs)

    def embed(
        self,
        input_ids: Int[Tensor, "batch prompt"] | None = None,
        pixel_values_videos: Float[Tensor, "patches values"] | None = None,
        video_grid_thw: Int[Tensor, "videos 3"] | None = None,
        input_features: Float[Tensor, "pieces bins rows"] | None = None,
        *,
        inputs_embeds: Float[Tensor, "batch prompt hidden"] | None = None,
        whole: bool = True,
    ) -> Float[Tensor, "batch prompt hidden"]:
        """The decoder's input: text embeddings, with the media's in place of their placeholders, in order.

        inputs_embeds: in place of `input_ids`: the embeddings of placeholders, where no media were merged yet. whole:
        whether the ids are a prompt's, so that each placeholder needs its media.

        Raises: MediaError unless there are as many placeholders as media tokens (see `merged`).
        """
        scheme, encoders = self.config.scheme, cast(Any, self)
        features: dict[int, Tensor | None] = dict.fromkeys(scheme.placeholders)
        if pixel_values_videos is not None:
            if video_grid_thw is None:
                raise MediaError("pixel_values_videos come without their sizes", "pass video_grid_thw")
            seen = encoders.get_video_features(pixel_values_videos, video_grid_thw, return_dict=True)
            features[scheme.video_token_id] = torch.cat(seen.pooler_output)
        if input_features is not None:
            sound = encoders.get_audio_features(input_features, return_dict=True)
            features[scheme.audio_token_id] = sound.pooler_output.flatten(0, 1)
        return merged(self.model.embed_tokens, input_ids, inputs_embeds, features, whole=whole)

    def position_ids(
        self,
        input_ids: Int[Tensor, "batch prompt"],
        attention_mask: Tensor | None = None,
        video_grid_thw: Int[Tensor, "videos 3"] | None = None,
    ) -> Int[Tensor, "3 batch prompt"]:
        """Positions of whole prompts on the axes time, height and width; 0 where the mask hides.

        Raises: MediaError if videos and prompts do not fit, or for `positions="dataset"`, which needs the clips' times.
        """
        scheme = self.config.scheme
        if torch.compiler.is_compiling() and video_grid_thw is None:  # nothing there can look at ids; text goes by one
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            text = text_positions(real, input_ids.shape[1])
            if text is not None:
                return text.expand(3, -1, -1)
        ids = input_ids.cpu().numpy()
        known = attention_mask is not None and attention_mask.ndim == 2
        mask = attention_mask.cpu().numpy() if known else np.ones_like(ids)  # pyright: ignore[reportOptionalMemberAccess]
        sizes = [] if video_grid_thw is None else video_grid_thw.tolist()
        shown = (ids == scheme.video_token_id).any(1)
        if len(sizes) != shown.sum():
            raise MediaError(
                f"{shown.sum()} of the prompts show a video, video_grid_thw has {len(sizes)}",
                "a prompt shows one clip; pass video_grid_thw with the prompts",
            )
        grids = iter([(time, height // scheme.merge, width // scheme.merge) for time, height, width in sizes])
        positions = np.zeros((3, *ids.shape), np.int64)
        for row, real in enumerate(mask.astype(bool)):
            grid = next(grids) if shown[row] else None
            positions[:, row, real] = row_positions(ids[row, real], grid, None, scheme)
        return torch.from_numpy(positions).to(input_ids.device)

    def _ids(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, sizes: Tensor | None) -> Tensor:
        """A prompt's ids, or those of its placeholders' embeddings if it shows a video.

        Raises: MediaError for embeddings that may hold a clip or not.
        """
        if input_ids is not None:
            return input_ids
        if inputs_embeds is None:
            raise MediaError("the model takes input_ids or inputs_embeds, one of them", "pass input_ids")
        if sizes is None:
            raise MediaError(
                "inputs_embeds do not tell where the clip is", "pass position_ids, or input_ids instead of embeddings"
            )
        tokens = self.config.scheme.video_token_id, self.config.scheme.audio_token_id
        return ids_of(self.model.embed_tokens, inputs_embeds, tokens)

    @either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Encode, merge, place, and run Qwen2.5-VL's own decoder.

        input_ids: [batch, prompt], one placeholder id per media token. pixel_values_videos: [patches, values] of all
        videos. video_grid_thw: [videos, 3], patches along time, height and width. input_features: [pieces, bins, rows]
        of all sounds. feature_attention_mask: [pieces, rows], True where a row holds sound; unused, for layouts.
        position_ids: [3, batch, prompt], or [4, ...] with the text's own before them. The processor gives them; without
        them prompts are placed by `script`, and later tokens where the cache's prompt ended.
        """
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None and not past:
            position_ids = self.position_ids(
                self._ids(input_ids, inputs_embeds, video_grid_thw), attention_mask, video_grid_thw
            )
        inputs_embeds = self.embed(
            input_ids,
            pixel_values_videos,
            video_grid_thw,
            input_features,
            inputs_embeds=inputs_embeds,
            whole=starts_prompt(cache, input_ids),
        )
        if position_ids is None:
            position_ids = later_positions(cache, past, inputs_embeds.shape[1], attention_mask)
        refuse_positions(position_ids, inputs_embeds)
        outputs: Any = self.model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            **as_argument(cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        if not past and (filled := of_output(outputs)) is not None:
            setattr(filled, DELTA, deltas(position_ids, attention_mask))
        return outputs


class VideoSalmonn2PlusForConditionalGeneration(MediaGeneration, VideoSalmonn2PlusModel, GenerationMixin):
    """video-SALMONN 2+."""

    media_inputs = ("pixel_values_videos", "video_grid_thw", "input_features", "feature_attention_mask")

    def _add_head(self, text: Any) -> None:
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    @either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [batch, kept, vocab]; arguments as `VideoSalmonn2PlusModel.forward`.

        labels: [batch, prompt], -100 where there is none (media and padding).
        logits_to_keep: the last so many, or those at these indices.
        """
        outputs: Any = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **as_argument(cache),
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            input_features=input_features,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        return self._with_head(outputs, labels, logits_to_keep, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Three axes; transformers appends one to the last of each for every generated token."""
        mixin: Any = super()
        cache = in_arguments(model_kwargs)
        if cache is not None and cache.get_seq_length():
            places = mixin._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
            return (places + cache_deltas(cache, places.shape[0])).expand(3, -1, -1)
        ids = model_kwargs.get("input_ids", inputs_tensor)
        if ids.ndim != 2 or not ids.shape[1]:
            ids = self._ids(None, model_kwargs.get("inputs_embeds"), model_kwargs.get("video_grid_thw"))
        return self.position_ids(ids, model_kwargs.get("attention_mask"), model_kwargs.get("video_grid_thw"))

    def _media_per_row(self, name: str, media: Mapping[str, Tensor], input_ids: Tensor) -> list[int]:
        """How many of the first axis belong to each row."""
        if name in ("input_features", "feature_attention_mask"):
            return ((input_ids == self.config.audio_token_id).sum(1) // PIECE_TOKENS).tolist()
        videos = (input_ids == self.config.video_token_id).any(1).long().tolist()
        if name == "video_grid_thw":
            return videos
        patches = iter(media["video_grid_thw"].prod(1).tolist())
        return [next(patches) if video else 0 for video in videos]


def refuse_positions(position_ids: Tensor, inputs_embeds: Tensor) -> None:
    """Raise MediaError unless positions are [3 or 4, batch, prompt]; whatever joins rows at the first axis is wrong."""
    rows = tuple(inputs_embeds.shape[:2])
    if position_ids.ndim != 3 or position_ids.shape[0] not in (3, 4) or tuple(position_ids.shape[1:]) != rows:
        raise MediaError(
            f"position_ids must be [3, {rows[0]}, {rows[1]}], got {list(position_ids.shape)}",
            "prompts of several calls of the processor do not make one batch: give it all of them at once",
        )


def deltas(position_ids: Tensor, attention_mask: Any) -> Tensor | None:
    """What to add to a later token's place in its row: [batch, 1]; None under masks of a form that hides it."""
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        return None
    last = position_ids[-1] if position_ids.ndim == 3 else position_ids
    real = position_ids.shape[-1] if attention_mask is None else attention_mask.long().sum(1, keepdim=True)
    return last[:, -1:] + 1 - real


def cache_deltas(cache: Any, batch: int) -> Tensor:
    """The deltas that a prefill left with its cache, one per row of a batch that may hold each row several times.

    Raises: MediaError if there are none.
    """
    delta = getattr(cache, DELTA, None)
    if delta is None or batch % delta.shape[0]:
        raise MediaError("the cache does not tell where its prompts ended", "pass position_ids")
    return delta.repeat_interleave(batch // delta.shape[0], dim=0)


def later_positions(cache: Any, past: int, new: int, attention_mask: Any) -> Tensor:
    """Positions [3, batch, new] of tokens after a cached prompt: they go on from its last one, on all axes alike."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        places = (attention_mask.long().cumsum(-1) - 1)[:, -new:]
        return (places + cache_deltas(cache, len(places))).expand(3, -1, -1)
    delta = getattr(cache, DELTA, None)
    delta = cache_deltas(cache, 1 if delta is None else len(delta))
    return (torch.arange(past, past + new, device=delta.device) + delta).expand(3, -1, -1)
