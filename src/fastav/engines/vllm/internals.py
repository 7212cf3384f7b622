"""All use of vLLM's internals, of one version.

A hook reads the plan when vLLM reads a model's configuration, refuses what cannot be exact, and names a worker of our
own, which is vLLM's but for one thing: once the model is loaded, its decoder becomes a `PrunedDecoder`. That runs the
layers before the first cut as they are, and later ones on the tokens that stay, with attention metadata of their own.

What is used beyond vLLM's documented interfaces: the map of configuration hooks, `Worker.load_model`, the V1 model
runner's batch and requests, the forward context's dictionaries, metadata builders, and the decoder's layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastav.engines.vllm import guards
from fastav.engines.vllm.passage import Passage, Passages
from fastav.engines.vllm.walk import Geometry, Row, Walk
from fastav.errors import FastAVError, UnsupportedModel, UnsupportedPlan

SUPPORTED = "0.32"  # of vLLM
WORKER = f"{__name__}.PruningWorker"
PADDED = -1  # the slot of a token that is not stored


# --- in every process


def install() -> None:
    """Hook into the configuration of every model, and into the checks of requests; again does nothing.

    In another vLLM than the one that is supported only the first, which refuses plans there.
    """
    from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP  # pyright: ignore[reportMissingImports]

    for name in {*ModelRegistry.get_supported_archs(), *MODELS_CONFIG_MAP}:
        if not isinstance(earlier := MODELS_CONFIG_MAP.get(name), _Configured):
            MODELS_CONFIG_MAP[name] = _Configured(earlier)
    if not _supported():
        return
    from vllm.v1.engine.input_processor import InputProcessor  # pyright: ignore[reportMissingImports]

    if not hasattr(InputProcessor, "_fastav"):
        InputProcessor._fastav = True
        InputProcessor._validate_params = _refusing(InputProcessor._validate_params)


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
            config.parallel_config.worker_cls = WORKER


def _supported() -> bool:
    """Whether this vLLM is the one whose internals stand here."""
    return _version().startswith(f"{SUPPORTED}.")


def _version() -> str:
    import vllm  # pyright: ignore[reportMissingImports]

    return vllm.__version__


def require_version() -> None:
    """Refuse any other vLLM than the one that is supported.  Raises: FastAVError."""
    if not _supported():
        raise FastAVError(
            f"fastav prunes inside vLLM {SUPPORTED}, this is {_version()}", f"pip install 'vllm~={SUPPORTED}.0'"
        )


def _refusing(plain: Any) -> Any:
    def validate(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        additional = self.vllm_config.additional_config
        pruning = isinstance(additional, Mapping) and "fastav" in additional
        if pruning and getattr(params, "prompt_logprobs", None) is not None:
            raise ValueError("prompt_logprobs asks for logits at tokens that fastav drops: leave it out")
        return plain(self, params, *args, **kwargs)

    return validate


def _adapt(config: Any, asked: guards.Asked) -> None:
    """Turn off what vLLM turns on by itself and pruning cannot be exact with, and say so."""
    from vllm.logger import init_logger  # pyright: ignore[reportMissingImports]

    log, scheduler = init_logger("vllm.fastav"), config.scheduler_config  # vLLM shows what its own loggers say
    log.info("fastav: pruning %s by the plan %s", asked.adapter.name, asked.plan.name or asked.plan.fingerprint)
    if config.cache_config.enable_prefix_caching:
        log.warning("fastav: prefix caching is turned off, as pruned layers hold other tokens than it looks for")
        config.cache_config.enable_prefix_caching = False
    if not asked.by_layout:
        if scheduler.enable_chunked_prefill:
            log.warning("fastav: chunked prefill is turned off, as the plan's methods look at whole prompts")
        scheduler.enable_chunked_prefill = False
        scheduler.long_prefill_token_threshold = 0
        _make_room(scheduler, config.model_config.max_model_len)
    mode = config.compilation_config.cudagraph_mode
    if mode is None or mode.has_full_cudagraphs():
        from vllm.config import CUDAGraphMode  # pyright: ignore[reportMissingImports]

        # graphs of the whole model would replay without looking at what was kept; attention stands outside of these
        config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE


def _make_room(scheduler: Any, longest: int) -> None:
    """Have the longest prompt fit one step, and the media of two steps the cache of what encoders said.

    Where a prompt's media found no room there, vLLM would run the text before them by itself.
    """
    scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, longest)
    scheduler.max_num_encoder_input_tokens = scheduler.max_num_batched_tokens
    scheduler.encoder_cache_size = 2 * scheduler.max_num_batched_tokens


def _serving(config: Any) -> guards.Serving:
    parallel, model = config.parallel_config, config.model_config
    media = model.multimodal_config
    return guards.Serving(
        prefix_caching=bool(config.cache_config.enable_prefix_caching),
        chunked_prefill=bool(config.scheduler_config.enable_chunked_prefill),
        speculative=config.speculative_config is not None,
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        data_parallel=parallel.data_parallel_size,
        context_parallel=max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size),
        microbatches=bool(parallel.enable_dbo or parallel.ubatch_size),
        lora=config.lora_config is not None,
        kv_transfer=any(
            asked is not None
            for asked in (config.kv_transfer_config, config.ec_transfer_config, config.cache_config.kv_offloading_size)
        ),
        pooling=model.runner_type != "generate",
        prompt_embeds=bool(model.enable_prompt_embeds),
        evs=media is not None and bool(media.video_pruning_rate),
        own_worker=parallel.worker_cls not in ("auto", WORKER),
        v2_runner=bool(config.use_v2_model_runner),
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
        def load_model(self, **options: Any) -> None:
            super().load_model(**options)
            prune(self.model_runner, self.vllm_config)

    return PruningWorker


def prune(runner: Any, config: Any) -> None:
    """Have the decoder of a model runner's model prune as the configuration asks.  Raises: UnsupportedModel."""
    from vllm.model_executor.models.qwen2 import Qwen2Model  # pyright: ignore[reportMissingImports]

    asked = guards.read(config.additional_config, config.model_config.hf_config)
    assert asked is not None, "the worker is named where a plan is"
    decoder = getattr(getattr(runner.get_model(), "language_model", None), "model", None)
    if type(decoder) is not Qwen2Model:
        raise UnsupportedModel(
            f"vLLM runs {asked.adapter.name} with a decoder {type(decoder).__name__}, and Qwen2Model is what is known",
            "leave --model-impl out",
        )
    decoder.__class__ = _pruned(Qwen2Model)  # its weights and compiled code stay as they are
    decoder.__dict__["pruning"] = Pruning(asked, decoder, runner)


