"""Control methods: how each ranks channels."""

import torch
from torch import nn

from scop import make_model, select_channels


def test_l1_ranks_by_filter_norm() -> None:
    model = make_model("resnet20")
    plan = select_channels(model, method="l1", prune_rate=0.25, input_shape=(3, 16, 16))
    norms = model.layer1[0].conv1.weight.detach().abs().sum((1, 2, 3))
    assert plan.removed("layer1.0.conv1") == sorted(norms.argsort()[:4].tolist())


def test_bn_gamma_ranks_by_batch_norm_weight() -> None:
    model = make_model("resnet20")
    with torch.no_grad():
        model.layer1[0].bn1.weight.copy_(torch.linspace(-1, 1, 16))
    plan = select_channels(model, method="bn_gamma", prune_rate=0.25, input_shape=(3, 16, 16))
    assert plan.removed("layer1.0.conv1") == [6, 7, 8, 9]


def test_random_depends_on_the_seed() -> None:
    model = make_model("resnet20")
    plans = [select_channels(model, method="random", seed=s, input_shape=(3, 16, 16)).kept for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_none_removes_nothing() -> None:
    plan = select_channels(make_model("resnet20"), method="none", input_shape=(3, 16, 16))
    assert plan.removes_nothing
    assert plan.prune_rate == 0


def test_fpgm_removes_the_filters_closest_to_the_others() -> None:
    """The points 0.1, 0.2, 0.3 and 0.9 on a line have distance sums of 1.1, 0.9, 0.9 and 2.1."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.1, 0.2, 0.9, 0.3])[:, None, None, None])
    kept = [
        select_channels(model, method="fpgm", prune_rate=rate, input_shape=(1, 4, 4)).kept["0"] for rate in (0.5, 0.75)
    ]
    assert kept == [[0, 2], [2]]
    by_norm = select_channels(model, method="l1", prune_rate=0.5, input_shape=(1, 4, 4))
    assert by_norm.kept["0"] == [2, 3]
