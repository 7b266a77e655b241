"""Batch norm over the whole batch when every process holds a shard of it.

`torch.nn.SyncBatchNorm` runs on GPUs only and replaces the network's modules. This version also runs on CPUs, with
gloo, and does not change the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SynchronisedBatchNorms(TorchFunctionMode):
    """In this context, batch norms in training use the statistics of all processes' shards, which have equal sizes."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute `torch.nn.functional.batch_norm`, synchronised in training."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.ones(x.shape[1], device=x.device) if weight is None else weight
    shift = torch.zeros(x.shape[1], device=x.device) if bias is None else bias
    output, mean, var = _SynchronisedBatchNorm.apply(x, scale, shift, eps)
    if running_mean is not None and running_var is not None:
        count = x.numel() / x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return output


class _SynchronisedBatchNorm(torch.autograd.Function):
    """Batch norm in training of a shard (N, C, ...); returns (output, mean, biased variance) of the whole batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        over = [0, *range(2, x.dim())]
        own = torch.stack(torch.var_mean(x.float(), over, correction=0))
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        variances, means = torch.stack(every, 1)
        # Exact for shards of equal size, and without the cancellation of E[x^2] - E[x]^2.
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        output = F.batch_norm(x, mean, var, weight.float(), bias.float(), False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        # Gradients with constant statistics; those of the weight and the bias are sums over the batch.
        direct, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0].contiguous(memory_format=torch.channels_last) if x.dim() == 4 else gradients[0],
            x,
            weight.float(),
            mean,
            var,
            None,
            None,
            False,
            ctx.eps,
            [True, True, True],
        )
        sums = torch.stack((by_weight, by_bias)).float()
        over_all = sums.clone()
        dist.all_reduce(over_all)
        # Through the statistics: -weight / sigma * (mean(g) + x_hat mean(g x_hat)) (Ioffe and Szegedy, 2015).
        count = x.numel() / x.shape[1] * dist.get_world_size()
        scale, shift = over_all * (-weight.float() * (var + ctx.eps).rsqrt() / count)
        through = F.batch_norm(x, mean, var, scale, shift, False, 0.0, ctx.eps)
        by_weight, by_bias = sums.to(weight.dtype).unbind()
        return direct.add_(through), by_weight, by_bias, None
