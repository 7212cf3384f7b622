"""VideoLLaMA3: the release's numbers, tokens that depend on what is shown, and loading."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import VideoLlama3VideoProcessor
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.video_utils import VideoMetadata

from fastav.budgets import Share
from fastav.engines.transformers import prune
from fastav.errors import CheckpointError, MediaError
from fastav.layout import Modality
from fastav.media import Clip
from fastav.models.video_llama3 import VideoLlama3Adapter
from fastav.plan import Keep
from fastav.presets import fastav
from fastav.request import Request
from support.families import video_llama3
from support.masked import masked_logits, rules_of

ADAPTER = VideoLlama3Adapter()
TOKENS = 3 * 4  # of a whole frame of 24 x 32 pixels


def clip_of(*shown: np.ndarray, fps: int = 1) -> Clip:
    return Clip.from_arrays(frames=np.stack(shown), fps=fps)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def with_a_spot(frame: np.ndarray) -> np.ndarray:
    """The picture, different in its upper left 8 x 8 pixels, which are one token."""
    frame = frame.copy()
    frame[:8, :8] = 255 - frame[:8, :8]
    return frame


@pytest.fixture(scope="module")
def built():
    return video_llama3.build()


@pytest.fixture(scope="module")
def processor(built):
    return built[1]


@pytest.fixture(scope="module")
def saved(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for part in built:
        part.save_pretrained(folder)
    return folder


# --- the release


def test_the_release_is_the_7b_model():
    config = ADAPTER.config()
    shape = ADAPTER.shape(config)
    assert (shape.layers, shape.hidden, shape.intermediate) == (28, 3584, 18_944)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab) == (28, 4, 128, 152_064)
    vision = config.vision_config
    assert (vision.num_hidden_layers, vision.hidden_size, vision.patch_size) == (27, 1152, 14)
    assert (config.video_token_id, config.text_config.max_position_embeddings) == (151_656, 32_768)


@pytest.mark.parametrize(("seconds", "tokens"), [(10, 11_960), (30, 15_810), (60, 15_840)])
def test_example_clips_have_the_tokens_in_the_docs(seconds, tokens):
    layout = ADAPTER.example(ADAPTER.config(), seconds=seconds, text=44)
    assert layout.by_modality() == {"text": 44, "video": tokens}
    assert not layout.padding.any()


@pytest.mark.parametrize("seconds", [0.2, 1, 2.6, 10, 30, 60, 500])
@pytest.mark.parametrize("size", [(720, 1280), (480, 640), (64, 48)])
def test_examples_agree_with_the_official_processor(seconds, size):
    released = VideoLlama3VideoProcessor()
    metadata = VideoMetadata(total_num_frames=round(seconds * 25), fps=25.0, duration=seconds, width=1, height=1)
    frames = len(released.sample_frames(metadata, fps=1.0))
    scaled = released.resize(
        torch.empty(1, frames, 3, *size, dtype=torch.uint8, device="meta"),
        SizeDict(shortest_edge=12_544, longest_edge=12_845_056),
        PILImageResampling.BICUBIC,
        factor=28,
    )
    assert ADAPTER.release_grid(seconds, *size) == (frames, scaled.shape[-2] // 28, scaled.shape[-1] // 28)


def test_sound_is_refused_in_examples():
    with pytest.raises(MediaError, match="does not take audio"):
        ADAPTER.example(ADAPTER.config(), audio=3, text=5)


# --- prompts


def test_tokens_that_resemble_the_frame_before_are_left_out(processor):
    first, second = picture(1), picture(2)
    clip = clip_of(first, first, second, with_a_spot(second), with_a_spot(second))
    prepared = ADAPTER.prepare(processor, [Request(clip=clip, question="?")])
    (layout,) = prepared.layouts
    # a frame that shows nothing new has one token all the same
    expected = np.repeat(np.arange(5), [TOKENS, 1, TOKENS, 1, 1])
    video = layout.modality == Modality.VIDEO
    assert layout.frame[video].tolist() == expected.tolist()
    assert layout.second[video].tolist() == expected.tolist()
    assert len(layout) == prepared.inputs["input_ids"].shape[1]
    text = processor.decode(prepared.inputs["input_ids"][0])
    groups = [group.count("<|video_pad|>") for group in text.split("Time ")[1:]]
    assert groups == [TOKENS, 1, TOKENS, 1, 1]


def test_still_and_moving_clips_share_a_batch_and_are_read_off_its_inputs(built):
    model, processor = built
    still = Request(clip=clip_of(*[picture(1)] * 6), question="?")
    moving = Request(clip=clip_of(*map(picture, range(5))), question="And now?")
    prepared = ADAPTER.prepare(processor, [still, moving])
    assert [layout.count(Modality.VIDEO) for layout in prepared.layouts] == [TOKENS + 5, 5 * TOKENS]
    for ours, read in zip(prepared.layouts, ADAPTER.layouts(model.config, prepared.inputs), strict=True):
        assert np.array_equal(ours.frame, read.frame)
    with torch.no_grad():
        together = model(**prepared.inputs).logits[:, -1]
        for row, request in enumerate((still, moving)):
            alone = model(**ADAPTER.prepare(processor, [request]).inputs).logits[0, -1]
            assert (together[row] - alone).abs().max() < 1e-4


def test_without_a_mask_every_token_is_there(built):
    model, processor = built
    inputs = {**ADAPTER.prepare(processor, [Request(clip=clip_of(*map(picture, range(4))), question="?")]).inputs}
    (whole,) = ADAPTER.layouts(model.config, inputs)
    del inputs["video_compression_mask"]
    (unmasked,) = ADAPTER.layouts(model.config, inputs)
    assert np.array_equal(whole.frame, unmasked.frame)
    assert whole.frame.max() == 3


def test_each_video_of_a_prompt_counts_its_own_frames(built):
    model, processor = built
    one = ADAPTER.prepare(processor, [Request(clip=clip_of(*map(picture, range(4))), question="?")])
    inputs = {name: torch.cat([value] * 2) for name, value in one.inputs.items()}
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name].view(1, -1)
    (layout,) = ADAPTER.layouts(model.config, inputs)
    video = layout.modality == Modality.VIDEO
    assert layout.frame[video].tolist() == np.tile(np.repeat(np.arange(4), TOKENS), 2).tolist()
    assert layout.item[video].tolist() == np.repeat([0, 1], 4 * TOKENS).tolist()


def test_frames_are_unknown_where_the_videos_are_not_those_of_the_prompt(built):
    model, processor = built
    inputs = {**ADAPTER.prepare(processor, [Request(clip=clip_of(*map(picture, range(4))), question="?")]).inputs}
    inputs["video_compression_mask"] = inputs["video_compression_mask"].clone()
    inputs["video_compression_mask"][-1] = False
    (layout,) = ADAPTER.layouts(model.config, inputs)
    assert (layout.frame == -1).all()
    assert layout.count(Modality.VIDEO) == 4 * TOKENS


@pytest.mark.parametrize(("frames", "fps"), [(75, 10), (133, 10), (133, 5)])
def test_sampling_that_lands_behind_the_last_frame_takes_what_is_there(processor, frames, fps):
    clip = clip_of(*[picture(1)] * frames, fps=fps)
    metadata = VideoMetadata(total_num_frames=frames, fps=fps)
    assert processor.video_processor.sample_frames(metadata, fps=1.0)[-1] == frames
    (layout,) = ADAPTER.prepare(processor, [Request(clip=clip, question="?")]).layouts
    assert layout.frame.max() + 1 == int(frames / fps)


def test_pruning_a_compressed_clip_is_exact(built):
    model, processor = built
    shown = [picture(1), picture(1), with_a_spot(picture(1)), picture(2), picture(3), picture(3)]
    prepared = ADAPTER.prepare(processor, [Request(clip=clip_of(*shown), question="What?")])
    plan = fastav(Keep(media=Share(0.6)))
    with prune(model, plan, layouts=prepared.layouts, adapter=ADAPTER):
        out = model.generate(
            **prepared.inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    layers = ADAPTER.decoder(model).layers
    rules = rules_of(plan, prepared.layouts[0], len(layers))
    expected = masked_logits(model, layers, prepared.inputs, out.sequences[0, -3:], rules)
    assert (torch.cat(out.logits) - expected).abs().max() < 1e-3 * expected.abs().max()


# --- loading


def test_a_saved_model_loads_and_answers_the_same(built, saved):
    model, processor = built
    loaded, read = ADAPTER.load(str(saved))
    requests = [Request(clip=clip_of(*map(picture, range(4))), question="Who?")]
    before, after = ADAPTER.prepare(processor, requests), ADAPTER.prepare(read, requests)
    with torch.no_grad():
        assert torch.equal(loaded(**after.inputs).logits, model(**before.inputs).logits)


def test_a_checkpoint_that_lacks_a_key_is_refused(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(saved / "model.safetensors")
    del weights["model.projector.readout.0.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 key: model\.projector\.readout\.0\.bias"):
        ADAPTER.load(str(tmp_path))
