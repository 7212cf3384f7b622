"""Whether generated ids are the wanted ones, where the logits decide.

Two ways of computing the same logits differ by rounding. Where the two best are nearer to each other than that, either
is right, and which it is depends on the CPU; from there on the two answer different prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def assert_ids_where_decided(
    model: Any, inputs: Mapping[str, Any], wanted: Sequence[int], error: float, **how: Any
) -> bool:
    """The greedy ids are these up to the first step, if any, at which two scores are as near as their errors reach.

    error: of each logit. Whether all ids are these: where one is not, the steps after it answer another prompt.
    """
    made = model.generate(
        **inputs, **how, max_new_tokens=len(wanted), do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    ids = made.sequences[0, -len(made.scores) :].tolist()
    for step, (ours, theirs) in enumerate(zip(ids, wanted, strict=True)):
        if ours != theirs:
            apart = made.scores[step][0, ours] - made.scores[step][0, theirs]
            assert apart <= 2 * error, f"id {ours} for {theirs} at step {step}, by a margin of {apart}"
            return False
    return True


def assert_same_greedy(found: Any, expected: Any, error: float) -> None:
    """Both of `generate`: logits within the error of each other, and the same ids, row by row up to such a step."""
    assert found.sequences.shape == expected.sequences.shape
    ours, theirs = (torch.stack(output.logits, 1) for output in (found, expected))
    steps = ours.shape[1]
    for row in range(len(ours)):
        same = (found.sequences[row, -steps:] == expected.sequences[row, -steps:]).long().cumprod(0)
        decided = min(int(same.sum()) + 1, steps)  # the logits at the first other id are still of the same prompt
        assert (ours[row, :decided] - theirs[row, :decided]).abs().max() < error
        if not same.all():
            best = theirs[row, decided - 1].topk(2)
            assert best.values[0] - best.values[1] <= 2 * error
            assert found.sequences[row, decided - 1 - steps] in best.indices
    prompt = found.sequences.shape[1] - steps
    assert torch.equal(found.sequences[:, :prompt], expected.sequences[:, :prompt])
