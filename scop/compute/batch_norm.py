"""Replacing the function that batch norms call, without replacing a network's modules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class BatchNorm(NamedTuple):
    """The arguments of `torch.nn.functional.batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def update_statistics(self, mean: Tensor, var: Tensor, count: float) -> None:
        """Update the running statistics from those of a batch.

        Args:
            mean: mean (C,).
            var: biased variance (C,).
            count: number of values per channel.
        """
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)


class BatchNorms(TorchFunctionMode):
    """Context in which `train` computes batch norms in training."""

    @abstractmethod
    def train(self, norm: BatchNorm) -> Tensor:
        """Return the output of a batch norm in training, and update its running statistics."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            norm = BatchNorm(*args, **(kwargs or {}))
            if norm.training:
                return self.train(norm)
        return func(*args, **(kwargs or {}))
