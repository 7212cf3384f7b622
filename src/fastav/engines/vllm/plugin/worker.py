"""All use of vLLM's internals, of one version, but for the cache's (`memory`).

A hook reads the plan when vLLM reads a model's configuration, refuses what cannot be exact, and names a scheduler and a
worker of our own. The worker is vLLM's but for two things: once the model is loaded, its decoder becomes a
`PrunedDecoder`, and the cache of its layers is asked for in parts. The decoder runs the layers before the first cut as
they are, and later ones on the tokens that stay, with attention metadata of their own.

What is used beyond vLLM's documented interfaces: the map of configuration hooks, `Worker.get_kv_cache_spec`, the V1
model runner's batch and requests, the forward context's dictionaries, metadata builders, the decoder's layers, and the
group of tensor-parallel ranks.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastav.engines.vllm import guards
from fastav.engines.vllm.passage import Passage, Passages, Plans, inputs_of
from fastav.engines.vllm.ranks import MEANS, Ranks
from fastav.engines.vllm.step_check import LayerCall, StepPlan, StepRecord, require_step
from fastav.engines.vllm.walk import Geometry, Row, Walk, uploaded
from fastav.errors import FastAVError, UnsupportedModel, UnsupportedPlan, reason_of
from fastav.plan_check import not_applied

SUPPORTED = "0.32.0"  # of vLLM, which the extra `vllm` names too
WORKER = f"{__name__}.PruningWorker"
SCHEDULER = "fastav.engines.vllm.memory.scheduler"
PADDED = -1  # the slot of a token that is not stored
BACKENDS = ("CPU_ATTN", "FLASH_ATTN")  # others may own much memory in every builder of metadata
OUTSIDE_GRAPHS = frozenset({"vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"})
DECODERS = (  # module and class, whose layers are run as `Pruning` does
    "qwen2.Qwen2Model",
    "qwen3_vl.Qwen3LLMModel",
    "qwen3_vl_moe.Qwen3MoeLLMModel",
    "qwen3_omni_moe_thinker.Qwen3MoeLLMModel",
)


# --- in every process


def install() -> None:
    """Hook into the configuration of every model, and into the checks of requests; again does nothing.

    In another vLLM than the one that is supported only where configurations are made, which refuses plans there.
    """
    from vllm.config import VllmConfig  # pyright: ignore[reportMissingImports]

    if not hasattr(VllmConfig, "_fastav"):
        VllmConfig._fastav = True
        VllmConfig.__post_init__ = _checked_at_last(VllmConfig.__post_init__)
    if not supported():
        return
    from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.input_processor import InputProcessor  # pyright: ignore[reportMissingImports]

    for name in {*ModelRegistry.get_supported_archs(), *MODELS_CONFIG_MAP}:
        if not isinstance(earlier := MODELS_CONFIG_MAP.get(name), _Configured):
            MODELS_CONFIG_MAP[name] = _Configured(earlier)
    if not hasattr(InputProcessor, "_fastav"):
        InputProcessor._fastav = True
        InputProcessor.process_inputs = _checking(InputProcessor.process_inputs)
        InputProcessor.resolve_watermarking = _without_beams(InputProcessor.resolve_watermarking)


def _checked_at_last(plain: Any) -> Any:
    """What ends the making of a configuration, and then refuses a plan that nothing in it will carry out."""

    def __post_init__(self: Any) -> None:  # noqa: N807
        plain(self)
        model = self.model_config
        if model is None or (asked := guards.asked_for(self.additional_config)) is None:
            return
        require_version()
        if model.is_submodel_config:  # a part of a configuration that has been checked
            return
        if self.parallel_config.worker_cls != WORKER:  # which the model's own hook asks for
            raise not_applied(f"vLLM did not read {asked} for {', '.join(model.architectures or ())}")
        found = guards.read(self.additional_config, model.hf_config)
        assert found is not None
        guards.check(found, _serving(self))  # whatever vLLM has changed since

    return __post_init__


class _Configured:
    """What vLLM calls about a configuration: its own rules for the model, if it has any, then ours."""

    def __init__(self, earlier: Any) -> None:
        self._earlier = earlier

    def verify_and_update_model_config(self, model_config: Any) -> None:
        if self._earlier is not None:
            self._earlier.verify_and_update_model_config(model_config)

    def verify_and_update_config(self, config: Any) -> None:
        if self._earlier is not None:
            self._earlier.verify_and_update_config(config)
        if (asked := guards.read(config.additional_config, config.model_config.hf_config)) is not None:
            require_version()
            _adapt(config, asked)
            guards.check(asked, _serving(config))
            # the same plan in every process, whatever becomes of a file
            config.additional_config = {
                **config.additional_config,
                "fastav": {"plan": json.loads(asked.plan.to_json())},
            }
            config.parallel_config.worker_cls = WORKER
            config.scheduler_config.scheduler_cls = SCHEDULER


def supported() -> bool:
    """Whether this vLLM is the one whose internals stand here, for whichever device it was built."""
    return _version().partition("+")[0] == SUPPORTED


def _version() -> str:
    import vllm  # pyright: ignore[reportMissingImports]

    return vllm.__version__


def require_version() -> None:
    """Refuse any other vLLM than the one that is supported.  Raises: FastAVError."""
    if not supported():
        raise FastAVError(
            f"fastav prunes inside vLLM {SUPPORTED}, this is {_version()}", f"pip install vllm=={SUPPORTED}"
        )


def plans(config: Any) -> Plans:
    """The plans by which requests of a server run that prunes.  Raises: PlanError, UnknownName, UnsupportedModel."""
    asked = guards.read(config.additional_config, config.model_config.hf_config)
    assert asked is not None, "nothing of ours is named where there is no plan"
    return Plans(asked, bool(config.scheduler_config.enable_chunked_prefill))


def computed_before(step: Any) -> dict[str, int]:
    """How many tokens of each request had run before a step that vLLM's scheduler wants."""
    went_on = step.scheduled_cached_reqs
    computed = dict(zip(went_on.req_ids, went_on.num_computed_tokens, strict=True))
    return computed | {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}


