import pytest
import torch
from torch import nn

from scop import UserError, make_model, select_channels
from scop.config import VariantSection
from scop.selection import keep_highest, kept_count
from tests.helpers import GroupsAndBias


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


def test_the_highest_scores_stay_in_the_channels_order() -> None:
    scores = torch.tensor([0.3, 0.9, 0.1, 0.5])
    assert keep_highest(scores, 1, VariantSection(prune_rate=0.5)) == [1, 3]


def test_equal_scores_stay_by_place() -> None:
    assert keep_highest(torch.zeros(6), 1, VariantSection(prune_rate=0.5)) == [0, 1, 2]


def test_blocks_lose_equally_many() -> None:
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    assert keep_highest(scores, 2, VariantSection(prune_rate=0.5)) == [0, 1, 6, 7]


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
