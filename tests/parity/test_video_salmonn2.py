"""Our video-SALMONN 2 against arrays of the original, stage by stage, on a tiny checkpoint of random weights.

The checkpoint and its arrays lie in the folder that `FASTAV_REFERENCE_VIDEO_SALMONN2` names, by default the copy in
this repository. Any folder of that form must pass: other dimensions, lengths or weights.
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
from fastav.models.video_salmonn2 import (
    VideoSalmonn2Adapter,
    VideoSalmonn2ForConditionalGeneration,
    VideoSalmonn2Processor,
    pixel_values,
    sample_frames,
    spectrograms,
)
from fastav.request import Request, Use
from support.native import arrays, assert_close, assert_same_samples, assert_same_spectrograms, attention
from support.ties import assert_ids_where_decided

DEFAULT = Path(__file__).parents[1] / "reference" / "video_salmonn2"
FOLDER = Path(os.environ.get("FASTAV_REFERENCE_VIDEO_SALMONN2") or DEFAULT)
ENCODERS, LOGITS, HIDDEN, ATTENTION = 1e-4, 1e-4, 1e-4, 1e-5
CASES = ("av", "video", "av2seg", "audio")
PICTURES, SOUNDS = ("av", "video", "av2seg"), ("av", "av2seg", "audio")
USE = {"av": Use.BOTH, "video": Use.VIDEO, "av2seg": Use.BOTH, "audio": Use.AUDIO}
CLIP = {"av": "clip_short.mp4", "audio": "clip_short.mp4", "video": "clip_long.mp4", "av2seg": "clip_long.mp4"}
FRAMES_OF = {"av": "av", "video": "video", "av2seg": "video"}  # which case's arrays hold the clip's pictures
SOUND_OF = {"av": "av", "audio": "av", "av2seg": "av2seg"}
CAPPED = ("video", "av2seg")  # run with another `max_time`
MEDIA = ("pixel_values_videos", "input_features", "audio_index", "piece_index")


@dataclass(frozen=True)
class Reference:
    """The tiny checkpoint, loaded, and the original's arrays."""

    model: VideoSalmonn2ForConditionalGeneration
    tiny: VideoSalmonn2Processor
    aux: Mapping[str, Any]
    golden: Mapping[str, Mapping[str, np.ndarray]]

    def processor(self, case: str) -> VideoSalmonn2Processor:
        """The checkpoint's processor, with the frame cap of the case."""
        cap = {"max_time": self.aux["long_max_time"]} if case in CAPPED else {}
        return VideoSalmonn2Processor(self.tiny.tokenizer, scheme=self.tiny.scheme | cap)

    def processed(self, case: str) -> dict[str, Any]:
        """Our inputs from the original's decoded frames and samples."""
        processor, video, audio = self.processor(case), case in PICTURES, case in SOUNDS
        sound = self.golden[SOUND_OF[case]]["waveform_int16"].astype(np.float32) / 32768 if audio else None
        return dict(
            processor(
                processor.prompt(self.aux["prompt"], video=video, audio=audio),
                videos=[self.golden[FRAMES_OF[case]]["frames_uint8"]] if video else None,
                audio=[sound] if audio else None,
                video_seconds=float(self.golden[case]["real_time"]) if video else None,
            )
        )

    def inputs(self, case: str) -> dict[str, Any]:
        """As `processed`, with the original's own pixels and mel: a stage does not answer for those before it."""
        inputs = self.processed(case)
        if case in PICTURES:
            inputs["pixel_values_videos"] = torch.from_numpy(self.golden[FRAMES_OF[case]]["pixel_values"])
        if case in SOUNDS:
            inputs["input_features"] = torch.from_numpy(self.golden[SOUND_OF[case]]["mel"])
        return inputs


@pytest.fixture(scope="module")
def reference() -> Reference:
    model, processor = VideoSalmonn2Adapter().load(str(FOLDER), dtype=torch.float32)
    return Reference(
        model=model,
        tiny=processor,
        aux=json.loads((FOLDER / "aux_config.json").read_text()),
        golden={case: arrays(FOLDER / f"golden_{case}.npz") for case in CASES},
    )


