"""Our VideoLLaMA2 against arrays that the original computed, stage by stage, on a tiny checkpoint of random weights.

The checkpoint and its arrays lie in the folder that `FASTAV_REFERENCE_VIDEOLLAMA2` names, by default the copy in this
repository. Any folder of that form must pass: other dimensions, frames, lengths or weights.
"""

import json
import os
import wave
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch

from fastav.media import Clip
from fastav.models.videollama2 import (
    VideoLlama2Adapter,
    VideoLlama2ForConditionalGeneration,
    VideoLlama2Processor,
    clip_bounds,
    file_features,
    pixel_values,
    sample_frames,
    soundtrack_features,
)
from fastav.request import Request, Use
from support.native import arrays, assert_close, assert_same_samples, attention
from support.spectra import Bounds, assert_within, in_bfloat16, kaldi
from support.ties import assert_ids_where_decided

DEFAULT = Path(__file__).parents[1] / "reference" / "videollama2"
FOLDER = Path(os.environ.get("FASTAV_REFERENCE_VIDEOLLAMA2") or DEFAULT)
ENCODERS, LOGITS, HIDDEN = 1e-4, 2e-3, 1e-3
CASES = ("av", "v", "a")
USE = {"av": Use.BOTH, "v": Use.VIDEO, "a": Use.AUDIO}
ORIGINAL_VIDEO, ORIGINAL_AUDIO = -201, -202  # the original's placeholders in `input_ids`


@dataclass(frozen=True)
class Reference:
    """The tiny checkpoint, loaded, and the original's arrays."""

    model: VideoLlama2ForConditionalGeneration
    processor: VideoLlama2Processor
    preprocess: Mapping[str, np.ndarray]
    golden: Mapping[str, Mapping[str, np.ndarray]]

    def question(self, case: str) -> str:
        """What the user asked, decoded from the original's ids."""
        ids = self.golden[case]["input_ids"]
        after = self.processor.tokenizer.decode(ids[int(np.flatnonzero(ids < 0)[-1]) + 1 :])
        end = self.processor.prompt("QUESTION", video=True).split("QUESTION")[1]
        return after.removeprefix("\n").removesuffix(end)

    def processed(self, case: str) -> dict[str, Any]:
        """Our inputs from the original's decoded frames and samples."""
        sound, rate = first_channel(FOLDER / "sound.wav") if case == "a" else (waveform(self.preprocess), 16_000)
        return dict(
            self.processor(
                self.processor.prompt(self.question(case), video="v" in case, audio="a" in case),
                videos=[self.preprocess["frames_u8"]] if "v" in case else None,
                audio=[sound] if "a" in case else None,
                sampling_rate=rate,
            )
        )

    def inputs(self, case: str) -> dict[str, Any]:
        """Our token ids, and the original's own pixels and filter bank: a stage does not answer for those before it."""
        inputs = self.processed(case)
        if "v" in case:
            inputs["pixel_values_videos"] = torch.from_numpy(self.preprocess["pixel_values"])[None]
        if "a" in case:
            name = "fbank_from_wav" if case == "a" else "fbank_from_video"
            inputs["input_features"] = torch.from_numpy(self.preprocess[name])
        return inputs


def waveform(preprocess: Mapping[str, np.ndarray]) -> np.ndarray:
    return preprocess["waveform_s16"].astype(np.float32) / 32768


def first_channel(path: Path) -> tuple[np.ndarray, int]:
    with wave.open(str(path)) as file:
        assert file.getsampwidth() == 2
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, file.getnchannels())
        return samples[:, 0] / 32768, file.getframerate()


def filter_bank(reference: Reference, name: str) -> Bounds:
    """What a float32 computation may make of the filter bank of this name in the bundle."""
    samples = reference.processor.media.audio_samples
    if name == "fbank_from_wav":  # all in float64, but for the filters
        sound, rate = first_channel(FOLDER / "sound.wav")
        length = reference.processor.media.audio_seconds * rate
        sound = scipy.signal.resample(np.pad(sound[:length], (0, length - len(sound[:length]))), samples)
    else:
        pieces = [
            waveform(reference.preprocess)[start:end] for start, end in reference.preprocess["clip_sample_bounds"]
        ]
        joined = np.concatenate(pieces)[:samples]
        sound = np.pad(joined, (0, samples - len(joined)))
    return kaldi(sound * 2.0**15, reference.processor.media.mel_bins, whole=name == "fbank_from_wav")


