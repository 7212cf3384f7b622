"""Our video-SALMONN 2+ against arrays that the original computed, stage by stage, on a tiny checkpoint.

The checkpoint (random weights) and its arrays lie in the folder that `FASTAV_REFERENCE_VIDEO_SALMONN2_PLUS` names, by
default the copy in this repository. Any folder of that form must pass: other dimensions, frames, lengths or weights.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastav.media import Clip
from fastav.models.video_salmonn2_plus import (
    VideoSalmonn2PlusAdapter,
    VideoSalmonn2PlusForConditionalGeneration,
    VideoSalmonn2PlusProcessor,
    patches,
    sample_frames,
    spectrograms,
)
from fastav.request import Request, Use
from support.native import arrays, assert_close, assert_same_samples, assert_same_spectrograms, attention
from support.ties import assert_ids_where_decided

DEFAULT = Path(__file__).parents[1] / "reference" / "video_salmonn2_plus"
FOLDER = Path(os.environ.get("FASTAV_REFERENCE_VIDEO_SALMONN2_PLUS") or DEFAULT)
TOLERANCE = 1e-4
CASES = ("av", "video")
USE = {"av": Use.BOTH, "video": Use.VIDEO}
RULES = {  # our name of a position rule -> the bundle's names of its positions, logits and ids
    "script": ("position_ids_inference_script", "logits_inference_script", "greedy_ids_inference_script"),
    "dataset": ("position_ids_dataset", "logits_dataset_positions", "greedy_ids_dataset_positions"),
}
both_cases = pytest.mark.parametrize("case", CASES)
both_rules = pytest.mark.parametrize("rule", RULES)


@dataclass(frozen=True)
class Reference:
    """The tiny checkpoint, loaded, and the original's arrays."""

    model: VideoSalmonn2PlusForConditionalGeneration
    processor: VideoSalmonn2PlusProcessor
    golden: Mapping[str, Mapping[str, np.ndarray]]

    def by(self, rule: str, **changes: Any) -> VideoSalmonn2PlusProcessor:
        """The processor with another position rule."""
        return VideoSalmonn2PlusProcessor(
            self.processor.tokenizer, scheme=self.processor.scheme | {"positions": rule} | changes
        )

    def question(self, case: str) -> str:
        """What the user asked, decoded from the original's ids."""
        ids, end = self.golden[case]["input_ids"], self.processor.media.vision_end_token_id
        after = self.processor.tokenizer.decode(ids[int(np.flatnonzero(ids == end)[-1]) + 1 :])
        return after.removeprefix("\n").split("<|im_end|>")[0]

    def seconds(self, case: str) -> float:
        """How long the video is, from the time between two steps and the number of frames."""
        frames = len(self.golden[case]["frames_uint8"])
        return float(self.golden[case]["second_per_grid_ts"][0]) * frames / self.processor.media.temporal

    def processed(self, case: str, rule: str = "script") -> dict[str, Any]:
        """Our inputs from the original's decoded frames and samples."""
        golden, processor = self.golden[case], self.by(rule)
        return dict(
            processor(
                processor.prompt(self.question(case)),
                videos=[golden["frames_uint8"]],
                audio=[golden["waveform_float32"]] if case == "av" else None,
                seconds=self.seconds(case),
            )
        )

    def inputs(self, case: str, rule: str = "script") -> dict[str, Any]:
        """Our token ids, and the original's own pixels, sound and positions."""
        golden, inputs = self.golden[case], self.processed(case)
        inputs["pixel_values_videos"] = torch.from_numpy(golden["pixel_values_videos"])
        inputs["video_grid_thw"] = torch.from_numpy(golden["video_grid_thw"])
        inputs["position_ids"] = torch.from_numpy(golden[RULES[rule][0]])[:, None]
        if case == "av":
            inputs["input_features"] = torch.from_numpy(golden["mel"])
        return inputs


@pytest.fixture(scope="module")
def reference() -> Reference:
    model, processor = VideoSalmonn2PlusAdapter().load(str(FOLDER), dtype=torch.float32)
    return Reference(
        model=model,
        processor=processor,
        golden={case: arrays(FOLDER / f"golden_{case}.npz") for case in CASES},
    )


@pytest.fixture(params=["sdpa", "eager"])
def model(reference: Reference, request: pytest.FixtureRequest) -> Any:
    with attention(reference.model, request.param) as model:
        yield model


@both_cases
def test_frames_are_sampled_as_by_the_original(reference: Reference, case: str) -> None:
    wanted = reference.golden[case]["frame_idx"].tolist()
    frames = Clip.open(FOLDER / "clip.mp4").require_video().frames
    assert sample_frames(frames, len(wanted)).tolist() == wanted


@both_cases
def test_patches_are_the_originals(reference: Reference, case: str) -> None:
    golden = reference.golden[case]
    assert_close(patches(golden["frames_uint8"], reference.processor.media), golden["pixel_values_videos"], 1e-6)
    inputs = reference.processed(case)
    assert_close(inputs["pixel_values_videos"], golden["pixel_values_videos"], 1e-6)
    assert inputs["video_grid_thw"].tolist() == golden["video_grid_thw"].tolist()


def test_spectrograms_are_the_originals(reference: Reference) -> None:
    golden = reference.golden["av"]
    sound, bins = golden["waveform_float32"], reference.processor.media.mel_bins
    ours, is_sound = spectrograms(sound, bins)
    assert_same_spectrograms(ours, golden["mel"], sound, is_sound, bins)


@both_cases
def test_prompt_is_the_originals(reference: Reference, case: str) -> None:
    assert reference.processed(case)["input_ids"][0].tolist() == reference.golden[case]["input_ids"].tolist()


