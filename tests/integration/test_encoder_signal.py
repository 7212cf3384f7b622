"""What methods are shown of the encoders is what their own attention says, per prompt, alone and in a batch."""

import copy
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import transformers
from packaging.version import Version

from fastav.adapter import ModelAdapter
from fastav.budgets import Share
from fastav.engines.transformers import TransformersEngine, prune
from fastav.engines.transformers.prefetch import on_device
from fastav.errors import UnsupportedPlan
from fastav.layout import Layout, Modality
from fastav.method import ENCODER_SIGNALS, Method, Signal
from fastav.models.phi4_multimodal import Phi4MultimodalAdapter
from fastav.models.video_salmonn2 import VideoSalmonn2Adapter
from fastav.models.videollama2 import VideoLlama2Adapter
from fastav.pipelines import Pipeline
from fastav.plan import Keep, Plan, Step
from fastav.recipes import recipe
from support.encoders import CASES
from support.pretended import pretended, spread

pytestmark = pytest.mark.filterwarnings("ignore:tiny does not know the word")  # in these questions

HALF = Keep(media=Share(0.5))
PLAN = Plan((Step(layers="0", method="position", keep=HALF), Step(layers="2", method="position", keep=HALF)))
SEEN = {}


class Watch(Method):
    """Keeps what it is shown, and scores by position."""

    def score(self, view):
        SEEN[view.layer] = view
        return -view.position.float()


def watching(patch, *, needs=frozenset(), wants=frozenset()):
    """Make every step of a plan watch these signals."""
    watch = type("Watch", (Watch,), {"needs": frozenset(needs), "wants": frozenset(wants)})
    patch.setattr("fastav.pruning.compiled.method_of", lambda step: watch())


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.fixture(scope="module", params=[name for name in CASES if name.startswith("audio")])
def heard(request):
    return CASES[request.param]()


@torch.no_grad()
def seen(case, prepared, monkeypatch, *, given=True, generate=True, **options):
    """What methods were shown entering two layers."""
    SEEN.clear()
    layouts = prepared.layouts if given else None
    with monkeypatch.context() as patch:
        watching(patch, needs={case.signal})
        with prune(case.model, PLAN, layouts=layouts, adapter=case.adapter):
            if generate:
                case.model.generate(**prepared.inputs, max_new_tokens=2, do_sample=False, **options)
            else:
                case.model(**prepared.inputs)
    return dict(SEEN)


def rows_of(case):
    return [[0], list(range(len(case.requests)))]


@pytest.mark.parametrize("generate", [True, False])
@torch.no_grad()
def test_every_token_has_what_the_dense_maps_say(case, monkeypatch, generate):
    for rows in rows_of(case):
        prepared = case.prepare(*rows)
        expected = case.dense(case.model, dict(prepared.inputs))
        for received in expected.values():
            assert received.std() > 1e-3 * received.mean(), "the maps are not uniform"
        view = seen(case, prepared, monkeypatch, generate=generate)[0]
        ends = {
            modality: list(accumulate(layout.count(modality) for layout in prepared.layouts))
            for modality in case.modalities
        }
        assert {m: len(received) for m, received in expected.items()} == {m: n[-1] for m, n in ends.items() if n[-1]}
        for row, layout in enumerate(prepared.layouts):
            found, others = view[case.signal][row, -len(layout) :], torch.ones(len(layout), dtype=torch.bool)
            for modality, received in expected.items():
                here = torch.from_numpy(layout.modality == modality)
                own = received[ends[modality][row] - int(here.sum()) : ends[modality][row]]
                assert ((found[here] - own).abs() < 1e-4 * received.max()).all()
                others &= ~here
            assert (found[others] == 0).all()
            assert (view[case.signal][row, : -len(layout)] == 0).all()


