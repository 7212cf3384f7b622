"""Seeds of sampling with chunked prefill on a CPU, where vLLM's model runner V1 cannot take a draw back.

The runner also samples behind chunks that do not end a prompt. It drops these tokens, and rewinds the request's random
generator as CUDA's can be rewound; a CPU's raises an error. `rewind_seeds` replaces the generators by ones that can.
"""

from typing import Any

import torch
from torch import Tensor


class RewindableGenerator(torch.Generator):
    """A generator that goes back to where it was when it was last marked."""

    marked: Tensor

    def mark(self) -> None:
        """Remember the present state."""
        self.marked = self.get_state()

    def get_offset(self) -> int:
        """Any position: `set_offset` does not read it."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Go back to the mark."""
        return self.set_state(self.marked)


def rewind_seeds(runner: Any) -> None:
    """Let a runner V1 on a CPU take back the draws of the step that it is about to sample."""
    batch = runner.input_batch
    for row, generator in batch.generators.items():
        if not isinstance(generator, RewindableGenerator):
            rewindable = RewindableGenerator()
            rewindable.set_state(generator.get_state())
            batch.generators[row] = runner.requests[batch.req_ids[row]].generator = generator = rewindable
        generator.mark()
