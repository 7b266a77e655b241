import itertools
import math

import pytest
import torch
from torch import nn

from scop import UserError, make_model, prune, select_channels
from scop.config import BudgetSection, VariantSection
from scop.knockoffs.phase import gated_layers
from scop.models.evaluation import Latency, count_macs, count_parameters
from scop.pruning.graph import ChannelGraph, Prunable
from scop.pruning.plan import ChannelPlan
from scop.selection.candidates import Candidate, Selection, kept_count, knockoff_threshold
from scop.selection.latency import Stopwatch, describe_latency, solve_measured
from scop.selection.scores import Scores
from scop.selection.sizes import Sizes
from tests.networks import GroupsAndBias


@pytest.mark.parametrize(
    ("channels", "rate", "round_to", "minimum", "kept"),
    [
        (16, 0.45, 1, 1, 9),
        (64, 0.45, 1, 1, 36),
        (100, 0.29, 1, 1, 71),  # 0.29 * 100 is 28.999999999999996 in binary
        (16, 0.45, 8, 1, 8),
        (32, 0.45, 8, 1, 16),
        (64, 0.45, 8, 1, 32),  # a tie between 32 and 40
        (64, 0.40, 8, 1, 40),
        (16, 0.99, 8, 1, 8),
        (6, 0.45, 8, 1, 6),  # no more than there are
        (16, 0.99, 1, 1, 1),
        (16, 0.99, 1, 4, 4),
        (16, 0.0, 8, 1, 16),
        (12, 0.0, 8, 1, 12),
    ],
)
def test_how_many_channels_stay(channels: int, rate: float, round_to: int, minimum: int, kept: int) -> None:
    assert kept_count(channels, rate, round_to, minimum) == kept


def test_a_layer_keeps_its_share_however_counts_are_rounded() -> None:
    model = nn.Sequential(*(nn.Conv2d(*ends, 1) for ends in ((3, 48), (48, 144), (144, 20), (20, 8))))
    for floor, kept in ((0.25, [16, 40, 8]), (0.5, [24, 72, 16])):
        variant = {"selection": "global", "prune_rate": 0.95, "round_to": 8, "floor": floor}
        plan = select_channels(model, method="l1", input_shape=(3, 4, 4), **variant)
        assert [len(channels) for channels in plan.kept.values()] == kept


def candidate(scores: list[float], blocks: int = 1, errors: list[float] | None = None) -> Candidate:
    prunable = Prunable(("conv",), len(scores), blocks, scatter=False)
    own = None if errors is None else torch.tensor(errors).view(blocks, -1)
    return Candidate(prunable, torch.tensor(scores).view(blocks, -1), own, None)


def test_the_highest_scores_stay_in_the_channels_order() -> None:
    assert candidate([0.3, 0.9, 0.1, 0.5]).keep(2) == [1, 3]


def test_equal_scores_stay_by_place() -> None:
    assert candidate([0.0] * 6).keep(3) == [0, 1, 2]


def test_blocks_lose_equally_many() -> None:
    assert candidate([9.0, 8, 7, 6, 1, 2, 3, 4], blocks=2).keep(2) == [0, 1, 6, 7]


def test_a_selection_is_unsure_of_scores_near_the_cut() -> None:
    errors = [0.1] * 4
    assert candidate([0.0, 0.9, 1.0, 2.0], errors=errors).unsure(2) == [1, 2]
    assert candidate([0.0, 0.5, 1.5, 2.0], errors=errors).unsure(2) == []
    assert candidate([0.0, 0.9, 1.0, 2.0], errors=errors).unsure(4) == []
    assert candidate([0.0, 0.9, 1.0, 2.0]).unsure(2) == []


def test_l1_ranks_by_the_filters_norm() -> None:
    model = make_model("resnet20")
    plan = select_channels(model, method="l1", prune_rate=0.25, input_shape=(3, 16, 16))
    norms = model.layer1[0].conv1.weight.detach().abs().sum((1, 2, 3))
    assert plan.removed("layer1.0.conv1") == sorted(norms.argsort()[:4].tolist())


def test_bn_gamma_ranks_by_the_batch_norms_weight() -> None:
    model = make_model("resnet20")
    with torch.no_grad():
        model.layer1[0].bn1.weight.copy_(torch.linspace(-1, 1, 16))
    plan = select_channels(model, method="bn_gamma", prune_rate=0.25, input_shape=(3, 16, 16))
    assert plan.removed("layer1.0.conv1") == [6, 7, 8, 9]


