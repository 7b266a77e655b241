"""Latency budgets: pruned networks are measured, alternately with the dense network."""

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
from scop.selection.candidates import Selection
from scop.selection.search import STRONGEST, between, out_of_reach

_AROUND, _TRIES, _CHECKS = 3, 2, 3
_CLOSE, _NEAR = 0.01, 0.03
"""Of a measured latency to its target: better than the first it is not known, and the second is near enough."""


def solve_measured(selection: Selection, target: float, latency: Callable[[ChannelPlan], float]) -> ChannelPlan:
    """The plan whose measured latency is nearest to the target, and not more than a percent above it.

    What is found is measured anew, three times, and says what it takes in the median. Where that is not near the
    target, a disturbed measurement may have led astray, and the search goes on from there, once.
    """
    whole, strongest = selection.plan(0.0), selection.plan(STRONGEST)
    if (ms := latency(whole)) <= target:
        return _taking(whole, ms)
    if (ms := latency(strongest)) > target:
        raise UserError(out_of_reach("latency_ms", target, f"{ms:.3g}", strongest))
    weak, strong = 0.0, STRONGEST
    found: dict[float, ChannelPlan] = {}
    for _ in range(_TRIES):
        plan, strength = _search(selection, target, latency, weak, strong)
        found[ms := statistics.median(latency(plan) for _ in range(_CHECKS))] = plan
        if ms > target * (1 + _CLOSE):
            weak, strong = strength, STRONGEST
        elif ms < target * (1 - _NEAR):
            weak, strong = 0.0, strength
        else:
            break
    fitting = [ms for ms in found if ms <= target * (1 + _CLOSE)]
    ms = max(fitting) if fitting else min(found)
    return _taking(found[ms], ms)


def describe_latency(plan: ChannelPlan, budget: BudgetSection | None) -> str | None:
    """What the network takes, and where it is not near its budget, that; None where it was not measured."""
    if plan.latency_ms is None:
        return None
    takes = f"{plan.latency_ms:.3g} ms, as measured here"
    off = plan.latency_ms / budget.latency_ms - 1 if budget and budget.latency_ms else 0.0
    whole = all(len(kept) == plan.channels[layer] for layer, kept in plan.kept.items())
    if -_NEAR <= off <= _CLOSE or (whole and off < 0):
        return takes
    side = "above" if off > 0 else "below"
    return (
        f"{takes}, {abs(off):.1%} {side} its budget: no network was found nearer to it; where other programs run, stop "
        "them and select again, or measure larger batches (budget.batch_size)"
    )


def _taking(plan: ChannelPlan, ms: float) -> ChannelPlan:
    return plan.model_copy(update={"latency_ms": round(ms, 4)})


def _search(
    selection: Selection, target: float, latency: Callable[[ChannelPlan], float], weak: float, strong: float
) -> tuple[ChannelPlan, float]:
    """A plan between two strengths, of which the stronger one fits, and about how strong it is.

    Latency does not fall evenly with the rate, for kernels like some widths better than others: so bisection finds the
    neighbourhood, and where that is not near enough, what prunes still less is measured too.
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
    best = between(selection, weak, strong, lambda plan: measured(plan) <= target)
    for offset in range(2, 2 + _AROUND):
        if measured(best) >= target * (1 - _NEAR):
            break
        plan = selection.plan(max(0.0, strong - offset * step))
        if measured(best) < measured(plan) <= target * (1 + _CLOSE):
            best = plan
    return best, strong


class Stopwatch:
    """Latencies of pruned networks in milliseconds: the median pass of a batch.

    Args:
        model: the dense network.
        graph: its channels.
        budget: says of how many images, on how many threads.
        device: where.

    Attributes:
        dense_ms: of the dense network, the median of every time that it was measured.
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
        """In turns with the dense network, whose share it is times what that one takes."""
        pruned = apply_cuts(copy.deepcopy(self._dense).cpu(), cuts_of(self._graph, plan))
        times = self._measure({"dense": self._dense, "pruned": pruned}, 30)
        return self.dense_ms * times["pruned"] / times["dense"]

    def _measure(self, models: dict[str, nn.Module], repeats: int) -> dict[str, float]:
        budget, shape = self._budget, self._graph.input_shape
        found = measure_latency(models, shape, budget.batch_size, self._device, repeats, budget.threads)
        self._dense_times.append(found["dense"].p50)
        return {name: latency.p50 for name, latency in found.items()}
