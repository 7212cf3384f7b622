"""What cannot be exact is refused before it runs, in words."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from fastav import token_mixing
from fastav.adapter import ModelAdapter
from fastav.engines.transformers.generation.buffers import StepCache
from fastav.errors import UnsupportedModel, UnsupportedPlan
from fastav.layout import Layout
from fastav.pruning.decoder_layers import layers_with_cache, narrow
from fastav.pruning.device_layout import upload

_DRAFTS = "puts draft tokens into the prefill, which shifts the last query"
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {  # settings of generate: which values, and why
    "assistant_model": (bool, f"assisted decoding {_DRAFTS}"),
    "prompt_lookup_num_tokens": (bool, f"prompt lookup {_DRAFTS}"),
    "assistant_early_exit": (bool, f"early-exit drafting {_DRAFTS}"),
    "use_mtp": (bool, f"multi-token prediction {_DRAFTS}"),
    "prefill_chunk_size": (bool, "a chunked prefill scores every chunk by that chunk's own last query"),
    "custom_generate": (
        lambda value: bool(value) and not getattr(value, "exact_while_pruning", False),
        "custom generation code may not keep the cache (fastav.Decoding does)",
    ),
    "guidance_scale": (
        lambda value: value not in (None, 1),
        "guidance runs the model on a second prompt beside this one, which would be pruned by a last query of its own",
    ),
    "use_cache": (lambda value: value is False, "without a cache every token would prune anew, by another last query"),
    "cache_implementation": (
        lambda value: value not in (None, "dynamic", "hybrid"),
        "this cache cannot hold layers of different lengths",
    ),
}
_PACKING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-3,
}  # between copies of a prompt, whose media are encoded in a batch
_COARSE = 5e-2  # in other dtypes


def check_layers(layers: Sequence[nn.Module]) -> None:
    """Refuse layers that are built of more than attention, whatever their configuration says.

    Raises: UnsupportedModel.
    """
    for layer in layers:
        if why := token_mixing.of_layer(layer):
            raise UnsupportedModel(f"{type(layer).__name__} cannot be pruned: {why}")


def check_attention(config: PreTrainedConfig, implementation: str | None, first: int) -> None:
    """Refuse attention whose masks the engine cannot follow.  first: the first pruned layer.

    Raises: UnsupportedPlan.
    """
    flash = implementation is not None and "flash" in implementation
    if flash and layers_with_cache(config) < config.num_hidden_layers:
        raise UnsupportedPlan(
            "flash attention takes a layer's queries for its last keys, which they are not where keys are shared",
            "load the model with attn_implementation='sdpa'",
        )
    if flash and any(narrow(config)[first:]):
        raise UnsupportedPlan(
            "flash attention counts its sliding window in stored keys, which are not neighbours after pruning",
            "load the model with attn_implementation='sdpa', or prune after the last sliding-window layer",
        )
    if not (implementation in ("eager", "sdpa") or flash):
        raise UnsupportedPlan(
            f"attention {implementation!r} is not supported while pruning",
            "load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'",
        )


def check_cache(cache: Cache | None) -> None:
    """Refuse caches whose layers must all have one length or place.  Raises: UnsupportedPlan."""
    if cache is None or isinstance(cache, StepCache):
        return
    if type(cache) is DynamicCache and not getattr(cache, "offloading", False):
        return
    kind = "an offloaded cache" if type(cache) is DynamicCache else type(cache).__name__
    raise UnsupportedPlan(f"{kind} cannot hold layers of different lengths", "use a DynamicCache")


def check_model(model: Any) -> None:
    """Refuse what wraps a model: the engine's hooks must stand on the model itself.  Raises: UnsupportedModel."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a transformers model",
            "pass the model inside: the module that was given to torch.compile, FSDP or DataParallel",
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModel("a model compiled as a whole cannot be pruned", "compile its decoder layers instead")


def check_call(inputs: Mapping[str, Any], config: PreTrainedConfig, decoder: nn.Module) -> None:
    """Refuse what asks for places that pruning drops.  Raises: UnsupportedPlan."""
    tensors = (*inputs.values(), *decoder.parameters()) if torch.is_grad_enabled() else ()
    if any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        raise UnsupportedPlan("pruning drops gradients with the tokens", "run under torch.inference_mode()")
    if inputs.get("labels") is not None:
        raise UnsupportedPlan(
            "a label after a dropped token would be compared with nothing", "compute the loss from the logits of text"
        )
    for name in ("output_hidden_states", "output_attentions"):
        if inputs.get(name) or (inputs.get(name) is None and getattr(config, name, False)):
            raise UnsupportedPlan(f"{name} would differ in length from layer to layer", "leave it out while pruning")