def test_after_a_cut_it_is_that_of_the_tokens_still_there(case, monkeypatch):
    views = seen(case, case.prepare(*rows_of(case)[1]), monkeypatch, given=False)
    first, second = views[0], views[2]
    assert second.slots.shape[1] < first.slots.shape[1]
    whole = torch.cat([first[case.signal], torch.zeros(len(first.slots), 1)], dim=1)
    assert torch.equal(second[case.signal], whole.gather(1, second.slots))


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
    # some releases of transformers fail to repeat videos that are compressed, with pruning and without
    prepared = case.prepare(*([2] if case.adapter.name == "video-llama3" else rows_of(case)[1]))
    if media_of_others(case, prepared):
        assert Version(transformers.__version__) < Version("5.19"), "what the newest release does wrong must be known"
        with pytest.raises(UnsupportedPlan, match="transformers gives copies of a prompt"):
            seen(case, prepared, monkeypatch, num_beams=2)
        return
    plain = seen(case, prepared, monkeypatch)[0][case.signal]
    beams = seen(case, prepared, monkeypatch, num_beams=2)[0][case.signal]
    assert (beams - plain.repeat_interleave(2, 0)).abs().max() < 1e-5 * plain.max()


@pytest.mark.filterwarnings("ignore:an earlier question chose")
def test_a_later_turn_has_that_of_its_own_media(case, monkeypatch):
    """Of the same media as in the first; where a chat has one clip, of none."""
    engine = TransformersEngine(case.model, case.processor, case.adapter)
    request = case.requests[0]
    content = [{"type": "text", "text": "And here?"}] if not case.adapter.supports_images else None
    with monkeypatch.context() as patch:
        watching(patch, needs={case.signal})
        chat = Pipeline(engine, PLAN, case.adapter).chat()
        views = []
        for turn in (request.messages, content or request.messages):
            SEEN.clear()
            chat.ask(
                [{"role": "user", "content": turn}] if content and turn is content else list(turn), max_new_tokens=2
            )
            views.append(SEEN.get(0))
    first, second = (media_scores(view, case) for view in views)
    assert len(first)
    if content:
        assert len(second) == 0
    else:
        assert (first - second).abs().max() < 1e-5 * first.max()


def media_scores(view, case):
    """What the tokens of the encoder's modalities have, of one prompt."""
    if view is None:  # nothing was to be dropped
        return torch.zeros(0)
    return view[case.signal][torch.isin(view.modality, torch.tensor(case.modalities))]


def hooks(encoders):
    return [len(module._forward_pre_hooks) for module in encoders.modules()]


def test_encoders_are_left_alone_unless_asked_and_afterwards(case, monkeypatch):
    encoders = torch.nn.ModuleList(case.adapter.encoders(case.model))
    before = hooks(encoders)
    with prune(case.model, "fastv", adapter=case.adapter):
        assert hooks(encoders) == before
    watching(monkeypatch, needs={case.signal})
    with prune(case.model, PLAN, adapter=case.adapter):
        assert sum(hooks(encoders)) == sum(before) + 2
    assert hooks(encoders) == before


@torch.no_grad()
def test_omnizip_keeps_its_budget_and_a_row_alone_is_the_row_of_a_batch(heard):
    case, plan = heard, recipe("omnizip")
    rows = rows_of(case)[1]
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


@torch.no_grad()
def test_media_that_were_encoded_elsewhere_are_refused(case, monkeypatch):
    prepared = case.prepare(0)
    inputs = {name: prepared.inputs[name] for name in ("attention_mask", "position_ids") if name in prepared.inputs}
    embeds = case.model.get_input_embeddings()(prepared.inputs["input_ids"].clamp(max=2))
    watching(monkeypatch, needs={case.signal})
    with (
        prune(case.model, PLAN, layouts=prepared.layouts, adapter=case.adapter),
        pytest.raises(UnsupportedPlan, match=r"encoder scored none \(pass the media"),
    ):
        case.model(inputs_embeds=embeds, **inputs)


