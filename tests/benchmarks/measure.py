"""Alternating measurements in one process, so that noise of the machine affects all candidates alike."""

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
from pathlib import Path
from typing import Any

import torch

from scop.compute.device import describe_device, pick_device
from scop.system.revision import git_revision

RESULTS = Path(__file__).parent / "results"
_REVISION = git_revision()
"""Revision of the running code, read at import: the checkout may change during hours of work."""


def take_turns(
    work: Mapping[str, Callable[[], object]],
    turns: int,
    warmup: int = 2,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Return the median seconds of each function, by name.

    Args:
        work: functions by name.
        turns: number of timed rounds; each runs every function once.
        warmup: number of rounds before them that are not timed.
        before: called before each function; not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warmup + turns):
        for name, run in work.items():
            before()
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, Any]:
    """Return the machine, versions, revision and date that are stored with a figure."""
    return {
        "device": describe_device(pick_device()),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "revision": _REVISION,
        "date": datetime.now(UTC).date().isoformat(),
    }


def settings_hash(*settings: object) -> str:
    """Hash the settings that a figure depends on."""
    return sha256(json.dumps(settings).encode()).hexdigest()[:16]
