"""Signals that ask a process to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""A scheduler's, Ctrl-C, and that of a terminal that is closed."""


def handled(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Have `STOP_SIGNALS` handled, but for a closed terminal's where nohup has it ignored; the handlers before."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP)]
    return {number: signal.signal(number, handler) for number in numbers}


@contextlib.contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """Within, `STOP_SIGNALS` do not end the process; the given function tells whether one came."""
    if threading.current_thread() is not threading.main_thread():  # only it may have handlers
        yield lambda: False
        return
    came = 0

    def note(number: int, _: object) -> None:
        nonlocal came
        came = number

    before = handled(note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:  # too late for a checkpoint, but not forgotten
        signal.raise_signal(came)
