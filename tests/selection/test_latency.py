"""Latency budgets: measurement, search and description of the result."""

import itertools

import pytest
import torch
from torch import nn

from scop import UserError, make_model, prune, select_channels
from scop.config import BudgetSection
from scop.models.evaluation import Latency, count_macs, count_parameters
from scop.pruning.graph import ChannelGraph
from scop.pruning.plan import ChannelPlan
from scop.selection.latency import Stopwatch, describe_latency, solve_measured
from scop.selection.sizes import Sizes
from tests.selection.helpers import SHAPE, selection_of


def test_search_meets_the_target_if_latency_is_not_monotonic() -> None:
    """A network takes as many milliseconds as it has MACs, or 10 % more unless all widths are multiples of 8."""
    model = make_model("resnet20")
    graph = ChannelGraph(model, SHAPE)
    selection, sizes = selection_of(model, graph), Sizes(model, graph)
    measured: list[float] = []

    def uneven_latency(plan: ChannelPlan) -> float:
        aligned = all(len(kept) % 8 == 0 for kept in plan.kept.values())
        measured.append(sizes.count("macs", plan) * (1.0 if aligned else 1.1))
        return measured[-1]

    target = 0.6 * sizes.count("macs")
    plan = solve_measured(selection, target, uneven_latency)
    assert len(measured) < 25
    assert plan.latency_ms == pytest.approx(measured[-1], abs=1e-4)
    assert 0.97 * target < plan.latency_ms <= 1.01 * target
    with pytest.raises(UserError, match="latency_ms is out of reach"):
        solve_measured(selection, 10, uneven_latency)


def test_describes_the_distance_from_a_latency_budget() -> None:
    plan = select_channels(make_model("resnet20"), method="l1", input_shape=SHAPE)
    budget = BudgetSection(latency_ms=10)
    assert describe_latency(plan, budget) is None

    def described(ms: float, budget: BudgetSection | None = budget) -> str | None:
        return describe_latency(plan.model_copy(update={"latency_ms": ms}), budget)

    assert described(9.8) == "9.8 ms, measured on this machine"
    assert described(10.05) == "10.1 ms, measured on this machine"
    assert str(described(9.0)).startswith("9 ms, measured on this machine, 10.0% below the budget: no closer network")
    assert "5.0% above the budget" in str(described(10.5))
    assert described(9.0, None) == "9 ms, measured on this machine"
    every = {layer: list(range(width)) for layer, width in plan.channels.items()}
    whole = plan.model_copy(update={"kept": every, "latency_ms": 5.0})
    assert describe_latency(whole, budget) == "5 ms, measured on this machine"


@pytest.mark.parametrize("disturbed", [None, 2, 3, 4])
@pytest.mark.parametrize("by", [3.0, 0.2])
def test_search_tolerates_one_outlier(disturbed: int | None, by: float) -> None:
    model = make_model("resnet20")
    graph = ChannelGraph(model, SHAPE)
    selection, sizes = selection_of(model, graph), Sizes(model, graph)
    count = 0

    def latency(plan: ChannelPlan) -> float:
        nonlocal count
        count += 1
        return sizes.count("macs", plan) * (by if count == disturbed else 1.0)

    target = 0.6 * sizes.count("macs")
    plan = solve_measured(selection, target, latency)
    assert sizes.count("macs", plan) == plan.latency_ms
    assert 0.97 * target <= plan.latency_ms <= 1.01 * target
    assert count < 40


def test_measured_latency_does_not_depend_on_machine_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network takes as many milliseconds as it has MACs, times the machine's slowness, highest at the start."""
    model, cpu = make_model("resnet20").eval(), torch.device("cpu")
    graph = ChannelGraph(model, SHAPE)
    selection, sizes = selection_of(model, graph), Sizes(model, graph)
    slowness = itertools.chain([3.0], itertools.cycle([1.0, 1.5, 1.0, 0.9]))

    def busy(models: dict[str, nn.Module], *_: object) -> dict[str, Latency]:
        by = next(slowness)
        return {name: Latency(by * count_macs(own, SHAPE), 0) for name, own in models.items()}

    monkeypatch.setattr("scop.selection.latency.measure_latency", busy)
    stopwatch = Stopwatch(model, graph, BudgetSection(latency_ms=1), cpu)
    target = 0.6 * sizes.count("macs")
    plan = solve_measured(selection, target, stopwatch)
    assert stopwatch.dense_ms == pytest.approx(sizes.count("macs"))
    assert 0.97 * target <= sizes.count("macs", plan) <= 1.01 * target
    assert plan.latency_ms == pytest.approx(sizes.count("macs", plan))


@pytest.mark.parametrize("selection", ["uniform", "global"])
def test_selection_meets_a_latency_budget(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network takes as many milliseconds as it has MACs."""

    def measure(models: dict[str, nn.Module], *_: object) -> dict[str, Latency]:
        return {name: Latency(count_macs(own, SHAPE), 0) for name, own in models.items()}

    monkeypatch.setattr("scop.selection.latency.measure_latency", measure)
    model = make_model("resnet20").eval()
    target = 0.6 * count_macs(model, SHAPE)
    settings = {"method": "l1", "selection": selection, "input_shape": SHAPE}
    plan = select_channels(model, budget={"latency_ms": target}, **settings)
    taken = count_macs(prune(model, plan), SHAPE)
    assert 0.97 * target <= taken <= 1.01 * target
    assert plan.latency_ms == pytest.approx(taken)
    with pytest.raises(UserError, match="latency_ms is out of reach"):
        select_channels(model, budget={"latency_ms": 10}, **settings)


def test_stopwatch_measures_real_networks() -> None:
    model, cpu = make_model("resnet20").eval(), torch.device("cpu")
    graph = ChannelGraph(model, SHAPE)
    # One thread: several threads wait for each other, on a busy machine for longer than they compute.
    stopwatch = Stopwatch(model, graph, BudgetSection(latency_ms=1, batch_size=64, threads=1), cpu)
    selection = selection_of(model, graph, residual="coupled")
    assert 0 < stopwatch(selection.plan(0.9)) < stopwatch(selection.plan(0.0))  # without 90 % of the channels
    assert count_parameters(model) == count_parameters(make_model("resnet20"))
