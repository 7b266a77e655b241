"""Budgets of parameters and MACs."""

import pytest
import torch

from scop import UserError, make_model, prune, select_channels
from scop.models.evaluation import count_macs, count_parameters
from tests.selection.helpers import SHAPE, scores_of


@pytest.mark.parametrize("what", ["params", "macs"])
@pytest.mark.parametrize(
    ("selection", "residual"),
    [("uniform", "scatter"), ("global", "scatter"), ("global", "coupled"), ("knockoff_plus", "inner")],
)
def test_meets_budgets_without_overpruning(what: str, selection: str, residual: str) -> None:
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


def test_global_under_a_budget_removes_the_most_expensive_channels() -> None:
    """Among channels of equal value, a MACs budget removes those of the first stage, a params budget of the last."""
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


def test_rejects_unreachable_and_ambiguous_budgets() -> None:
    model = make_model("resnet20")
    with pytest.raises(UserError, match=r"a budget of 1,000 params is out of reach: .* needs \d+,\d+; raise the"):
        select_channels(model, method="l1", budget={"params": 1000}, input_shape=SHAPE)
    with pytest.raises(UserError, match="set exactly one of params, macs and latency_ms"):
        select_channels(model, method="l1", budget={"params": 0.5, "macs": 0.5}, input_shape=SHAPE)
