"""Channel plans: validation against the file format and the model."""

from pathlib import Path

import pytest

from scop import ChannelPlan, UserError, make_model, prune, select_channels


def changed_plan(**changes) -> ChannelPlan:
    plan = select_channels(make_model("resnet20"), method="l1", input_shape=(3, 32, 32))
    return ChannelPlan.model_validate(plan.model_dump() | changes)


def test_rejects_plans_that_do_not_match_the_model() -> None:
    resnet = make_model("resnet20")
    for kept, channels, message in (
        ({"layer1.0.conv9": [0]}, {"layer1.0.conv9": 16}, r"did you mean 'layer1.0.conv\d'"),
        ({"layer1.0.conv1": [0]}, {"layer1.0.conv1": 32}, "has 16 channels in the model but 32 in the plan"),
        ({"conv1": [0]}, {"conv1": 16}, "'conv1' is in the plan but cannot be pruned under residual rule 'scatter'"),
    ):
        with pytest.raises(UserError, match=message):
            prune(resnet, changed_plan(kept=kept, channels=channels))
    with pytest.raises(UserError, match="keep the same channels in all of them"):
        prune(resnet, changed_plan(kept={"conv1": [0]}, channels={"conv1": 16}, residual="coupled"))


def test_rejects_an_inconsistent_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"input_shape": [3, 32, 32], "residual": "scatter", "kept": {"a": [3, 1]}, "channels": {"a": 4}}')
    with pytest.raises(UserError, match="must be ascending"):
        ChannelPlan.load(path)
