"""What the searches for a budget share."""

from __future__ import annotations

from collections.abc import Callable

from scop.pruning.plan import ChannelPlan
from scop.selection.candidates import Selection

STRONGEST = 0.99
"""The largest pruning strength that is tried."""
HALVINGS = 12
"""Steps of a bisection over the strength."""


def between(selection: Selection, weak: float, strong: float, fits: Callable[[ChannelPlan], bool]) -> ChannelPlan:
    """The last plan that fits on the way from a strength that does to a weaker one that does not, layer by layer.

    At one rate many layers may be about to lose a channel, which is a step too wide for a budget to be used.
    """
    weaker, counts = selection.counts(weak), selection.counts(strong)
    changed = [place for place, (more, fewer) in enumerate(zip(weaker, counts, strict=True)) if more != fewer]

    def mixed(relaxed: int) -> ChannelPlan:
        own = list(counts)
        for place in changed[:relaxed]:
            own[place] = weaker[place]
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
    """The message for a budget that even the strongest pruning misses."""
    shown = f"{target:,.0f}" if target >= 100 else f"{target:.3g}"
    return (
        f"a budget of {shown} {what} is out of reach: with as little as rule {plan.residual!r} leaves there are "
        f"{least}; raise the budget, lower min_channels or floor, or try residual: coupled"
    )
