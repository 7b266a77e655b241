"""Cuts: the layers that lose channels, and what the shrunk layers keep."""

import pytest
import torch
from torch import nn

from scop import ChannelPlan, UserError, make_model, prune, select_channels
from scop.pruning.cuts import cuts_of
from scop.pruning.exactness import exactness
from scop.pruning.graph import RESIDUAL_RULES, ChannelGraph
from tests.helpers import randomise_batch_norms
from tests.networks import GroupsAndBias


def test_cuts_the_inputs_of_a_linear_layer_after_a_flatten() -> None:
    from torchvision.models.vgg import VGG, make_layers

    torch.manual_seed(0)
    model = VGG(make_layers([16, "M", 32, "M"], batch_norm=True), num_classes=10)  # type: ignore[list-item]
    model.classifier = nn.Sequential(nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10))
    randomise_batch_norms(model.eval())
    plan = select_channels(model, method="l1", input_shape=(3, 28, 28))
    assert exactness(model, cuts_of(ChannelGraph(model, (3, 28, 28)), plan), (3, 28, 28)) < 1e-4
    assert prune(model, plan).classifier[0].in_features == 18 * 7 * 7


def test_keeps_layer_attributes_and_the_dense_model() -> None:
    model = GroupsAndBias()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = prune(model, select_channels(model, method="l1", residual="coupled", input_shape=(3, 16, 16)))
    assert (pruned.grouped.dilation, pruned.grouped.groups) == ((2, 2), 4)
    assert pruned.grouped.bias.shape == (pruned.grouped.out_channels,)
    assert (pruned.stem_norm.eps, pruned.stem_norm.momentum) == (1e-3, 0.3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_kept_channels_keep_their_order_and_weights() -> None:
    model = make_model("resnet20")
    plan = select_channels(model, method="random", prune_rate=0.3, input_shape=(3, 32, 32))
    pruned = prune(model, plan)
    kept = plan.kept["layer1.0.conv1"]
    assert kept == sorted(kept)
    assert torch.equal(pruned.layer1[0].bn1.weight, model.layer1[0].bn1.weight[kept])
    assert torch.equal(pruned.layer1[0].conv1.weight, model.layer1[0].conv1.weight[kept])


def test_frozen_parameters_stay_frozen() -> None:
    model = make_model("resnet20").requires_grad_(False)
    model.fc.requires_grad_(True)
    for rule in RESIDUAL_RULES:
        pruned = prune(model, select_channels(model, method="l1", residual=rule, input_shape=(3, 8, 8)))
        assert [name for name, p in pruned.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]


def test_rejects_unequal_removal_from_groups() -> None:
    plan = ChannelPlan(
        input_shape=(3, 16, 16), residual="inner", kept={"grouped": list(range(1, 24))}, channels={"grouped": 24}
    )
    with pytest.raises(UserError, match="has 4 groups: remove the same number of channels from each"):
        prune(GroupsAndBias(), plan)
