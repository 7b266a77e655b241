"""Check of a surgery: the pruned network must compute the same function as the masked dense network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from scop.errors import UserError
from scop.pruning.cuts import Cuts, apply_cuts, layer_width


def masked_twin(model: nn.Module, cuts: Cuts) -> nn.Module:
    """Return a copy of the dense model that zeroes the removed channels after every layer that loses them."""
    twin = copy.deepcopy(model)
    for name, cut in cuts.items():
        if cut.out:
            layer = twin.get_submodule(name)
            mask = torch.ones(layer_width(layer))
            mask[cut.out] = 0
            layer.register_forward_hook(_Mask(mask))
    return twin


class _Mask:
    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # Channels are dimension 1, except after a linear layer or layer norm, where they are the last dimension.
        last = isinstance(layer, nn.Linear | nn.LayerNorm)
        shape = (-1,) if last else (-1,) + (1,) * (output.dim() - 2)
        return output * self.mask.to(output).view(shape)


def _tensors_near_zero(model: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """Yield the tensors whose values may be zero or close to it, each with the lower end of a range of width 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
            ranges = {"running_mean": -0.5, "running_var": 0.5, "weight": 0.5, "bias": -0.5}
            for name, low in ranges.items():
                if isinstance(tensor := getattr(module, name, None), Tensor):
                    yield tensor, low
        elif not type(module).__module__.startswith("torch.nn"):  # ConvNeXt's layer_scale starts at 1e-6
            yield from ((parameter, 0.5) for parameter in module.parameters(recurse=False))


@torch.no_grad()
def exactness(model: nn.Module, cuts: Cuts, input_shape: tuple[int, ...], seed: int = 0) -> float:
    """Return the largest absolute difference between the outputs of the masked twin and of the pruned model.

    It is measured in float64 on random images, so that it shows errors of the surgery and not rounding. The norms'
    statistics and affine parameters and any layer scales are drawn at random: a channel multiplied by 0 would hide
    such an error.

    Args:
        model: the dense network; it is not changed.
        cuts: the cuts to check.
        input_shape: (C, H, W) of an image.
        seed: seed of the random images and parameters.

    Raises:
        UserError: the pruned model does not run, since the plan breaks a dependency that tracing did not find.
    """
    generator = torch.Generator().manual_seed(seed)
    dense = copy.deepcopy(model).cpu().double().eval()
    for tensor, low in _tensors_near_zero(dense):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    images = torch.randn(2, *input_shape, generator=generator).double()
    try:
        expected = masked_twin(dense, cuts)(images)
    except RuntimeError:
        # Some networks convert to float32 in their forward. The result then includes rounding errors.
        dense, images = dense.float(), images.float()
        expected = masked_twin(dense, cuts)(images)
    try:
        actual = apply_cuts(copy.deepcopy(dense), cuts)(images)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the pruned {type(model).__name__} does not run ({error}); add these layers to the variant's exclude"
        ) from error
    return float((expected - actual).abs().max())
