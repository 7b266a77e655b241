"""Budgets: how strongly to prune so that a network has so many parameters or MACs, or takes so long.

Parameters and MACs are counted on networks without numbers in them (PyTorch's meta device) that are not run, so that
the search takes a second. Latency is measured: of real pruned networks, in turns with the dense one, for what can be
known on a noisy machine is how two networks compare.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scop.compute.device import pick_device
from scop.config import BudgetSection
from scop.errors import UserError
from scop.models.evaluation import count_macs, count_parameters, measure_latency
from scop.pruning.graph import ChannelGraph
from scop.pruning.plan import ChannelPlan
from scop.pruning.surgery import apply_cuts, cuts_of

if TYPE_CHECKING:
    from scop.selection.candidates import Selection

_STRONGEST = 0.99
_HALVINGS = 12
_AROUND, _TRIES, _CHECKS = 3, 2, 3
_CLOSE, _NEAR = 0.01, 0.03
"""Of a measured latency to its target: better than the first it is not known, and the second is near enough."""


class Sizes:
    """What pruned networks would have: counted without running any.

    Surgery changes the weights of convolutions and linear layers and not where they are applied: so the MACs are those
    of the dense network less, for each layer, the weights that it loses times the places that they are applied at.

    Args:
        model: the dense network.
        graph: its channels.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self.model, self.graph = model, graph
        self._skeleton = copy.deepcopy(model).to("meta").eval()
        try:
            self._macs = count_macs(self._skeleton, graph.input_shape)
        except Exception:  # whatever a forward that looks at its numbers does where there are none
            self._skeleton = copy.deepcopy(model).cpu().eval()
            self._macs = count_macs(self._skeleton, graph.input_shape)
        self._places = self._count_places()

    def _count_places(self) -> dict[str, int]:
        """For each convolution and linear layer, how often one image has each of its weights multiplied."""
        places: dict[str, int] = {}

        def note(name: str, module: nn.Module, _: Any, output: torch.Tensor) -> None:
            channels = output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1]
            places[name] = places.get(name, 0) + output.numel() // channels

        layers = [(n, m) for n, m in self._skeleton.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        hooks = [module.register_forward_hook(partial(note, name)) for name, module in layers]
        with torch.no_grad():
            self._skeleton(torch.zeros(1, *self.graph.input_shape, device=next(self._skeleton.parameters()).device))
        for hook in hooks:
            hook.remove()
        return places

    def count(self, what: str, plan: ChannelPlan | None = None) -> int:
        """The params or macs of the network that a plan leaves, or of the whole one."""
        network = self._skeleton
        if plan is not None:
            network = apply_cuts(copy.deepcopy(self._skeleton), cuts_of(self.graph, plan))
        if what == "params":
            return count_parameters(network)
        lost = (places * (self._weights(name) - _weights_of(network, name)) for name, places in self._places.items())
        return self._macs - sum(lost)

    def by_layer(self, plan: ChannelPlan) -> dict[str, tuple[int, int]]:
        """The weights and MACs that the plan leaves of each convolution and linear layer."""
        network = apply_cuts(copy.deepcopy(self._skeleton), cuts_of(self.graph, plan))
        weights = {name: _weights_of(network, name) for name in self._places}
        return {name: (own, own * self._places[name]) for name, own in weights.items()}

    def _weights(self, name: str) -> int:
        return _weights_of(self._skeleton, name)


def _weights_of(network: nn.Module, name: str) -> int:
    return int(network.get_submodule(name).weight.numel())  # type: ignore[operator]


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
    weak, strong = 0.0, _STRONGEST
    if cost(plan := selection.plan(weak)) <= target:
        return plan
    best = selection.plan(strong)
    if (least := cost(best)) > target:
        raise UserError(_out_of_reach(what, target, f"{least:,.0f}", best))
    for _ in range(_HALVINGS):
        middle = (weak + strong) / 2
        plan = selection.plan(middle)
        if plan.kept == best.kept or cost(plan) <= target:
            best, strong = plan, middle
        else:
            weak = middle
    return _between(selection, weak, strong, lambda plan: cost(plan) <= target)


def _between(selection: Selection, weak: float, strong: float, fits: Callable[[ChannelPlan], bool]) -> ChannelPlan:
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


def solve_measured(selection: Selection, target: float, latency: Callable[[ChannelPlan], float]) -> ChannelPlan:
    """The plan whose measured latency is nearest to the target, and not more than a percent above it.

    What is found is measured anew, three times, and says what it takes in the median. Where that is not near the
    target, a disturbed measurement may have led astray, and the search goes on from there, once.
    """
    whole, strongest = selection.plan(0.0), selection.plan(_STRONGEST)
    if (ms := latency(whole)) <= target:
        return _taking(whole, ms)
    if (ms := latency(strongest)) > target:
        raise UserError(_out_of_reach("latency_ms", target, f"{ms:.3g}", strongest))
    weak, strong = 0.0, _STRONGEST
    found: dict[float, ChannelPlan] = {}
    for _ in range(_TRIES):
        plan, strength = _search(selection, target, latency, weak, strong)
        found[ms := statistics.median(latency(plan) for _ in range(_CHECKS))] = plan
        if ms > target * (1 + _CLOSE):
            weak, strong = strength, _STRONGEST
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
    best = _between(selection, weak, strong, lambda plan: measured(plan) <= target)
    for offset in range(2, 2 + _AROUND):
        if measured(best) >= target * (1 - _NEAR):
            break
        plan = selection.plan(max(0.0, strong - offset * step))
        if measured(best) < measured(plan) <= target * (1 + _CLOSE):
            best = plan
    return best, strong


def _out_of_reach(what: str, target: float, least: str, plan: ChannelPlan) -> str:
    shown = f"{target:,.0f}" if target >= 100 else f"{target:.3g}"
    return (
        f"a budget of {shown} {what} is out of reach: with as little as rule {plan.residual!r} leaves there are "
        f"{least}; raise the budget, lower min_channels or floor, or try residual: coupled"
    )


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
