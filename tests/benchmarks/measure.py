"""Timing by turns: what is compared takes turns in one process, so that a noisy machine is noisy for all."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import torch

from scop.compute.device import describe_device, pick_device
from scop.system.revision import git_revision

_REVISION = git_revision()
"""Of the code that runs; the checkout may be another one when hours of work have ended."""


def take_turns(work: Mapping[str, Callable[[], object]], turns: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each piece of work.

    Args:
        work: by name.
        turns: timed rounds; in each every piece runs once.
        warmup: rounds before these.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warmup + turns):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "device": describe_device(pick_device()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "revision": _REVISION,
        "date": datetime.now(UTC).date().isoformat(),
    }


def settings_hash(*settings: object) -> str:
    """Of what a figure was made with."""
    return sha256(json.dumps(settings).encode()).hexdigest()[:16]
