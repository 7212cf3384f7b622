"""One prefill while it runs: which tokens are still there, what methods are shown, and what each layer is given."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedConfig

from fastav import cache_argument
from fastav.attention import attention_rows, last_query_attention
from fastav.engines.transformers import decoder_layers, gather, guards, staging
from fastav.engines.transformers.cache import PrunedLayer
from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.layout import Modality
from fastav.method import Contest, Method, Prompt, Signal, View, select_even, select_of
from fastav.plan import Plan
from fastav.rollout import Captured, rollout_row

WINDOW = 32  # queries of the observation window, as in SnapKV's paper

Cuts = tuple[tuple[int, Method], ...]

# keys are asked for where they were seen; so is what the rollout has captured, to which a row of weights goes
_FOLLOWING = ("prompt", "slots", "valid", "columns", "counts", "contests", "stored", "signals")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which layers of a decoder are cut, and by which methods.

    cuts: of tokens, entering a layer. cache_cuts: of a layer's cache alone. owners: how many layers have a cache.
    """

    plan: Plan
    config: PreTrainedConfig
    cuts: Cuts
    cache_cuts: Cuts
    owners: int
    depth: int

    @property
    def first(self) -> int:
        """The first layer at which anything happens; the depth if nothing does."""
        return min((layer for layer, _ in (*self.cuts, *self.cache_cuts)), default=self.depth)

    @property
    def methods(self) -> tuple[Method, ...]:
        """Of all cuts."""
        return tuple(method for _, method in (*self.cuts, *self.cache_cuts))

    @cached_property
    def owner(self) -> str:
        """What the caches of pruned layers are marked with."""
        return self.plan.fingerprint

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens a query of each layer sees at most."""
        return decoder_layers.windows(self.config)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """The layer whose keys each layer reads."""
        return tuple(decoder_layers.source(self.config, layer) for layer in range(self.depth))

    @cached_property
    def last_rollout(self) -> int:
        """The layer that is entered once nobody will ask for the rollout again."""
        cuts = (*self.cuts, *((layer + 1, method) for layer, method in self.cache_cuts))
        return max((layer for layer, method in cuts if Signal.ROLLOUT in method.needs), default=0)

    def wanted(self) -> dict[int, set[Signal]]:
        """What is asked of the attention of which layers.

        A cut of tokens asks the layer before, a cut of a cache that layer itself.
        """
        wanted: dict[int, set[Signal]] = {}
        for layer, method in (*self.cuts, *((layer + 1, method) for layer, method in self.cache_cuts)):
            for signal in method.needs - guards.OUTSIDE:
                for index in range(layer) if signal is Signal.ROLLOUT else [layer - 1]:
                    wanted.setdefault(index, set()).add(signal)
        return wanted


@dataclass(slots=True, kw_only=True)
class Prefill:
    """One running prefill of a batch.

    prompt: all tokens, `length` columns wide. slots, valid: columns of the tokens still there, and which rows of them
    are real (None: all). counts, widths: of every cut, those of caches after those of tokens: how many stay, the
    longest row and whether another is shorter. asking: the most tokens that any row's question has. sounding: audio
    tokens of all rows together. stored: what each layer holds so far, for those that share it. kept: (layer, slots) of
    every cut. columns: slots, and any column where they stand for no token. heard: the attention that audio tokens
    receive in their encoder, in the order of the prompts. contests: of all tokens, by the pools that cuts tell apart.
    rotary: position embeddings of all tokens, cosines and sines in one, beside what they were made of. last_only: the
    model is asked for the last token's logits and no others. agreed: where several processes run one model, what all of
    them keep, from what each would choose.
    """

    schedule: Schedule
    prompt: Prompt
    length: int
    slots: Int[Tensor, "batch kept"]
    valid: Bool[Tensor, "batch kept"] | None
    counts: Sequence[staging.Counts]
    widths: Sequence[tuple[int, bool]]
    asking: int
    sounding: int
    stored: dict[int, gather.Kept]
    kept: list[tuple[int, Tensor]]
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    keys: Tensor | None = None
    captured: list[Captured] = field(default_factory=list)
    heard: list[Tensor] = field(default_factory=list)
    columns: Int[Tensor, "batch kept"] = field(init=False)
    contests: dict[staging.Pools, Contest] = field(default_factory=dict)
    rotary: dict[int, tuple[Sequence[Tensor], Tensor]] = field(default_factory=dict)
    last_only: bool = False
    agreed: Callable[[Tensor], Tensor] | None = None
    next_cut: int = 0
    out: bool = False  # whether the last layer has run, and its output is laid out as the model expects it
    sliced: bool = False  # whether the model went on with the last tokens only
    arguments: dict[Any, tuple[Any, Any]] = field(default_factory=dict)  # those shrunk since the last cut

    def __post_init__(self) -> None:
        self.columns = self.slots

    @property
    def whole(self) -> bool:
        """Whether all tokens are there, and no row is padded."""
        return self.slots.shape[1] == self.length and self.valid is None

    # --- where

    def follow(self, tensor: Tensor) -> None:
        """Go on where this tensor is: a decoder may be spread over devices, and each layer's work is done on its own.

        What later layers or cuts ask for comes along, once for each change of device.
        """
        if (device := tensor.device) == self.slots.device:
            return
        moved: dict[int, tuple[Tensor, Tensor]] = {}  # what is shared stays so

        def there(value: Any) -> Any:
            match value:
                case Tensor():
                    if id(value) not in moved:
                        moved[id(value)] = value, value.to(device)
                    return moved[id(value)][1]
                case Prompt():
                    return replace(value, **{field.name: there(getattr(value, field.name)) for field in fields(value)})
                case dict():
                    return {key: there(one) for key, one in value.items()}
                case tuple() if hasattr(value, "_fields"):
                    return type(value)(*map(there, value))
                case list():
                    return [there(one) for one in value]
            return value

        for name in _FOLLOWING:
            setattr(self, name, there(getattr(self, name)))
        self.arguments.clear()
        self.rotary.clear()

    # --- cuts

    def cut(self, index: int, hidden: Tensor) -> Tensor:
        """The hidden states that enter a layer, of the tokens that stay."""
        self.follow(hidden)
        cuts = self.schedule.cuts
        while self.next_cut < len(cuts) and cuts[self.next_cut][0] == index:
            number, method = self.next_cut, cuts[self.next_cut][1]
            self.next_cut += 1
            if self.widths[number] == (self.slots.shape[1], False) and self.valid is None:
                continue  # nothing goes
            view = self._view(index, method, hidden)
            chosen, real = self._select(number, method.score(view))
            chosen = chosen if self.agreed is None else self.agreed(chosen)
            if method.merges:
                hidden = method.merge(view, chosen, torch.ones_like(chosen, dtype=torch.bool) if real is None else real)
            else:
                hidden = gather.take(hidden, chosen)
            self._keep(chosen, real, again=self.next_cut < len(cuts) and cuts[self.next_cut][0] == index)
            self.kept.append((index, self.slots))
        if index >= self.schedule.last_rollout:
            self.captured.clear()
        return hidden

    def cut_cache(self, number: int, layer: PrunedLayer, hidden: Tensor) -> None:
        """Drop tokens from the cache of a layer that has just run.  number: of the cut, among those of caches."""
        self.follow(hidden)
        index, method = self.schedule.cache_cuts[number]
        view = self._view(index, method, hidden)
        layer.hold(*self._select(len(self.schedule.cuts) + number, method.score(view)))

    def _select(
        self, number: int, scores: Float[Tensor, "batch tokens"]
    ) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"] | None]:
        """Indices of what stays of the tokens still there, and which of them are real (None: all)."""
        (pools, limits), (width, ragged) = self.counts[number], self.widths[number]
        if pools not in self.contests:
            self.contests[pools] = Contest.of(self.prompt.modality, pools, last=self.length - 1)
        contest = self.contests[pools]
        head_start = contest.head_start.gather(1, self.slots)
        if len(pools) == 1 and not ragged:
            return select_even(scores, head_start, width), None
        chosen, real = select_of(scores, head_start, contest.kind.gather(1, self.slots), limits, width)
        return chosen, real if ragged else None

    def _keep(
        self, chosen: Int[Tensor, "batch width"], real: Bool[Tensor, "batch width"] | None, *, again: bool
    ) -> None:
        """Go on with these of the tokens still there.  again: whether the same layer cuts once more."""
        slots = self.slots.gather(1, chosen)
        self.slots = slots if real is None else slots.masked_fill(~real, self.length)
        self.columns = slots if real is None else slots.clamp(max=self.length - 1)
        self.valid = real
        # later layers are asked anew
        lasting = {s: score for s, score in self.signals.items() if again or s is Signal.GIVEN}
        self.signals = {signal: score.gather(1, chosen) for signal, score in lasting.items()}
        self.keys = gather.take_keys(self.keys, chosen) if again and self.keys is not None else None
        self.arguments.clear()

    def _view(self, index: int, method: Method, hidden: Tensor) -> View:
        """What a method is shown of the tokens still there."""
        if Signal.ENCODER in method.needs:
            self.signals[Signal.ENCODER] = self._of_encoder().gather(1, self.slots)
        if Signal.ROLLOUT in method.needs:
            start = torch.zeros(self.slots.shape[0], self.length + 1, device=hidden.device)
            start[:, self.length - 1] = 1.0
            self.signals[Signal.ROLLOUT] = rollout_row(self.captured, start).gather(1, self.slots)
        return View(
            layer=index,
            prompt=self.prompt,
            slots=self.slots,
            signals=self.signals,
            hidden=hidden if hidden.ndim == 3 else hidden[0],  # stacked hidden states (AltUp): the one that attends
            keys=self.keys,
        )

    def _of_encoder(self) -> Float[Tensor, "batch columns"]:
        """What was heard, at the places of audio in the prompts; 0 elsewhere."""
        if (found := sum(len(part) for part in self.heard)) != self.sounding:
            raise UnsupportedPlan(
                f"the prompts hold {self.sounding} audio tokens, and the audio encoder has attended to {found} of them",
                "give the sound itself to forward or generate, so that the encoder runs in there",
            )
        audio = self.prompt.modality == Modality.AUDIO
        scores = torch.zeros(audio.shape, device=audio.device)
        return scores.masked_scatter(audio, torch.cat(self.heard).to(audio.device)) if self.heard else scores

    def capture(self, index: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Captured:
        """What one layer's attention is given, and of which tokens that is."""
        self.follow(query)
        seen = self.stored[self.schedule.sources[index]].slots
        return Captured(query, key, mask, scaling, self.slots[:, -query.shape[2] :], seen, self.valid)

    def observe(
        self, index: int, wanted: Collection[Signal], query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        """Keep what later cuts ask of one layer's attention."""
        self.follow(query)
        tokens = query.shape[2]
        if Signal.LAST_QUERY in wanted:
            self.signals[Signal.LAST_QUERY] = last_query_attention(query, key, mask, self.valid, scaling)
        if Signal.TEXT_QUERIES in wanted:
            first = max(0, tokens - self.asking)
            rows = attention_rows(query, key, mask, self.valid, scaling, first=first)
            asked = self.prompt.question.gather(1, self.slots)[:, first:].float()
            self.signals[Signal.TEXT_QUERIES] = torch.einsum("bq,bqt->bt", asked / asked.sum(1, keepdim=True), rows)
        if Signal.WINDOW in wanted:
            rows = attention_rows(query, key, mask, self.valid, scaling, first=max(0, tokens - WINDOW))
            self.signals[Signal.WINDOW] = rows.sum(1) / rows.sum((1, 2))[:, None]
        if Signal.KEYS in wanted:
            self.keys = key
        if Signal.ROLLOUT in wanted:
            self.captured.append(self.capture(index, query, key, mask, scaling))

    # --- what layers are given

    def layer_arguments(self, index: int, kwargs: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
        """A layer's arguments for the tokens still there, with a cache layer that knows which they are."""
        schedule = self.schedule
        self.stored[index] = gather.Kept(self.slots, self.valid)
        if index < schedule.owners and (cache := cache_argument.in_arguments(kwargs)) is not None:
            layer = PrunedLayer(self.slots, self.valid, self.length, schedule.owner, schedule.windows[index])
            cache.layers[index : index + 1] = [layer]
        seen = self.stored[schedule.sources[index]]
        if self.whole and seen.slots.shape[1] == self.length:
            return kwargs
        self.sliced = self._is_sliced(index, kwargs)
        shrunk = {}
        for name, value in kwargs.items():
            key = (name, id(value), id(seen.slots), self.sliced)
            if key not in self.arguments:
                self.arguments[key] = (value, self._shrink(name, value, seen, dtype))
            shrunk[name] = self.arguments[key][1]
        return shrunk

    def _is_sliced(self, index: int, kwargs: Mapping[str, Any]) -> bool:
        """Whether a layer that shares its keys runs on the prompt's last tokens alone, as no other is read again."""
        rotary = kwargs.get("position_embeddings")
        if index < self.schedule.owners or rotary is None or rotary[0].shape[-2] == self.length:
            return False
        last = rotary[0].shape[-2]
        expected = torch.arange(self.length - last, self.length, device=self.slots.device)
        if last > 1 and not bool((self.slots[:, -last:] == expected).all()):
            raise UnsupportedPlan(f"logits_to_keep={last} asks for dropped tokens", "ask for the last token's logits")
        return True

    def _shrink(self, name: str, value: Any, seen: gather.Kept, dtype: torch.dtype) -> Any:
        index = self.columns
        kind: Any = self.schedule.config._attn_implementation
        if isinstance(value, Tensor):
            value = value.to(index.device)  # the decoder makes masks and the like where its first layer runs
        match name, value:
            case "attention_mask", _ if self.sliced:
                return gather.last_rows_mask(value, seen, self.length, kind=kind, dtype=dtype)
            case "attention_mask", _:
                here = gather.Kept(self.slots, self.valid)
                return gather.prefill_mask(value, here, seen, kind=kind, dtype=dtype)
            case "position_ids" | "cache_position", Tensor():
                # flash attention takes gaps at batch size 1 for packed sequences; RoPE reads position_embeddings
                return None if "flash" in kind else gather.take_positions(torch.atleast_2d(value), index)
            case (("position_embeddings" | "per_layer_input"), _) if self.sliced:
                return value
            case "position_embeddings", (Tensor(), Tensor()):
                return gather.take(self._rotary(value), index).unbind()
            case "per_layer_input", Tensor():
                return gather.take(value, index)
            case _, Tensor() if self.length in value.shape:
                raise UnsupportedModel(f"layers take {name} {list(value.shape)}, whose token axis is not known")
        return value

    def _rotary(self, parts: Sequence[Tensor]) -> Tensor:
        """Cosines and sines of all tokens in one tensor, so that every cut gathers once."""
        key = id(parts[0])
        if key not in self.rotary:
            self.rotary[key] = (parts, torch.stack(list(parts)).to(self.slots.device))
        return self.rotary[key][1]

    # --- what comes out

    def handed_on(self, hidden: Tensor) -> Tensor:
        """Hidden states at full length again, zero where tokens were dropped; or the last token's alone."""
        self.follow(hidden)
        if self.last_only:
            return hidden[..., -1:, :]
        full = hidden.new_zeros(*hidden.shape[:-2], self.length + 1, hidden.shape[-1])
        full.scatter_(-2, self.slots[..., None].expand_as(hidden), hidden)
        return full[..., : self.length, :]

    def with_visual(self, hidden: Tensor, places: Tensor, embeds: Tensor) -> Tensor:
        """Deepstack: what early layers add to the video tokens, for those of them that are still there.

        Where the last layer is such a layer, at the places that it has been laid out at.
        """
        self.follow(hidden)
        whole = hidden.new_zeros(hidden.shape[0], self.length + 1, hidden.shape[-1])
        whole[:, :-1][places.to(hidden.device)] = embeds.to(hidden.device, hidden.dtype)
        if not self.out:
            return hidden + gather.take(whole, self.slots)
        kept = torch.zeros(whole.shape[:2], dtype=torch.bool, device=hidden.device).scatter(1, self.slots, True)
        return hidden + whole.masked_fill(~kept[..., None], 0)[:, self.length - hidden.shape[1] : self.length]
