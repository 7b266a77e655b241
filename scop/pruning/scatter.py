"""Adding a narrow residual branch to a stream of full width."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scop.errors import UserError


class Scattered:
    """The narrow end of a residual branch, which waits for the addition to the full-width stream.

    Stands in for the feature map between the branch's last layer and the addition, so the network's own forward needs
    no change and nothing of full width is made: ``x + scattered`` puts each channel where it belongs.

    Shape:
        values (N, K, H, W) + stream (N, C, H, W) -> (N, C, H, W), with ``places`` of K of the C channels.
    """

    def __init__(self, values: Tensor, places: Tensor, spread: Tensor) -> None:
        self.values, self.places, self.spread = values, places, spread

    def added_to(self, stream: Tensor) -> Tensor:
        """The stream with the branch's channels added where they belong."""
        # Channels that lie side by side in memory are hard to address one by one: there a 1x1 convolution with a
        # 0/1 matrix is 2.5 times faster than index_add (bf16, two cores), and exact, each sum having one term.
        # Runtimes for exported graphs are good at convolutions too, and turn index_add into transposes and a scatter.
        if torch.compiler.is_exporting() or not self.values.is_contiguous():
            return stream + F.conv2d(self.values, self.spread.to(self.values.dtype))
        return stream.index_add(1, self.places, self.values.to(stream.dtype))

    __add__ = added_to
    __radd__ = added_to
    __iadd__ = added_to

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("add", "__add__", "__radd__", "__iadd__", "add_") and len(args) == 2:
            branch, stream = args if isinstance(args[0], cls) else reversed(args)
            return branch.added_to(stream)  # not with +, which torch.compile would send here again
        raise UserError(_passes_through(getattr(func, "__name__", str(func))))

    # Stochastic depth, which may stand before the addition, scales whole images: that commutes with scattering.

    def __mul__(self, noise: Tensor | float) -> Scattered:
        if isinstance(noise, Tensor) and noise.dim() > 1 and noise.shape[1] != 1:
            raise UserError(_passes_through("a product with a feature map"))
        return Scattered(self.values * noise, self.places, self.spread)

    def __truediv__(self, share: Tensor | float) -> Scattered:
        return self * (1 / share)

    div = __truediv__

    def new_empty(self, *size: Any, **options: Any) -> Tensor:
        """As a tensor's, for the noise."""
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
    """For who asks whether there is such an attribute it is what they expect."""


class _Scattering:
    """Mixin for a branch's last layer, convolution or batch norm: its forward returns a `Scattered`."""

    places: Tensor
    spread: Tensor

    def forward(self, x: Tensor) -> Scattered:
        return Scattered(super().forward(x), self.places, self.spread)  # type: ignore[misc]


def make_scattering(layer: nn.Module, removed: list[int], width: int) -> None:
    """Turn a branch's last layer, in place, into one whose output is a `Scattered` of `width` channels."""
    gone = set(removed)
    places = torch.tensor([channel for channel in range(width) if channel not in gone])
    spread = torch.zeros(width, len(places), 1, 1)
    spread[places, torch.arange(len(places))] = 1
    device = next(chain(layer.parameters(), layer.buffers())).device
    # Rebuilt from the cuts on loading, hence no part of the state dict.
    layer.register_buffer("places", places.to(device), persistent=False)
    layer.register_buffer("spread", spread.to(device), persistent=False)
    own = type(layer)
    layer.__class__ = type(f"Scattering{own.__name__}", (_Scattering, own), {"__doc__": own.__doc__})
