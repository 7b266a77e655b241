"""Batch norm over the whole batch when each process has one shard of it.

`torch.nn.SyncBatchNorm` runs on GPUs only and is a module of the network. Here its kernels serve any network on GPUs,
and the same computation runs on CPUs, with gloo.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm

from scop.compute.batch_norm import BatchNorm, BatchNorms


class SynchronisedBatchNorms(BatchNorms):
    """Context in which batch norms in training use the statistics of all processes' shards, which have equal sizes."""

    def train(self, norm: BatchNorm) -> Tensor:
        x, world = norm.input, dist.get_world_size()
        if x.is_cuda:
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.momentum)
            return SyncBatchNorm.apply(x, norm.weight, norm.bias, *statistics, dist.group.WORLD, world)
        scale = torch.ones(x.shape[1]) if norm.weight is None else norm.weight
        shift = torch.zeros(x.shape[1]) if norm.bias is None else norm.bias
        output, mean, var = _SynchronisedBatchNorm.apply(x, scale, shift, norm.eps)
        norm.update_statistics(mean, var, x.numel() / x.shape[1] * world)
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
