"""Training of strided convolutions with few channels on CPUs, where oneDNN may crash without the workaround."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scop import make_model, prune, select_channels
from scop.compute.strided_convolution import pick_pixels_first
from scop.config import DenseSection
from scop.training.supervised import Supervised

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("stride", [2, (3, 1)])
def test_selecting_pixels_first_gives_the_same_results(stride: int | tuple[int, int], size: int) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(5, 8, 1, stride=stride)
    images = torch.randn(4, 5, size, size)

    def results(module: nn.Module) -> list[torch.Tensor]:
        x = images.clone().requires_grad_()  # in contiguous memory, for which oneDNN is correct
        out = module(x)
        module.zero_grad()
        out.square().sum().backward()
        return [out, x.grad, module.weight.grad, module.bias.grad]

    expected = [result.clone() for result in results(convolution)]
    undo = pick_pixels_first(convolution)
    assert convolution.stride == (1, 1)
    for result, other in zip(results(convolution), expected, strict=True):
        assert torch.allclose(result, other, atol=1e-5)
    undo()
    assert convolution.stride == ((stride, stride) if isinstance(stride, int) else stride)
    assert not convolution._forward_pre_hooks


def test_training_a_narrow_stream_gives_correct_gradients() -> None:
    torch.manual_seed(0)
    dense = make_model("resnet20")
    plan = select_channels(dense, method="l1", residual="coupled", prune_rate=0.6, input_shape=(3, 16, 16))
    pruned = prune(dense, plan)
    assert pruned.layer2[0].downsample[0].in_channels < 8
    # In float64, so that no activation is rounded to the other side of a ReLU.
    images, labels = torch.randn(16, 3, 16, 16, dtype=torch.float64), torch.arange(16) % 10
    plain = copy.deepcopy(pruned.double()).train()
    F.cross_entropy(plain(images), labels).backward()
    pruned.to(memory_format=torch.channels_last)
    objective = Supervised(pruned, CPU, DenseSection(precision="fp32", ema=0.9))
    objective.start_epoch(0)
    loss, _ = objective.loss(images, labels)
    loss.backward()
    objective.after_step()
    for (name, own), other in zip(pruned.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=name)
    objective.finish()
    assert pruned.layer2[0].downsample[0].stride == (2, 2)