class GenerateCall(threading.local):
    """The call of `generate` that runs in this thread.

    active: whether one runs. arguments: what it was called with, by name. copies: how many rows of the batch each
    prompt has, for beams and `num_return_sequences`.
    """

    active = False
    arguments: Mapping[str, Any] = {}
    copies = 1

    @contextmanager
    def run(self, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Record a call while it runs."""
        self.active, self.arguments = True, arguments
        try:
            yield
        finally:
            self.active, self.arguments, self.copies = False, {}, 1


@contextmanager
def guarded_generate(model: PreTrainedModel, call: GenerateCall) -> Iterator[None]:
    """While active, generation refuses what pruning would make silently wrong, and `call` records each call.

    The arguments of `generate` are checked; the generation config that results from them and the model's own settings,
    in `_prepare_generation_config`; drafts of any kind, in `_get_candidate_generator`; and continuous batching.
    """

    def generate(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arguments = signature(plain).bind_partial(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.get("kwargs", {})}
        _refuse(arguments.get)
        if arguments.get("streamer") is not None and arguments.get("custom_generate") is not None:
            raise UnsupportedPlan("transformers hands no streamer to a custom loop", "give it to fastav.Decoding")
        with call.run(arguments):
            return plain(*args, **kwargs)

    def expand(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call.copies = signature(plain).bind_partial(*args, **kwargs).arguments.get("expand_size", 1)
        return plain(*args, **kwargs)

    def packed(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedPlan(
            f"{plain.__name__} cannot be exact while pruning: continuous batching packs pieces of several prompts into "
            "one row, and its paged cache has one length for all layers",
            "call generate with a left-padded batch, or serve the model with vLLM (docs/vllm.md)",
        )

    def prepare(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        config, rest = plain(*args, **kwargs)
        _refuse(lambda name: getattr(config, name, None))
        return config, rest

    def candidates(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedPlan(f"drafting {_DRAFTS}", "leave the assistant out")

    guarded = {
        "generate": generate,
        "_prepare_generation_config": prepare,
        "_get_candidate_generator": candidates,
        "_expand_inputs_for_generation": expand,
        **dict.fromkeys(_PACKING, packed),
    }
    with ExitStack() as stack:
        for name, guard in guarded.items():
            if hasattr(model, name):
                stack.enter_context(patched(model, name, partial(guard, getattr(model, name))))
        yield


def check_copies(hidden: Tensor, copies: int) -> None:
    """Refuse a batch in which copies of one prompt are not alike when the first layer is entered.

    Some releases of transformers repeat frames, images or sounds one by one where a prompt has several, so that its
    copies are given media of each other. On a GPU this waits for the device.
    hidden: [..., prompts x copies, tokens, features].  Raises: UnsupportedPlan.
    """
    rows = hidden.detach().unflatten(-3, (-1, copies)).float()
    apart = (rows - rows[..., :1, :, :]).norm(dim=-1)
    if bool((apart > _TOLERANCE.get(hidden.dtype, _COARSE) * rows.norm(dim=-1)).any()):
        raise UnsupportedPlan(
            "transformers gives copies of a prompt (num_beams, num_return_sequences) other frames, images or sounds "
            "than the prompt's own here, with pruning and without",
            "leave them out, or put the prompt into the batch as often as you want answers",
        )


@contextmanager
def text_only(model: PreTrainedModel, adapter: ModelAdapter) -> Iterator[None]:
    """While active, refuse speech: a talker reads the hidden states of every token, dropped ones too."""
    if not hasattr(model, "generate"):
        yield
        return
    plain: Any = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        if (hint := adapter.text_only_hint(model, kwargs)) is not None:
            raise UnsupportedPlan(
                "speech cannot be exact while pruning: the talker reads the hidden states of dropped tokens", hint
            )
        return plain(*args, **kwargs)

    with patched(model, "generate", generate):
        yield


def check_mask(mask: Tensor | None, layouts: Sequence[Layout], length: int, *, wait: bool) -> None:
    """Refuse a prompt whose real tokens are not the last ones of each row, as many as its layout has.

    wait: whether looking may wait for the device; otherwise a GPU looks for itself, and stops if they disagree.

    Raises: UnsupportedPlan.
    """
    lengths = [len(layout) for layout in layouts]
    if mask is None:
        if any(n != length for n in lengths):
            raise UnsupportedPlan(
                f"the prompts have {length} tokens, their layouts {lengths}, and there is no attention mask",
                "pass the attention mask, or one layout of full length per prompt",
            )
        return
    if mask.ndim != 2:
        return  # the caller's own rules of who sees whom; layouts were given with them
    expected = torch.arange(length)[None] >= length - torch.tensor(lengths)[:, None]
    if mask.is_cpu or wait:
        if mask.shape != expected.shape or not torch.equal(mask.bool().cpu(), expected):
            raise UnsupportedPlan(
                f"the attention mask shows {mask.bool().sum(1).tolist()} tokens, the layouts {lengths}, "
                "or the tokens shown are not the last ones of each row",
                "pad on the left, without holes",
            )
        return
    same = (mask.bool() == upload(expected.numpy(), mask.device)).all()
    check: Any = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
    check(same, "the attention mask and the layouts given to fastav.prune disagree")


@contextmanager
def patched(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of the instance, for a while."""
    own = vars(module)
    before = own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


def _refuse(setting: Callable[[str], Any]) -> None:
    for name, (refused, reason) in _REFUSED.items():
        if refused(value := setting(name)):
            shown = value if isinstance(value, bool | int | str) else "..."
            raise UnsupportedPlan(
                f"generate({name}={shown!r}) cannot be exact while pruning: {reason}", f"leave {name} out"
            )
