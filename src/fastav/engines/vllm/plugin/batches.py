"""What pruning reads of vLLM's model runner, whichever runner it is.

vLLM has two model runners. They keep requests and batches in different objects, so `runner_v1` and `runner_v2` each
implement `Batches`, and nothing else in the plugin reads a runner. Both pass the positions of scheduled tokens to the
decoder.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

BuildMetadata = Callable[[Any], Any]  # from vLLM's CommonAttentionMetadata to a backend's


class ScheduledRequest(NamedTuple):
    """One request of a batch.

    num_computed: tokens of prompt and answer that have run before. num_tokens: how many run now.
    """

    request_id: str
    num_computed: int
    num_tokens: int


@runtime_checkable
class RequestListener(Protocol):
    """What `Batches` tells of requests, before it lists the batch in which they first run."""

    def start_request(self, request_id: str, request: Any) -> None:
        """A request begins, or begins again after it was preempted.

        request: with vLLM's `prompt_token_ids`, `mm_features` and `sampling_params`. It must not be kept, as it holds
        the media.
        """
        ...

    def end_request(self, request_id: str) -> None:
        """A request has ended, or was preempted."""
        ...


@runtime_checkable
class Batches(Protocol):
    """The batches of a model runner."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        ...

    def step(self, scheduler_output: Any) -> AbstractContextManager[None]:
        """A step of requests, within which the runner runs; only there can the decoder's batch be listed.

        scheduler_output: what vLLM's scheduler has decided of it.
        """
        ...

    @property
    def is_armed(self) -> bool:
        """Whether the decoder now runs the batch that `rows` lists.

        False while vLLM profiles, compiles, warms up or captures graphs: the runner then holds the batch of an earlier
        step, whose slots of the cache may belong to other requests.
        """
        ...

    def rows(self) -> list[ScheduledRequest]:
        """The requests of the batch, in its order; the listener knows all of them."""
        ...

    def prompt_positions(self, request_id: str, length: int) -> Int[Tensor, "*axes tokens"]:
        """The positions of a prompt's tokens, [tokens] or [axes, tokens], as the runner passes them to the decoder.

        length: number of the prompt's tokens.
        """
        ...

    def kv_groups(self) -> Sequence[Sequence[str]]:
        """The names of the layers in each group of the KV cache."""
        ...

    def block_table(self, group: int) -> Int[Tensor, "requests blocks"]:
        """The blocks that a group of the KV cache gives to the requests of the batch, in its order."""
        ...

    def block_size(self, group: int) -> int:
        """How many tokens each of these blocks holds."""
        ...

    def metadata_builder(self, layer_name: str) -> BuildMetadata:
        """A new builder of a layer's attention metadata, by the layer's backend.

        It owns the memory of its metadata, so that it must not serve two layers with different metadata. It takes block
        tables like those of `block_table`.
        """
        ...
