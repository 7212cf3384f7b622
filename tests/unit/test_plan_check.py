"""A plan that did not take effect is an error."""

import pytest

from fastav.errors import PlanNotApplied
from fastav.pruning.verification import require_applied


def test_what_a_plan_says_is_let_pass():
    require_applied([9, 9, 4], [9, 9, 4])
    require_applied([], [])


@pytest.mark.parametrize(("found", "layer"), [([9, 9, 9], 2), ([9, 8, 4], 1), ([4, 4, 4], 0)])
def test_the_first_layer_that_differs_is_named(found, layer):
    with pytest.raises(PlanNotApplied, match=f"layer {layer}'s cache holds {found[layer]} tokens, and by the plan"):
        require_applied([9, 9, 4], found)


def test_layers_that_were_not_seen_are_missed():
    with pytest.raises(PlanNotApplied, match="for 3 layers, 2 were seen"):
        require_applied([9, 9, 4], [9, 9])
