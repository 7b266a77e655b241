"""Budgets: the pruning strength that reaches a number of parameters or MACs, or a latency.

Parameters and MACs are counted on networks on PyTorch's meta device, without data and without running them, so the
search takes a second. Latency is measured on real pruned networks, see `scop.selection.latency`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from scop.compute.device import pick_device
from scop.config import BudgetSection
from scop.errors import UserError
from scop.pruning.plan import ChannelPlan
from scop.selection.latency import Stopwatch, solve_measured
from scop.selection.search import HALVINGS, STRONGEST, interpolate, out_of_reach
from scop.selection.sizes import Sizes
from scop.selection.strategy import Selection


def unit_prices(selection: Selection, sizes: Sizes, what: str) -> list[float]:
    """Return, for each candidate, the params or macs that removing one channel from each of its blocks saves."""
    everything = sizes.count(what)
    whole, prices = [c.width for c in selection.candidates], []
    for index, width in enumerate(whole):
        fewer = [*whole[:index], max(1, width - 1), *whole[index + 1 :]]
        prices.append(float(max(1, everything - sizes.count(what, selection.plan(0, fewer)))))
    return prices


def solve(selection: Selection, sizes: Sizes, budget: BudgetSection, device: torch.device | None) -> ChannelPlan:
    """Return the weakest plan that meets the budget of the selection's round.

    Args:
        selection: the plan at each strength.
        sizes: counts parameters and MACs of the network.
        budget: the budget of the last round.
        device: device to measure latency on; by default that of `pick_device`.

    Raises:
        UserError: even the strongest pruning exceeds the budget.
    """
    ((what, limit),) = budget.given.items()
    if what == "latency_ms":
        stopwatch = Stopwatch(sizes.model, sizes.graph, budget, device or pick_device())
        return solve_measured(selection, selection.round.target(stopwatch.dense_ms, limit), stopwatch)
    whole = sizes.count(what)
    target = selection.round.target(whole, limit * whole if limit <= 1 else limit)
    return _solve_counted(selection, target, lambda plan: sizes.count(what, plan), what)


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
    return interpolate(selection, weak, strong, lambda plan: cost(plan) <= target)