def said_by(params: Any) -> Any:
    """What a request says of plans in its sampling parameters, `vllm_xargs` of the OpenAI server; None if nothing."""
    return (getattr(params, "extra_args", None) or {}).get("fastav")


def _checking(plain: Any) -> Any:
    """vLLM's `process_inputs`, with our checks around it, whose errors it hands to the client as its own."""

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **named: Any) -> Any:
        made = _plans_of(self)
        if wrong := guards.misspelt(getattr(params, "extra_args", None) or {}):
            raise _refusal(f"a request names its plan as fastav, not as {wrong}")
        if made is None:
            if said_by(params) is not None:
                raise _refusal(f"this server does not prune: {guards.HOW}")
            return plain(self, request_id, prompt, params, *args, **named)
        if getattr(params, "prompt_logprobs", None) is not None:
            raise _refusal("prompt_logprobs asks for logits at tokens that fastav drops: leave it out")
        if named.get("resumable"):
            raise _refusal("input that comes in a stream grows a prompt that has been pruned: send it whole")
        with _told():
            chosen = made.of(said_by(params))
        request = plain(self, request_id, prompt, params, *args, **named)
        if all(feature.data is not None for feature in request.mm_features or ()):  # not where a cache has it
            with _told():
                chosen.counts(prompt_of(request, chosen))
        return request

    return process_inputs


def _without_beams(plain: Any) -> Any:
    """What vLLM asks about the parameters of every request first, and of beams alone."""

    def resolve_watermarking(self: Any, params: Any) -> Any:
        if type(params).__name__ == "BeamSearchParams" and _plans_of(self) is not None:
            raise _refusal("vLLM's beam search asks anew for every token, which would be pruned by other queries")
        return plain(self, params)

    return resolve_watermarking


def _plans_of(processor: Any) -> Plans | None:
    """The plans of the server that a processor of inputs is of; None if it does not prune."""
    if "_fastav" not in processor.__dict__:
        config = processor.vllm_config
        pruning = isinstance(config.additional_config, Mapping) and "fastav" in config.additional_config
        processor.__dict__["_fastav"] = plans(config) if pruning else None
    return processor.__dict__["_fastav"]


@contextmanager
def _told() -> Iterator[None]:
    """Whatever a request's plan or prompt cannot be read for is an error of that request, not of the engine."""
    try:
        yield
    except Exception as error:
        raise _refusal(str(error) if isinstance(error, FastAVError) else reason_of(error)) from error


def _refusal(words: str) -> Exception:
    """What vLLM's server answers with 400."""
    from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

    return VLLMValidationError(words)