@pytest.mark.parametrize("case", PICTURES)
def test_frames_are_sampled_as_by_the_original(reference: Reference, case: str) -> None:
    golden = reference.golden[case]
    frames, fps = golden["total_frames_and_fps"]
    ours = sample_frames(int(frames), float(fps), reference.processor(case).media)
    assert ours.tolist() == golden["frame_idx"].tolist()
    assert float(golden["real_time"]) == frames / fps


@pytest.mark.parametrize("case", ["av", "video"])
def test_pixels_are_the_originals(reference: Reference, case: str) -> None:
    golden = reference.golden[case]
    assert_close(pixel_values(golden["frames_uint8"], reference.tiny.media.image_size), golden["pixel_values"], 0)


@pytest.mark.parametrize("case", ["av", "av2seg"])
def test_mel_spectrograms_are_the_originals(reference: Reference, case: str) -> None:
    golden = reference.golden[case]
    samples = min(len(golden["waveform_int16"]), round(16_000 * float(golden["real_time"])))
    sound = golden["waveform_int16"][:samples].astype(np.float32) / 32768
    ours, is_sound = spectrograms(sound, reference.tiny.media.mel_bins)
    assert torch.equal(reference.processed(case)["input_features"], ours)
    assert_same_spectrograms(ours, golden["mel"], sound, is_sound, reference.tiny.media.mel_bins)


@pytest.mark.parametrize("case", CASES)
def test_prompt_is_the_originals(reference: Reference, case: str) -> None:
    original = reference.golden[case]["input_ids"].tolist()
    place = original.index(-200)  # the original's placeholder
    ours = reference.processed(case)["input_ids"][0].tolist()
    after = len(original) - place - 1
    assert ours[:place] == original[:place]
    assert ours[len(ours) - after :] == original[place + 1 :]
    assert len(ours) == len(reference.golden[case]["inputs_embeds"])
    scheme = reference.tiny.media
    placeholders = {scheme.video_token_id} if case == "video" else {scheme.video_token_id, scheme.audio_token_id}
    block = set(ours[place : len(ours) - after])
    assert block - placeholders == set() or case == "video"
    assert (scheme.audio_token_id in block) == (case in SOUNDS)
    assert (scheme.video_token_id in block) == (case in PICTURES)


@pytest.mark.parametrize("case", PICTURES)
def test_siglip_its_projector_and_pooling_give_the_originals_features(reference: Reference, case: str) -> None:
    golden, model = reference.golden[case], reference.model.model
    with torch.no_grad():
        tower = model.vision_tower(reference.inputs(case)["pixel_values_videos"])
        projected = model.mm_projector(tower)
        pooled = model.pool(projected).flatten(1, 2)
    if case != "av2seg":  # the bundle holds these once a clip
        assert_close(tower, golden["vision_tower_out"], ENCODERS)
        assert_close(projected, golden["vision_projected"], ENCODERS)
    assert_close(pooled, golden["vision_pooled"], ENCODERS)


@pytest.mark.parametrize("case", ["av", "av2seg"])
def test_whisper_gives_the_originals_features(reference: Reference, case: str) -> None:
    golden = reference.golden[case]
    with torch.no_grad():
        ours = reference.model.speech_encoder(torch.from_numpy(golden["mel"])).last_hidden_state
    if case == "av":
        assert_close(ours, golden["speech_encoder_out"], ENCODERS)
    else:
        assert_close(ours[:, ::10], golden["speech_encoder_out_every10"], ENCODERS)


def test_qformer_gives_the_originals_queries(reference: Reference) -> None:
    golden, model = reference.golden["av"], reference.model
    with torch.no_grad():
        ours = model.windows(model.speech_encoder(torch.from_numpy(golden["mel"])).last_hidden_state)
        assert_close(ours, golden["qformer_out"], ENCODERS)
        assert_close(model.speech_llama_proj(ours), golden["speech_llama_proj_out"], ENCODERS)


