"""Pruning a transformers model in place, for as long as a context lasts.

Hooks on decoder layers shrink hidden states, position embeddings and masks to the tokens that stay; each layer's cache
holds only those; after the last layer the sequence is laid out at full length again, so that everything around the
decoder sees what it expects. No model code is replaced.
"""

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from fastav.adapter import ModelAdapter, adapter_for
from fastav.attention import attention_rows, last_query_attention
from fastav.engines.transformers import gather, guards, staging
from fastav.engines.transformers.cache import PrunedLayer
from fastav.engines.transformers.tap import tapped
from fastav.errors import PlanError, UnsupportedModel, UnsupportedPlan
from fastav.layout import MEDIA, Layout, Modality
from fastav.method import Method, Prompt, Signal, View, method_of, select
from fastav.plan import Plan
from fastav.rollout import Captured, rollout_row

WINDOW = 32  # queries of the observation window, as in SnapKV's paper
_claims = threading.Lock()
_pruned: WeakSet[nn.Module] = WeakSet()


@contextmanager
def prune(
    model: Any,
    plan: Plan | str = "fastav",
    *,
    layouts: Sequence[Layout] | None = None,
    scores: Float[Tensor, "batch tokens"] | None = None,
    adapter: ModelAdapter | None = None,
) -> Iterator["Pruning"]:
    """While active, `model` drops tokens as the plan says, in `forward` and in `generate`; afterwards it is as before.

    model: of a model that also speaks (Qwen-Omni), its thinker is pruned; ask such a whole model for text only.
    plan: a `Plan`, or the name of one of the model's presets.
    layouts: one per prompt of the batch. Without them they are read off `input_ids`, which on a GPU waits for the
    device once per prefill.
    scores: of every prompt token, for plans with the method `given`, shaped like `input_ids`.

    Logits and hidden states at places of dropped tokens are those of a zero vector; those of text are exact. Keep
    decoding inside the context. Exact means: as if every layer hid the dropped tokens by an attention mask.

    Raises, on entry: UnknownName, PlanError, UnsupportedModel, UnsupportedPlan; while active: UnsupportedPlan for what
    docs/exactness.md lists, such as assisted decoding, chunked prefill, foreign caches, labels and gradients.
    """
    guards.check_model(model)
    named = {*(model.config.architectures or ()), type(model).__name__}
    adapter = adapter or adapter_for(named, model.config.to_dict())
    chosen = plan if isinstance(plan, Plan) else adapter.preset(plan)
    part = adapter.language_model(model)
    pruning = Pruning(part, chosen, adapter, layouts, scores)
    with pruning._installed(), nullcontext() if part is model else guards.speechless(model):
        yield pruning


@dataclass(slots=True, kw_only=True)
class _Prefill:
    """One running prefill."""

    prompt: Prompt
    length: int
    slots: Int[Tensor, "batch kept"]
    valid: Bool[Tensor, "batch kept"] | None
    counts: list[staging.Counts]
    widths: list[tuple[int, bool]]  # per cut: longest row, and whether another row is shorter
    next_cut: int = 0
    sliced: bool = False  # whether the model went on with the last tokens only
    asking: int  # the most tokens that any row's question has
    stored: dict[int, gather.Kept]  # what layers hold, for those that share it
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    keys: Tensor | None = None
    captured: list[Captured] = field(default_factory=list)
    arguments: dict[tuple[str, int, int, bool], tuple[Any, Any]] = field(
        default_factory=dict
    )  # shrunk, since the last cut


def _wanted(cuts: Sequence[tuple[int, Method]]) -> dict[int, set[Signal]]:
    """What is asked of the attention of which layers."""
    wanted: dict[int, set[Signal]] = {}
    for layer, method in cuts:
        for signal in method.needs - {Signal.GIVEN}:
            for index in range(layer) if signal is Signal.ROLLOUT else [layer - 1]:
                wanted.setdefault(index, set()).add(signal)
    return wanted


class _Decode:
    """A forward on top of a pruned cache."""


