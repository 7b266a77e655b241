"""`SynchronisedBatchNorms` on a GPU; `test_distributed.py` tests it on CPUs, in two processes."""

import copy
from inspect import signature
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm

from scop.compute.sync_batch_norm import SynchronisedBatchNorms


def test_pytorchs_function_takes_the_arguments_that_are_passed_to_it() -> None:
    assert list(signature(SyncBatchNorm.forward).parameters)[1:] == [
        *("input", "weight", "bias", "running_mean", "running_var", "eps", "momentum", "process_group", "world_size")
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_process_on_a_gpu_has_the_batch_norm_of_pytorch(tmp_path: Path) -> None:
    plain = nn.BatchNorm2d(9, momentum=0.3).cuda()
    nn.init.uniform_(plain.weight)
    synchronised = copy.deepcopy(plain)
    x = torch.randn(4, 9, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
    inputs = [x.clone().to(memory_format=torch.channels_last).requires_grad_() for _ in range(2)]
    expected = plain(inputs[0])
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with SynchronisedBatchNorms():
            actual = synchronised(inputs[1])
        for output in (expected, actual):
            (output * x).sum().backward()
    finally:
        dist.destroy_process_group()
    assert "SyncBatchNorm" in actual.grad_fn.name()
    pairs = [(expected, actual), (inputs[0].grad, inputs[1].grad), (plain.weight.grad, synchronised.weight.grad)]
    pairs += [(getattr(plain, name), getattr(synchronised, name)) for name in ("running_mean", "running_var")]
    for one, other in pairs:
        torch.testing.assert_close(one, other)