@torch.no_grad()
def test_layouts_of_other_numbers_of_tokens_are_refused(case, monkeypatch):
    (layout,), inputs = (prepared := case.prepare(0)).layouts, prepared.inputs
    wrong = layout.modality.copy()
    wrong[int((wrong == case.modalities[-1]).argmax())] = Modality.TEXT
    fields = {name: getattr(layout, name) for name in Layout.__slots__}
    watching(monkeypatch, needs={case.signal})
    with (
        prune(case.model, PLAN, layouts=[Layout(**fields | {"modality": wrong})], adapter=case.adapter),
        pytest.raises(UnsupportedPlan, match=r"the prompts have .* tokens, and the .* encoder scored \d+"),
    ):
        case.model.generate(**inputs, max_new_tokens=1, do_sample=False)


def test_models_that_do_not_tell_are_refused_by_name(monkeypatch):
    adapter, plan = VideoSalmonn2Adapter(), recipe("omnizip")
    with pytest.raises(
        UnsupportedPlan, match="the audio encoder's attention, which the adapter of video-salmonn2 does"
    ):
        TransformersEngine.check(adapter.config(), plan)
    TransformersEngine.check(VideoLlama2Adapter().config(), plan)
    watching(monkeypatch, needs={Signal.VISION_ENCODER})
    with pytest.raises(
        UnsupportedPlan, match="the vision encoder's attention, which the adapter of phi4-multimodal does"
    ):
        TransformersEngine.check(Phi4MultimodalAdapter().config(), PLAN)
    TransformersEngine.check(adapter.config(), PLAN)


DEAF = {"audio_attention": ModelAdapter.audio_attention, "vision_attention": ModelAdapter.vision_attention}


def test_an_adapter_of_someone_elses_that_does_not_tell_is_refused_on_entry(case, monkeypatch):
    deaf = type("Deaf", (type(case.adapter),), DEAF)()
    watching(monkeypatch, needs={case.signal})
    with pytest.raises(UnsupportedPlan, match="does not provide"), prune(case.model, PLAN, adapter=deaf):
        pass


@torch.no_grad()
def test_a_wanted_signal_is_the_same_and_none_where_it_is_not_provided(case, monkeypatch):
    prepared = case.prepare(0)
    needed = seen(case, prepared, monkeypatch)[0]
    deaf = type("Deaf", (type(case.adapter),), DEAF)()
    watching(monkeypatch, wants=ENCODER_SIGNALS)
    for adapter in (case.adapter, deaf):
        SEEN.clear()
        with prune(case.model, PLAN, layouts=prepared.layouts, adapter=adapter):
            case.model.generate(**prepared.inputs, max_new_tokens=1, do_sample=False)
        for signal, attention in (
            (Signal.AUDIO_ENCODER, adapter.audio_attention()),
            (Signal.VISION_ENCODER, adapter.vision_attention()),
        ):
            assert (SEEN[0].get(signal) is None) == (attention is None)
        if adapter is not deaf:
            assert torch.equal(SEEN[0].get(case.signal), needed[case.signal])


def test_it_is_the_same_where_the_model_is_spread_over_devices(case, monkeypatch):
    if case.adapter.name == "video-salmonn2":
        pytest.skip("it has parameters that are in no module that could be spread; videollama2 has the same SigLIP")
    prepared, model = case.prepare(*rows_of(case)[1]), copy.deepcopy(case.model)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # others count tokens as only a real device does
    spread(model, case.adapter.decoder(model).layers, lambda number: number % 2 == 1)
    plain = seen(case, prepared, monkeypatch)
    with pretended():
        moved = replace(prepared, inputs=on_device(prepared.inputs, model))
        found = seen(replace(case, model=model), moved, monkeypatch)
        for layer, view in plain.items():
            expected = view[case.signal]
            assert (found[layer][case.signal].cpu() - expected).abs().max() < 1e-5 * expected.max()


def test_it_is_in_float32_in_a_model_that_is_not(case, monkeypatch):
    prepared, model = case.prepare(*rows_of(case)[1]), copy.deepcopy(case.model).bfloat16()
    view = seen(replace(case, model=model), replace(prepared, inputs=on_device(prepared.inputs, model)), monkeypatch)[0]
    assert view[case.signal].dtype == torch.float32
    assert view[case.signal].isfinite().all()