class Pruning:
    """A model being pruned.  `tokens` tells what the last prefill kept."""

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        adapter: ModelAdapter,
        layouts: Sequence[Layout] | None,
        scores: Float[Tensor, "batch tokens"] | None,
    ) -> None:
        self.model, self.plan, self.adapter = model, plan, adapter
        self._layouts, self._scores = layouts, scores
        self._decoder = adapter.decoder(model)
        self._layers = list(self._decoder.layers)  # pyright: ignore[reportArgumentType]
        self._config: Any = self._decoder.config
        self._parameters = tuple(signature(model.forward).parameters)
        self._layer_parameters = tuple(signature(self._layers[0].forward).parameters)
        self._owners = guards.layers_with_cache(self._config)
        cuts = plan.cuts(len(self._layers))
        self._cuts: tuple[tuple[int, Method], ...] = tuple((layer, method_of(step)) for layer, step in cuts)
        cache_cuts = plan.cache_cuts(len(self._layers))
        self._cache_cuts: tuple[tuple[int, Method], ...] = tuple((layer, method_of(step)) for layer, step in cache_cuts)
        # what a cut of tokens asks, it asks of the layer before; what a cut of a cache asks, of that layer itself
        self._wanted = _wanted([*self._cuts, *((layer + 1, method) for layer, method in self._cache_cuts)])
        self._first = min((layer for layer, _ in [*self._cuts, *self._cache_cuts]), default=len(self._layers))
        self._local = threading.local()  # the running forward: a model may serve several threads
        self._check()

    # --- what was kept

    def tokens(self) -> list[list[dict[str, int]]]:
        """Tokens by modality that each layer ran on, of every row of this thread's last prefill: `[row][layer][label]`.

        On a GPU this waits for the device.
        """
        if not hasattr(self._local, "kept"):
            return []
        prompt, slots_at = self._local.kept
        kept = [(layer, prompt.modality.gather(1, slots).cpu().numpy()) for layer, slots in slots_at]
        rows = []
        for row in range(kept[0][1].shape[0]):
            present = [m for m in Modality if (kept[0][1][row] == m).any()]
            at = {layer: {m.label: int((modality[row] == m).sum()) for m in present} for layer, modality in kept}
            now, layers = at[0], []
            for layer in range(len(self._layers)):
                now = at.get(layer, now)
                layers.append(now)
            rows.append(layers)
        return rows

    # --- before anything runs

    def _check(self) -> None:
        guards.check_decoder(self._config, self._cuts)
        guards.check_caches(self._config, self._cache_cuts)
        guards.check_layers(self._layers[self._first :])
        guards.check_device(self._decoder)
        if self._first < len(self._layers):
            guards.check_attention(self._config, self._config._attn_implementation, self._first)
        needs = {signal for _, method in [*self._cuts, *self._cache_cuts] for signal in method.needs}
        if Signal.GIVEN in needs and self._scores is None:
            raise UnsupportedPlan("the plan asks for given scores, and none are given", "pass scores= to prune")
        if self._scores is not None and not bool(self._scores.isfinite().all()):
            raise PlanError("a given score is not finite")

    def __deepcopy__(self, memo: Any) -> "Pruning":
        raise UnsupportedPlan("a model cannot be copied while it is being pruned", "leave the context first")

    @contextmanager
    def _installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            enter = stack.enter_context
            enter(self._claimed())
            enter(guards.guarded_generate(self.model, self._local))
            stack.callback(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
            stack.callback(self.model.register_forward_hook(self._after_model, always_call=True).remove)
            for index in range(self._first, len(self._layers)):
                before = partial(self._before_layer, index)
                layer = self._layers[index]
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            for number, (index, _) in enumerate(self._cache_cuts):
                after = partial(self._cut_cache, number)
                stack.callback(self._layers[index].register_forward_hook(after, with_kwargs=True).remove)
            if self._cuts:
                stack.callback(self._layers[-1].register_forward_hook(self._after_last_layer).remove)
            if hasattr(self._decoder, "_deepstack_process"):
                add = partial(self._add_visual, self._decoder._deepstack_process)
                enter(guards.shadowed(self._decoder, "_deepstack_process", add))
            for index, wanted in self._wanted.items():
                enter(tapped(self._attention(index), partial(self._observe, wanted)))
            yield

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        with _claims:
            if any(layer in _pruned for layer in self._layers):
                raise UnsupportedPlan("the model is being pruned already", "leave the other context first")
            _pruned.update(self._layers)
        try:
            yield
        finally:
            with _claims:
                _pruned.difference_update(self._layers)

    def _attention(self, layer: int) -> nn.Module:
        attention = getattr(self._layers[layer], "self_attn", None)
        if attention is None:
            raise UnsupportedModel(f"layer {layer} of {type(self._decoder).__name__} has no self_attn to score with")
        return attention

    # --- while the model runs

    @property
    def _running(self) -> _Prefill | _Decode | None:
        return getattr(self._local, "running", None)

    @property
    def _generating(self) -> bool:
        return getattr(self._local, "generating", False)

    def _before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(self._parameters, args, strict=False)) | kwargs
        self._local.running = None
        if self._first < len(self._layers):
            guards.check_call(inputs, self.model.config, self._decoder)
        cache = inputs.get("past_key_values")
        guards.check_cache(cache)
        if cache is not None and cache.get_seq_length() > 0:
            self._local.running = self._continue(cache, inputs)
        else:
            self._local.running = self._start(inputs)

    def _after_model(self, *_: Any) -> None:
        self._local.running = None

    def _continue(self, cache: Cache, inputs: Mapping[str, Any]) -> _Decode:
        layers: list[Any] = cache.layers[: self._owners]
        owners = [layer.owner if isinstance(layer, PrunedLayer) else None for layer in layers]
        late = max(0, self._owners - self._first)
        if owners != [None] * min(self._first, self._owners) + [self.plan.fingerprint] * late:
            raise UnsupportedPlan(
                "the cache was filled without this plan, or in chunks", "prefill the whole prompt in this context"
            )
        if len({layer.get_seq_length() for layer in layers}) > 1:
            raise UnsupportedPlan("the cache's layers have come apart, as after a crop that failed", "prefill again")
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if self._first < len(self._layers) and ids is None and embeds is not None and embeds.shape[1] > 1:
            raise UnsupportedPlan("inputs_embeds after the first prefill may hold audio or video", "pass input_ids")
        if ids is not None and ids.shape[1] > 1:
            config, chunk = self.model.config, {"input_ids": ids}
            if any(layout.count(*MEDIA) for layout in self.adapter.layouts(config, chunk)):
                raise UnsupportedPlan(
                    "audio or video after the first prefill is not supported while pruning", "start a new prompt"
                )
        return _Decode()

    def _start(self, inputs: Mapping[str, Any]) -> _Prefill:
        tokens = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
        if tokens is None:
            raise UnsupportedPlan("the model was called without a prompt", "pass input_ids or inputs_embeds")
        batch, length = tokens.shape[:2]
        layouts = self._layouts_of(inputs, batch, length)
        device = tokens.device
        prompt = staging.stage_prompt(layouts, length, device)
        padded = any(len(layout) < length for layout in layouts)
        counts, widths = staging.stage_cuts(self.plan, layouts, len(self._layers), device)
        slots = torch.arange(length, device=device).expand(batch, length)
        valid = prompt.modality[:, :length] >= 0 if padded else None
        state = _Prefill(
            prompt=prompt,
            length=length,
            slots=slots,
            valid=valid,
            stored=dict.fromkeys(range(self._first), gather.Kept(slots, valid)),
            counts=counts,
            widths=widths,
            asking=max(int(staging.question(layout).sum()) for layout in layouts),
        )
        self._local.kept = (prompt, [(0, state.slots)])
        if self._scores is not None:
            state.signals[Signal.GIVEN] = self._given(batch, length, device)
        return state

    def _layouts_of(self, inputs: Mapping[str, Any], batch: int, length: int) -> list[Layout]:
        mask = inputs.get("attention_mask")
        if self._layouts is None:
            if inputs.get("input_ids") is None:
                raise UnsupportedPlan("inputs_embeds do not tell audio from text", "pass layouts= to prune")
            if isinstance(mask, Tensor) and mask.ndim != 2:
                raise UnsupportedPlan(
                    f"a mask of shape {list(mask.shape)} does not tell padding", "pass layouts= to prune"
                )
            layouts = list(self.adapter.layouts(self.model.config, inputs))
        else:
            layouts = list(self._layouts)
        copies = batch // max(1, len(layouts))
        if copies * len(layouts) != batch or (copies > 1 and not self._generating):
            raise UnsupportedPlan(f"{len(layouts)} layouts for {batch} prompts", "pass one layout per prompt")
        layouts = [layout for layout in layouts for _ in range(copies)]
        if length == 1 and self._generating and hasattr(self._local, "kept"):
            raise UnsupportedPlan(
                "the model dropped its cache in mid-answer (Phi-4 does where the prompt and answer pass 4,096 tokens)",
                "ask for a shorter answer, or about less of the clip",
            )
        if any(len(layout) > length for layout in layouts):
            raise UnsupportedPlan(
                f"layouts of {[len(layout) for layout in layouts]} tokens do not fit prompts of {length}",
                "prefill whole prompts",
            )
        staging.check_mask(mask if isinstance(mask, Tensor) else None, layouts, length, wait=self._layouts is None)
        return layouts

    def _given(self, batch: int, length: int, device: torch.device) -> Tensor:
        scores = self._scores
        assert scores is not None
        if batch % scores.shape[0] or scores.shape[1] != length:
            raise PlanError(f"scores have shape {list(scores.shape)}, the prompts [{batch}, {length}]")
        return scores.to(device).repeat_interleave(batch // scores.shape[0], dim=0)

    def _before_layer(
        self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(zip(self._layer_parameters, args, strict=False)) | kwargs
        hidden = kwargs.pop("hidden_states")
        state = self._running
        if state is None:
            raise UnsupportedPlan("the decoder was called by itself", "call the whole model")
        if isinstance(state, _Decode):
            return (hidden,), self._decode_arguments(index, hidden, kwargs)
        hidden = self._cut(state, index, hidden)
        return (hidden,), self._prefill_arguments(state, index, hidden, kwargs)

    def _cut(self, state: _Prefill, index: int, hidden: Tensor) -> Tensor:
        while state.next_cut < len(self._cuts) and self._cuts[state.next_cut][0] == index:
            method, counts = self._cuts[state.next_cut][1], state.counts[state.next_cut]
            width, ragged = state.widths[state.next_cut]
            state.next_cut += 1
            if width == state.slots.shape[1] and not ragged and state.valid is None:
                continue  # nothing goes
            scores = method.score(self._view(state, index, method, hidden))
            modality = state.prompt.modality.gather(1, state.slots)
            chosen, real = select(scores, modality, counts, width)
            hidden = gather.take(hidden, chosen)
            slots = state.slots.gather(1, chosen)
            state.slots = torch.where(real, slots, state.length) if ragged else slots
            state.valid = real if ragged else None
            state.signals = {signal: score.gather(1, chosen) for signal, score in state.signals.items()}
            state.keys = None if state.keys is None else gather.take_keys(state.keys, chosen)
            state.arguments.clear()
            self._local.kept[1].append((index, state.slots))
        return hidden

    def _cut_cache(self, number: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Drop tokens from the cache of a layer that has just run on them."""
        state = self._running
        if not isinstance(state, _Prefill) or (cache := kwargs.get("past_key_values")) is None:
            return
        index, method = self._cache_cuts[number]
        counts, (width, ragged) = state.counts[len(self._cuts) + number], state.widths[len(self._cuts) + number]
        hidden = output[0] if isinstance(output, tuple) else output
        scores = method.score(self._view(state, index, method, hidden))
        chosen, real = select(scores, state.prompt.modality.gather(1, state.slots), counts, width)
        cache.layers[index].hold(chosen, real if ragged or state.valid is not None else None)

    def _view(self, state: _Prefill, index: int, method: Method, hidden: Tensor) -> View:
        if Signal.ROLLOUT in method.needs:
            start = torch.zeros(hidden.shape[-3], state.length + 1, device=hidden.device)
            start[:, state.length - 1] = 1.0
            state.signals[Signal.ROLLOUT] = rollout_row(state.captured, start).gather(1, state.slots)
        return View(
            layer=index,
            prompt=state.prompt,
            slots=state.slots,
            signals=state.signals,
            hidden=hidden if hidden.ndim == 3 else hidden[0],  # stacked hidden states (AltUp): the one that attends
            keys=state.keys,
        )

    def _prefill_arguments(self, state: _Prefill, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        here = gather.Kept(state.slots, state.valid)
        state.stored[index] = here
        if index < self._owners and (cache := kwargs.get("past_key_values")) is not None:
            window = guards.window(self._config, index)
            layer = PrunedLayer(state.slots, state.valid, state.length, self.plan.fingerprint, window)
            cache.layers[index : index + 1] = [layer]
        seen = state.stored[guards.source(self._config, index)]
        if state.slots.shape[1] == seen.slots.shape[1] == state.length and state.valid is None:
            return kwargs
        state.sliced = self._is_sliced(state, index, kwargs)
        shrunk = {}
        for name, value in kwargs.items():
            key = (name, id(value), id(seen.slots), state.sliced)
            if key not in state.arguments:
                state.arguments[key] = (value, self._shrink(state, name, value, seen, hidden.dtype))
            shrunk[name] = state.arguments[key][1]
        return shrunk

    def _is_sliced(self, state: _Prefill, index: int, kwargs: Mapping[str, Any]) -> bool:
        """Whether a layer that shares its keys runs on the prompt's last tokens alone, as no other is read again."""
        rotary = kwargs.get("position_embeddings")
        if index < self._owners or rotary is None or rotary[0].shape[-2] == state.length:
            return False
        last = rotary[0].shape[-2]
        expected = torch.arange(state.length - last, state.length, device=state.slots.device)
        if last > 1 and not bool((state.slots[:, -last:] == expected).all()):
            raise UnsupportedPlan(f"logits_to_keep={last} asks for dropped tokens", "ask for the last token's logits")
        return True

    def _shrink(self, state: _Prefill, name: str, value: Any, seen: gather.Kept, dtype: torch.dtype) -> Any:
        index = state.slots if state.valid is None else state.slots.clamp(max=state.length - 1)
        kind = self._config._attn_implementation
        match name, value:
            case "attention_mask", _ if state.sliced:
                return gather.last_rows_mask(value, seen, state.length, kind=kind, dtype=dtype)
            case "attention_mask", _:
                here = gather.Kept(state.slots, state.valid)
                return gather.prefill_mask(value, here, seen, kind=kind, dtype=dtype)
            case "position_ids" | "cache_position", Tensor():
                # flash attention takes gaps at batch size 1 for packed sequences; RoPE reads position_embeddings
                return None if "flash" in kind else gather.take_positions(torch.atleast_2d(value), index)
            case (("position_embeddings" | "per_layer_input"), _) if state.sliced:
                return value
            case "position_embeddings", (Tensor(), Tensor()):
                return tuple(gather.take(part, index) for part in value)
            case "per_layer_input", Tensor():
                return gather.take(value, index)
            case _, Tensor() if state.length in value.shape:
                raise UnsupportedModel(f"layers take {name} {list(value.shape)}, whose token axis is not known")
        return value

    def _decode_arguments(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        layer, new = kwargs["past_key_values"].layers[guards.source(self._config, index)], hidden.shape[-2]
        mask = kwargs.get("attention_mask")
        if not isinstance(layer, PrunedLayer):
            return kwargs  # it shares what an unpruned layer holds
        if index < self._owners:
            layer.armed = True
            coming = new
        else:
            coming = 0  # the layer whose keys it shares has stored the new ones already
        if mask is None and layer.valid is None and new == 1:
            return kwargs
        kwargs["attention_mask"] = gather.decode_mask(
            mask,
            layer.places(coming),
            layer.validity(coming),
            total=layer.get_seq_length() + coming,
            new=new,
            kind=self._config._attn_implementation,
            dtype=hidden.dtype,
        )
        return kwargs

    def _observe(
        self, wanted: Collection[Signal], query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        """Keep what later cuts ask of one layer's attention."""
        state = self._running
        if not isinstance(state, _Prefill):
            return
        tokens = query.shape[2]
        if Signal.LAST_QUERY in wanted:
            state.signals[Signal.LAST_QUERY] = last_query_attention(query, key, mask, state.valid, scaling)
        if Signal.TEXT_QUERIES in wanted:
            first = max(0, tokens - state.asking)
            rows = attention_rows(query, key, mask, state.valid, scaling, first=first)
            asked = state.prompt.question.gather(1, state.slots)[:, first:].float()
            state.signals[Signal.TEXT_QUERIES] = torch.einsum("bq,bqt->bt", asked / asked.sum(1, keepdim=True), rows)
        if Signal.WINDOW in wanted:
            first = max(0, tokens - WINDOW)
            rows = attention_rows(query, key, mask, state.valid, scaling, first=first)
            real = rows.sum(-1)
            state.signals[Signal.WINDOW] = rows.sum(1) / real.sum(1, keepdim=True)
        if Signal.KEYS in wanted:
            state.keys = key
        if Signal.ROLLOUT in wanted:
            state.captured.append(Captured(query, key, mask, scaling, state.slots, state.valid))

    def _after_last_layer(self, module: Any, args: Any, output: Any) -> Any:
        state = self._running
        whole = isinstance(state, _Prefill) and state.slots.shape[1] == state.length and state.valid is None
        if not isinstance(state, _Prefill) or whole or state.sliced:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        full = hidden.new_zeros(*hidden.shape[:-2], state.length + 1, hidden.shape[-1])
        full.scatter_(-2, state.slots[..., None].expand_as(hidden), hidden)
        full = full[..., : state.length, :]
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _add_visual(self, plain: Any, hidden: Tensor, places: Tensor, embeds: Tensor) -> Tensor:
        """Deepstack: what early layers add to the video tokens, for those of them that are still there."""
        state = self._running
        if not isinstance(state, _Prefill) or (state.slots.shape[1] == state.length and state.valid is None):
            return plain(hidden, places, embeds)
        whole = hidden.new_zeros(hidden.shape[0], state.length + 1, hidden.shape[-1])
        whole[:, :-1][places.to(hidden.device)] = embeds.to(hidden.device, hidden.dtype)
        return hidden + gather.take(whole, state.slots)