def assert_same_filter_bank(ours: torch.Tensor, reference: Reference, name: str) -> None:
    """The original's is what float32 may have made of the exact one, and ours is the exact one, both in bfloat16."""
    bounds = filter_bank(reference, name)
    assert_within(reference.preprocess[name][0], bounds.map(in_bfloat16))
    exact = Bounds(bounds.exact - 1e-7, bounds.exact, bounds.exact + 1e-7)  # two orders of computation in float64
    assert_within(ours.numpy(), exact.map(in_bfloat16))


@pytest.fixture(scope="module")
def reference() -> Reference:
    model, processor = VideoLlama2Adapter().load(str(FOLDER), dtype=torch.float32)
    return Reference(
        model=model,
        processor=processor,
        preprocess=arrays(FOLDER / "golden_preprocess.npz"),
        golden={case: arrays(FOLDER / f"golden_{case}.npz") for case in CASES},
    )


def test_frames_are_sampled_as_by_the_original(reference: Reference) -> None:
    golden = {name: value for name, value in reference.preprocess.items() if name.startswith("frame_sample_")}
    assert golden
    for name, indices in golden.items():
        frames, count = map(int, name.split("_")[2:])
        assert sample_frames(frames, count).tolist() == indices.tolist(), name
    count = len(reference.preprocess["frame_indices"])
    assert count == reference.processor.media.num_frames
    frames = int(reference.preprocess["video_num_frames"])
    assert sample_frames(frames, count).tolist() == reference.preprocess["frame_indices"].tolist()


def test_soundtracks_are_cut_as_by_the_original(reference: Reference) -> None:
    golden = {name: value for name, value in reference.preprocess.items() if name.startswith("clips_")}
    assert golden
    for name, bounds in golden.items():
        assert clip_bounds(int(name.split("_")[1])).tolist() == bounds.tolist(), name
    samples = len(reference.preprocess["waveform_s16"])
    assert clip_bounds(samples).tolist() == reference.preprocess["clip_sample_bounds"].tolist()


def test_pixels_are_the_originals(reference: Reference) -> None:
    scheme = reference.processor.media
    ours = pixel_values(reference.preprocess["frames_u8"], scheme.image_size, scheme.num_frames)
    assert_close(ours, reference.preprocess["pixel_values"], 0)


