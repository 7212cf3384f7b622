"""Hidden states and attention maps of encoder layers, for `output_hidden_states` and `output_attentions`."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def output_flags(config: PreTrainedConfig, options: dict[str, Any]) -> dict[str, bool]:
    """The flags `output_hidden_states` and `output_attentions` of a call, or else of the encoder's configuration."""
    names = ("output_hidden_states", "output_attentions")
    flags = {name: getattr(config, name, False) if options.get(name) is None else options[name] for name in names}
    return {name: bool(value) for name, value in flags.items()}


@contextmanager
def record_outputs(
    layers: Iterable[nn.Module], *, output_hidden_states: bool = False, output_attentions: bool = False
) -> Iterator[dict[str, Any]]:
    """Record outputs of layers that run inside the context, into a dict that is complete when the context ends.

    layers: in the order of their calls. Each takes hidden states as its first argument and returns them; its
    `self_attn` returns a pair of them and of its map, which is None for kernels that compute no map (all but `eager`).
    `hidden_states`: the first layer's input and every layer's output. `attentions`: the map of every layer,
    [batch, heads, tokens, tokens]. The dict lacks what is not requested, which is not stored either.
    """
    if not (output_hidden_states or output_attentions):  # without hooks, which a compiler or `torch.export` would trace
        yield {}
        return
    states: list[Any] = []
    maps: list[Any] = []
    record_input, record_map = (lambda _, inputs: states.append(inputs[0])), (lambda *call: maps.append(call[2][1]))
    records: dict[str, Any] = {}
    with ExitStack() as hooks:
        last = None
        for layer in layers:
            if output_hidden_states:
                hooks.enter_context(layer.register_forward_pre_hook(record_input))
                last = layer
            if output_attentions:
                hooks.enter_context(layer.get_submodule("self_attn").register_forward_hook(record_map))
        if last is not None:
            hooks.enter_context(last.register_forward_hook(lambda *call: states.append(call[2])))
        yield records
    if output_hidden_states:
        records["hidden_states"] = tuple(states)
    if output_attentions:
        records["attentions"] = tuple(maps)
