"""The status and the exit code of a finished step, and the signals that stop a step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from enum import IntEnum, StrEnum

from scop.errors import Stopped, UserError, first_line
from scop.system.signals import handle_stop_signals, restore_handlers


class Status(StrEnum):
    """The status in a step's record."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"


class ExitCode(IntEnum):
    """The exit code of a step's process."""

    SUCCESS = 0
    FAILURE = 1
    USER_ERROR = 2
    NO_DEVICE = 3
    HUNG_UP = 128 + signal.SIGHUP
    INTERRUPTED = 128 + signal.SIGINT
    TERMINATED = 128 + signal.SIGTERM


class NoDeviceError(UserError):
    """A GPU that the step requires is missing."""


class StepFailedError(Exception):
    """A step failed for a reason that is not the user's mistake; its traceback has been logged."""


class Terminated(SystemExit):
    """A stop signal arrived when there was no training to save."""

    code: int

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)

    def __str__(self) -> str:
        return "terminated"


def status_of(error: BaseException) -> Status:
    """Return the status of a step that ended by an exception."""
    return Status.STOPPED if isinstance(error, Stopped | Terminated) else Status.FAILED


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit code of a step that ended by an exception."""
    if isinstance(error, NoDeviceError):
        return ExitCode.NO_DEVICE
    if isinstance(error, UserError):
        return ExitCode.USER_ERROR
    return ExitCode(error.code) if isinstance(error, Stopped | Terminated) else ExitCode.FAILURE


def reason_of(error: BaseException) -> str:
    """Describe an exception in one line, including its original cause if a library wrapped it."""
    if not isinstance(error, Exception | Terminated):
        return type(error).__name__
    cause: BaseException = error
    while not isinstance(error, UserError | Stopped | Terminated) and (deeper := cause.__cause__ or cause.__context__):
        cause = deeper
    if cause is error or first_line(cause) in first_line(error):
        return first_line(error)
    return f"{first_line(error)} (caused by {type(cause).__name__}: {first_line(cause)})"


@contextlib.contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Raise `Terminated` on a stop signal within the context, so that the step's record is written.

    Signals after the first are ignored until the record is written. SIGKILL cannot be handled. In a thread other than
    the main thread, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, object] = {}

    def end(number: int, _: object) -> None:
        # Ctrl-C arrives twice: from the terminal and, as SIGTERM, from `scop run`.
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    before.update(handle_stop_signals(end))
    try:
        yield
    finally:
        restore_handlers(before)