@cache
def _pruned(kind: type) -> type:
    """A decoder that hands its layers to `Pruning`."""

    class PrunedDecoder(kind):
        def __call__(
            self, input_ids: Any, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None
        ) -> Any:
            plain = super().__call__
            return self.pruning.forward(plain, input_ids, positions, intermediate_tensors, inputs_embeds)

    return PrunedDecoder


class Pruning:
    """What a decoder knows of the requests that it runs."""

    def __init__(self, asked: guards.Asked, decoder: Any, runner: Any) -> None:
        self.decoder, self.runner, self.made = decoder, runner, Passages(asked)
        self.passages: dict[str, Passage] = {}
        self.names = [layer.self_attn.attn.layer_name for layer in decoder.layers]
        self._builder: Any = None
        self._block = 0

    @torch.inference_mode()
    def forward(self, plain: Any, input_ids: Any, positions: Tensor, intermediate: Any, embeds: Any) -> Any:
        """The decoder's hidden states, at the places of the whole batch; zero where tokens were dropped."""
        from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]

        context = get_forward_context()
        if not context.attn_metadata or not self.made.layers:
            return plain(input_ids, positions, intermediate, embeds)  # a run for memory or compilation
        walk = Walk(self._rows(), positions.device)
        if walk.whole:
            return plain(input_ids, positions, intermediate, embeds)
        if not walk.cut_here:
            with self._within(context, walk) as change:
                change()
                return plain(input_ids, positions, intermediate, embeds)
        hidden = self.decoder.embed_input_ids(input_ids) if embeds is None else embeds
        with self._within(context, walk) as change:
            out = self._walked(walk, hidden, positions, change)
        self._settle()
        return out

    def _walked(self, walk: Walk, hidden: Tensor, positions: Tensor, change: Any) -> Tensor:
        """Run the layers one by one."""
        residual, places = None, None
        out = torch.zeros_like(hidden)
        for index, layer in enumerate(self.decoder.layers):
            if index in self.made.layers:
                hidden = hidden if residual is None else hidden + residual
                hidden, residual = walk.cut(index, hidden[: walk.tokens]), None
                places = walk.places()
                if not len(places):
                    return out  # a piece of a prompt of which nothing stays
                change(index)
            here = positions if places is None else positions[..., places]
            with self._observed(walk, index, layer):
                hidden, residual = layer(here, hidden, residual)
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
            self.passages[name] = self.made.of(_inputs(request), self.runner.device)
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
        ends = [*self.made.layers[1:], len(self.names)]

        def change(at: int | None = None) -> None:
            for first, end in zip(self.made.layers, ends, strict=True):
                if at in (None, first):
                    name = self.names[first]
                    metadata, slots = self._metadata(
                        context.attn_metadata[name], context.slot_mapping[name], walk.enter(first), at is None
                    )
                    for layer in self.names[first:end]:
                        own.attn_metadata[layer], own.slot_mapping[layer] = metadata, slots

        with override_forward_context(own):
            yield change

    def _metadata(self, whole: Any, mapping: Tensor, where: Geometry, padded: bool) -> tuple[Any, Tensor]:
        """Attention metadata and slots of one layer's tokens, by the backend's own builder.

        padded: whether the layer runs on as many tokens as the whole batch is padded to.
        """
        from vllm.v1.attention.backend import CommonAttentionMetadata  # pyright: ignore[reportMissingImports]

        builder, block = self._building(whole)
        device = mapping.device
        upload = lambda array, kind: torch.from_numpy(array).to(device, kind, non_blocking=True)  # noqa: E731
        table = whole.block_table[upload(where.requests, torch.int64)]
        row, place = upload(where.row, torch.int64), upload(where.place, torch.int64)
        slots = table[row, place // block].long() * block + place % block
        if padded:
            slots = nn.functional.pad(slots, (0, len(mapping) - len(slots)), value=PADDED)
        starts = torch.from_numpy(where.starts).int()
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device, non_blocking=True),
            query_start_loc_cpu=starts,
            seq_lens=upload(where.lengths, torch.int32),
            seq_lens_cpu_upper_bound=torch.from_numpy(where.lengths).int(),
            num_reqs=len(where.requests),
            num_actual_tokens=len(where.row),
            max_query_len=int(np.diff(where.starts).max()),
            max_seq_len=int(where.lengths.max()),
            block_table_tensor=table,
            slot_mapping=slots,
            causal=True,
        )
        return builder.build(0, common), slots

    def _building(self, whole: Any) -> tuple[Any, int]:
        """A metadata builder of our own for pruned layers, and how many tokens a block of theirs holds."""
        if self._builder is None:
            first = self.names[self.made.layers[0]]
            groups = [group for groups in self.runner.attn_groups for group in groups if first in group.layer_names]
            (group,) = groups
            table = self.runner.input_batch.block_table[group.kv_cache_group_id]
            spec = group.kv_cache_spec.copy_with_new_block_size(table.block_size)
            late = self.names[self.made.layers[0] :]
            config, device = self.runner.vllm_config, whole.block_table.device
            self._builder = group.backend.get_builder_cls()(spec, late, config, device)
            self._block = table.block_size
        return self._builder, self._block

    @contextmanager
    def _observed(self, walk: Walk, index: int, layer: Any) -> Iterator[None]:
        """Show methods the queries and keys of a layer, if they ask for them."""
        wanted, attention = self.made.wanted.get(index), layer.self_attn
        if not wanted:
            yield
            return

        def see(_: Any, given: tuple[Tensor, ...]) -> None:
            query, key = (
                x.view(-1, heads, attention.head_dim)
                for x, heads in zip(given, (attention.num_heads, attention.num_kv_heads), strict=False)
            )
            walk.observe(index, wanted, query, key, attention.scaling)

        hook = attention.attn.register_forward_pre_hook(see)
        try:
            yield
        finally:
            hook.remove()


def _inputs(request: Any) -> Mapping[str, Any]:
    """What an adapter reads of a prompt: ids, and the grids of its videos in their order."""
    features = sorted(request.mm_features, key=lambda feature: feature.mm_position.offset)
    items = [feature.data for feature in features if feature.data is not None]
    grids = [item["video_grid_thw"].data.numpy() for item in items if "video_grid_thw" in item]
    inputs: dict[str, Any] = {"input_ids": np.asarray(request.prompt_token_ids)[None]}
    return inputs | ({"video_grid_thw": np.stack(grids)} if grids else {})
