"""`NarrowBatchNorms` compared with PyTorch's batch norm."""

import copy

import pytest
import torch
from torch import nn

from scop.compute.narrow_batch_norm import NarrowBatchNorms, _fold_of


def feature_map(channels: int, dtype: torch.dtype = torch.float32, images: int = 128, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(images, channels, size, size, generator=generator) * 3 + 1
    return x.to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [2, 5, 8, 9, 18, 31])
def test_matches_batch_norm_in_outputs_gradients_and_statistics(channels: int) -> None:
    plain = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
    nn.init.uniform_(plain.weight)
    nn.init.uniform_(plain.bias)
    fast = copy.deepcopy(plain)
    inputs = [feature_map(channels).requires_grad_() for _ in range(2)]
    assert _fold_of(inputs[0]) > 1
    gradient = torch.randn(inputs[0].shape)
    expected = plain(inputs[0])
    with NarrowBatchNorms():
        actual = fast(inputs[1])
    assert "FoldedBatchNorm" in actual.grad_fn.name()
    expected, actual = expected.relu_(), actual.relu_()
    for output in (expected, actual):
        output.backward(gradient)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    pairs = [(expected, actual), (inputs[0].grad, inputs[1].grad)]
    pairs += [(getattr(plain, n), getattr(fast, n)) for n in ("running_mean", "running_var", "num_batches_tracked")]
    pairs += [(plain.weight.grad, fast.weight.grad), (plain.bias.grad, fast.bias.grad)]
    for a, b in pairs:
        assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-4)


def test_bfloat16_output_is_close_and_keeps_its_dtype() -> None:
    norm = nn.BatchNorm2d(9)
    x = feature_map(9, torch.bfloat16)
    expected = nn.BatchNorm2d(9)(x.float())
    with NarrowBatchNorms():
        actual = norm(x)
    assert actual.dtype == torch.bfloat16
    assert torch.allclose(actual.float(), expected, atol=0.03)


@pytest.mark.parametrize(
    "x",
    [
        feature_map(16),
        feature_map(64),
        feature_map(9).contiguous(),
        feature_map(9, size=9, images=127),
        feature_map(9, images=64),
    ],
)
def test_other_feature_maps_use_the_original_batch_norm(x: torch.Tensor) -> None:
    norm = nn.BatchNorm2d(x.shape[1])
    assert _fold_of(x) == 1
    with NarrowBatchNorms():
        assert torch.equal(norm(x), nn.BatchNorm2d(x.shape[1])(x))
    assert torch.equal(norm.eval()(feature_map(x.shape[1])), norm(feature_map(x.shape[1])))
