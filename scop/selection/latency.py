"""Latency budgets: pruned networks are measured alternately with the dense network.

On a noisy machine, only the ratio of two latencies measured alternately is reliable.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import torch
from torch import nn

from scop.config import BudgetSection
from scop.errors import UserError
from scop.models.evaluation import measure_latency
from scop.pruning.cuts import apply_cuts, cuts_of
from scop.pruning.graph import ChannelGraph
from scop.pruning.plan import ChannelPlan
from scop.selection.search import STRONGEST, interpolate, out_of_reach
from scop.selection.strategy import Selection

_SEARCHES = 2
_CHECKS = 3
"""Number of measurements of the network that the search found; their median is the result."""
_NEIGHBOURS = 3
"""Number of weaker strengths that are tried after the bisection."""
_ABOVE = 0.01
"""Tolerated relative excess of a measured latency over its target: the accuracy of the measurement."""
_BELOW = 0.03
"""Relative distance below the target at which the search stops."""


class Stopwatch:
    """Latencies of pruned networks in milliseconds: the median forward pass of a batch.

    Args:
        model: the dense network.
        graph: its channels.
        budget: batch size and number of threads.
        device: device to measure on.

    Attributes:
        dense_ms: latency of the dense network, the median of all its measurements.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, budget: BudgetSection, device: torch.device) -> None:
        self._dense = copy.deepcopy(model).float().cpu()
        self._graph, self._budget, self._device = graph, budget, device
        self._dense_times: list[float] = []
        for _ in range(5):
            self._measure({"dense": self._dense}, 12)

    @property
    def dense_ms(self) -> float:
        return statistics.median(self._dense_times)

    def __call__(self, plan: ChannelPlan) -> float:
        """Measure a pruned network alternately with the dense one; return the ratio times the dense latency."""
        pruned = apply_cuts(copy.deepcopy(self._dense).cpu(), cuts_of(self._graph, plan))
        times = self._measure({"dense": self._dense, "pruned": pruned}, 30)
        return self.dense_ms * times["pruned"] / times["dense"]

    def _measure(self, models: dict[str, nn.Module], repeats: int) -> dict[str, float]:
        budget, shape = self._budget, self._graph.input_shape
        found = measure_latency(models, shape, budget.batch_size, self._device, repeats, budget.threads)
        self._dense_times.append(found["dense"].p50)
        return {name: latency.p50 for name, latency in found.items()}


def solve_measured(selection: Selection, target: float, latency: Callable[[ChannelPlan], float]) -> ChannelPlan:
    """Search for the plan whose latency is closest to the target and at most 1 % above it.

    The result is measured three more times, and the plan records the median. If the median is not close to the target,
    an outlier may have misled the search: it is repeated once, from the strength that it found.

    Args:
        selection: the plan at each strength.
        target: latency in milliseconds.
        latency: measures the latency of a plan in milliseconds.

    Raises:
        UserError: even the strongest pruning exceeds the target.
    """
    whole, strongest = selection.plan(0.0), selection.plan(STRONGEST)
    if (ms := latency(whole)) <= target:
        return _with_latency(whole, ms)
    if (ms := latency(strongest)) > target:
        raise UserError(out_of_reach("latency_ms", target, f"{ms:.3g}", strongest))
    weak, strong = 0.0, STRONGEST
    found: dict[float, ChannelPlan] = {}
    for _ in range(_SEARCHES):
        plan, strength = _search(selection, target, latency, weak, strong)
        found[ms := statistics.median(latency(plan) for _ in range(_CHECKS))] = plan
        if ms > target * (1 + _ABOVE):
            weak, strong = strength, STRONGEST
        elif ms < target * (1 - _BELOW):
            weak, strong = 0.0, strength
        else:
            break
    fitting = [ms for ms in found if ms <= target * (1 + _ABOVE)]
    ms = max(fitting) if fitting else min(found)
    return _with_latency(found[ms], ms)


def describe_latency(plan: ChannelPlan, budget: BudgetSection | None) -> str | None:
    """Describe a plan's measured latency and its distance from the budget, or return None if it was not measured."""
    if plan.latency_ms is None:
        return None
    measured = f"{plan.latency_ms:.3g} ms, measured on this machine"
    off = plan.latency_ms / budget.latency_ms - 1 if budget and budget.latency_ms else 0.0
    whole = all(len(kept) == plan.channels[layer] for layer, kept in plan.kept.items())
    if -_BELOW <= off <= _ABOVE or (whole and off < 0):
        return measured
    side = "above" if off > 0 else "below"
    return (
        f"{measured}, {abs(off):.1%} {side} the budget: no closer network was found; stop other programs and select "
        "again, or increase budget.batch_size"
    )


def _with_latency(plan: ChannelPlan, ms: float) -> ChannelPlan:
    return plan.model_copy(update={"latency_ms": round(ms, 4)})


def _search(
    selection: Selection, target: float, latency: Callable[[ChannelPlan], float], weak: float, strong: float
) -> tuple[ChannelPlan, float]:
    """Return a plan that meets the target, between two strengths, and its approximate strength.

    The stronger of the two must meet the target. Latency does not decrease steadily with the strength, since kernels
    are faster at some widths: unless the result of the bisection is close to the target, a few weaker strengths are
    measured too.
    """
    step = 1 / max(candidate.width for candidate in selection.candidates)
    known: dict[tuple[int, ...], float] = {}

    def measured(plan: ChannelPlan) -> float:
        widths = tuple(map(len, plan.kept.values()))
        if widths not in known:
            known[widths] = latency(plan)
        return known[widths]

    while strong - weak > step:
        middle = (weak + strong) / 2
        if measured(selection.plan(middle)) <= target:
            strong = middle
        else:
            weak = middle
    best = interpolate(selection, weak, strong, lambda plan: measured(plan) <= target)
    for offset in range(2, 2 + _NEIGHBOURS):
        if measured(best) >= target * (1 - _BELOW):
            break
        plan = selection.plan(max(0.0, strong - offset * step))
        if measured(best) < measured(plan) <= target * (1 + _ABOVE):
            best = plan
    return best, strong
