"""Strategies: kept counts, values under `global`, and the knockoff filter."""

import math

import pytest
import torch
from torch import nn

from scop import UserError, make_model, select_channels
from scop.config import VariantSection
from scop.pruning.graph import ChannelGraph
from scop.selection.candidates import find_candidates
from scop.selection.scores import Scores
from scop.selection.strategy import kept_count, knockoff_threshold
from tests.selection.helpers import SHAPE, scores_of


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
        (6, 0.45, 8, 1, 6),  # at most the layer's width
        (16, 0.99, 1, 1, 1),
        (16, 0.99, 1, 4, 4),
        (16, 0.0, 8, 1, 16),
        (12, 0.0, 8, 1, 12),
    ],
)
def test_kept_count(channels: int, rate: float, round_to: int, minimum: int, kept: int) -> None:
    assert kept_count(channels, rate, round_to, minimum) == kept


def test_rounding_never_goes_below_the_floor() -> None:
    model = nn.Sequential(*(nn.Conv2d(*ends, 1) for ends in ((3, 48), (48, 144), (144, 20), (20, 8))))
    for floor, kept in ((0.25, [16, 40, 8]), (0.5, [24, 72, 16])):
        variant = {"selection": "global", "prune_rate": 0.95, "round_to": 8, "floor": floor}
        plan = select_channels(model, method="l1", input_shape=(3, 4, 4), **variant)
        assert [len(channels) for channels in plan.kept.values()] == kept


def test_global_removes_the_lowest_values_down_to_the_floor() -> None:
    """The value of a channel is its score divided by the share of its layer that is left when it is removed."""
    model = make_model("resnet20")
    scores = scores_of(model)
    scores.score["layer1.0.conv1"] *= 1e-6
    plan = select_channels(model, scores, selection="global", prune_rate=0.3, floor=0.25)
    assert len(plan.kept["layer1.0.conv1"]) == 4  # all its channels are worth less than any other
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


def test_global_normalises_published_scores_per_layer() -> None:
    model = make_model("resnet20")
    fisher, published = scores_of(model), scores_of(model, "published")
    for scores in (fisher, published):
        scores.score["layer3.2.conv1"] *= 100
    plans = [select_channels(model, scores, selection="global", prune_rate=0.4) for scores in (fisher, published)]
    assert len(plans[0].kept["layer3.2.conv1"]) == 64
    assert len(plans[1].kept["layer3.2.conv1"]) == pytest.approx(0.6 * 64, abs=6)


def test_negative_scores_do_not_empty_a_layer_first() -> None:
    """The mean W of a layer may be negative; the number of channels that it loses still depends on the rate."""
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
def test_values_ascend_even_for_negative_scores(kind: str) -> None:
    model = make_model("resnet20")
    scores = scores_of(model, kind)
    for layer, own in scores.score.items():
        scores.score[layer] = 2 * own - 1.6
    for candidate in find_candidates(model, ChannelGraph(model, SHAPE), VariantSection(selection="global"), scores):
        assert (candidate.values().diff() >= 0).all()


def test_coupled_groups_of_any_size_lose_the_same_share() -> None:
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


def test_knockoff_threshold_follows_the_paper() -> None:
    w = torch.tensor([5.0, 4, 3, 2, 1, -1.5, 0.5])
    # t = 2: (1 + 0) / 4; t = 1: (1 + 1) / 5; t = 0.5: (1 + 1) / 6.
    assert knockoff_threshold(w, 0.25) == 2
    assert knockoff_threshold(w, 0.34) == 0.5
    assert knockoff_threshold(w, 0.2) == math.inf


def test_knockoff_threshold_is_not_off_by_rounding() -> None:
    """Ten channels beat their knockoffs and none loses: (1 + 0) / 10 equals 0.1 despite binary fractions."""
    model = make_model("tests.networks:Plain")
    graph = ChannelGraph(model, (1, 8, 8))
    signed = {p.name: torch.zeros(p.channels) for p in graph.prunable("scatter")}
    next(iter(signed.values()))[:10] = torch.arange(1.0, 11)
    scores = Scores(signed, signed, signed, signed, "fisher", (1, 8, 8))
    assert knockoff_threshold(torch.cat(list(signed.values())), 0.1) == 1
    plan = select_channels(model, scores, selection="knockoff_plus", fdr=0.1, floor=0.0)
    assert sum(map(len, plan.kept.values())) == 10 + len(signed) - 1  # the other layers keep one each


@pytest.mark.parametrize("fdr", [0.1, 0.3])
def test_false_discovery_rate_holds_on_known_nulls(fdr: float) -> None:
    """350 of 500 channels are nulls with symmetric statistics; their share of the kept ones is about q, not more."""
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


def test_knockoff_plus_keeps_channels_that_beat_their_knockoffs() -> None:
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
    with pytest.raises(UserError, match="knockoff_plus needs knockoffs; method l1 has none"):
        select_channels(model, method="l1", selection="knockoff_plus", input_shape=SHAPE)
