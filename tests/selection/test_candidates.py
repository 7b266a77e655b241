"""Candidates: ranking of channels, uncertain channels, coupled layers and patterns."""

import pytest
import torch
from torch import nn

from scop import UserError, make_model, select_channels
from scop.pruning.graph import Prunable
from scop.selection.candidates import Candidate
from tests.selection.helpers import SHAPE, scores_of


def candidate(scores: list[float], blocks: int = 1, errors: list[float] | None = None) -> Candidate:
    prunable = Prunable(("conv",), len(scores), blocks, scatter=False)
    own = None if errors is None else torch.tensor(errors).view(blocks, -1)
    return Candidate(prunable, torch.tensor(scores).view(blocks, -1), own, None)


def test_keeps_the_highest_scores_in_channel_order() -> None:
    assert candidate([0.3, 0.9, 0.1, 0.5]).keep(2) == [1, 3]


def test_ties_keep_the_lower_indices() -> None:
    assert candidate([0.0] * 6).keep(3) == [0, 1, 2]


def test_blocks_lose_the_same_number_of_channels() -> None:
    assert candidate([9.0, 8, 7, 6, 1, 2, 3, 4], blocks=2).keep(2) == [0, 1, 6, 7]


def test_channels_near_the_cut_are_uncertain() -> None:
    errors = [0.1] * 4
    assert candidate([0.0, 0.9, 1.0, 2.0], errors=errors).uncertain(2) == [1, 2]
    assert candidate([0.0, 0.5, 1.5, 2.0], errors=errors).uncertain(2) == []
    assert candidate([0.0, 0.9, 1.0, 2.0], errors=errors).uncertain(4) == []
    assert candidate([0.0, 0.9, 1.0, 2.0]).uncertain(2) == []


def test_coupled_layers_are_ranked_by_their_mean_score() -> None:
    model = make_model("resnet20")
    scores = {f"layer1.{block}.conv2": torch.randn(16) for block in range(3)}
    others = {p: torch.rand(c) for p, c in ((f"layer1.{b}.conv1", 16) for b in range(3))}
    others |= {f"layer2.{b}.conv{c}": torch.rand(32) for b in range(3) for c in (1, 2)}
    others |= {f"layer3.{b}.conv{c}": torch.rand(64) for b in range(3) for c in (1, 2)}
    plan = select_channels(model, scores | others, residual="coupled", prune_rate=0.25, input_shape=(3, 16, 16))
    mean = torch.stack(list(scores.values())).mean(0)
    assert plan.removed("conv1") == plan.removed("layer1.1.conv2") == sorted(mean.argsort()[:4].tolist())


def test_rejects_scores_that_do_not_match_the_model() -> None:
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


def test_patterns_select_layers_and_set_rates() -> None:
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
    with pytest.raises(UserError, match=r"no prunable layer matches 'layer1.0.conv3' \(did you mean"):
        kept(exclude=["layer1.0.conv3"])


def test_plan_records_uncertain_channels() -> None:
    model = make_model("resnet20")
    scores = scores_of(model)
    plan = select_channels(model, scores, prune_rate=0.5)
    layer = "layer3.0.conv1"
    ordered = scores[layer].sort().values
    cut = (ordered[31] + ordered[32]) / 2
    assert plan.unsure[layer] == torch.nonzero((scores[layer] - cut).abs() < 0.02).flatten().tolist()
    assert select_channels(model, method="l1", input_shape=SHAPE).unsure == {}
