"""Workaround for a oneDNN bug in the training of strided pointwise convolutions on CPUs.

oneDNN, PyTorch's convolution library on CPUs, writes past the end of its workspace when it computes the weight gradient
of a strided 1x1 convolution in channels-last memory with fewer input channels than its kernels process at a time, 8 or
16 (uxlfoundation/oneDNN issue 6035). The process crashes or continues with wrong numbers. Pruning creates such layers
in the shortcuts of residual streams. With stride 2, a pointwise convolution reads only every second pixel: the
workaround selects these pixels first and then convolves without stride.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_LANES = 16


def pick_pixels_first(model: nn.Module) -> Callable[[], None]:
    """Make affected convolutions select pixels instead of striding, in place; return a function that undoes this."""
    changed: list[tuple[nn.Conv2d, tuple[int, ...], RemovableHandle]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_in_danger(module):
            stride = module.stride
            changed.append((module, stride, module.register_forward_pre_hook(partial(_pick, stride))))
            module.stride = (1, 1)

    def undo() -> None:
        for module, stride, hook in changed:
            module.stride = stride
            hook.remove()
        changed.clear()

    return undo


def _is_in_danger(module: nn.Conv2d) -> bool:
    pointwise = module.kernel_size == (1, 1) and module.padding in ((0, 0), "valid")
    return pointwise and module.stride != (1, 1) and module.in_channels // module.groups < _LANES


def _pick(stride: tuple[int, ...], _: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return (inputs[0][..., :: stride[0], :: stride[1]], *inputs[1:])