def _adapt(config: Any, asked: guards.Asked) -> None:
    """Turn off what vLLM turns on by itself and pruning cannot be exact with, and say so."""
    from vllm.logger import init_logger  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    log, scheduler = init_logger("vllm.fastav"), config.scheduler_config  # vLLM shows what its own loggers say
    log.info("fastav: pruning %s by the plan %s", asked.adapter.name, asked.plan.name or asked.plan.fingerprint)
    if config.cache_config.enable_prefix_caching:
        log.warning("fastav: prefix caching is turned off, as pruned layers hold other tokens than it looks for")
        config.cache_config.enable_prefix_caching = False
    if scheduler.enable_chunked_prefill and not asked.by_layout:
        log.warning("fastav: chunked prefill is turned off, as the plan's methods look at whole prompts")
        scheduler.enable_chunked_prefill = False
    if not scheduler.enable_chunked_prefill:
        _make_room(scheduler, config.model_config.max_model_len)
    if not current_platform.is_cpu():
        log.warning(
            "fastav: pruning inside vLLM is shown to be exact on its CPU backend; elsewhere it has not been run"
        )
    mode = config.compilation_config.cudagraph_mode
    if mode is None or mode.has_full_cudagraphs():
        from vllm.config import CUDAGraphMode  # pyright: ignore[reportMissingImports]

        # graphs of the whole model would replay without looking at what was kept; attention stands outside of these
        config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE


def _make_room(scheduler: Any, longest: int) -> None:
    """Have the longest prompt fit one step, and the media of two steps the cache of what encoders said.

    Where a prompt's media found no room there, vLLM would run the text before them by itself.
    """
    scheduler.long_prefill_token_threshold = 0
    scheduler.max_num_scheduled_tokens = None  # which vLLM takes from the next
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, longest)
    scheduler.max_num_encoder_input_tokens = scheduler.max_num_batched_tokens
    scheduler.encoder_cache_size = 2 * scheduler.max_num_batched_tokens


def _serving(config: Any) -> guards.Serving:
    import vllm.envs as envs  # pyright: ignore[reportMissingImports]

    parallel, model = config.parallel_config, config.model_config
    media, compiling = model.multimodal_config, config.compilation_config
    graphs, splits = compiling.cudagraph_mode, compiling.splitting_ops
    return guards.Serving(
        prefix_caching=bool(config.cache_config.enable_prefix_caching),
        chunked_prefill=bool(config.scheduler_config.enable_chunked_prefill),
        speculative=config.speculative_config is not None,
        pipeline_parallel=parallel.pipeline_parallel_size,
        data_parallel=parallel.data_parallel_size,
        context_parallel=max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size),
        expert_parallel=bool(parallel.enable_expert_parallel),
        microbatches=bool(parallel.enable_dbo or parallel.ubatch_size),
        lora=config.lora_config is not None,
        kv_transfer=any(
            asked is not None
            for asked in (config.kv_transfer_config, config.ec_transfer_config, config.cache_config.kv_offloading_size)
        ),
        pooling=model.runner_type != "generate",
        prompt_embeds=bool(model.enable_prompt_embeds),
        evs=media is not None and bool(media.video_pruning_rate),
        routed_experts=bool(config.aux_output_config.enabled),
        shared_media=media is not None and media.mm_processor_cache_type == "shm",
        own_worker=parallel.worker_cls not in ("auto", WORKER),
        own_scheduler=config.scheduler_config.scheduler_cls not in (None, SCHEDULER),
        v2_runner=bool(config.use_v2_model_runner),
        whole_graphs=graphs is not None
        and graphs.name != "NONE"
        and (
            graphs.has_full_cudagraphs()
            or bool(envs.VLLM_USE_BREAKABLE_CUDAGRAPH)
            or (splits is not None and not OUTSIDE_GRAPHS.issubset(splits))
        ),
    )


# --- in a worker


def __getattr__(name: str) -> Any:
    if name == "PruningWorker":
        return _worker()
    raise AttributeError(name)