def test_filter_bank_of_a_soundtrack_is_the_originals(reference: Reference) -> None:
    ours, heard = soundtrack_features(waveform(reference.preprocess), reference.processor.media)
    assert_same_filter_bank(ours, reference, "fbank_from_video")
    starts, ends = reference.preprocess["clip_sample_bounds"].T
    samples = int((np.minimum(ends, len(reference.preprocess["waveform_s16"])) - starts).sum())
    assert int(heard.sum()) == -(-samples // 160)


def test_filter_bank_of_a_sound_file_is_the_originals(reference: Reference) -> None:
    ours, _ = file_features(*first_channel(FOLDER / "sound.wav"), reference.processor.media)
    assert_same_filter_bank(ours, reference, "fbank_from_wav")


def test_processor_makes_the_originals_inputs(reference: Reference) -> None:
    inputs = reference.processed("av")
    assert_close(inputs["pixel_values_videos"][0], reference.preprocess["pixel_values"], 0)
    assert_same_filter_bank(inputs["input_features"][0], reference, "fbank_from_video")
    assert_same_filter_bank(reference.processed("a")["input_features"][0], reference, "fbank_from_wav")


@pytest.mark.parametrize("case", CASES)
def test_prompt_is_the_originals(reference: Reference, case: str) -> None:
    original = reference.golden[case]["input_ids"].tolist()
    scheme = reference.processor.media
    ours = reference.inputs(case)["input_ids"][0].tolist()
    place = next(i for i, token in enumerate(original) if token < 0)
    assert original[place] == (ORIGINAL_AUDIO if case == "a" else ORIGINAL_VIDEO)
    video = scheme.video_tokens(scheme.num_frames) if "v" in case else 0
    audio = scheme.audio_tokens if "a" in case else 0
    run = [scheme.video_token_id] * video + [scheme.audio_token_id] * audio
    assert ours == [*original[:place], *run, *original[place + 1 :]]


def test_siglip_gives_the_originals_features(reference: Reference) -> None:
    pixels = torch.from_numpy(reference.preprocess["pixel_values"])
    with torch.no_grad():
        assert_close(reference.model.model.vision_tower(pixels), reference.golden["av"]["vision_tower"], ENCODERS)


def test_connector_gives_the_originals_tokens(reference: Reference) -> None:
    pixels = torch.from_numpy(reference.preprocess["pixel_values"])
    with torch.no_grad():
        ours = reference.model.model.get_video_features(pixels[None]).pooler_output
    assert_close(ours, reference.golden["av"]["mm_projector"], ENCODERS)


@pytest.mark.parametrize(("case", "fbank"), [("av", "fbank_from_video"), ("a", "fbank_from_wav")])
def test_beats_and_its_projector_give_the_originals_tokens(reference: Reference, case: str, fbank: str) -> None:
    golden, model = reference.golden[case], reference.model.model
    features = torch.from_numpy(reference.preprocess[fbank])
    with torch.no_grad():
        tower, tokens = model.audio_tower(features), model.get_audio_features(features).pooler_output
    assert golden["audio_TF"].tolist() == list(reference.processor.media.audio_grid)
    if case == "a":
        tower, tokens = (x[0, torch.from_numpy(golden["audio_positions"])] for x in (tower, tokens))
    assert_close(tower, golden["audio_tower"], ENCODERS)
    assert_close(tokens, golden["mm_projector_a"], ENCODERS)


@pytest.mark.parametrize("case", CASES)
def test_merged_embeddings_are_the_originals(reference: Reference, case: str) -> None:
    inputs, golden = reference.inputs(case), reference.golden[case]
    with torch.no_grad():
        ours = reference.model.model.embed(
            inputs["input_ids"], inputs.get("pixel_values_videos"), inputs.get("input_features")
        )[0]
    if case == "a":  # the whole array is left out of the bundle; its parts are there
        assert ours.shape == tuple(golden["inputs_embeds_shape"])
        place = (inputs["input_ids"][0] == reference.processor.media.audio_token_id).nonzero()[:, 0]
        assert_close(ours[place[torch.from_numpy(golden["audio_positions"])]], golden["mm_projector_a"], ENCODERS)
        assert_close(ours[-1], golden["hidden_states_last_pos"][0], ENCODERS)
    else:
        assert_close(ours, golden["inputs_embeds"], ENCODERS)


def embedded(reference: Reference, case: str) -> torch.Tensor:
    """Our merged embeddings from the original's own pixels and filter bank."""
    inputs = reference.inputs(case)
    with torch.no_grad():
        return reference.model.model.embed(
            inputs["input_ids"], inputs.get("pixel_values_videos"), inputs.get("input_features")
        )


def carried(model: VideoLlama2ForConditionalGeneration, embeddings: torch.Tensor) -> torch.Tensor:
    """How far the error that embeddings may have, `ENCODERS`, moves the logits of each token."""
    noise = torch.empty_like(embeddings).uniform_(-ENCODERS, ENCODERS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, other = (
            model(inputs_embeds=given, use_cache=False).logits[0] for given in (embeddings, embeddings + noise)
        )
    return (ours - other).abs().amax(1)


@pytest.fixture(params=["sdpa", "eager"])
def model(reference: Reference, request: pytest.FixtureRequest) -> Iterator[VideoLlama2ForConditionalGeneration]:
    with attention(reference.model, request.param) as model:
        yield model


@pytest.mark.parametrize("case", ["av", "v"])
def test_the_decoder_gives_the_originals_logits_and_hidden_states(reference: Reference, model: Any, case: str) -> None:
    golden = reference.golden[case]
    embeddings = torch.from_numpy(golden["inputs_embeds"])[None]
    with torch.no_grad():
        output = model(inputs_embeds=embeddings, output_hidden_states=True, use_cache=False)
    assert_close(output.logits[0], golden["logits"], LOGITS)
    last = torch.stack([hidden[0, -1] for hidden in output.hidden_states])
    assert_close(last, golden["hidden_states_last_pos"], HIDDEN)


@pytest.mark.parametrize("case", CASES)
def test_the_whole_model_is_its_decoder_on_the_merged_embeddings(reference: Reference, model: Any, case: str) -> None:
    with torch.no_grad():
        whole = model(**reference.inputs(case), use_cache=False).logits[0]
        alone = model(inputs_embeds=embedded(reference, case), use_cache=False).logits[0]
    assert_close(whole, alone.numpy(), LOGITS)


def test_logits_and_hidden_states_of_sound_are_the_originals(reference: Reference, model: Any) -> None:
    """The bundle does not hold these embeddings, so the error that they may have is carried through the decoder."""
    golden, embeddings = reference.golden["a"], embedded(reference, "a")
    with torch.no_grad():
        output = model(inputs_embeds=embeddings, output_hidden_states=True, use_cache=False)
    logits, error = output.logits[0], carried(model, embeddings)
    rows = len(golden["logits_last32"])
    assert_close(logits[-rows:], golden["logits_last32"], LOGITS + float(error[-rows:].max()))
    assert_close(
        torch.stack([hidden[0, -1] for hidden in output.hidden_states]), golden["hidden_states_last_pos"], HIDDEN
    )
    decided = logits.topk(2).values.diff(dim=-1).abs()[:, 0] > 2 * (LOGITS + error)
    assert decided.float().mean() > 0.9
    assert (logits.argmax(-1) == torch.from_numpy(golden["logits_argmax"]))[decided].all()


@pytest.mark.parametrize("penalty", [None, 1.05])
@pytest.mark.parametrize("case", CASES)
def test_generated_ids_are_the_originals(reference: Reference, case: str, penalty: float | None) -> None:
    golden, inputs = reference.golden[case], reference.inputs(case)
    wanted = golden["generated_ids" if penalty is None else f"generated_ids_rep_penalty_{penalty}"].tolist()
    error = LOGITS + float(carried(reference.model, embedded(reference, case))[-1])
    same = assert_ids_where_decided(reference.model, inputs, wanted, error, repetition_penalty=penalty or 1.0)
    if penalty is None and same:
        text = reference.processor.tokenizer.decode(wanted, skip_special_tokens=True).strip()
        assert text == str(golden["text"])


@pytest.mark.parametrize("case", CASES)
def test_from_the_media_file_to_the_originals_inputs(reference: Reference, case: str) -> None:
    clip = Clip.open(FOLDER / ("sound.wav" if case == "a" else "clip.mp4"))
    request = Request(clip=clip, question=reference.question(case), use=USE[case])
    prepared = VideoLlama2Adapter().prepare(reference.processor, [request])
    exact = reference.processed(case)
    assert prepared.inputs.keys() == exact.keys()
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(prepared.inputs[name], exact[name])
    if "v" in case:  # another decoder: 2 levels of 255 either way, on a scale of [-1, 1]
        difference = prepared.inputs["pixel_values_videos"] - exact["pixel_values_videos"]
        assert difference.abs().max() <= 2 * 2 / 255 + 1e-6
    if case == "av":
        assert_same_samples(clip, waveform(reference.preprocess))
    if case == "a":
        assert torch.equal(prepared.inputs["input_features"], exact["input_features"])
    assert len(prepared.layouts[0]) == len(exact["input_ids"][0])


def test_configuration_is_the_checkpoints(reference: Reference) -> None:
    written = json.loads((FOLDER / "config.json").read_text())
    config = reference.model.config
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "mm_hidden_size", "num_frames", "mm_vision_tower"):
        assert getattr(config, key) == written[key]
    assert config.rope_parameters["rope_theta"] == written["rope_theta"]
