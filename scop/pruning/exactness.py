"""The proof of a surgery: the pruned network must compute what the masked dense network computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from scop.errors import UserError
from scop.pruning.cuts import Cuts, apply_cuts, layer_width


def masked_twin(model: nn.Module, cuts: Cuts) -> nn.Module:
    """A copy of the dense model in which the removed channels are zeroed behind every layer that loses them."""
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
        # Channels are dimension 1, but the last one behind a linear or layer norm.
        last = isinstance(layer, nn.Linear | nn.LayerNorm)
        shape = (-1,) if last else (-1,) + (1,) * (output.dim() - 2)
        return output * self.mask.to(output).view(shape)


def _what_may_hide(model: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """Numbers of a network that may be, or be near, zero, each tensor with the lower end of a range of width 1."""
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
    """The largest absolute difference between the masked twin's and the pruned model's outputs.

    Measured in float64 on random images, with the norms' statistics and affine parameters drawn at random, and the
    layers' scales where a network has some, so that a channel that should be gone cannot hide behind a zero; what
    remains is an error of the surgery, not rounding.

    Raises:
        UserError: the pruned model does not run: the plan breaks a dependency that tracing did not see.
    """
    generator = torch.Generator().manual_seed(seed)
    dense = copy.deepcopy(model).cpu().double().eval()
    for tensor, low in _what_may_hide(dense):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    images = torch.randn(2, *input_shape, generator=generator).double()
    try:
        expected = masked_twin(dense, cuts)(images)
    except RuntimeError:
        # Some networks convert to float32 on their way; then rounding is part of what is measured.
        dense, images = dense.float(), images.float()
        expected = masked_twin(dense, cuts)(images)
    try:
        actual = apply_cuts(copy.deepcopy(dense), cuts)(images)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the pruned {type(model).__name__} does not run ({error}); name them in the variant's exclude"
        ) from error
    return float((expected - actual).abs().max())
