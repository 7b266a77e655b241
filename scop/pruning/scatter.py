"""Addition of a narrow residual branch to a full-width residual stream."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scop.errors import UserError


class Scattered:
    """The output of a pruned residual branch, which has fewer channels than the residual stream.

    It replaces the feature map between the branch's last layer and the addition: ``x + scattered`` adds each channel
    to the stream at its original index. So the network's own forward needs no change, and the branch is not padded to
    full width.

    Args:
        values: the branch's output (N, K, H, W).
        indices: (K,), the index in the stream of each channel.
        spread: (C, K, 1, 1), the same as a 0/1 matrix.

    Shape:
        values (N, K, H, W) + stream (N, C, H, W) -> (N, C, H, W)
    """

    def __init__(self, values: Tensor, indices: Tensor, spread: Tensor) -> None:
        self.values, self.indices, self.spread = values, indices, spread

    def added_to(self, stream: Tensor) -> Tensor:
        """Return the stream (N, C, H, W) with the branch's channels added at their indices."""
        # In channels-last memory, a 1x1 convolution with a 0/1 matrix is 2.5 times faster than index_add (bf16, two
        # cores), and exact, since each sum has one term. It also suits exported graphs: their runtimes turn index_add
        # into transposes and a scatter, and are fast at convolutions.
        if torch.compiler.is_exporting() or not self.values.is_contiguous():
            return stream + F.conv2d(self.values, self.spread.to(self.values.dtype))
        return stream.index_add(1, self.indices, self.values.to(stream.dtype))

    __add__ = added_to
    __radd__ = added_to
    __iadd__ = added_to

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("add", "__add__", "__radd__", "__iadd__", "add_") and len(args) == 2:
            branch, stream = args if isinstance(args[0], cls) else reversed(args)
            return branch.added_to(stream)  # not `+`, which torch.compile would dispatch here again
        raise UserError(_passes_through(getattr(func, "__name__", str(func))))

    # Stochastic depth before the addition multiplies whole images by a factor, which commutes with scattering.

    def __mul__(self, noise: Tensor | float) -> Scattered:
        if isinstance(noise, Tensor) and noise.dim() > 1 and noise.shape[1] != 1:
            raise UserError(_passes_through("a product with a feature map"))
        return Scattered(self.values * noise, self.indices, self.spread)

    def __truediv__(self, share: Tensor | float) -> Scattered:
        return self * (1 / share)

    div = __truediv__

    def new_empty(self, *size: Any, **options: Any) -> Tensor:
        """Return an uninitialised tensor, as `Tensor.new_empty`; stochastic depth draws its noise into it."""
        return self.values.new_empty(*size, **options)

    def __len__(self) -> int:
        return len(self.values)

    def __getattr__(self, name: str) -> Any:
        raise _UnknownToScatteredError(_passes_through(name))

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device


def _passes_through(what: str) -> str:
    return (
        f"a residual branch passes through {what} before it is added, so it cannot be scattered; use residual: inner "
        "or coupled"
    )


class _UnknownToScatteredError(UserError, AttributeError):
    """Also an AttributeError, so that ``hasattr`` works."""


class _Scattering:
    """Mixin for a branch's last layer (a convolution or batch norm): its forward returns a `Scattered`."""

    indices: Tensor
    spread: Tensor

    def forward(self, x: Tensor) -> Scattered:
        return Scattered(super().forward(x), self.indices, self.spread)  # type: ignore[misc]


def make_scattering(layer: nn.Module, removed: list[int], width: int) -> None:
    """Change a branch's last layer in place so that it returns a `Scattered`.

    Args:
        layer: the layer, already cut.
        removed: the output channels that were removed from it.
        width: number of its output channels before the cut, as in the residual stream.
    """
    removed_set = set(removed)
    indices = torch.tensor([channel for channel in range(width) if channel not in removed_set])
    spread = torch.zeros(width, len(indices), 1, 1)
    spread[indices, torch.arange(len(indices))] = 1
    device = next(chain(layer.parameters(), layer.buffers())).device
    # Not in the state dict, since loading rebuilds them from the cuts.
    layer.register_buffer("indices", indices.to(device), persistent=False)
    layer.register_buffer("spread", spread.to(device), persistent=False)
    own = type(layer)
    layer.__class__ = type(f"Scattering{own.__name__}", (_Scattering, own), {"__doc__": own.__doc__})
