"""Functions that the budget searches share."""

from __future__ import annotations

from collections.abc import Callable

from scop.pruning.plan import ChannelPlan
from scop.selection.strategy import Selection

STRONGEST = 0.99
"""The largest strength that is tried."""
HALVINGS = 12
"""Number of steps of a bisection over the strength."""


def interpolate(selection: Selection, weak: float, strong: float, fits: Callable[[ChannelPlan], bool]) -> ChannelPlan:
    """Return a plan between two strengths that just meets the budget, by changing one layer after another.

    The strength alone is too coarse: a small step can remove a channel from many layers at once.

    Args:
        selection: the plan at each strength.
        weak: strength at which the budget is exceeded.
        strong: strength at which the budget is met.
        fits: whether a plan meets the budget.
    """
    weaker, counts = selection.counts(weak), selection.counts(strong)
    changed = [index for index, (more, fewer) in enumerate(zip(weaker, counts, strict=True)) if more != fewer]

    def mixed(relaxed: int) -> ChannelPlan:
        own = list(counts)
        for index in changed[:relaxed]:
            own[index] = weaker[index]
        return selection.plan(strong, own)

    best, fitting, too_many = mixed(0), 0, len(changed)
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(plan := mixed(middle)):
            best, fitting = plan, middle
        else:
            too_many = middle
    return best


def out_of_reach(what: str, target: float, least: str, plan: ChannelPlan) -> str:
    """Return the error message for a budget that even the strongest pruning exceeds."""
    shown = f"{target:,.0f}" if target >= 100 else f"{target:.3g}"
    return (
        f"a budget of {shown} {what} is out of reach: the smallest network under rule {plan.residual!r} needs {least}; "
        "raise the budget, lower min_channels or floor, or try residual: coupled"
    )