@both_rules
@both_cases
def test_positions_are_the_originals(reference: Reference, case: str, rule: str) -> None:
    wanted = reference.golden[case][RULES[rule][0]].tolist()
    inputs = reference.processed(case, rule)
    assert inputs["position_ids"][:, 0].tolist() == wanted
    if rule == "script":  # what the model falls back to without any
        ours = reference.model.position_ids(inputs["input_ids"], None, inputs["video_grid_thw"])
        assert ours[:, 0].tolist() == wanted


@both_cases
def test_first_generated_token_stands_where_the_original_puts_it(reference: Reference, case: str) -> None:
    golden = reference.golden[case]
    after = golden["position_ids_inference_script"][:, -1] + 1
    assert after.tolist() == golden["first_decode_position_inference_script"].tolist()


@both_cases
def test_vision_tower_gives_the_originals_tokens(reference: Reference, model: Any, case: str) -> None:
    inputs = reference.inputs(case)
    with torch.no_grad():
        ours = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    assert_close(torch.cat(ours.pooler_output), reference.golden[case]["vision_out"], TOLERANCE)


def test_whisper_gives_the_originals_features(reference: Reference, model: Any) -> None:
    with torch.no_grad():
        ours = model.audio(reference.inputs("av")["input_features"])
    assert_close(ours.last_hidden_state, reference.golden["av"]["speech_encoder_out"], TOLERANCE)


def test_qformer_gives_the_originals_features(reference: Reference) -> None:
    golden = reference.golden["av"]
    with torch.no_grad():
        assert_close(
            reference.model.audio.summarize(torch.from_numpy(golden["speech_encoder_out"])),
            golden["qformer_out"],
            TOLERANCE,
        )


def test_audio_encoder_gives_the_originals_tokens(reference: Reference, model: Any) -> None:
    golden = reference.golden["av"]
    with torch.no_grad():
        assert_close(
            model.get_audio_features(torch.from_numpy(golden["mel"])).pooler_output, golden["audio_tokens"], TOLERANCE
        )


@both_cases
def test_merged_embeddings_are_the_originals(reference: Reference, case: str) -> None:
    inputs = reference.inputs(case)
    with torch.no_grad():
        ours = reference.model.embed(
            inputs["input_ids"],
            inputs["pixel_values_videos"],
            inputs["video_grid_thw"],
            inputs.get("input_features"),
        )[0]
    assert_close(ours, reference.golden[case]["inputs_embeds"], TOLERANCE)


@both_rules
@both_cases
def test_logits_are_the_originals(reference: Reference, model: Any, case: str, rule: str) -> None:
    with torch.no_grad():
        logits = model(**reference.inputs(case, rule), use_cache=False).logits[0]
    assert_close(logits, reference.golden[case][RULES[rule][1]], TOLERANCE)


@both_cases
def test_last_query_attends_as_in_the_original(reference: Reference, case: str) -> None:
    with torch.no_grad(), attention(reference.model, "eager") as model:
        maps = model(**reference.inputs(case, "dataset"), output_attentions=True).attentions
    assert_close(torch.stack([layer[0, :, -1] for layer in maps]), reference.golden[case]["last_query_attn"], TOLERANCE)


@both_rules
@both_cases
def test_generated_ids_are_the_originals(reference: Reference, model: Any, case: str, rule: str) -> None:
    wanted = reference.golden[case][RULES[rule][2]].tolist()
    inputs = reference.inputs(case, rule)
    assert_ids_where_decided(model, inputs, wanted, TOLERANCE)
    if rule == "script":
        del inputs["position_ids"]
        assert_ids_where_decided(model, inputs, wanted, TOLERANCE)


@both_cases
def test_from_the_media_file_to_the_originals_inputs(reference: Reference, case: str) -> None:
    clip, golden = Clip.open(FOLDER / "clip.mp4"), reference.golden[case]
    frames = len(golden["frames_uint8"])
    video = clip.require_video()
    assert video.frames / video.fps == pytest.approx(reference.seconds(case))
    processor = reference.by("script", frame_seconds=video.frames / video.fps / frames, min_frames=1)
    request = Request(clip=clip, question=reference.question(case), use=USE[case])
    prepared, exact = VideoSalmonn2PlusAdapter().prepare(processor, [request]), reference.processed(case)
    assert prepared.inputs.keys() == exact.keys()
    for name in ("input_ids", "attention_mask", "position_ids", "video_grid_thw"):
        assert torch.equal(prepared.inputs[name], exact[name])
    # another decoder: 2 levels of 255 either way, divided by the smallest standard deviation
    difference = prepared.inputs["pixel_values_videos"] - exact["pixel_values_videos"]
    assert difference.abs().max() <= 2 / 255 / 0.26 + 1e-6
    if case == "av":
        assert_same_samples(clip, golden["waveform_float32"])
    assert len(prepared.layouts[0]) == len(exact["input_ids"][0])


def test_configuration_is_the_checkpoints(reference: Reference) -> None:
    written = json.loads((FOLDER / "config.json").read_text())
    config = reference.model.config
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"):
        assert getattr(config.text_config, key) == written[key]
    for part in ("vision_config", "audio_config"):
        for key in ("num_heads", "depth", "encoder_layers", "d_model", "second_stride", "fullatt_block_indexes"):
            assert getattr(getattr(config, part), key, None) == written[part].get(key)
    rope = config.text_config.rope_parameters
    assert rope["mrope_section"] == written["rope_scaling"]["mrope_section"]
    assert rope["rope_theta"] == written["rope_theta"]
    assert config.audio_token_id == written["audio_token_id"]