def test_random_is_drawn_by_seed() -> None:
    model = make_model("resnet20")
    plans = [select_channels(model, method="random", seed=s, input_shape=(3, 16, 16)).kept for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_none_removes_nothing() -> None:
    plan = select_channels(make_model("resnet20"), method="none", input_shape=(3, 16, 16))
    assert plan.removes_nothing
    assert plan.prune_rate == 0


def test_coupled_layers_keep_the_same_channels_by_the_mean_score() -> None:
    model = make_model("resnet20")
    scores = {f"layer1.{block}.conv2": torch.randn(16) for block in range(3)}
    others = {p: torch.rand(c) for p, c in ((f"layer1.{b}.conv1", 16) for b in range(3))}
    others |= {f"layer2.{b}.conv{c}": torch.rand(32) for b in range(3) for c in (1, 2)}
    others |= {f"layer3.{b}.conv{c}": torch.rand(64) for b in range(3) for c in (1, 2)}
    plan = select_channels(model, scores | others, residual="coupled", prune_rate=0.25, input_shape=(3, 16, 16))
    mean = torch.stack(list(scores.values())).mean(0)
    assert plan.removed("conv1") == plan.removed("layer1.1.conv2") == sorted(mean.argsort()[:4].tolist())


def test_at_least_one_channel_stays() -> None:
    plan = select_channels(GroupsAndBias(), method="l1", prune_rate=0.99, residual="coupled", input_shape=(3, 16, 16))
    assert all(kept for kept in plan.kept.values())
    assert len(plan.kept["grouped"]) == 4  # one in each of its groups


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_rate": 1.0}, "'prune_rate' is 1.0"),
        ({"prune_rate": -0.1}, "'prune_rate' is -0.1"),
        ({"method": "l2"}, "'method' is 'l2'"),
        ({"residual": "loose"}, "'residual' is 'loose'"),
        ({"prunerate": 0.3}, "did you mean 'prune_rate'"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_channels(make_model("resnet20"), input_shape=(3, 16, 16), **settings)


def test_scores_that_do_not_fit_are_named() -> None:
    model = make_model("resnet20")
    shape = (3, 16, 16)
    with pytest.raises(UserError, match="needs the scores of the knockoff phase"):
        select_channels(model, input_shape=shape)
    with pytest.raises(UserError, match="needs input_shape"):
        select_channels(model, {"conv1": torch.zeros(16)})
    with pytest.raises(UserError, match="no scores for layer 'layer1.0.conv1'"):
        select_channels(model, {"conv1": torch.zeros(16)}, input_shape=shape)
    with pytest.raises(UserError, match="'conv9' has scores but is not in the model"):
        select_channels(model, {"conv9": torch.zeros(16)}, input_shape=shape)
    complete = {f"layer{s}.{b}.conv{c}": torch.zeros(8 << s) for s in (1, 2, 3) for b in range(3) for c in (1, 2)}
    with pytest.raises(UserError, match="has 16 channels but 5 scores"):
        select_channels(model, complete | {"layer1.0.conv1": torch.zeros(5)}, input_shape=shape)
    with pytest.raises(UserError, match="scores that are not finite"):
        select_channels(model, complete | {"layer1.0.conv1": torch.full((16,), torch.nan)}, input_shape=shape)
    without_norm = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(576, 2))
    with pytest.raises(UserError, match="method 'bn_gamma' has no scores .* it has no batch norm"):
        select_channels(without_norm, method="bn_gamma", input_shape=shape)


SHAPE = (3, 16, 16)


def scores_of(model: nn.Module, kind: str = "fisher", seed: int = 0) -> Scores:
    """Scores of every layer that can be pruned, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    widths = {layer: model.get_submodule(layer).out_channels for layer in gated_layers(ChannelGraph(model, SHAPE))}
    score = {layer: torch.rand(width, generator=generator) for layer, width in widths.items()}
    error = {layer: torch.full((width,), 0.01) for layer, width in widths.items()}
    signed = {layer: torch.randn(width, generator=generator) + 2 for layer, width in widths.items()}
    return Scores(score, error, signed, score, kind, SHAPE)


def test_global_takes_the_lowest_of_all_layers_for_what_is_left_of_them_down_to_the_floor() -> None:
    """A layer's k-th lowest score counts as if divided by the share of the layer that is left when its turn comes."""
    model = make_model("resnet20")
    scores = scores_of(model)
    scores.score["layer1.0.conv1"] *= 1e-6
    plan = select_channels(model, scores, selection="global", prune_rate=0.3, floor=0.25)
    assert len(plan.kept["layer1.0.conv1"]) == 4  # all of it is worth less than the rest
    total = sum(plan.channels.values())
    kept = sum(map(len, plan.kept.values()))
    values = {
        layer: own.sort().values / (1 - torch.arange(len(own)) / len(own))
        for layer, own in scores.items()
        if layer != "layer1.0.conv1"
    }
    gone = {layer: len(plan.removed(layer)) for layer in values}
    lowest_kept = min(float(own[gone[layer]]) for layer, own in values.items())
    highest_removed = max(float(own[gone[layer] - 1]) for layer, own in values.items() if gone[layer])
    assert len(set(gone.values())) > 3
    assert highest_removed < lowest_kept
    assert 1 - kept / total == pytest.approx(0.3, abs=0.02)


def test_scores_that_are_no_losses_are_put_in_proportion_first() -> None:
    model = make_model("resnet20")
    fisher, published = scores_of(model), scores_of(model, "published")
    for scores in (fisher, published):
        scores.score["layer3.2.conv1"] *= 100
    plans = [select_channels(model, scores, selection="global", prune_rate=0.4) for scores in (fisher, published)]
    assert len(plans[0].kept["layer3.2.conv1"]) == 64
    assert len(plans[1].kept["layer3.2.conv1"]) == pytest.approx(0.6 * 64, abs=6)


def test_scores_below_zero_do_not_make_a_layer_go_first() -> None:
    """W of a layer may be below 0 on the whole; what is taken from it still depends on the rate."""
    model = make_model("resnet20")
    scores = scores_of(model, "published")
    for layer, own in scores.score.items():
        scores.score[layer] = own * 2 - (1.2 if layer == "layer3.2.conv1" else 0.2)
    gone = [
        len(select_channels(model, scores, selection="global", prune_rate=rate).removed("layer3.2.conv1"))
        for rate in (0.05, 0.2, 0.5)
    ]
    assert 0 < gone[0] < gone[1] < gone[2]


@pytest.mark.parametrize("kind", ["fisher", "published"])
def test_what_goes_first_is_worth_least_though_scores_be_negative(kind: str) -> None:
    model = make_model("resnet20")
    scores = scores_of(model, kind)
    for layer, own in scores.score.items():
        scores.score[layer] = 2 * own - 1.6
    selection = Selection(model, ChannelGraph(model, SHAPE), VariantSection(selection="global"), scores)
    for candidate in selection.candidates:
        assert (selection._value(candidate).diff() >= 0).all()


def test_a_large_group_of_coupled_layers_loses_no_other_share_than_a_small_one() -> None:
    model = make_model("resnet20")
    prunables = ChannelGraph(model, SHAPE).prunable("coupled")
    assert {len(prunable.convs) for prunable in prunables} == {1, 4}
    score = {conv: torch.linspace(0.1, 1, p.channels) for p in prunables for conv in p.convs}
    for kind in ("fisher", "published"):
        scores = Scores(score, score, score, score, kind, SHAPE)
        plan = select_channels(model, scores, residual="coupled", selection="global", prune_rate=0.4, floor=0.0)
        for prunable in prunables:
            lost = len(plan.removed(prunable.name)) / prunable.channels
            assert lost == pytest.approx(0.4, abs=1 / 16), (kind, prunable.name)


@pytest.mark.parametrize("what", ["params", "macs"])
@pytest.mark.parametrize(
    ("selection", "residual"),
    [("uniform", "scatter"), ("global", "scatter"), ("global", "coupled"), ("knockoff_plus", "inner")],
)
def test_budgets_are_met_and_used(what: str, selection: str, residual: str) -> None:
    model = make_model("resnet20")
    measure = count_parameters if what == "params" else lambda network: count_macs(network, SHAPE)
    dense = measure(model)
    plan = select_channels(model, scores_of(model), selection=selection, residual=residual, budget={what: 0.6})
    share = measure(prune(model, plan)) / dense
    assert 0.59 < share <= 0.6
    absolute = select_channels(
        model, scores_of(model), selection=selection, residual=residual, budget={what: 0.6 * dense}
    )
    assert absolute == plan
    whole = select_channels(model, scores_of(model), selection=selection, residual=residual, budget={what: dense})
    if selection == "uniform":
        assert whole.removes_nothing


def test_under_a_budget_global_takes_what_saves_most() -> None:
    """Of channels that are worth the same the dear ones go: in MACs the first stage's, in parameters the last's."""
    model = make_model("resnet20")
    scores = scores_of(model)
    for score in scores.score.values():
        score.fill_(1).add_(torch.linspace(0, 1e-3, len(score)))
    kept = {
        what: {
            layer: len(own)
            for layer, own in select_channels(model, scores, selection="global", budget={what: 0.7}).kept.items()
        }
        for what in ("macs", "params")
    }
    assert kept["macs"]["layer1.1.conv1"] < 0.5 * 16
    assert kept["macs"]["layer3.1.conv1"] == 64
    assert kept["params"]["layer1.1.conv1"] == 16
    assert kept["params"]["layer3.1.conv1"] < 0.65 * 64


def test_a_budget_out_of_reach_is_refused() -> None:
    model = make_model("resnet20")
    with pytest.raises(UserError, match=r"a budget of 1,000 params is out of reach: .* there are \d+,\d+; raise the"):
        select_channels(model, method="l1", budget={"params": 1000}, input_shape=SHAPE)
    with pytest.raises(UserError, match="give one of params, macs and latency_ms"):
        select_channels(model, method="l1", budget={"params": 0.5, "macs": 0.5}, input_shape=SHAPE)


def test_a_measured_budget_is_searched_for_where_the_measure_is_rough() -> None:
    """Here milliseconds are MACs, and widths that are no multiple of 8 take a tenth longer."""
    model = make_model("resnet20")
    graph = ChannelGraph(model, SHAPE)
    selection, sizes = Selection(model, graph, VariantSection(method="l1")), Sizes(model, graph)
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

    assert said(9.8) == "9.8 ms, as measured here"
    assert said(10.05) == "10.1 ms, as measured here"
    assert str(said(9.0)).startswith("9 ms, as measured here, 10.0% below its budget: no network was found nearer")
    assert "5.0% above its budget" in str(said(10.5))
    assert said(9.0, None) == "9 ms, as measured here"
    every = {layer: list(range(width)) for layer, width in plan.channels.items()}
    whole = plan.model_copy(update={"kept": every, "latency_ms": 5.0})
    assert describe_latency(whole, budget) == "5 ms, as measured here"


@pytest.mark.parametrize("disturbed", [None, 2, 3, 4])
@pytest.mark.parametrize("by", [3.0, 0.2])
def test_one_disturbed_measurement_does_not_lead_astray(disturbed: int | None, by: float) -> None:
    model = make_model("resnet20")
    graph = ChannelGraph(model, SHAPE)
    selection, sizes = Selection(model, graph, VariantSection(method="l1")), Sizes(model, graph)
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
    selection, sizes = Selection(model, graph, VariantSection(method="l1")), Sizes(model, graph)
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
    selection = Selection(model, graph, VariantSection(method="l1", residual="coupled"))
    assert 0 < stopwatch(selection.plan(0.9)) < stopwatch(selection.plan(0.0))  # a tenth of the MACs, in turns
    assert count_parameters(model) == count_parameters(make_model("resnet20"))


def test_rates_and_patterns_say_which_layers() -> None:
    model = make_model("resnet20")

    def kept(**settings: object) -> dict[str, int]:
        plan = select_channels(model, method="l1", input_shape=SHAPE, **settings)
        return {layer: len(own) for layer, own in plan.kept.items()}

    only = kept(include=["layer3.*"], prune_rate=0.5)
    assert set(only) == {f"layer3.{block}.conv{conv}" for block in range(3) for conv in (1, 2)}
    without = kept(exclude=["layer3.*", "layer1.0.conv1"])
    assert {layer.split(".")[0] for layer in without} == {"layer1", "layer2"}
    assert "layer1.0.conv1" not in without
    for selection in ("uniform", "global"):
        own = kept(rates={"layer1.*": 0.0, "layer3.2.*": 0.75}, prune_rate=0.5, selection=selection)
        assert own["layer1.0.conv1"] == 16
        assert own["layer3.2.conv1"] == 16
    with pytest.raises(UserError, match=r"no layer that can be pruned is named like 'layer1.0.conv3' \(did you mean"):
        kept(exclude=["layer1.0.conv3"])


def test_the_knockoff_threshold_is_the_papers() -> None:
    w = torch.tensor([5.0, 4, 3, 2, 1, -1.5, 0.5])
    # t = 2: (1 + 0) / 4; t = 1: (1 + 1) / 5; t = 0.5: (1 + 1) / 6.
    assert knockoff_threshold(w, 0.25) == 2
    assert knockoff_threshold(w, 0.34) == 0.5
    assert knockoff_threshold(w, 0.2) == math.inf


def test_the_false_discovery_rate_means_what_it_says_to_the_last_channel() -> None:
    """Ten that beat their knockoffs, and none that does not: (1 + 0) / 10 is 0.1, in binary fractions too."""
    model = make_model("tests.networks:Plain")
    graph = ChannelGraph(model, (1, 8, 8))
    signed = {p.name: torch.zeros(p.channels) for p in graph.prunable("scatter")}
    next(iter(signed.values()))[:10] = torch.arange(1.0, 11)
    scores = Scores(signed, signed, signed, signed, "fisher", (1, 8, 8))
    assert knockoff_threshold(torch.cat(list(signed.values())), 0.1) == 1
    plan = select_channels(model, scores, selection="knockoff_plus", fdr=0.1, floor=0.0)
    assert sum(map(len, plan.kept.values())) == 10 + len(signed) - 1  # of the others the one that must stay


def test_nothing_to_decide_is_no_mistake_and_nothing_to_prune_is_one() -> None:
    model = make_model("resnet20")
    scores = scores_of(model)
    assert select_channels(model, scores, method="none", selection="knockoff_plus").prune_rate == 0
    plan = select_channels(model, scores, selection="knockoff_plus", rates={"*": 0.5})
    assert len(plan.kept["layer1.0.conv1"]) == 8
    with pytest.raises(UserError, match="include and exclude leave no layer to prune"):
        select_channels(model, scores, include=["layer1.*"], exclude=["layer1.*"])


def test_fpgm_removes_what_is_nearest_to_the_others() -> None:
    """On a line 0.1, 0.2, 0.3, 0.9 the distances sum up to 1.1, 0.9, 0.9 and 2.1."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.1, 0.2, 0.9, 0.3])[:, None, None, None])
    kept = [
        select_channels(model, method="fpgm", prune_rate=rate, input_shape=(1, 4, 4)).kept["0"] for rate in (0.5, 0.75)
    ]
    assert kept == [[0, 2], [2]]
    by_norm = select_channels(model, method="l1", prune_rate=0.5, input_shape=(1, 4, 4))
    assert by_norm.kept["0"] == [2, 3]


@pytest.mark.parametrize("fdr", [0.1, 0.3])
def test_the_false_discovery_rate_is_kept_on_known_nulls(fdr: float) -> None:
    """Of 500 channels 350 are nulls with symmetric statistics: among those kept about a share q are nulls, no more."""
    generator = torch.Generator().manual_seed(0)
    null = torch.arange(500) >= 150
    proportions, found = [], []
    for _ in range(200):
        w = torch.randn(500, generator=generator)
        w[~null] += 3
        kept = w >= knockoff_threshold(w, fdr)
        proportions.append(float((kept & null).sum() / kept.sum().clamp_min(1)))
        found.append(float((kept & ~null).sum() / 150))
    assert 0.75 * fdr < sum(proportions) / 200 <= 1.02 * fdr
    assert sum(found) / 200 > 0.8


def test_knockoff_plus_keeps_what_beats_its_knockoff() -> None:
    model = make_model("resnet20")
    scores = scores_of(model)
    for w in scores.signed.values():
        w.copy_(torch.where(torch.arange(len(w)) % 3 == 0, -0.9, 4.0) + 0.01 * torch.arange(len(w)))
    plan = select_channels(model, scores, selection="knockoff_plus", fdr=0.2)
    for layer, own in plan.kept.items():
        assert own == [c for c in range(plan.channels[layer]) if c % 3], layer
    assert plan.prune_rate == pytest.approx(1 / 3, abs=0.02)
    for w in scores.signed.values():
        w.neg_()
    with pytest.raises(UserError, match="keeps no channel at fdr 0.2"):
        select_channels(model, scores, selection="knockoff_plus", fdr=0.2)
    with pytest.raises(UserError, match="knockoff_plus needs knockoffs, and method l1 has none"):
        select_channels(model, method="l1", selection="knockoff_plus", input_shape=SHAPE)


def test_a_plan_tells_which_channels_it_was_unsure_of() -> None:
    model = make_model("resnet20")
    scores = scores_of(model)
    plan = select_channels(model, scores, prune_rate=0.5)
    layer = "layer3.0.conv1"
    ordered = scores[layer].sort().values
    cut = (ordered[31] + ordered[32]) / 2
    assert plan.unsure[layer] == torch.nonzero((scores[layer] - cut).abs() < 0.02).flatten().tolist()
    assert select_channels(model, method="l1", input_shape=SHAPE).unsure == {}


def test_variants_are_named_after_what_they_do() -> None:
    def label(**settings: object) -> str:
        return VariantSection.model_validate(settings).label

    assert label() == "scop-0.45"
    assert label(selection="global", prune_rate=0.3) == "scop-global-0.3"
    assert label(selection="global", budget={"macs": 0.442}) == "scop-global-macs-0.442"
    assert label(method="l1", budget={"latency_ms": 12.5}) == "l1-latency_ms-12.5"
    assert label(selection="knockoff_plus", fdr=0.2) == "scop-knockoff_plus-0.2"