@cache
def _worker() -> type:
    """The platform's worker, which prunes the model that it loads.  Made late: to import workers is for workers."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Base  # pyright: ignore[reportMissingImports]
    else:
        from vllm.v1.worker.gpu_worker import Worker as Base  # pyright: ignore[reportMissingImports]

    class PruningWorker(Base):
        def get_kv_cache_spec(self) -> dict[str, Any]:
            from fastav.engines.vllm.memory import in_parts

            # the first thing that is asked of a loaded model; of what loading itself refuses, an engine with workers in
            # other processes would not hear the words
            pruning, longest = self.pruning, self.vllm_config.model_config.max_model_len
            return in_parts(super().get_kv_cache_spec(), pruning.names, pruning.plans.default, longest)

        def execute_model(self, scheduler_output: Any, *rest: Any, **named: Any) -> Any:
            # an error of a worker ends the engine: an installation that does not prune is not one that may go on
            with self.pruning.checked(scheduler_output):
                return super().execute_model(scheduler_output, *rest, **named)

        @cached_property
        def pruning(self) -> "Pruning":
            return prune(self.model_runner, self.vllm_config)

    return PruningWorker


def prune(runner: Any, config: Any) -> "Pruning":
    """Have the decoder of a model runner's model prune as the configuration asks.  Raises: UnsupportedModel."""
    made, model = plans(config), runner.get_model()
    decoder = getattr(getattr(model, "language_model", None), "model", None)
    kind = type(decoder)
    if f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" not in DECODERS:
        raise UnsupportedModel(
            f"vLLM runs {made.default.asked.adapter.name} as {type(model).__name__}, whose decoder is not known",
            "leave --model-impl out",
        )
    decoder.__class__ = _pruned(kind)  # its weights and compiled code stay as they are
    decoder.__dict__["pruning"] = pruning = Pruning(made, decoder, runner)
    return pruning


@cache
def _pruned(kind: type) -> type:
    """A decoder that hands its layers to `Pruning`."""

    class PrunedDecoder(kind):
        def __call__(
            self,
            input_ids: Any,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Any = None,
            deepstack_input_embeds: Any = None,
        ) -> Any:
            def plain() -> Any:
                more = {} if deepstack_input_embeds is None else {"deepstack_input_embeds": deepstack_input_embeds}
                return call(input_ids, positions, intermediate_tensors, inputs_embeds, **more)

            call = super().__call__
            visual = [] if deepstack_input_embeds is None else list(deepstack_input_embeds.tensors.values())
            return self.pruning.forward(plain, input_ids, positions, inputs_embeds, visual)

    return PrunedDecoder