@pytest.mark.parametrize("case", SOUNDS)
def test_sound_gives_the_originals_tokens(reference: Reference, case: str) -> None:
    with torch.no_grad():
        whisper = reference.model.speech_encoder(reference.inputs(case)["input_features"])
        ours = reference.model.speech_tokens(whisper.last_hidden_state)
    golden = reference.golden[case]["speech_tokens"]
    assert_close(ours.flatten(0, 1).reshape(golden.shape), golden, ENCODERS)


@pytest.mark.parametrize("case", CASES)
def test_merged_embeddings_are_the_originals(reference: Reference, case: str) -> None:
    inputs = reference.inputs(case)
    with torch.no_grad():
        ours = reference.model.embed(inputs["input_ids"], *(inputs.get(name) for name in MEDIA))[0]
    assert_close(ours, reference.golden[case]["inputs_embeds"], ENCODERS)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_hidden_states_are_the_originals(reference: Reference, case: str, implementation: str) -> None:
    golden, model = reference.golden[case], reference.model
    with torch.no_grad(), attention(model, implementation):
        output = model(
            **reference.inputs(case),
            output_hidden_states=True,
            output_attentions=implementation == "eager",
            use_cache=False,
        )
    logits = output.logits[0]
    wanted = golden["logits"] if "logits" in golden else golden["logits_last16"]
    assert_close(logits[-len(wanted) :], wanted, LOGITS)
    assert case not in ("av", "video") or len(wanted) == len(logits)
    if case == "av":
        middle = model.config.num_hidden_layers // 2
        assert_close(output.hidden_states[middle][0], golden["hidden_after_mid_layers"], HIDDEN)
        assert_close(output.hidden_states[-1][0], golden["hidden_final_normed"], HIDDEN)
        if implementation == "eager":
            rows = torch.stack([weights[0, :, -1] for weights in output.attentions])
            assert_close(rows, golden["last_query_attn"], ATTENTION)


@pytest.mark.parametrize("case", CASES)
def test_generated_ids_are_the_originals(reference: Reference, case: str) -> None:
    wanted, inputs = reference.golden[case]["greedy_ids"].tolist(), reference.inputs(case)
    assert_ids_where_decided(reference.model, inputs, wanted, LOGITS)


@pytest.mark.parametrize("case", CASES)
def test_from_the_media_file_to_the_originals_inputs(reference: Reference, case: str) -> None:
    clip = Clip.open(FOLDER / CLIP[case])
    request = Request(clip=clip, question=reference.aux["prompt"], use=USE[case])
    prepared = VideoSalmonn2Adapter().prepare(reference.processor(case), [request])
    exact = reference.processed(case)
    assert prepared.inputs.keys() == exact.keys()
    for name in exact.keys() - {"pixel_values_videos", "input_features", "feature_attention_mask"}:
        assert torch.equal(prepared.inputs[name], exact[name]), name
    if case in PICTURES:  # another decoder: 2 levels of 255 either way, on a scale of [-1, 1]
        difference = prepared.inputs["pixel_values_videos"] - exact["pixel_values_videos"]
        assert difference.abs().max() <= 2 * 2 / 255 + 1e-6
    if case in SOUNDS:
        assert_same_samples(clip, reference.golden[SOUND_OF[case]]["waveform_int16"].astype(np.float32) / 32768)
    assert len(prepared.layouts[0]) == len(exact["input_ids"][0])


def test_configuration_is_the_checkpoints(reference: Reference) -> None:
    written, config, aux = json.loads((FOLDER / "config.json").read_text()), reference.model.config, reference.aux
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "mm_hidden_size", "mm_spatial_pool_stride"):
        assert getattr(config, key) == written[key]
    assert config.rope_parameters["rope_theta"] == written["rope_theta"]
    assert config.vision_config.num_hidden_layers == aux["siglip_layers_kept"]
    assert config.speech_config.d_model == aux["whisper"]["d_model"]
    assert config.qformer.hidden_size == aux["qformer"]["hidden_size"]
    for key in ("second_per_window", "second_stride", "num_speech_query_token", "use_final_linear", "video_fps"):
        assert getattr(config, key) == aux[key]
