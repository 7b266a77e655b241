"""Exactness: the masked, the pruned and the reloaded network compute the same function."""

import copy

import pytest
import torch

from scop import load_model, prune, save_model, select_channels
from scop.models.evaluation import count_parameters
from scop.pruning.cuts import cuts_of
from scop.pruning.exactness import exactness, masked_twin
from scop.pruning.graph import RESIDUAL_RULES, ChannelGraph
from tests.networks import Offset
from tests.pruning.helpers import make_random_model, max_difference

# name, factory, arguments, input shape
NETWORKS = [
    ("resnet20", "resnet20", {"num_classes": 10}, (3, 32, 32)),
    ("resnet56", "resnet56", {"num_classes": 10}, (3, 16, 16)),
    ("resnet50", "torchvision:resnet50", {"num_classes": 10}, (3, 32, 32)),
    ("mobilenet_v2", "torchvision:mobilenet_v2", {"num_classes": 10}, (3, 32, 32)),
    ("densenet", "tests.networks:small_densenet", {"num_classes": 10}, (3, 32, 32)),
    ("groups_and_bias", "tests.networks:GroupsAndBias", {"num_classes": 5}, (3, 16, 16)),
]


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
@pytest.mark.parametrize(("name", "factory", "arguments", "shape"), NETWORKS, ids=[n[0] for n in NETWORKS])
def test_masked_pruned_and_reloaded_networks_agree(name, factory, arguments, shape, rule, tmp_path) -> None:
    model = make_random_model(factory, arguments)
    plan = select_channels(model, method="random", prune_rate=0.45, residual=rule, input_shape=shape)
    cuts = cuts_of(ChannelGraph(model, shape), plan)
    assert exactness(model, cuts, shape) < 1e-4

    pruned = prune(model, plan).eval()
    assert count_parameters(pruned) < 0.9 * count_parameters(model) or name == "groups_and_bias"
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = pruned(images)
        scale = max(1.0, float(expected.abs().max()))
        assert max_difference(masked_twin(model, cuts)(images), expected) < 1e-4 * scale
        save_model(pruned, tmp_path / "small")
        assert torch.equal(load_model(tmp_path / "small")(images), expected)
        # In channels-last memory, another operation adds the scattered branch.
        last = copy.deepcopy(pruned).to(memory_format=torch.channels_last)
        assert max_difference(last(images.to(memory_format=torch.channels_last)), expected) < 1e-4 * scale


def test_exactness_detects_inexact_pruning() -> None:
    model = Offset(in_channels=3)
    plan = select_channels(model, method="l1", input_shape=(3, 8, 8))
    assert exactness(model, cuts_of(ChannelGraph(model, (3, 8, 8)), plan), (3, 8, 8)) > 1e-3
