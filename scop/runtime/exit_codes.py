"""How a step ends that does not come to its end: by an error, or told to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from scop.errors import Stopped, UserError, first_line
from scop.system.signals import handled

TERMINATED = 128 + signal.SIGTERM


def status_of(error: BaseException) -> str:
    """What a record says of a step that ended by it."""
    return "stopped" if isinstance(error, Stopped | Terminated) else "failed"


def code_of(error: BaseException) -> int:
    """The exit code."""
    return 2 if isinstance(error, UserError) else TERMINATED if status_of(error) == "stopped" else 1


def reason_of(error: BaseException) -> str:
    """In a line; of an error of a library's also what caused it at first."""
    if not isinstance(error, Exception | Terminated):
        return type(error).__name__
    cause: BaseException = error
    while not isinstance(error, UserError | Stopped | Terminated) and (deeper := cause.__cause__ or cause.__context__):
        cause = deeper
    if cause is error or first_line(cause) in first_line(error):
        return first_line(error)
    return f"{first_line(error)} (because of {type(cause).__name__}: {first_line(cause)})"


class Terminated(SystemExit):
    """SIGTERM or Ctrl-C came at a time when there was nothing to save."""

    def __str__(self) -> str:
        return "told to stop"


@contextlib.contextmanager
def ending_when_told() -> Iterator[None]:
    """Within, the signals to stop unwind the stack, so that the record says how the step ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before: dict[int, Any] = {}

    def end(*_: object) -> None:
        # Ctrl-C comes from the terminal and, as SIGTERM, from `scop run`. The record is written first; SIGKILL is left.
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise Terminated(TERMINATED)

    before.update(handled(end))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
