"""The processor's name, without importing PyTorch."""

from __future__ import annotations

import contextlib
import platform
from functools import cache
from pathlib import Path


@cache
def processor_name() -> str:
    """Return the processor's name, such as ``AMD EPYC``."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as info:
        for line in info:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
