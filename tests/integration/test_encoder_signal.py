"""What methods are shown of the audio encoder is what its own attention says, per prompt, alone and in a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn.functional import avg_pool1d, linear
from transformers import Qwen2_5OmniThinkerConfig, Qwen3OmniMoeThinkerConfig
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as qwen2_5
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as qwen3

from fastav.adapter import ModelAdapter, adapter_for
from fastav.budgets import Share
from fastav.engines.transformers import TransformersEngine, prune
from fastav.errors import UnsupportedPlan
from fastav.layout import Modality
from fastav.media import Clip
from fastav.method import Method, Signal
from fastav.models.tiny import TinyAdapter
from fastav.models.video_salmonn2 import VideoSalmonn2Adapter
from fastav.models.videollama2 import VideoLlama2Adapter
from fastav.models.videollama2.beats import relative_buckets
from fastav.plan import Keep, Plan, Step
from fastav.recipes import recipe
from fastav.request import Request, Use
from support.families import qwen2_5_omni, qwen3_omni
from support.families._tiny import randomized

pytestmark = pytest.mark.filterwarnings("ignore:tiny does not know the word")  # in these questions

BUNDLE = Path(__file__).parents[1] / "reference" / "videollama2"
HALF = Keep(media=Share(0.5))
PLAN = Plan((Step(layers="0", method="position", keep=HALF), Step(layers="2", method="position", keep=HALF)))
SEEN: dict[int, Any] = {}


class Watch(Method):
    """Keeps what it is shown, and scores by position."""

    needs = frozenset({Signal.ENCODER})

    def score(self, view):
        SEEN[view.layer] = view
        return -view.position.float()


@dataclass
class Case:
    """A model, and the attention of its encoder's last layer: for each sound what each of its tokens receives."""

    adapter: ModelAdapter
    model: Any
    processor: Any
    requests: list[Request]
    dense: Callable[[Any, dict[str, Any]], list[torch.Tensor]]

    def prepare(self, *rows: int):
        return self.adapter.prepare(self.processor, [self.requests[row] for row in rows])


def clips(*seconds: float) -> list[Request]:
    make = np.random.default_rng(0)
    requests = []
    for length in seconds:
        clip = Clip.from_arrays(
            frames=make.integers(0, 256, (int(length * 10), 24, 32, 3), dtype=np.uint8),
            fps=10,
            waveform=make.uniform(-0.5, 0.5, int(length * 16_000)).astype(np.float32),
            sample_rate=16_000,
        )
        requests.append(Request(clip=clip, question=f"What is heard in {length} s?"))
    return requests


