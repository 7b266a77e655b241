"""The device to compute on, and settings that make a process fast on it."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from functools import cache

import torch
from torch import Tensor

from scop.config import Precision
from scop.errors import UserError, first_line
from scop.system.processor import processor_name


def pick_device(name: str | None = None) -> torch.device:
    """Return the device with this name; by default a GPU if there is one, else the CPU.

    Raises:
        UserError: the device is unknown or missing.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"device {name!r} is not available ({reason}); set SCOP_DEVICE=cpu") from error
    return device


def tune_process(device: torch.device) -> None:
    """Set process-wide options that make training fast. For programs only: a library must not change its caller."""
    if device.type == "cpu":
        _keep_freed_memory()
    else:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


@cache
def _keep_freed_memory() -> None:
    """Make glibc keep large freed buffers instead of returning them to the kernel.

    A training step frees and allocates the same feature maps repeatedly; otherwise each one is unmapped, mapped and
    zeroed again. ResNet-20, batch 256, two cores: 327 ms a step before, 251 ms after.
    """
    if platform.libc_ver()[0] == "glibc":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 1 << 30)
            libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is native on the device; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return False


def autocast_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """Return the dtype of convolutions: bfloat16 if requested, or for "auto" if native, else float32."""
    use_bf16 = precision == "bf16" or (precision == "auto" and has_native_bf16(device))
    return torch.bfloat16 if use_bf16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context in which convolutions and matrix products compute in `dtype`; float32 changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_device(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch on the device, in channels-last format; nothing is copied if it is already there."""
    return images.to(device, memory_format=torch.channels_last, non_blocking=True), labels.to(device, non_blocking=True)


def describe_device(device: torch.device, threads: int | None = None) -> str:
    """Return a name for records and reports, such as ``AMD EPYC (2 threads)`` or ``NVIDIA H200``.

    Args:
        device: the device.
        threads: number of CPU threads; PyTorch's by default.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()} ({threads or torch.get_num_threads()} threads)"
