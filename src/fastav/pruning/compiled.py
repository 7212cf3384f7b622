"""A plan compiled for one model: its cuts by layer, its methods and the signals that they read.  Checked once."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig

from fastav import token_mixing
from fastav.adapter import EncoderAttention, ModelAdapter
from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.method import ATTENTION_SIGNALS, DECODER_SIGNALS, ENCODER_SIGNALS, OWN_SIGNALS, Method, Signal, method_of
from fastav.plan import Plan
from fastav.pruning import decoder_layers

Cuts = tuple[tuple[int, Method], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class CompiledPlan:
    """The cuts of a plan in one decoder; made by `compile_plan`.

    config: the decoder's configuration. cuts: (layer, method) of each cut before a layer, in order. cache_cuts: (layer,
    method) of each cut in a layer's KV cache alone.
    """

    plan: Plan
    adapter: ModelAdapter
    config: PreTrainedConfig
    cuts: Cuts
    cache_cuts: Cuts

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return self.config.num_hidden_layers

    @cached_property
    def first_layer(self) -> int:
        """The first layer with a cut, of its cache too; the depth if there is none."""
        if self.earlier_caches_until:
            return 0
        return min((layer for layer, _ in (*self.cuts, *self.cache_cuts)), default=self.depth)

    @cached_property
    def earlier_caches_until(self) -> int:
        """The layer before which every cache holds the tokens of this layer alone; 0 if there is none."""
        return self.plan.earlier_caches_until(self.depth)

    @cached_property
    def cut_layers(self) -> tuple[int, ...]:
        """The layers where tokens are dropped for all later layers, in order."""
        return tuple(sorted({layer for layer, _ in self.cuts}))

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """The methods of all cuts."""
        return tuple(method for _, method in (*self.cuts, *self.cache_cuts))

    def name_of(self, method: Method) -> str:
        """The name by which the plan calls one of its methods."""
        return self._names[type(method)]

    @cached_property
    def _names(self) -> Mapping[type[Method], str]:
        steps = (*self.plan.cuts(self.depth), *self.plan.cache_cuts(self.depth))
        return {type(method): step.method for (_, step), method in zip(steps, self.methods, strict=True)}

    @cached_property
    def needs(self) -> frozenset[Signal]:
        """Every signal that some method reads in this model."""
        return frozenset[Signal]().union(*map(self.signals_of, self.methods))

    def signals_of(self, method: Method) -> frozenset[Signal]:
        """The signals that a method reads in this model: those that it needs, and of those that it wants the provided.

        What is provided depends on the model's adapter alone, so that a plan is the same in every engine.
        """
        return method.needs | method.wants.intersection(self.encoder_attentions)

    @cached_property
    def encoder_attentions(self) -> Mapping[Signal, EncoderAttention]:
        """What the adapter provides of its encoders' attention, by signal."""
        attentions = {
            Signal.AUDIO_ENCODER: self.adapter.audio_attention(),
            Signal.VISION_ENCODER: self.adapter.vision_attention(),
        }
        return {signal: attention for signal, attention in attentions.items() if attention is not None}

    @cached_property
    def layout_only(self) -> bool:
        """Whether the layout alone decides which tokens every layer keeps."""
        return all(method.layout_only for method in self.methods)

    @cached_property
    def first_scored_layer(self) -> int:
        """The first layer where tokens are dropped by more than the layout; the depth if there is none."""
        return min((layer for layer, method in self.cuts if not method.layout_only), default=self.depth)

    @cached_property
    def fingerprint(self) -> str:
        """The plan's fingerprint, which marks the caches of pruned layers."""
        return self.plan.fingerprint

    @cached_property
    def n_kv_layers(self) -> int:
        """How many layers, the first ones, have keys and values of their own."""
        return decoder_layers.layers_with_cache(self.config)

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer in tokens, the query included; None for full attention."""
        return decoder_layers.windows(self.config)

    @cached_property
    def kv_sources(self) -> tuple[int, ...]:
        """The layer whose keys and values each layer reads."""
        return tuple(decoder_layers.source(self.config, layer) for layer in range(self.depth))

    @cached_property
    def last_rollout_layer(self) -> int:
        """The last layer where a cut reads the rollout; 0 if none does."""
        return max((layer for layer, method in self._signal_cuts() if Signal.ROLLOUT in method.needs), default=0)

    @cached_property
    def observed(self) -> dict[int, frozenset[Signal]]:
        """The signals to compute from each layer's attention, by layer.

        A cut reads the attention of the preceding layer; a cut in a cache reads that of its own layer. Of a layer about
        to run, its attention is not observed while it runs, but computed before (`PruningState.own_signals`).
        """
        observed: dict[int, frozenset[Signal]] = {}
        for layer, method in self._signal_cuts():
            for signal in method.needs & DECODER_SIGNALS:
                for index in range(layer) if signal is Signal.ROLLOUT else [layer - 1]:
                    observed[index] = observed.get(index, frozenset()) | {signal}
        for layer, method in self.cache_cuts:
            if signals := method.needs & OWN_SIGNALS:
                observed[layer] = observed.get(layer, frozenset()) | signals
        return observed

    def _signal_cuts(self) -> Cuts:
        """All cuts, with the layer before which their signals must be computed."""
        return (*self.cuts, *((layer + 1, method) for layer, method in self.cache_cuts))


def compile_plan(plan: Plan, config: PreTrainedConfig, adapter: ModelAdapter) -> CompiledPlan:
    """Compile a plan for a decoder, and refuse a plan that cannot be exact in it.

    config: the decoder's configuration.
    Raises: PlanError, UnknownName, UnsupportedModel, UnsupportedPlan.
    """
    decoder: Any = config
    depth = decoder.num_hidden_layers
    plan.require(adapter.name, depth, decoder.hidden_size)
    if plan.target is not None and plan.target.retention is None:
        plan = plan.for_decoder(adapter.shape(config))
    compiled = CompiledPlan(
        plan=plan,
        adapter=adapter,
        config=config,
        cuts=tuple((layer, method_of(step)) for layer, step in plan.cuts(depth)),
        cache_cuts=tuple((layer, method_of(step)) for layer, step in plan.cache_cuts(depth)),
    )
    _check_encoders(compiled)
    _check_cuts(compiled)
    _check_cache_cuts(compiled)
    _check_earlier_caches(compiled)
    return compiled


def _check_cuts(compiled: CompiledPlan) -> None:
    """Refuse cuts before layers that mix tokens or share keys, and signals that no layer computes."""
    if not compiled.cuts:
        return
    types, narrow = decoder_layers.layer_types(compiled.config), decoder_layers.narrow(compiled.config)
    for layer, method in compiled.cuts:
        if reason := token_mixing.of_types(types[layer:]):
            raise UnsupportedModel(f"no token can be dropped before layer {layer}: {reason}")
        if layer >= compiled.n_kv_layers:
            raise UnsupportedPlan(
                f"layer {layer} has no keys and values of its own but reads those of layers before "
                f"{compiled.n_kv_layers}, so it would still attend to dropped tokens",
                f"place the last step at layer {compiled.n_kv_layers - 1} or before",
            )
        if method.merges and compiled.adapter.stacks_hidden_states(compiled.config):
            raise UnsupportedPlan(
                f"method {compiled.name_of(method)!r} merges tokens, and this decoder stacks several hidden states per "
                "token",
                "choose a method that only drops tokens",
            )
        if method.needs & OWN_SIGNALS and narrow[layer]:
            raise UnsupportedPlan(
                f"layer {layer} attends within a window, so its queries cannot score all tokens",
                "place the step before a layer of full attention",
            )
        if not (signals := method.needs & DECODER_SIGNALS):
            continue
        if layer == 0:
            names = ", ".join(sorted(signals))
            raise UnsupportedPlan(
                f"layer 0 has no preceding layer whose attention could be read ({names})",
                "start at layer 1, or choose a method that reads the layer's own attention (own-last-query)",
            )
        if signals & ATTENTION_SIGNALS and narrow[layer - 1]:
            raise UnsupportedPlan(
                f"layer {layer - 1} attends within a window, so its last query cannot score all tokens",
                "place the step after a layer of full attention",
            )


def _check_cache_cuts(compiled: CompiledPlan) -> None:
    """Refuse merging in caches, and cuts in caches that belong to another layer or hold only a window."""
    for layer, method in compiled.cache_cuts:
        if method.merges:
            raise UnsupportedPlan(
                f"method {compiled.name_of(method)!r} merges hidden states, and a cut in a cache has only keys and "
                "values",
                "remove cache_only, or choose a method that only drops tokens",
            )
        if layer >= compiled.n_kv_layers:
            raise UnsupportedPlan(
                f"layer {layer} has no cache of its own", f"place the step before layer {compiled.n_kv_layers}"
            )
        if decoder_layers.narrow(compiled.config)[layer]:
            raise UnsupportedPlan(
                f"layer {layer} attends within a window, and its cache holds only the window",
                "choose layers of full attention",
            )


def _check_earlier_caches(compiled: CompiledPlan) -> None:
    """Refuse to cut earlier caches that hold only a window, or another state than keys and values."""
    if not (until := compiled.earlier_caches_until):
        return
    if reason := token_mixing.of_types(decoder_layers.layer_types(compiled.config)[:until]):
        raise UnsupportedModel(f"the caches of layers before {until} cannot be cut: {reason}")
    if any(narrow := decoder_layers.narrow(compiled.config)[:until]):
        raise UnsupportedPlan(
            f"layer {narrow.index(True)} attends within a window, and its cache holds only the window",
            f"remove earlier_caches from the step at layer {until}",
        )


def _check_encoders(compiled: CompiledPlan) -> None:
    """Refuse methods that need encoder attention which the adapter does not provide."""
    for method in compiled.methods:
        if missing := (method.needs & ENCODER_SIGNALS).difference(compiled.encoder_attentions):
            kind = min(missing).removesuffix("-encoder")
            raise UnsupportedPlan(
                f"method {compiled.name_of(method)!r} reads the {kind} encoder's attention, which the adapter of "
                f"{compiled.adapter.name} does not provide",
                "choose another method, or a model that docs/methods.md lists for this method",
            )