def beats(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """From whole maps, with biases pair by pair; they are the model's own, as they give what its attention says."""
    attention, seen = model.model.audio_tower.encoder.layers[-1].self_attn, {}

    def after(module, args, output):
        seen.update(hidden=args[0], output=output[0])

    handle = attention.register_forward_hook(after)
    model.model.get_audio_features(inputs["input_features"])
    handle.remove()
    table = model.model.audio_tower.encoder.layers[0].self_attn.relative_attention_bias.weight
    found = []
    for hidden, output in zip(seen["hidden"], seen["output"], strict=True):
        n, heads = len(hidden), attention.heads
        query, key, value = (
            linear(hidden, p.weight, p.bias).view(n, heads, -1).transpose(0, 1)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        buckets = relative_buckets(n, len(table), attention.farthest, hidden.device)
        place = torch.arange(n)
        bias = table[buckets[place[None] - place[:, None] + n - 1]].permute(2, 0, 1)
        grep = linear(query, attention.grep_linear.weight, attention.grep_linear.bias).view(heads, n, 2, 4).sum(-1)
        near, far = grep.sigmoid()[..., 0], grep.sigmoid()[..., 1]
        gate = near * (far * attention.grep_a.view(heads, 1) - 1) + 2
        logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5 + gate[..., None] * bias
        weights = logits.softmax(-1)
        said = linear(
            (weights @ value).transpose(0, 1).reshape(n, -1), attention.out_proj.weight, attention.out_proj.bias
        )
        assert (said - output).abs().max() < 1e-4 * output.abs().max()
        found.append(weights.mean((0, 1)))
    return found


def windowed(module: Any, pooled: bool) -> Callable[[Any, dict[str, Any]], list[torch.Tensor]]:
    """From the weights that the model's own eager attention returns, window by window."""

    def dense(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
        outer = model if hasattr(model, "audio_tower") else model.model
        last, plain, maps = outer.audio_tower.layers[-1].self_attn, module.eager_attention_forward, []

        def recording(attention, *args, **kwargs):
            said, weights = plain(attention, *args, **kwargs)
            if attention is last:
                maps.append(weights[0])
            return said, weights

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "eager_attention_forward", recording)
            before = model.config._attn_implementation
            model.set_attn_implementation("eager")
            found = []
            for features, mask in zip(inputs["input_features"], inputs["feature_attention_mask"], strict=True):
                maps.clear()
                model.get_audio_features(features[None], mask[None])
                received = torch.cat([weights.mean((0, 1)) for weights in maps])
                found.append(avg_pool1d(received[None], 2, 2)[0] if pooled else received)
            model.set_attn_implementation(before)
        assert len(maps) > 1, "the last sound is longer than a window"
        return found

    return dense


def videollama2() -> Case:
    adapter = VideoLlama2Adapter()
    model, processor = adapter.load(str(BUNDLE), dtype=torch.float32)
    clip = Clip.open(BUNDLE / "clip.mp4")
    requests = [Request(clip=clip, question=f"What {use} is it?", use=use) for use in (Use.BOTH, Use.VIDEO, Use.AUDIO)]
    return Case(adapter, model, processor, requests, beats)


def embedded() -> Case:
    adapter = TinyAdapter()
    model, processor = adapter.load(adapter.checkpoint, dtype=torch.float32)
    return Case(adapter, model, processor, clips(3.0, 4.0), beats)


def omni(family: Any, config: Any, kind: str, module: Any, pooled: bool, **audio: Any) -> Case:
    """Two layers in the audio tower, so that the last is not the first."""
    settings = family.thinker()
    settings["audio_config"] |= {"encoder_layers": 2, **audio}
    model = randomized(getattr(module, kind)(config(**settings)), "sdpa")
    return Case(adapter_for([kind]), model, family.processor(), clips(4.0, 2.15, 3.3), windowed(module, pooled))


CASES = {
    "videollama2": videollama2,
    "tiny": embedded,
    "qwen2-5-omni": lambda: omni(
        qwen2_5_omni, Qwen2_5OmniThinkerConfig, "Qwen2_5OmniThinkerForConditionalGeneration", qwen2_5, True
    ),
    "qwen3-omni": lambda: omni(
        qwen3_omni,
        Qwen3OmniMoeThinkerConfig,
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        qwen3,
        False,
        n_window_infer=200,  # two seconds: clips of more than one window
    ),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request):
    return CASES[request.param]()


@torch.no_grad()
def seen(case, prepared, monkeypatch, *, given=True, **options):
    """What methods were shown entering two layers."""
    SEEN.clear()
    layouts = prepared.layouts if given else None
    with monkeypatch.context() as patch:
        patch.setattr("fastav.pruning.compiled.method_of", lambda step: Watch())
        with prune(case.model, PLAN, layouts=layouts, adapter=case.adapter):
            case.model.generate(**prepared.inputs, max_new_tokens=2, do_sample=False, **options)
    return dict(SEEN)


def rows_of(case):
    return [[0], list(range(len(case.requests)))]


@torch.no_grad()
def test_every_audio_token_has_what_the_dense_maps_say(case, monkeypatch):
    for rows in rows_of(case):
        prepared = case.prepare(*rows)
        sounds = iter(case.dense(case.model, prepared.inputs))
        view = seen(case, prepared, monkeypatch)[0]
        for row, layout in enumerate(prepared.layouts):
            found = view[Signal.ENCODER][row, -len(layout) :]
            audio = torch.from_numpy(layout.modality == Modality.AUDIO)
            if audio.any():
                expected = next(sounds)
                assert (found[audio] - expected).abs().max() < 1e-4 * expected.max()
                assert expected.std() > 1e-3 * expected.mean(), "the maps are not uniform"
            assert (found[~audio] == 0).all()
            assert (view[Signal.ENCODER][row, : -len(layout)] == 0).all()
        assert next(sounds, None) is None


def test_after_a_cut_it_is_that_of_the_tokens_still_there(case, monkeypatch):
    views = seen(case, case.prepare(*rows_of(case)[1]), monkeypatch, given=False)
    first, second = views[0], views[2]
    assert second.slots.shape[1] < first.slots.shape[1]
    whole = torch.cat([first[Signal.ENCODER], torch.zeros(len(first.slots), 1)], dim=1)
    assert torch.equal(second[Signal.ENCODER], whole.gather(1, second.slots))


@torch.no_grad()
def media_of_others(case, prepared) -> bool:
    """Whether transformers itself mixes up the sounds or frames of copies, as 5.17 does for Qwen-Omni."""
    entered = []
    first = case.adapter.decoder(case.model).layers[0]
    handle = first.register_forward_pre_hook(
        lambda _, args, named: entered.append([*args, *named.values()][0]), with_kwargs=True
    )
    case.model.generate(**prepared.inputs, max_new_tokens=1, do_sample=False, num_beams=2)
    handle.remove()
    one, other = entered[0].unflatten(0, (-1, 2)).unbind(1)
    return bool((one - other).abs().max() > 1e-3)


def test_beams_repeat_it(case, monkeypatch):
    prepared = case.prepare(*rows_of(case)[1])
    if media_of_others(case, prepared):
        assert Version(transformers.__version__) < Version("5.19"), "what the newest release does wrong must be known"
        with pytest.raises(UnsupportedPlan, match="transformers gives copies of a prompt"):
            seen(case, prepared, monkeypatch, num_beams=2)
        return
    plain = seen(case, prepared, monkeypatch)[0][Signal.ENCODER]
    beams = seen(case, prepared, monkeypatch, num_beams=2)[0][Signal.ENCODER]
    assert (beams - plain.repeat_interleave(2, 0)).abs().max() < 1e-5 * plain.max()


def hooks(encoders):
    return [len(module._forward_pre_hooks) for module in encoders.modules()]


def test_encoders_are_left_alone_unless_asked_and_afterwards(case):
    encoders = torch.nn.ModuleList(case.adapter.encoders(case.model))
    before = hooks(encoders)
    with prune(case.model, "fastv", adapter=case.adapter):
        assert hooks(encoders) == before
    with prune(case.model, "omnizip", adapter=case.adapter):
        assert hooks(encoders) != before
    assert hooks(encoders) == before


@torch.no_grad()
def test_omnizip_keeps_its_budget_and_a_row_alone_is_the_row_of_a_batch(case):
    plan, rows = recipe("omnizip"), rows_of(case)[1]
    prepared, depth = case.prepare(*rows), case.adapter.shape(case.model.config).layers
    with prune(case.model, plan, layouts=prepared.layouts, adapter=case.adapter) as pruning:
        batch = case.model(**prepared.inputs).logits[:, -1]
    for row, kept in zip(rows, pruning.tokens(), strict=True):
        alone, layout = case.prepare(row), prepared.layouts[row]
        assert [sum(layer.values()) for layer in kept] == list(plan.tokens(layout, depth))
        assert kept[0].get("audio", 0) == -(-layout.count(Modality.AUDIO) * 3 // 4)
        with prune(case.model, plan, layouts=alone.layouts, adapter=case.adapter):
            logits = case.model(**alone.inputs).logits[0, -1]
        assert (logits - batch[row]).abs().max() < 1e-3 * logits.abs().max()


def test_sound_that_was_encoded_elsewhere_is_refused(case):
    prepared = case.prepare(0)
    inputs = {"attention_mask": prepared.inputs["attention_mask"], "input_ids": prepared.inputs["input_ids"]}
    embeds = case.model.get_input_embeddings()(inputs.pop("input_ids").clamp(max=2))
    with (
        prune(case.model, "omnizip", layouts=prepared.layouts, adapter=case.adapter),
        pytest.raises(UnsupportedPlan, match=r"audio encoder scored 0 \(pass the sound"),
        torch.no_grad(),
    ):
        case.model(inputs_embeds=embeds, **inputs)


def test_models_that_do_not_tell_are_refused_by_name():
    adapter, plan = VideoSalmonn2Adapter(), recipe("omnizip")
    with pytest.raises(UnsupportedPlan, match="adapter of video-salmonn2 does not provide"):
        TransformersEngine.check(adapter.config(), plan)
    TransformersEngine.check(VideoLlama2Adapter().config(), plan)


def test_an_adapter_of_someone_elses_that_does_not_tell_is_refused_on_entry(case):
    deaf = type("Deaf", (type(case.adapter),), {"audio_attention": ModelAdapter.audio_attention})()
    with pytest.raises(UnsupportedPlan, match="does not provide"), prune(case.model, "omnizip", adapter=deaf):
        pass