class Pruning:
    """What a decoder knows of the requests that it runs."""

    def __init__(self, plans: Plans, decoder: Any, runner: Any) -> None:
        from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports]

        self.decoder, self.runner, self.plans = decoder, runner, plans
        self.passages: dict[str, Passage] = {}
        self.ranks = Ranks(get_tp_group())
        self.names = [layer.self_attn.attn.layer_name for layer in decoder.layers]
        for backend in {layer.self_attn.attn.attn_backend.get_name() for layer in decoder.layers}:
            if backend not in BACKENDS:
                raise UnsupportedPlan(
                    f"pruning does not know the attention backend {backend}", f"--attention-backend {BACKENDS[-1]}"
                )
        self._builders: dict[str, tuple[Any, int]] = {}
        self._record = StepRecord(len(self.names))
        for index, layer in enumerate(decoder.layers):
            _record_calls(layer.self_attn.attn.impl, index, self._record)

    @contextmanager
    def checked(self, step: Any) -> Iterator[None]:
        """Around a step that vLLM's scheduler wants: in the end every layer has run as the plan says.

        Raises: PlanNotApplied.
        """
        self._record.clear()
        yield
        if not (tokens := step.num_scheduled_tokens):
            return
        computed = computed_before(step)
        passages = [self.passages.get(name) or self._passage(name, self.runner.requests[name], 0) for name in tokens]
        plan = StepPlan.of(passages, [computed[name] for name in tokens], list(tokens.values()))
        require_step(plan, self._record)

    @torch.inference_mode()
    def forward(self, plain: Any, input_ids: Any, positions: Tensor, embeds: Any, visual: Sequence[Tensor]) -> Any:
        """The decoder's hidden states, at the places of the whole batch; zero where tokens were dropped.

        plain: runs the decoder as it is. visual: what is added after each of the first layers (deepstack), of all
        tokens of the batch.
        """
        from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]

        context = get_forward_context()
        if not context.attn_metadata:
            return plain()  # a run for memory or compilation
        walk = Walk(self._rows(), positions.device)
        if walk.whole:
            return plain()
        if not walk.cut_here:
            with self._within(context, walk) as change:
                change()
                return plain()
        hidden = self.decoder.embed_input_ids(input_ids) if embeds is None else embeds
        with self._within(context, walk) as change:
            out = self._walked(walk, hidden, positions, visual, change)
        self._settle()
        return out

    def _walked(self, walk: Walk, hidden: Tensor, positions: Tensor, visual: Sequence[Tensor], change: Any) -> Tensor:
        """Run the layers one by one."""
        residual, places, cuts = None, None, walk.layers
        out = torch.zeros_like(hidden)
        for index, layer in enumerate(self.decoder.layers):
            if index in cuts:
                hidden = hidden if residual is None else hidden + residual
                hidden, residual = walk.cut(index, hidden[: walk.tokens]), None
                places = walk.places()
                if not len(places):
                    return out  # a piece of a prompt of which nothing stays
                change(index)
            here = positions if places is None else positions[..., places]
            with self._observed(walk, index, layer):
                hidden, residual = layer(here, hidden, residual)
            if index < len(visual):
                hidden = hidden + (visual[index] if places is None else visual[index][places])
        hidden, _ = self.decoder.norm(hidden, residual)
        out[places] = hidden
        return out

    # --- requests

    def _rows(self) -> list[Row]:
        """The requests of the batch, in its order."""
        batch, requests = self.runner.input_batch, self.runner.requests
        for gone in self.passages.keys() - requests.keys():
            del self.passages[gone]
        tokens = np.diff(self.runner.query_start_loc.np[: batch.num_reqs + 1]).tolist()
        computed = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        return [
            Row(self._passage(name, requests[name], done), done, new)
            for name, done, new in zip(batch.req_ids, computed, tokens, strict=True)
        ]

    def _passage(self, name: str, request: Any, computed: int) -> Passage:
        if not computed:  # it begins, or begins anew after it was preempted
            made = self.plans.of(said_by(request.sampling_params))
            self.passages[name] = made.of(prompt_of(request, made), self.runner.device)
            if (prefill := self.passages[name].prefill) is not None and not self.ranks.alone:
                prefill.agreed = self.ranks.agreed
        passage = self.passages[name]
        if passage.length != request.num_prompt_tokens:
            raise UnsupportedPlan("a prompt grew after it had run, as streamed input does", "send whole prompts")
        return passage

    def _settle(self) -> None:
        """Forget what only the prefill needed."""
        for name, passage in self.passages.items():
            if passage.prefill is not None:
                self.passages[name] = replace(passage, prefill=None)

    # --- attention

    @contextmanager
    def _within(self, context: Any, walk: Walk) -> Iterator[Any]:
        """A forward context in which a function changes what the layers from a cut to the next one are given."""
        from vllm.forward_context import override_forward_context  # pyright: ignore[reportMissingImports]

        own = copy(context)
        own.attn_metadata, own.slot_mapping = dict(context.attn_metadata), dict(context.slot_mapping)
        stages = dict(pairwise([*walk.layers, len(self.names)]))

        def change(at: int | None = None) -> None:
            for first, end in stages.items() if at is None else [(at, stages[at])]:
                where = walk.enter(first)
                for names in self._alike(self.names[first:end]):
                    width = len(context.slot_mapping[names[0]]) if at is None else len(where.row)
                    metadata, slots = self._metadata(names[0], where, width)
                    for layer in names:
                        own.attn_metadata[layer], own.slot_mapping[layer] = metadata, slots

        with override_forward_context(own):
            yield change

    def _alike(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Layers, in order, by the part of the cache that they are in."""
        for group in self.runner.kv_cache_config.kv_cache_groups:
            if inside := [name for name in names if name in group.layer_names]:
                yield inside

    def _metadata(self, layer: str, where: Geometry, width: int) -> tuple[Any, Tensor]:
        """Attention metadata and slots of the tokens of one layer and of those like it, by the backend's own builder.

        width: how many tokens the layer runs on, with those that only fill the batch up.
        """
        from vllm.v1.attention.backend import CommonAttentionMetadata  # pyright: ignore[reportMissingImports]

        builder, group = self._building(layer)
        blocks, device = self.runner.input_batch.block_table[group], self.runner.device
        table = blocks.get_device_tensor(self.runner.input_batch.num_reqs)[uploaded(where.requests, device)]
        row, place = uploaded(where.row, device), uploaded(where.place, device)
        slots = table[row, place // blocks.block_size].long() * blocks.block_size + place % blocks.block_size
        slots = nn.functional.pad(slots, (0, width - len(slots)), value=PADDED)
        starts, lengths = where.starts.astype(np.int32), where.lengths.astype(np.int32)
        common = CommonAttentionMetadata(
            query_start_loc=uploaded(starts, device),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=uploaded(lengths, device),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
            num_reqs=len(where.requests),
            num_actual_tokens=len(where.row),
            max_query_len=int(np.diff(starts).max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=slots,
            causal=True,
        )
        return builder.build(0, common), slots

    def _building(self, layer: str) -> tuple[Any, int]:
        """A metadata builder of our own for a layer and those like it, and which part of the cache is theirs.

        For each of them another one: a builder may own the memory that its metadata is in.
        """
        if layer not in self._builders:
            groups = [group for groups in self.runner.attn_groups for group in groups if layer in group.layer_names]
            (group,) = groups
            size = self.runner.input_batch.block_table[group.kv_cache_group_id].block_size
            spec, kind = group.kv_cache_spec.copy_with_new_block_size(size), group.backend.get_builder_cls()
            builder = kind(spec, [layer], self.runner.vllm_config, self.runner.device)
            self._builders[layer] = builder, group.kv_cache_group_id
        return self._builders[layer]

    @contextmanager
    def _observed(self, walk: Walk, index: int, layer: Any) -> Iterator[None]:
        """Show methods the queries and keys of a layer, if they ask for them."""
        if not (wanted := walk.wanted(index)):
            yield
            return
        attention, ranks = layer.self_attn, self.ranks

        def see(_: Any, given: tuple[Tensor, ...]) -> None:
            query, key = (
                x.view(-1, heads, attention.head_dim)
                for x, heads in zip(given, (attention.num_heads, attention.num_kv_heads), strict=False)
            )
            if means := wanted & MEANS:
                walk.observe(index, means, query, key, attention.scaling)
                walk.average(index, means, ranks.mean)
            if whole := wanted - MEANS:
                query = ranks.heads(query, attention.total_num_heads)
                key = ranks.heads(key, attention.total_num_kv_heads)
                walk.observe(index, whole, query, key, attention.scaling)

        hook = attention.attn.register_forward_pre_hook(see)
        try:
            yield
        finally:
            hook.remove()


def _record_calls(attention: Any, layer: int, record: StepRecord) -> None:
    """Have a layer's implementation of attention note what it is given.

    Graphs that vLLM compiles and captures leave attention out, so that these run in every step.
    """
    forward, store = attention.forward, attention.do_kv_cache_update

    def noted(owner: Any, query: Tensor, key: Any, value: Any, cache: Any, given: Any, *rest: Any, **named: Any) -> Any:
        if given is not None:  # as it is in a run for memory or compilation
            lengths = given.seq_lens
            call = LayerCall(
                rows=len(query),
                tokens=given.num_actual_tokens,
                longest_query=given.max_query_len,
                longest=given.max_seq_len,
                lengths=tuple(lengths.tolist()) if lengths.device.type == "cpu" else None,
            )
            record.calls[layer].append(call)
            _require_as_many(call.tokens, len(query), layer)
        return forward(owner, query, key, value, cache, given, *rest, **named)

    def stored(owner: Any, key: Tensor, value: Tensor, cache: Any, slots: Tensor, *rest: Any, **named: Any) -> Any:
        record.slots[layer] += len(slots)
        _require_as_many(len(slots), len(key), layer)
        return store(owner, key, value, cache, slots, *rest, **named)

    attention.forward, attention.do_kv_cache_update = noted, stored


def _require_as_many(told: int, given: int, layer: int) -> None:
    """Refuse to run a kernel that would read beyond the tokens that it is given.  Raises: PlanNotApplied."""
    if told > given:
        raise not_applied(f"layer {layer} is told of {told} tokens and given {given}")


def prompt_of(request: Any, made: Passages) -> Mapping[str, Any]:
    """What an adapter reads of a request's prompt."""
    features = sorted(request.mm_features or (), key=lambda feature: feature.mm_position.offset)
    assert all(feature.data is not None for feature in features), "a cache that withholds them is refused at start"
    return inputs_of(made.asked.adapter, request.prompt_token_ids, [feature.data for feature in features])
