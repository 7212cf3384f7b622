"""The state of a running prefill, for every engine: the remaining tokens, and the signals that methods read."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastav.errors import PlanError, UnsupportedPlan
from fastav.layout import MEDIA, Layout, Modality
from fastav.method import ENCODER_SIGNALS, OWN_SIGNALS, BatchLayout, Method, Signal, View
from fastav.pruning import device_layout, indexing
from fastav.pruning.attention import attention_rows, last_query_attention
from fastav.pruning.compiled import CompiledPlan
from fastav.pruning.device_layout import CutCounts, Pools
from fastav.pruning.indexing import TokenSubset
from fastav.pruning.rollout import LayerAttention, rollout_row
from fastav.pruning.selection import SelectionGroups, select_grouped, select_uniform

WINDOW = 32  # queries of the observation window, as in SnapKV's paper

_LAST_QUERY = frozenset({Signal.LAST_QUERY, Signal.OWN_LAST_QUERY})
_TEXT_QUERIES = frozenset({Signal.TEXT_QUERIES, Signal.OWN_TEXT_QUERIES})

BroadcastIndices = Callable[[Tensor], Tensor]  # rank 0's indices, where several ranks run one model

# moved between devices with the hidden states; keys and the rollout's inputs are read on the device that made them
_MOVED = ("layout", "slots", "valid", "columns", "counts", "groups", "layer_tokens", "signals")


class CutRecord(NamedTuple):
    """One cut of a running prefill, for `PruningState.on_cut`.

    layer, method, is_cache_only: as in `fastav.inspection.Cut`. slots: columns of the tokens that remained before it.
    is_candidate: whether they compete for its budgets. scores: of its method. is_kept: whether they stay.
    """

    layer: int
    method: str
    is_cache_only: bool
    slots: Int[Tensor, "batch tokens"]
    is_candidate: Bool[Tensor, "batch tokens"]
    scores: Float[Tensor, "batch tokens"]
    is_kept: Bool[Tensor, "batch tokens"]


@dataclass(slots=True, kw_only=True)
class PruningState:
    """The state of one running prefill of a batch; made by `start`.

    A prefill of a later turn (new media after what a cache holds) is a prefill of the turn's tokens: all fields but
    `cached` count its columns from the turn's first. No key of an earlier token is a candidate of its cuts.

    layout: all tokens of the batch. length: number of columns of the padded prompt. slots, valid: columns of the
    remaining tokens, and which of them are real (None: all). columns: slots, or any column for a slot without a token.
    past: number of columns of the sequence before this prompt. cached: tokens that each layer's cache held before this
    prefill, by column of the whole sequence; empty for a first prefill.
    counts: of every cut of tokens, then of every cut in a cache. max_question_len, media_tokens: of the prompts; their
    numbers of audio, video and image tokens.
    layer_tokens: the tokens of each layer so far, whose keys later layers may share. history: (layer, slots) after
    every cut. encoder_scores: of each encoder signal, the scores that each call of the encoder gave, in order.
    encoder_copies: of encoder signals, how many rows in a row are copies of a prompt that the encoder saw once; 1 for
    others. groups: selection groups of all tokens, by pools. joined: results of `key_tokens`, with what they join.
    next_cut: index of the next cut. on_cut: called with every cut that is made; None for no records.
    """

    compiled: CompiledPlan
    layout: BatchLayout
    length: int
    slots: Int[Tensor, "batch kept"]
    valid: Bool[Tensor, "batch kept"] | None
    counts: Sequence[CutCounts]
    max_question_len: int
    media_tokens: Mapping[Modality, int]
    layer_tokens: dict[int, TokenSubset]
    history: list[tuple[int, Tensor]]
    columns: Int[Tensor, "batch kept"]
    broadcast_indices: BroadcastIndices | None
    past: int = 0
    cached: Sequence[TokenSubset] = ()
    signals: dict[Signal, Tensor] = field(default_factory=dict[Signal, Tensor])
    keys: Tensor | None = None
    attentions: list[LayerAttention] = field(default_factory=list[LayerAttention])
    encoder_scores: dict[Signal, list[Tensor]] = field(default_factory=dict[Signal, list[Tensor]])
    encoder_copies: dict[Signal, int] = field(default_factory=dict[Signal, int])
    groups: dict[Pools, SelectionGroups] = field(default_factory=dict[Pools, SelectionGroups])
    joined: dict[Any, tuple[TokenSubset, TokenSubset, TokenSubset]] = field(default_factory=dict[Any, Any])
    next_cut: int = 0
    on_cut: Callable[[CutRecord], None] | None = None

    @classmethod
    def start(
        cls,
        compiled: CompiledPlan,
        layouts: Sequence[Layout],
        length: int,
        device: torch.device,
        *,
        past: int = 0,
        cached: Sequence[TokenSubset] = (),
        broadcast_indices: BroadcastIndices | None = None,
    ) -> "PruningState":
        """The state before the first layer.

        layouts, length: of the padded prompts alone, without what a cache holds. past, cached: as in the class.
        broadcast_indices: makes all ranks of one model keep the same tokens.
        Raises: PlanError.
        """
        layout = device_layout.batch_layout(layouts, length, device)
        slots = torch.arange(length, device=device).expand(len(layouts), length)
        padded = any(len(one) < length for one in layouts)
        tokens = TokenSubset(slots, layout.modality[:, :length] >= 0 if padded else None)
        return cls(
            compiled=compiled,
            layout=layout,
            length=length,
            slots=slots,
            valid=tokens.valid,
            columns=slots,
            counts=device_layout.cut_counts(compiled.plan, layouts, compiled.depth, device),
            max_question_len=max(int(device_layout.question_mask(one).sum()) for one in layouts),
            media_tokens={modality: sum(one.count(modality) for one in layouts) for modality in MEDIA},
            layer_tokens=dict.fromkeys(range(compiled.first_layer), tokens),
            history=[(0, slots)],
            broadcast_indices=broadcast_indices,
            past=past,
            cached=cached,
        )

    @property
    def total(self) -> int:
        """Number of columns of the whole sequence, at the end of this prompt."""
        return self.past + self.length

    @property
    def is_full(self) -> bool:
        """Whether all tokens remain, and no row is padded."""
        return self.slots.shape[1] == self.length and self.valid is None

    def move_to(self, device: torch.device) -> None:
        """Continue on another device: a decoder may be spread over several.

        Tensors that later layers or cuts read are moved once per change of device.
        """
        if device == self.slots.device:
            return
        moved: dict[int, tuple[Tensor, Tensor]] = {}  # so that shared tensors remain shared

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                if id(value) not in moved:
                    moved[id(value)] = value, value.to(device)
                return moved[id(value)][1]
            if isinstance(value, BatchLayout):
                return replace(value, **{field.name: move(getattr(value, field.name)) for field in fields(value)})
            if isinstance(value, dict):
                return {key: move(entry) for key, entry in cast("dict[Any, Any]", value).items()}
            if isinstance(value, list):
                return [move(entry) for entry in cast("list[Any]", value)]
            if isinstance(value, CutCounts | SelectionGroups | TokenSubset):
                return value._replace(**{name: move(getattr(value, name)) for name in value._fields})
            return value

        for name in _MOVED:
            setattr(self, name, move(getattr(self, name)))

    # --- cuts

    def own_signals(self, index: int) -> frozenset[Signal]:
        """The signals of a layer's own attention that its cuts read; none if they drop nothing of these prompts.

        `observe` computes them before the layer's first cut, which all its cuts then share.
        """
        numbers = [number for number, (layer, _) in enumerate(self.compiled.cuts) if layer == index]
        if not numbers or self._keeps_all(self.counts[numbers[-1]]):
            return frozenset()
        return OWN_SIGNALS & frozenset[Signal]().union(*(self.compiled.cuts[number][1].needs for number in numbers))

    def _keeps_all(self, counts: CutCounts) -> bool:
        """Whether a cut to these counts drops nothing of what remains."""
        return counts.width == self.slots.shape[1] and not counts.ragged and self.valid is None

    def cut(self, index: int, hidden: Tensor) -> Tensor:
        """Make the cuts before a layer, and return the hidden states of the kept tokens."""
        self.move_to(hidden.device)
        cuts = self.compiled.cuts
        while self.next_cut < len(cuts) and cuts[self.next_cut][0] == index:
            counts, method = self.counts[self.next_cut], cuts[self.next_cut][1]
            self.next_cut += 1
            if self._keeps_all(counts):
                continue
            view = self._view(index, method, hidden, counts)
            scores = self._scores(method, view)
            indices, valid = self._select(counts, scores)
            indices = indices if self.broadcast_indices is None else self.broadcast_indices(indices)
            self._record(index, method, counts.pools, scores, indices, valid, is_cache_only=False)
            if method.merges:
                all_valid = torch.ones_like(indices, dtype=torch.bool)
                hidden = method.merge(view, indices, all_valid if valid is None else valid)
            else:
                hidden = indexing.take(hidden, indices)
            has_next = self.next_cut < len(cuts) and cuts[self.next_cut][0] == index
            self._keep(indices, valid, has_next=has_next)
            self.history.append((index, self.slots))
        if index >= self.compiled.last_rollout_layer:
            self.attentions.clear()
        return hidden

    def select_in_cache(
        self, number: int, hidden: Tensor
    ) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"] | None]:
        """Indices of the tokens to keep in the cache of a layer that has just run, and which are valid (None: all).

        number: index of the cut among `cache_cuts`. hidden: the layer's output.
        """
        self.move_to(hidden.device)
        index, method = self.compiled.cache_cuts[number]
        counts = self.counts[len(self.compiled.cuts) + number]
        scores = self._scores(method, self._view(index, method, hidden, counts))
        indices, valid = self._select(counts, scores)
        self._record(index, method, counts.pools, scores, indices, valid, is_cache_only=True)
        return indices, valid

    def places_among(self, tokens: TokenSubset) -> Int[Tensor, "batch kept"]:
        """The index of each remaining token among those of an earlier layer; any number for a slot without a token."""
        places = torch.arange(tokens.slots.shape[1], device=tokens.slots.device).expand_as(tokens.slots)
        columns = torch.zeros(len(places), self.length + 1, dtype=torch.long, device=places.device)
        return columns.scatter(1, tokens.slots, places).gather(1, self.slots)

    def _record(
        self,
        layer: int,
        method: Method,
        pools: Pools,
        scores: Float[Tensor, "batch tokens"],
        indices: Int[Tensor, "batch width"],
        valid: Bool[Tensor, "batch width"] | None,
        *,
        is_cache_only: bool,
    ) -> None:
        """Report a cut to `on_cut`.  indices, valid: of the tokens that stay among those that remain."""
        if self.on_cut is None:
            return
        places = indices if valid is None else indices.masked_fill(~valid, scores.shape[1])
        is_kept = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        group = self._groups(pools).group.gather(1, self.slots)
        self.on_cut(
            CutRecord(
                layer=layer,
                method=self.compiled.name_of(method),
                is_cache_only=is_cache_only,
                slots=self.slots,
                is_candidate=group < len(pools),
                scores=scores,
                is_kept=is_kept.scatter(1, places, True)[:, :-1],
            )
        )

    def _select(
        self, counts: CutCounts, scores: Float[Tensor, "batch tokens"]
    ) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"] | None]:
        """Indices of the tokens to keep among those that remain, and which are valid (None: all)."""
        bias, group = self._groups(counts.pools)
        bias = bias.gather(1, self.slots)
        if len(counts.pools) == 1 and not counts.ragged:
            return select_uniform(scores, bias, counts.width), None
        indices, valid = select_grouped(scores, bias, group.gather(1, self.slots), counts.limits, counts.width)
        return indices, valid if counts.ragged else None

    def _groups(self, pools: Pools) -> SelectionGroups:
        """The selection groups of all tokens."""
        if pools not in self.groups:
            self.groups[pools] = SelectionGroups.of(self.layout.modality, pools, last=self.length - 1)
        return self.groups[pools]

    def _keep(
        self, indices: Int[Tensor, "batch width"], valid: Bool[Tensor, "batch width"] | None, *, has_next: bool
    ) -> None:
        """Continue with these of the remaining tokens.  has_next: whether the same layer has another cut."""
        slots = self.slots.gather(1, indices)
        self.slots = slots if valid is None else slots.masked_fill(~valid, self.length)
        self.columns = slots if valid is None else slots.clamp(max=self.length - 1)
        self.valid = valid
        # other signals are computed again before the cuts of later layers
        reused = {s: score for s, score in self.signals.items() if has_next or s is Signal.GIVEN}
        self.signals = {signal: score.gather(1, indices) for signal, score in reused.items()}
        self.keys = indexing.take_keys(self.keys, indices) if has_next and self.keys is not None else None

    # --- signals

    def _view(self, index: int, method: Method, hidden: Tensor, counts: CutCounts) -> View:
        """The remaining tokens, as a method reads them.  counts: of the cut."""
        for signal in self.compiled.signals_of(method) & ENCODER_SIGNALS:
            self.signals[signal] = self._encoder_signal(signal).gather(1, self.slots)
        if Signal.ROLLOUT in method.needs:
            start = torch.zeros(self.slots.shape[0], self.length + 1, device=hidden.device)
            start[:, self.length - 1] = 1.0
            self.signals[Signal.ROLLOUT] = rollout_row(self.attentions, start).gather(1, self.slots)
        signals = dict(self.signals)
        signals[Signal.HIDDEN_STATES] = self.compiled.adapter.attending_hidden(hidden)
        if self.keys is not None:
            signals[Signal.KEYS] = self.keys
        return View(
            layer=index,
            layout=self.layout,
            slots=self.slots,
            pool=self._groups(counts.pools).group,
            signals=signals,
            method=self.compiled.name_of(method),
            needs=method.needs,
            wants=method.wants,
            kept=dict(zip(counts.pools, counts.most, strict=True)),
        )

    def _scores(self, method: Method, view: View) -> Float[Tensor, "batch tokens"]:
        """A method's scores.  Raises: PlanError if they have another shape than the remaining tokens."""
        scores = method.score(view)
        if scores.shape != view.slots.shape:
            raise PlanError(
                f"method {self.compiled.name_of(method)!r} returned scores of shape {list(scores.shape)}, the "
                f"remaining tokens have {list(view.slots.shape)}",
                "return one score per remaining token",
            )
        return scores

    def _encoder_signal(self, signal: Signal) -> Float[Tensor, "batch columns"]:
        """Encoder attention at the tokens of the encoder's modalities; 0 at all others.

        Raises: UnsupportedPlan unless a call of the encoder scored the tokens of each modality that is in the prompts.
        """
        copies, calls = self.encoder_copies.get(signal, 1), [*filter(len, self.encoder_scores.get(signal, ()))]
        attention = self.compiled.encoder_attentions[signal]
        expected = {one: n // copies for one in attention.modalities if (n := self.media_tokens[one])}
        if (scored := [len(call) for call in calls]) != [*expected.values()]:
            tokens = " and ".join(f"{n} {one.label}" for one, n in expected.items()) or "no such"
            raise UnsupportedPlan(
                f"the prompts have {tokens} tokens, and the {signal.removesuffix('-encoder')} encoder scored "
                f"{' and '.join(map(str, scored)) or 'none'}",
                "pass the media themselves to forward or generate, so that the encoder runs in that call",
            )
        modality = self.layout.modality[::copies]
        scores = torch.zeros(modality.shape, device=modality.device)
        for one, call in zip(expected, calls, strict=True):
            scores = scores.masked_scatter(modality == one, call.to(scores.device))
        return scores.repeat_interleave(copies, dim=0)

    def enter_layer(self, index: int) -> TokenSubset:
        """Record that a layer runs on the remaining tokens, and return the tokens whose keys it reads."""
        self.layer_tokens[index] = TokenSubset(self.slots, self.valid)
        return self.key_tokens(index)

    def key_tokens(self, index: int) -> TokenSubset:
        """The tokens whose keys a layer reads, by column of the whole sequence: cached ones, then this prefill's."""
        source = self.compiled.kv_sources[index]
        # a layer whose hook was lost has no record, which is an error once the prefill is verified
        tokens = self.layer_tokens.get(source, TokenSubset(self.slots, self.valid))
        if not self.cached:
            return tokens
        cached = self.cached[source]
        key = (id(cached.slots), id(tokens.slots))
        if key not in self.joined:
            self.joined[key] = cached, tokens, cached.followed_by(tokens, self.past)
        return self.joined[key][2]

    def layer_attention(
        self, index: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> LayerAttention:
        """The inputs of one layer's attention, with the tokens of its queries and keys."""
        self.move_to(query.device)
        key_slots = self.layer_tokens[self.compiled.kv_sources[index]].slots
        if self.cached:  # no earlier token attends to this prompt, so its share of the rollout is not needed
            cached = key_slots.new_full((key_slots.shape[0], key.shape[2] - key_slots.shape[1]), self.length)
            key_slots = torch.cat([cached, key_slots], dim=1)
        slots = self.slots[:, -query.shape[2] :]
        return LayerAttention(query, key, mask, scaling, slots, key_slots, self.key_tokens(index).valid)

    def replace_signal(self, signal: Signal, scores: Float[Tensor, "batch tokens"]) -> None:
        """Replace a signal that `observe` has computed, for example by its mean over ranks."""
        self.signals[signal] = scores

    def observe(
        self, index: int, signals: Collection[Signal], query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        """Compute signals for later cuts from one layer's attention."""
        self.move_to(query.device)
        tokens, valid = query.shape[2], self.key_tokens(index).valid
        scores: dict[Signal, Tensor] = {}  # of all keys, cached ones included
        if last := _LAST_QUERY.intersection(signals):
            scores |= dict.fromkeys(last, last_query_attention(query, key, mask, valid, scaling))
        if text := _TEXT_QUERIES.intersection(signals):
            first = max(0, tokens - self.max_question_len)
            rows = attention_rows(query, key, mask, valid, scaling, first=first)
            weight = self.layout.question.gather(1, self.slots)[:, first:].float()
            mean = torch.einsum("bq,bqt->bt", weight / weight.sum(1, keepdim=True), rows)
            scores |= dict.fromkeys(text, mean)
        if Signal.WINDOW in signals:
            rows = attention_rows(query, key, mask, valid, scaling, first=max(0, tokens - WINDOW))
            scores[Signal.WINDOW] = rows.sum(1) / rows.sum((1, 2))[:, None]
        self.signals |= {signal: score[:, -tokens:] for signal, score in scores.items()}
        if Signal.KEYS in signals:
            self.keys = key[:, :, -tokens:]
        if Signal.ROLLOUT in signals:
            self.attentions.append(self.layer_attention(index, query, key, mask, scaling))
