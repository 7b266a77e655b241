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


def test_a_measured_budget_is_searched_for_where_the_measure_is_rough() -> None:
    """Here milliseconds are MACs, and widths that are no multiple of 8 take a tenth longer."""
    model = make_model("resnet20")
    graph = ChannelGraph(model, SHAPE)
    selection, sizes = selection_of(model, graph), Sizes(model, graph)
    asked: list[float] = []

    def rough(plan: ChannelPlan) -> float:
        even = all(len(kept) % 8 == 0 for kept in plan.kept.values())
        asked.append(sizes.count("macs", plan) * (1.0 if even else 1.1))
        return asked[-1]

    target = 0.6 * sizes.count("macs")
    plan = solve_measured(selection, target, rough)
    assert len(asked) < 25
    assert plan.latency_ms == pytest.approx(asked[-1], abs=1e-4)
    assert 0.97 * target < plan.latency_ms <= 1.01 * target
    with pytest.raises(UserError, match="latency_ms is out of reach"):
        solve_measured(selection, 10, rough)


def test_a_network_that_is_not_near_its_latency_says_so() -> None:
    plan = select_channels(make_model("resnet20"), method="l1", input_shape=SHAPE)
    budget = BudgetSection(latency_ms=10)
    assert describe_latency(plan, budget) is None

    def said(ms: float, budget: BudgetSection | None = budget) -> str | None:
        return describe_latency(plan.model_copy(update={"latency_ms": ms}), budget)

    assert said(9.8) == "9.8 ms, measured on this machine"
    assert said(10.05) == "10.1 ms, measured on this machine"
    assert str(said(9.0)).startswith("9 ms, measured on this machine, 10.0% below the budget: no closer network")
    assert "5.0% above the budget" in str(said(10.5))
    assert said(9.0, None) == "9 ms, measured on this machine"
    every = {layer: list(range(width)) for layer, width in plan.channels.items()}
    whole = plan.model_copy(update={"kept": every, "latency_ms": 5.0})
    assert describe_latency(whole, budget) == "5 ms, measured on this machine"


@pytest.mark.parametrize("disturbed", [None, 2, 3, 4])
@pytest.mark.parametrize("by", [3.0, 0.2])
def test_one_disturbed_measurement_does_not_lead_astray(disturbed: int | None, by: float) -> None:
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


def test_a_machine_that_slows_down_does_not_change_a_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a network takes what it has of MACs, times what else the machine does, which is most at the very start."""
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
def test_a_selection_keeps_to_a_budget_of_latency(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a network takes as many milliseconds as it has MACs."""

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


def test_real_networks_run_for_a_latency() -> None:
    model, cpu = make_model("resnet20").eval(), torch.device("cpu")
    graph = ChannelGraph(model, SHAPE)
    # On one thread: several wait for each other, and where other processes run, for longer than they compute.
    stopwatch = Stopwatch(model, graph, BudgetSection(latency_ms=1, batch_size=64, threads=1), cpu)
    selection = selection_of(model, graph, residual="coupled")
    assert 0 < stopwatch(selection.plan(0.9)) < stopwatch(selection.plan(0.0))  # a tenth of the MACs, in turns
    assert count_parameters(model) == count_parameters(make_model("resnet20"))
