"""Whether generated ids are the wanted ones, where the logits decide."""

from collections.abc import Mapping, Sequence
from typing import Any


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
