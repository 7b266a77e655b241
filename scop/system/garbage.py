"""How often a process looks for garbage."""

from __future__ import annotations

import gc

_THRESHOLDS = (100_000, 50, 100)


def collect_garbage_rarely() -> None:
    """Make Python look for reference cycles less often: for programs, since a library must not change its caller.

    PyTorch and MLflow create millions of objects as they are imported, and hardly any of them is garbage. By default,
    Python looks at all of them again and again. Imports of 6.3 seconds take 4.9 with these thresholds.
    """
    gc.set_threshold(*_THRESHOLDS)
