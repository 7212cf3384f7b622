"""The states and attention maps of an encoder's layers, for `output_hidden_states` and `output_attentions`."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def wanted(config: PreTrainedConfig, options: dict[str, Any]) -> dict[str, bool]:
    """`output_hidden_states` and `output_attentions` as a call or else the encoder's configuration has them."""
    names = ("output_hidden_states", "output_attentions")
    flags = {name: getattr(config, name, False) if options.get(name) is None else options[name] for name in names}
    return {name: bool(value) for name, value in flags.items()}


@contextmanager
def recorded(
    layers: Iterable[nn.Module], *, output_hidden_states: bool = False, output_attentions: bool = False
) -> Iterator[dict[str, Any]]:
    """The states and maps of layers that run inside the context, by name; complete when the context ends.

    layers: in the order of their calls; each takes hidden states first and returns them, and its `self_attn` returns
    a pair of them and of its map, which is None where a kernel makes none (all but `eager`).
    `hidden_states`: what enters the first layer and what leaves each. `attentions`: [batch, heads, tokens, tokens] of
    each layer. What is not wanted is absent, and nothing of it is stored.
    """
    if not (output_hidden_states or output_attentions):  # nothing that a compiler or `torch.export` would trace
        yield {}
        return
    states: list[Any] = []
    maps: list[Any] = []
    states_of, maps_of = (lambda _, inputs: states.append(inputs[0])), (lambda *call: maps.append(call[2][1]))
    records: dict[str, Any] = {}
    with ExitStack() as hooks:
        last = None
        for layer in layers:
            if output_hidden_states:
                hooks.enter_context(layer.register_forward_pre_hook(states_of))
                last = layer
            if output_attentions:
                hooks.enter_context(layer.get_submodule("self_attn").register_forward_hook(maps_of))
        if last is not None:
            hooks.enter_context(last.register_forward_hook(lambda *call: states.append(call[2])))
        yield records
    if output_hidden_states:
        records["hidden_states"] = tuple(states)
    if output_attentions:
        records["attentions"] = tuple(maps)
