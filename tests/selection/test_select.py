"""`select_channels`: limits and validation of settings."""

import pytest

from scop import UserError, make_model, select_channels
from tests.networks import GroupsAndBias
from tests.selection.helpers import scores_of


def test_keeps_at_least_one_channel() -> None:
    plan = select_channels(GroupsAndBias(), method="l1", prune_rate=0.99, residual="coupled", input_shape=(3, 16, 16))
    assert all(kept for kept in plan.kept.values())
    assert len(plan.kept["grouped"]) == 4  # one per group


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
def test_rejects_invalid_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_channels(make_model("resnet20"), input_shape=(3, 16, 16), **settings)


def test_accepts_fixed_rates_in_all_layers_but_not_an_empty_selection() -> None:
    model = make_model("resnet20")
    scores = scores_of(model)
    assert select_channels(model, scores, method="none", selection="knockoff_plus").prune_rate == 0
    plan = select_channels(model, scores, selection="knockoff_plus", rates={"*": 0.5})
    assert len(plan.kept["layer1.0.conv1"]) == 8
    with pytest.raises(UserError, match="include and exclude leave no layer to prune"):
        select_channels(model, scores, include=["layer1.*"], exclude=["layer1.*"])
