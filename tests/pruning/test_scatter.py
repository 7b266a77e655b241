"""Scattered branches: training, autocast, `torch.compile`, stochastic depth and refusals."""

import copy

import pytest
import torch
from torch import nn

from scop import UserError, make_model, prune, select_channels
from tests.pruning.helpers import Own, make_random_model, max_difference


def test_scattering_works_in_training_and_under_autocast() -> None:
    model = make_model("resnet20").to(memory_format=torch.channels_last)
    pruned = prune(model, select_channels(model, method="l1", input_shape=(3, 16, 16))).train()
    images = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        pruned(images).float().sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scattering_network_compiles(layout: torch.memory_format) -> None:
    model = make_random_model("resnet20", {"num_classes": 10})
    pruned = prune(model, select_channels(model, method="random", prune_rate=0.45, input_shape=(3, 8, 8)))
    pruned = pruned.to(memory_format=layout).train()
    images = torch.randn(4, 3, 8, 8).to(memory_format=layout)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(pruned), backend="aot_eager", fullgraph=True)  # needs no C++ compiler
    expected, actual = pruned(images), compiled(images)
    assert max_difference(expected, actual) < 1e-4
    actual.sum().backward()
    expected.sum().backward()
    for (name, parameter), other in zip(pruned.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, atol=1e-3), name


def test_scatters_torchvision_stochastic_depth_in_training() -> None:
    model = make_model("torchvision:efficientnet_b0", num_classes=10)
    pruned = prune(model, select_channels(model, method="l1", input_shape=(3, 32, 32))).train()
    assert pruned(torch.randn(2, 3, 32, 32)).shape == (2, 10)


class Noisy(nn.Module):
    """A residual block with stochastic depth as timm and older repositories implement it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem = kind, nn.Conv2d(3, 16, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1))
        self.head = nn.Linear(16, 10)

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        shape = (len(x), 1, 1, 1)
        if not self.training:
            return x
        if self.kind == "new_empty":
            return x * x.new_empty(shape).bernoulli_(0.8).div_(0.8)
        if self.kind == "div":
            return x.div(0.8) * (0.8 + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()
        return x.clamp(max=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.dropped(self.block(x))).mean((2, 3)))


@pytest.mark.parametrize("kind", ["new_empty", "div"])
def test_scatters_other_forms_of_stochastic_depth(kind: str) -> None:
    model = Noisy(kind)
    pruned = prune(model, select_channels(model, method="l1", input_shape=(3, 8, 8))).train()
    state = torch.get_rng_state()
    assert pruned(torch.randn(64, 3, 8, 8)).shape == (64, 10)
    torch.set_rng_state(state)
    prune(model, select_channels(model, method="l1", input_shape=(3, 8, 8)))
    assert torch.equal(torch.get_rng_state(), state)


def test_rejects_operations_that_run_only_in_training() -> None:
    model = Noisy("clamp")
    with pytest.raises(UserError, match="a residual branch passes through clamp before it is added"):
        prune(model, select_channels(model, method="l1", input_shape=(3, 8, 8)))


def test_rejects_dropout_before_the_addition() -> None:
    model = Own(kind="dropout")
    with pytest.raises(UserError, match="passes through dropout before it is added"):
        prune(model, select_channels(model, method="l1", input_shape=(3, 8, 8))).train()(torch.randn(2, 3, 8, 8))
    coupled = prune(model, select_channels(model, method="l1", residual="coupled", input_shape=(3, 8, 8)))
    assert coupled.train()(torch.randn(2, 3, 8, 8)).shape == (2, 4)
