"""Signals that ask a process to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from scop.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Sent by a scheduler, by Ctrl-C, and by a closed terminal."""


def handle_stop_signals(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Install a handler for `STOP_SIGNALS`, except SIGHUP under nohup, and return the previous handlers."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP)]
    return {number: signal.signal(number, handler) for number in numbers}


def restore_handlers(handlers: dict[int, Any]) -> None:
    """Install the handlers that `handle_stop_signals` has returned."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def deferred_stop() -> Iterator[Callable[[], bool]]:
    """Defer `STOP_SIGNALS` within the context; yield a function that returns whether one has arrived.

    A signal that caused no stop is raised again at the end; a `Stopped` that leaves the context gets the signal's exit
    code. In threads other than the main thread, which cannot install handlers, nothing is deferred.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received = 0

    def note(number: int, _: object) -> None:
        nonlocal received
        received = number

    before = handle_stop_signals(note)
    try:
        yield lambda: bool(received)
    except Stopped as error:
        if received:  # else another process received the signal
            error.code = 128 + received
        raise
    finally:
        restore_handlers(before)
    if received:
        signal.raise_signal(received)
