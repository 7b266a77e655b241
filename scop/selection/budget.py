"""Budgets: how strongly to prune so that a network has so many parameters or MACs, or takes so long.

Parameters and MACs are counted on networks without numbers in them (PyTorch's meta device) that are not run, so that
the search takes a second. Latency is measured: of real pruned networks, in turns with the dense one, for what can be
known on a noisy machine is how two networks compare.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from scop.compute.device import pick_device
from scop.config import BudgetSection
from scop.errors import UserError
from scop.pruning.plan import ChannelPlan
from scop.selection.candidates import Selection
from scop.selection.latency import Stopwatch, solve_measured
from scop.selection.search import HALVINGS, STRONGEST, between, out_of_reach
from scop.selection.sizes import Sizes


def unit_prices(selection: Selection, sizes: Sizes, what: str) -> list[float]:
    """For each candidate, how many params or macs go with one channel of each of its blocks, at full width."""
    everything = sizes.count(what)
    whole, prices = [c.width for c in selection.candidates], []
    for place, width in enumerate(whole):
        fewer = [*whole[:place], max(1, width - 1), *whole[place + 1 :]]
        prices.append(float(max(1, everything - sizes.count(what, selection.plan(0, fewer)))))
    return prices


def solve(
    selection: Selection, sizes: Sizes, budget: BudgetSection, device: torch.device | None, part: float = 1.0
) -> ChannelPlan:
    """The plan of the least strength that keeps to the budget.

    Args:
        selection: what would be removed at any strength.
        sizes: of the network.
        budget: what it may cost.
        device: on which latency is measured.
        part: of the way to the budget, in its logarithm.

    Raises:
        UserError: even the strongest does not.
    """
    ((what, limit),) = budget.given.items()
    if what == "latency_ms":
        stopwatch = Stopwatch(sizes.model, sizes.graph, budget, device or pick_device())
        return solve_measured(selection, _on_the_way(stopwatch.dense_ms, limit, part), stopwatch)
    whole = sizes.count(what)
    target = _on_the_way(whole, limit * whole if limit <= 1 else limit, part)
    return _solve_counted(selection, target, lambda plan: sizes.count(what, plan), what)


def _on_the_way(whole: float, target: float, part: float) -> float:
    return float(whole ** (1 - part) * target**part)


def _solve_counted(selection: Selection, target: float, cost: Callable[[ChannelPlan], float], what: str) -> ChannelPlan:
    weak, strong = 0.0, STRONGEST
    if cost(plan := selection.plan(weak)) <= target:
        return plan
    best = selection.plan(strong)
    if (least := cost(best)) > target:
        raise UserError(out_of_reach(what, target, f"{least:,.0f}", best))
    for _ in range(HALVINGS):
        middle = (weak + strong) / 2
        plan = selection.plan(middle)
        if plan.kept == best.kept or cost(plan) <= target:
            best, strong = plan, middle
        else:
            weak = middle
    return between(selection, weak, strong, lambda plan: cost(plan) <= target)
