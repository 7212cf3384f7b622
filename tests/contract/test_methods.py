"""What every method must do; a new one is tested without a line here."""

from dataclasses import fields

import pytest
import torch

from fastav.budgets import Share
from fastav.errors import PlanError, UndeclaredSignal
from fastav.layout import MEDIA, Modality
from fastav.method import ENCODER_SIGNALS, LAYOUT_SIGNALS, BatchLayout, Method, Signal, View, method_of
from fastav.plan import Keep, Step
from fastav.pruning.device_layout import batch_layout
from fastav.pruning.selection import SelectionGroups, select
from fastav.registry import METHODS
from support.tiny import layout_of, prompt

ROWS = [prompt(seed=1), prompt(before=5, video=6, audio=3, after=2, seed=2)]


ALL = frozenset(Signal)


def view_of(rows, layer=4, needs=ALL, pools=tuple(frozenset({m}) for m in Modality), wants=frozenset(), provided=ALL):
    layouts = [layout_of(row[0]) for row in rows]
    length = max(len(layout) for layout in layouts)
    layout = batch_layout(layouts, length, torch.device("cpu"))
    position = layout.position[:, :length].float()
    signals = {signal: (position * 0.37).sin() for signal in Signal}
    signals[Signal.HIDDEN_STATES] = (position[..., None] * torch.arange(1, 9) * 0.21).sin()
    signals[Signal.KEYS] = (position[:, None, :, None] * torch.arange(1, 5) * 0.13).cos().expand(-1, 2, -1, -1)
    signals = {signal: scores for signal, scores in signals.items() if signal in provided}
    slots = torch.arange(length).expand(len(rows), length)
    return View(
        layer=layer,
        layout=layout,
        slots=slots,
        pool=SelectionGroups.of(layout.modality, pools).group,
        signals=signals,
        method="position",
        needs=needs,
        wants=wants,
    )


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]()


def test_it_is_a_frozen_method_with_defaults_and_a_docstring(method):
    assert isinstance(method, Method)
    assert type(method).__doc__
    assert method.needs <= set(Signal)
    assert method.wants <= ENCODER_SIGNALS - method.needs
    assert type(method)() == method


def test_it_reads_what_it_declares_and_nothing_else(method):
    view = view_of(ROWS, needs=method.needs, wants=method.wants)
    method.score(view)
    if method.merges:
        method.merge(view, *kept_of(method, view))
    for signal in method.needs | method.wants:  # a signal that is declared and not read would be computed in vain
        less = view_of(ROWS, needs=method.needs - {signal}, wants=method.wants - {signal})
        with pytest.raises(UndeclaredSignal, match=signal):
            (method.score(less), method.merges and method.merge(less, *kept_of(method, view)))


def test_it_does_without_what_it_wants(method):
    view = view_of(ROWS, needs=method.needs, wants=method.wants, provided=ALL - method.wants)
    assert method.score(view).isfinite().all()


@pytest.mark.parametrize("signal", Signal)
def test_a_view_raises_for_what_is_not_declared(signal):
    reads = {
        Signal.FRAMES: (lambda view: view.frame, lambda view: view.place),
        Signal.SECONDS: (lambda view: view.second, lambda view: view.last_second),
        Signal.QUESTION: (lambda view: view.question,),
        Signal.HIDDEN_STATES: (lambda view: view.hidden,),
        Signal.KEYS: (lambda view: view.keys,),
    }.get(signal, (lambda view: view[signal],))
    for read in reads:
        assert read(view_of(ROWS, needs=frozenset({signal}))) is not None
        with pytest.raises(UndeclaredSignal, match=f"method 'position' reads .*Signal.{signal.name}"):
            read(view_of(ROWS, needs=ALL - {signal}))


def test_layout_only_follows_from_what_is_declared(method):
    assert method.layout_only == (method.needs | method.wants <= LAYOUT_SIGNALS)
    if method.layout_only:  # whatever the model computes, the scores are the same
        view = view_of(ROWS, needs=method.needs)
        other = View(
            layer=4,
            layout=view._layout,
            slots=view.slots,
            pool=view._pool,
            signals={},
            method="position",
            needs=method.needs,
        )
        assert torch.equal(method.score(view), method.score(other))


def test_scores_are_finite_float_and_repeatable(method):
    view = view_of(ROWS)
    scores = method.score(view)
    assert scores.shape == view.slots.shape
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(scores, method.score(view))


def test_a_row_scores_the_same_alone_and_padded_in_a_batch(method):
    batch = method.score(view_of(ROWS))
    for b, row in enumerate(ROWS):
        alone, padded = method.score(view_of([row]))[0], batch[b, -row.shape[1] :]
        # sums over a few dozen features, which a kernel for other shapes may add up in another order
        assert (alone - padded).abs().max() <= 64 * 2**-24 * alone.abs().max()


def nowhere(view):
    """The view without data: on such tensors whatever would wait for a device fails, such as a mask as index."""
    planes = {f.name: getattr(view._layout, f.name) for f in fields(view._layout)}
    empty = {name: plane.to("meta") if isinstance(plane, torch.Tensor) else plane for name, plane in planes.items()}
    signals = {signal: scores.to("meta") for signal, scores in view._signals.items()}
    return View(
        layer=view.layer,
        layout=BatchLayout(**empty),
        slots=view.slots.to("meta"),
        pool=view._pool.to("meta"),
        signals=signals,
        method="position",
        needs=view._needs,
    )


def test_scoring_never_looks_at_data(method):
    view = view_of(ROWS)
    assert method.score(nowhere(view)).shape == view.slots.shape


