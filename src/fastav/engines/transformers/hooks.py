"""Pruning a transformers model in place, while a context lasts.

Hooks on decoder layers reduce hidden states, position embeddings and masks to the kept tokens, and each layer's cache
holds only those. After the last layer the hidden states are restored to full length, so that the code around the
decoder sees the shapes that it expects, unless it needs only the last token. No model code is replaced.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any, NamedTuple
from weakref import WeakSet, finalize

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from fastav import cache_argument
from fastav.adapter import EncoderCall, ModelAdapter, adapter_for, plan_named
from fastav.engines.transformers import guards
from fastav.engines.transformers.applied import check_prefill
from fastav.engines.transformers.attention_hooks import observe_attention
from fastav.engines.transformers.devices import ready_to_run
from fastav.engines.transformers.generation.buffers import StepCache
from fastav.engines.transformers.guards import GenerateCall
from fastav.engines.transformers.kv_cache import PrunedLayer, cached_tokens
from fastav.engines.transformers.layer_inputs import LayerInputs
from fastav.engines.transformers.masks import decode_mask
from fastav.engines.transformers.own_attention import attention_inputs
from fastav.engines.transformers.wrapped import attention_of, base_model, parameters_of, unwrapped
from fastav.errors import PlanError, UnsupportedModel, UnsupportedPlan
from fastav.layout import MEDIA, Layout, Modality
from fastav.method import ENCODER_SIGNALS, OWN_SIGNALS, Signal
from fastav.plan import Plan
from fastav.pruning import decoder_layers
from fastav.pruning.compiled import CompiledPlan, compile_plan
from fastav.pruning.rollout import LayerAttention
from fastav.pruning.state import CutRecord, PruningState

_claims = threading.Lock()
_pruned: WeakSet[nn.Module] = WeakSet()


def prune(
    model: Any,
    plan: Plan | CompiledPlan | str = "fastav",
    *,
    layouts: Sequence[Layout] | None = None,
    scores: Float[Tensor, "batch tokens"] | None = None,
    adapter: ModelAdapter | None = None,
) -> "Pruning":
    """Make `model` drop tokens under a plan, in `forward` and `generate`, while a context lasts.

    Pruning begins when you enter `with fastav.prune(model, plan) as pruning:` or call `apply()` on the result, and the
    model is restored at the end of the context or by `remove()`. A result that is never used gives a warning.

    model: may be wrapped by PEFT (LoRA) or DDP, whose `generate` and `forward` then prune too. In a model that also
    speaks (Qwen-Omni), the thinker is pruned; ask the complete model for text only.
    plan: a `Plan`; the name of one of the model's presets, of a recipe (`fastv@0.25`) or of a JSON file; or a plan
    that is compiled for this model.
    layouts: one per prompt of the batch. None to read them from `input_ids`, which on a GPU waits for the device once
    per prefill.
    scores: one per prompt token, shaped like `input_ids`, for plans with the method `given`.

    Logits and hidden states of dropped tokens are those of a zero vector; those of text are exact. Exact means: equal
    to hiding the dropped tokens from every layer by an attention mask. Decode within the context, too.

    Raises, at once: UnknownName, PlanError, UnsupportedModel, UnsupportedPlan. Raises, while active: UnsupportedPlan
    for the cases in docs/exactness.md, such as assisted decoding, chunked prefill, other caches, labels and gradients.
    """
    model = base_model(model)
    guards.check_model(model)
    if isinstance(plan, CompiledPlan):
        if adapter not in (None, plan.adapter):
            raise PlanError("a compiled plan has an adapter of its own, and another one was passed", "pass one of them")
        compiled, part = plan, plan.adapter.language_model(model)
        decoder: Any = compiled.adapter.decoder(part)
        if decoder.config is not compiled.config:
            raise PlanError("the plan was compiled for another model", "pass the plan itself")
    else:
        architectures = {*(model.config.architectures or ()), type(model).__name__}
        adapter = adapter or adapter_for(architectures, model.config.to_dict())
        part = adapter.language_model(model)
        config: Any = adapter.decoder(part).config
        compiled = compile_plan(plan_named(plan, adapter), config, adapter)
    pruning = Pruning(part, compiled, layouts, scores, parent=model)
    finalize(pruning, _warn_if_unused, pruning._used, *_caller())
    return pruning


def _caller() -> tuple[str, int]:
    """File and line of the innermost call from outside fastav and the wrappers that check types."""
    frame: Any = sys._getframe(1)
    while frame.f_globals.get("__name__", "").split(".")[0] in ("fastav", "jaxtyping", "beartype") and frame.f_back:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _warn_if_unused(used: list[bool], file: str, line: int) -> None:
    """Warn, with the line that created it, about a pruning that is deleted without having been used."""
    if not used:
        message = "fastav.prune was called and its result never used, so nothing was pruned: use `with`, or .apply()"
        warnings.warn_explicit(message, UserWarning, file, line)


class _Turn(NamedTuple):
    """What the caller says of a prefill.  layouts, scores: as for `Pruning.turn`."""

    layouts: Sequence[Layout] | None
    scores: Float[Tensor, "batch tokens"] | None


class _Decode:
    """A forward that continues from a pruned cache."""


class _Step:
    """A forward over buffers, which have their own record of the kept tokens."""


class Pruning:
    """The pruning of a model, active between `apply` and `remove`, or in a context."""

    def __init__(
        self,
        model: PreTrainedModel,
        compiled: CompiledPlan,
        layouts: Sequence[Layout] | None,
        scores: Float[Tensor, "batch tokens"] | None,
        *,
        parent: Any,
    ) -> None:
        self.model, self.compiled = model, compiled
        self._parent = parent  # the model that was passed, of which `model` may be a part
        self._active: ExitStack | None = None
        self._used: list[bool] = []  # not empty after `apply`; outlives this object
        self._first_turn = _Turn(layouts, scores)
        self._decoder = compiled.adapter.decoder(model)
        self._layers = list(self._decoder.layers)  # pyright: ignore[reportArgumentType]
        self._config: Any = self._decoder.config  # of the decoder
        self._parameters = tuple(signature(model.forward).parameters)
        self._layer_parameters = parameters_of(self._layers[0])
        self._first = compiled.first_layer
        self._local = threading.local()  # the running forward: a model may serve several threads
        self._call = GenerateCall()
        self._check()

    # --- begin and end

    def apply(self) -> "Pruning":
        """Start pruning, until `remove`.

        Raises: UnsupportedPlan if the model is being pruned already.
        """
        self._used.append(True)
        if self._active is not None:
            raise UnsupportedPlan("this pruning is applied already", "call remove() first")
        with ExitStack() as stack:
            stack.enter_context(self._installed())
            if self._parent is not self.model:
                stack.enter_context(guards.text_only(self._parent, self.compiled.adapter))
            self._active = stack.pop_all()
        return self

    def remove(self) -> None:
        """Restore the model.  Further calls do nothing."""
        active, self._active = self._active, None
        if active is not None:
            active.close()

    def __enter__(self) -> "Pruning":
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.remove()

    # --- conversations

    @contextmanager
    def turn(
        self, layouts: Sequence[Layout] | None = None, *, scores: Float[Tensor, "batch tokens"] | None = None
    ) -> Iterator[None]:
        """Make this thread's next forward a prefill, whose tokens are pruned by the plan, also behind a pruned cache.

        A later turn of a conversation may so bring new audio, images and video: cuts choose among its tokens alone,
        and earlier tokens stay as they were cut. Without this context, later forwards are text, and media in them are
        refused. Rows of different length are padded on the left of the turn's tokens. Pass the attention mask of the
        whole conversation, and the position ids of the new tokens if the model does not infer them.

        layouts: of the turn's new tokens, one per row; None to read them from `input_ids`. scores: one per new token,
        for plans with the method `given`.

        Raises, at the end: UnsupportedPlan if nothing was prefilled.
        """
        if self._next_turn is not None:
            raise UnsupportedPlan("a turn is waiting for its prefill already", "leave its context first")
        _check_scores(self.compiled, scores, "turn")
        self._local.next_turn = _Turn(layouts, scores)
        try:
            yield
            if self._next_turn is not None:
                raise UnsupportedPlan(
                    "nothing was prefilled in this turn", "call the model in the context, with the turn's tokens"
                )
        finally:
            self._local.next_turn = None

    @property
    def _next_turn(self) -> _Turn | None:
        return getattr(self._local, "next_turn", None)

    # --- kept tokens

    def tokens(self) -> list[list[dict[str, int]]]:
        """The numbers of tokens by modality that each layer ran on in this thread's last prefill.

        Of a later turn these are its own tokens, without the cached ones.

        Returns `[row][layer][label]`. On a GPU this waits for the device.
        """
        if not hasattr(self._local, "history"):
            return []
        layout, history = self._local.history
        modality = layout.modality
        cuts = [(layer, modality.gather(1, slots.to(modality.device)).cpu().numpy()) for layer, slots in history]
        rows: list[list[dict[str, int]]] = []
        for row in range(cuts[0][1].shape[0]):
            present = [m for m in Modality if (cuts[0][1][row] == m).any()]
            after_cut = {layer: {m.label: int((kept[row] == m).sum()) for m in present} for layer, kept in cuts}
            layers: list[dict[str, int]] = []
            counts = after_cut[0]
            for layer in range(len(self._layers)):
                counts = after_cut.get(layer, counts)
                layers.append(counts)
            rows.append(layers)
        return rows

    def slots(self) -> list[tuple[int, Int[Tensor, "batch kept"]]]:
        """The columns of the padded prompts that remain after every cut of this thread's last prefill, by layer.

        The first entry has all columns, at layer 0. The left end of rows with fewer tokens points behind the prompt. Of
        a later turn, columns count from its first token.
        """
        return list(self._local.history[1]) if hasattr(self._local, "history") else []

    @contextmanager
    def observe(self, observer: Callable[[LayerAttention], None]) -> Iterator[None]:
        """Call `observer` with the inputs of every layer's attention in a prefill, in order, while the context lasts.

        Raises: UnsupportedPlan for attention implementations whose masks cannot be adapted.
        """
        guards.check_attention(self._config, self._config._attn_implementation, 0)
        with ExitStack() as stack:
            for index in range(len(self._layers)):
                pass_on = partial(self._pass_attention, observer, index)
                stack.enter_context(observe_attention(self._attention(index), pass_on))
            yield

    @contextmanager
    def record_cuts(self, recorder: Callable[[CutRecord], None]) -> Iterator[None]:
        """Call `recorder` with every cut of this thread's prefills, in order, while the context lasts.

        A record has columns of the padded prompts, as `slots` has. Cuts that drop nothing are not made.
        """
        before, self._local.recorder = self._recorder, recorder
        try:
            yield
        finally:
            self._local.recorder = before

    @property
    def _recorder(self) -> Callable[[CutRecord], None] | None:
        return getattr(self._local, "recorder", None)

    # --- checks and hooks

    def _check(self) -> None:
        if len(self._layers) != self.compiled.depth:
            raise UnsupportedModel(
                f"the decoder has {len(self._layers)} layers, its configuration says {self.compiled.depth}",
                "set num_hidden_layers in the configuration to the number of layers",
            )
        guards.check_layers(self._layers[self._first :])
        if self._first < len(self._layers):
            first = 0 if Signal.ROLLOUT in self.compiled.needs else self._first
            guards.check_attention(self._config, self._config._attn_implementation, first)
        for layer, method in self.compiled.cuts:
            if method.needs & OWN_SIGNALS:
                self._attention(layer)
        _check_scores(self.compiled, self._first_turn.scores, "prune")

    def __deepcopy__(self, memo: Any) -> "Pruning":
        raise UnsupportedPlan("a model cannot be copied while it is being pruned", "leave the context first")

    @contextmanager
    def _installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            enter = stack.enter_context
            enter(self._claimed())
            enter(guards.guarded_generate(self.model, self._call))
            stack.callback(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
            after_model = self.model.register_forward_hook(self._after_model, with_kwargs=True, always_call=True)
            stack.callback(after_model.remove)
            # a layer that is compiled in place compiles its hooks too, and these change state outside the layer
            uncompiled: Any = torch.compiler.disable
            before_first = self._layers[0].register_forward_pre_hook(uncompiled(self._check_copies), with_kwargs=True)
            stack.callback(before_first.remove)
            for index in range(self._first, len(self._layers)):
                before = uncompiled(partial(self._before_layer, index))
                layer = self._layers[index]
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            for number, (index, _) in enumerate(self.compiled.cache_cuts):
                after = uncompiled(partial(self._after_cached_layer, number))
                stack.callback(self._layers[index].register_forward_hook(after, with_kwargs=True).remove)
            if self.compiled.cuts:
                stack.callback(self._layers[-1].register_forward_hook(uncompiled(self._after_last_layer)).remove)
            if (name := self.compiled.adapter.deepstack_method(self._decoder)) is not None:
                add = partial(self._add_visual, getattr(self._decoder, name))
                enter(guards.patched(self._decoder, name, add))
            for signal in self.compiled.needs & ENCODER_SIGNALS:
                self._observe_encoder(stack, signal)
            for index, signals in self.compiled.observed.items():
                enter(observe_attention(self._attention(index), partial(self._observe, index, signals)))
            yield

    def _observe_encoder(self, stack: ExitStack, signal: Signal) -> None:
        """Read the attention of an encoder's last layer, until the stack unwinds."""
        encoder, attention = self.compiled.encoder_attentions[signal].modules(self.model)
        for module, hook in ((encoder, self._before_encoder), (attention, self._before_encoder_attention)):
            stack.callback(module.register_forward_pre_hook(partial(hook, signal), with_kwargs=True).remove)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        layers = [unwrapped(layer) for layer in self._layers]
        with _claims:
            if any(layer in _pruned for layer in layers):
                raise UnsupportedPlan(
                    "the model is being pruned already", "leave the other context first, or call its remove()"
                )
            _pruned.update(layers)
        try:
            yield
        finally:
            with _claims:
                _pruned.difference_update(layers)

    def _attention(self, layer: int) -> nn.Module:
        attention = attention_of(self._layers[layer])
        if attention is None:
            raise UnsupportedModel(f"layer {layer} of {type(self._decoder).__name__} has no self_attn to score with")
        return attention

    # --- while the model runs

    @property
    def _running(self) -> LayerInputs | _Decode | _Step | None:
        return getattr(self._local, "running", None)

    def _before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(self._parameters, args, strict=False)) | kwargs
        self._local.running, self._local.model_inputs = None, inputs
        if self._first < len(self._layers):
            guards.check_call(inputs, self.model.config, self._decoder)
        cache = cache_argument.in_arguments(inputs)
        guards.check_cache(cache, self.compiled)
        if isinstance(cache, StepCache):
            self._local.running = _Step()
            return
        continued = cache if cache is not None and cache.get_seq_length() > 0 else None
        if continued is not None:
            self._check_continued(continued)
        if continued is None or self._next_turn is not None:
            turn, self._local.next_turn = self._next_turn or self._first_turn, None
            self._local.running = self._start(turn, inputs, continued)
        else:
            self._check_text(inputs)
            self._local.running = _Decode()

    def _check_copies(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call.copies > 1 and isinstance(self._running, LayerInputs):
            guards.check_copies(args[0] if args else kwargs["hidden_states"], self._call.copies)

    def _after_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        running, self._local.running, self._local.model_inputs = self._running, None, None
        if isinstance(running, LayerInputs) and output is not None:  # the output is None if the forward raised
            check_prefill(running.state, args, kwargs, output)

    def _check_continued(self, cache: Cache) -> None:
        layers: list[Any] = cache.layers[: self.compiled.n_kv_layers]
        owners = [layer.owner if isinstance(layer, PrunedLayer) else None for layer in layers]
        n_pruned = max(0, self.compiled.n_kv_layers - self._first)
        if owners != [None] * min(self._first, self.compiled.n_kv_layers) + [self.compiled.fingerprint] * n_pruned:
            raise UnsupportedPlan(
                "the cache was filled without this plan, or in chunks", "prefill the whole prompt in this context"
            )
        if len({layer.get_seq_length() for layer in layers}) > 1:
            raise UnsupportedPlan("the cache's layers differ in length, as after a failed crop", "prefill again")

    def _check_text(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a forward behind a pruned cache that may bring media, outside of `turn`."""
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if self._first < len(self._layers) and ids is None and embeds is not None and embeds.shape[1] > 1:
            raise UnsupportedPlan(
                "inputs_embeds after the first prefill may hold audio or video",
                "pass input_ids, or prefill them in `with pruning.turn(layouts):`",
            )
        if ids is not None and ids.shape[1] > 1:
            config, chunk = self.model.config, {"input_ids": ids}
            if any(layout.count(*MEDIA) for layout in self.compiled.adapter.layouts(config, chunk)):
                raise UnsupportedPlan(
                    "audio or video after the first prefill would not be pruned",
                    "prefill them in `with pruning.turn():`",
                )

    def _start(self, turn: _Turn, inputs: Mapping[str, Any], cache: Cache | None) -> LayerInputs:
        """Begin a prefill.  cache: what it continues from; None for a first prefill."""
        tokens = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
        if tokens is None:
            raise UnsupportedPlan("the model was called without a prompt", "pass input_ids or inputs_embeds")
        batch, length = tokens.shape[:2]
        past, cached = 0 if cache is None else cache.get_seq_length(), ()
        layouts = self._layouts_of(turn, inputs, batch, length, past)
        decoder_layers.check_length(self._config, past + length)
        if cache is not None:
            if any(layout.count(*MEDIA) for layout in layouts):
                guards.check_token_types(self.model, inputs, past + length)
            layers: list[Any] = cache.layers[: self.compiled.n_kv_layers]
            cached = cached_tokens(layers, batch, past, inputs.get("attention_mask"))
        state = PruningState.start(self.compiled, layouts, length, tokens.device, past=past, cached=cached)
        state.on_cut = self._recorder
        state.encoder_scores |= self._call.encoder_scores
        state.encoder_copies |= dict.fromkeys(self._call.encoder_scores, self._call.copies)
        self._local.history = (state.layout, state.history)
        if turn.scores is not None:
            state.signals[Signal.GIVEN] = _given_scores(turn.scores, batch, length, tokens.device)
        logits = inputs.get("logits_to_keep")
        return LayerInputs(state, last_only=type(logits) is int and logits == 1)

    def _layouts_of(self, turn: _Turn, inputs: Mapping[str, Any], batch: int, length: int, past: int) -> list[Layout]:
        mask = inputs.get("attention_mask")
        if turn.layouts is None:
            if inputs.get("input_ids") is None:
                raise UnsupportedPlan("inputs_embeds do not show which tokens are audio", "pass layouts= to prune")
            if isinstance(mask, Tensor) and mask.ndim != 2:
                raise UnsupportedPlan(
                    f"a mask of shape {list(mask.shape)} does not show padding", "pass layouts= to prune"
                )
            layout_inputs = self._layout_inputs(inputs, length, past)
            layouts = list(self.compiled.adapter.layouts(self.model.config, layout_inputs))
        else:
            layouts = list(turn.layouts)
        copies = batch // max(1, len(layouts))
        if copies * len(layouts) != batch or (copies > 1 and not self._call.active):
            raise UnsupportedPlan(f"{len(layouts)} layouts for {batch} prompts", "pass one layout per prompt")
        layouts = [layout for layout in layouts for _ in range(copies)]
        if length == 1 and not past and self._call.active and hasattr(self._local, "history"):
            raise UnsupportedPlan(
                f"the model dropped its cache in the middle of an answer{self.compiled.adapter.cache_limit}",
                "ask for a shorter answer, or about a shorter part of the clip",
            )
        if any(len(layout) > length for layout in layouts):
            raise UnsupportedPlan(
                f"layouts of {[len(layout) for layout in layouts]} tokens do not fit prompts of {length} tokens",
                "prefill complete prompts",
            )
        mask = mask if isinstance(mask, Tensor) else None
        guards.check_mask(mask, layouts, length, past=past, wait=turn.layouts is None)
        return layouts

    def _layout_inputs(self, inputs: Mapping[str, Any], length: int, past: int) -> Mapping[str, Any]:
        """The arguments to read layouts from: those of `generate`, if this forward runs on its prompt.

        Ids and masks are those of the last `length` tokens.
        Only `generate` has the media of some models: it runs their encoders itself, and passes the outputs to the
        forward in place of the number of frames.
        """
        arguments = self._call.arguments
        ids, mask = arguments.get("input_ids", arguments.get("inputs")), arguments.get("attention_mask")
        if not (isinstance(ids, Tensor) and ids.shape[1:] in ((length,), (past + length,))):
            arguments, ids, mask = inputs, inputs["input_ids"], inputs.get("attention_mask")
        elif mask is None and isinstance(repeated := inputs.get("attention_mask"), Tensor):
            mask = repeated[:: repeated.shape[0] // ids.shape[0]]  # `generate` infers the padding, and repeats rows
        mask = mask[:, -length:] if isinstance(mask, Tensor) else None
        return {**arguments, "input_ids": ids[:, -length:], "attention_mask": mask}

    def _encoder_scores(self, signal: Signal) -> list[Tensor] | None:
        """Where the scores of the running call of an encoder go; None if no prefill follows from it."""
        if isinstance(running := self._running, LayerInputs):
            return running.state.encoder_scores.setdefault(signal, [])
        return self._call.encoder_scores[signal] if running is None and self._call.active else None

    def _before_encoder(self, signal: Signal, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (scores := self._encoder_scores(signal)) is None:
            return
        call = EncoderCall(
            config=self.model.config,
            model_inputs=self._call.arguments if self._running is None else self._local.model_inputs,
            inputs=signature(module.forward).bind(*args, **kwargs).arguments,
            number=len(scores),
        )
        vars(self._local).setdefault("encoder_calls", {})[signal] = self.compiled.encoder_attentions[signal].begin(call)

    def _before_encoder_attention(
        self, signal: Signal, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if (scores := self._encoder_scores(signal)) is None:
            return
        call = self._local.encoder_calls.pop(signal)
        with ready_to_run(module, args, kwargs) as (moved, named):
            inputs = signature(module.forward).bind(*moved, **named).arguments
            scores.append(self.compiled.encoder_attentions[signal].scores(module, call, inputs))

    def _before_layer(
        self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(zip(self._layer_parameters, args, strict=False)) | kwargs
        hidden = kwargs.pop("hidden_states")
        running = self._running
        if running is None:
            raise UnsupportedPlan("the decoder was called without its model", "call the model itself")
        if isinstance(running, _Step):
            return (hidden,), kwargs
        if isinstance(running, _Decode):
            return (hidden,), self._decode_arguments(index, hidden, kwargs)
        if signals := running.state.own_signals(index):
            self._observe_own(running, index, signals, hidden, kwargs)
        hidden = running.state.cut(index, hidden)
        if index == self.compiled.earlier_caches_until:
            running.cut_earlier_caches(kwargs)
        return (hidden,), dict(running.arguments(index, kwargs, hidden.dtype))

    def _observe_own(
        self,
        running: LayerInputs,
        index: int,
        signals: Collection[Signal],
        hidden: Tensor,
        kwargs: Mapping[str, Any],
    ) -> None:
        """Compute signals of the attention of a layer about to run, on the tokens that remain before its cuts."""
        running.state.move_to(hidden.device)
        arguments = running.arguments_before_cuts(index, kwargs, hidden.dtype)
        self._local.running = None  # observers of this layer's attention are for its real forward
        try:
            inputs = attention_inputs(self._layers[index], self._attention(index), hidden, arguments)
        finally:
            self._local.running = running
        running.state.observe(index, signals, *inputs)

    def _decode_arguments(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        layer, n_new = cache_argument.in_arguments(kwargs).layers[self.compiled.kv_sources[index]], hidden.shape[-2]
        mask = kwargs.get("attention_mask")
        if not isinstance(layer, PrunedLayer):
            return kwargs  # it reads the cache of an unpruned layer
        if index < self.compiled.n_kv_layers:
            layer.expect_tokens()
            n_unstored = n_new
        else:
            n_unstored = 0  # the layer whose keys it reads has stored the new ones already
        if mask is None and layer.valid is None and n_new == 1:
            return kwargs
        kwargs["attention_mask"] = decode_mask(
            None if mask is None else mask.to(layer.slots.device),
            layer.positions(n_unstored),
            layer.validity(n_unstored),
            total=layer.get_seq_length() + n_unstored,
            n_new=n_new,
            kind=self._config._attn_implementation,
            dtype=hidden.dtype,
        )
        return kwargs

    def _observe(
        self, index: int, signals: Collection[Signal], query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        if isinstance(running := self._running, LayerInputs):
            running.state.observe(index, signals, query, key, mask, scaling)

    def _pass_attention(
        self,
        observer: Callable[[LayerAttention], None],
        index: int,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> None:
        if isinstance(running := self._running, LayerInputs):
            observer(running.state.layer_attention(index, query, key, mask, scaling))

    def _after_cached_layer(self, number: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache, index = cache_argument.in_arguments(kwargs), self.compiled.cache_cuts[number][0]
        if isinstance(running := self._running, LayerInputs) and cache is not None:
            hidden = output[0] if isinstance(output, tuple) else output
            state = running.state
            earlier = state.cached[index].slots.shape[1] if state.cached else 0
            cache.layers[index].keep(*state.select_in_cache(number, hidden), earlier=earlier)

    def _after_last_layer(self, module: Any, args: Any, output: Any) -> Any:
        running = self._running
        if not isinstance(running, LayerInputs) or running.state.is_full or running.only_last_rows:
            return None
        if isinstance(output, tuple):
            return (running.restore(output[0]), *output[1:])
        return running.restore(output)

    def _add_visual(self, original: Any, hidden: Tensor, mask: Tensor, embeds: Tensor) -> Tensor:
        running = self._running
        if not isinstance(running, LayerInputs) or running.state.is_full:
            return original(hidden, mask, embeds)
        return running.add_visual(hidden, mask, embeds)


def _check_scores(compiled: CompiledPlan, scores: Float[Tensor, "batch tokens"] | None, function: str) -> None:
    """Refuse a plan without the scores that it needs, and scores that are not finite.  function: which takes them."""
    if Signal.GIVEN in compiled.needs and scores is None:
        raise UnsupportedPlan("the plan needs your own scores, and you passed none", f"pass scores= to {function}")
    if scores is not None and not bool(scores.isfinite().all()):
        raise PlanError("scores must be finite")


def _given_scores(scores: Tensor, batch: int, length: int, device: torch.device) -> Tensor:
    if batch % scores.shape[0] or scores.shape[1] != length:
        raise PlanError(f"scores must have the prompts' shape [{batch}, {length}], got {list(scores.shape)}")
    return scores.to(device).repeat_interleave(batch // scores.shape[0], dim=0)
