"""Pointwise convolutions with a stride, trained on CPUs without damage.

oneDNN, which convolves for PyTorch on CPUs, writes past the end of its workspace when it computes the weights' gradient
of a strided 1x1 convolution that reads fewer channels than its kernels take at a time, 8 or 16, in channels-last memory
(uxlfoundation/oneDNN issue 6035): the process dies, or goes on with wrong numbers. Pruning makes such layers, of the
shortcuts of a stream. But a strided pointwise convolution looks at every second pixel only, say: so these are picked
first, and then there is no stride.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_LANES = 16


def pick_pixels_first(model: nn.Module) -> Callable[[], None]:
    """Have the strided pointwise convolutions that read few channels do so, in place; what is returned undoes it."""
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