def kept_of(method, view):
    """What stays of a view where three quarters of each modality do."""
    pools = [(frozenset({m}), ((view.modality == m).sum(1) * 3 + 3) // 4) for m in (Modality.AUDIO, Modality.VIDEO)]
    text = (view.modality == Modality.TEXT).sum(1)
    width = int((sum(count for _, count in pools) + text).max())
    return select(method.score(view), view.modality, pools, width)


def test_what_stays_changes_only_where_a_method_merges(method):
    view = view_of(ROWS)
    chosen, real = kept_of(method, view)
    plain = torch.stack([view.hidden[row, chosen[row]] for row in range(len(ROWS))])
    merged = method.merge(view, chosen, real)
    assert torch.equal(Method.merge(method, view, chosen, real), plain)
    assert method.merges == (type(method).merge is not Method.merge)
    changed = (merged != plain).any(-1) & real
    assert changed.any() == method.merges
    assert merged[real].isfinite().all()
    text = view.modality.gather(1, chosen) == 0
    assert not (changed & text).any()


def test_merging_a_row_alone_and_in_a_batch_is_alike_and_keeps_the_dtype(method):
    view = view_of(ROWS)
    chosen, real = kept_of(method, view)
    batch = method.merge(view, chosen, real)
    for row, ids in enumerate(ROWS):
        single = view_of([ids])
        kept, there = kept_of(method, single)
        alone = method.merge(single, kept, there)[0]
        assert (alone - batch[row, real[row]]).abs().max() < 1e-6
    half = View(
        layer=view.layer,
        layout=view._layout,
        slots=view.slots,
        pool=view._pool,
        signals=view._signals | {Signal.HIDDEN_STATES: view.hidden.bfloat16()},
        method="position",
        needs=view._needs,
    )
    assert method.merge(half, chosen, real).dtype == torch.bfloat16


def test_merging_never_looks_at_data(method):
    view = view_of(ROWS)
    chosen, real = kept_of(method, view)
    assert method.merge(nowhere(view), chosen.to("meta"), real.to("meta")).shape == (*chosen.shape, 8)


def test_random_differs_by_seed_layer_and_position_and_is_uniform():
    long = [prompt(video=3000, audio=1000)]
    scores = METHODS["random"](seed=1).score(view_of(long))[0]
    assert 0 <= scores.min() < 0.01 < 0.99 < scores.max() < 1
    assert abs(scores.mean() - 0.5) < 0.02
    assert scores.unique().numel() > 3900
    others = [METHODS["random"](seed=2).score(view_of(long))[0], METHODS["random"](seed=1).score(view_of(long, 5))[0]]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([scores, other]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([scores[1:], scores[:-1]]))[0, 1]) < 0.05


def test_keep_first_takes_turns_where_position_does_not():
    view = view_of(ROWS[:1], pools=[frozenset(MEDIA)])
    first, position = METHODS["keep-first"]().score(view)[0], METHODS["position"]().score(view)[0]
    video, audio = 3, 3 + 16
    assert first[video] == first[audio] > first[video + 1]
    assert position[video] > position[video + 1] > position[audio]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sed": 1}, "its options: seed"), ({"seed": -1}, "whole number"), ({"seed": "x"}, "seed")],
)
def test_wrong_options_are_refused(options, message):
    step = Step(layers="1", method="random", options=options, keep=Keep(media=Share(0.5)))
    with pytest.raises(PlanError, match=message):
        method_of(step)


@pytest.mark.parametrize("attribute", ["needs", "wants"])
@pytest.mark.parametrize("signals", [["keys"], frozenset({"hiden-states"}), None])
def test_declarations_that_are_no_signals_are_refused(monkeypatch, attribute, signals):
    method = METHODS["position"]
    monkeypatch.setattr(method, attribute, signals)
    with pytest.raises(PlanError, match=f"must declare `{attribute}`"):
        method_of(Step(layers="1", method="position", keep=Keep(media=Share(0.5))))


def test_only_the_encoders_attention_can_be_wanted(monkeypatch):
    step = Step(layers="1", method="position", keep=Keep(media=Share(0.5)))
    monkeypatch.setattr(METHODS["position"], "wants", ENCODER_SIGNALS)
    assert not method_of(step).layout_only
    monkeypatch.setattr(METHODS["position"], "wants", frozenset({Signal.AUDIO_ENCODER, Signal.KEYS}))
    with pytest.raises(PlanError, match="wants keys: only audio-encoder and vision-encoder"):
        method_of(step)


def test_a_view_gives_what_a_method_wants_or_nothing():
    wanted, other = Signal.VISION_ENCODER, Signal.AUDIO_ENCODER
    view = view_of(ROWS, needs=frozenset({Signal.WINDOW}), wants=frozenset({wanted}))
    assert torch.equal(view.get(wanted), view.get("vision-encoder"))
    assert torch.equal(view.get(Signal.WINDOW), view[Signal.WINDOW])
    assert view_of(ROWS, needs=frozenset(), wants=frozenset({wanted}), provided=ALL - {wanted}).get(wanted) is None
    with pytest.raises(UndeclaredSignal, match=other):
        view.get(other)
    with pytest.raises(UndeclaredSignal, match=wanted) as error:
        view[wanted]
    assert "view.get(Signal.VISION_ENCODER)" in error.value.hint
    with pytest.raises(PlanError, match="is not a score"):
        view.get(Signal.FRAMES)


def test_a_view_takes_names_of_signals_and_refers_to_its_properties():
    view = view_of(ROWS)
    assert torch.equal(view["last-query"], view[Signal.LAST_QUERY])
    with pytest.raises(PlanError, match="is not a score") as error:
        view[Signal.FRAMES]
    assert "view.place" in error.value.hint
    with pytest.raises(UndeclaredSignal):
        view_of(ROWS, needs=frozenset())["last-query"]
