"""Supervision of a command in a child process: if it is killed, its run is closed and the way to resume is printed.

`scop run` executes all steps in one process. If that process is killed, for example because memory ran out, its parent
closes the run in MLflow and prints how to continue. The parent does nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from pipelines.cli.options import report_missing_module
from pipelines.local.job import State

_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def supervise(work: Callable[[Callable[[State], None]], int]) -> int:
    """Run work in a forked child process.

    If PyTorch is already imported, the work runs in this process, since PyTorch's threads do not survive a fork.

    Args:
        work: function that returns an exit code; its argument is a function that receives the run's state.

    Returns:
        The exit code of the work, or 1 if its process was killed.
    """
    if "torch" in sys.modules or not hasattr(os, "fork"):
        return work(lambda state: None)
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_child(work, writing)
    os.close(writing)
    with _forwarding_signals(child):
        # Ends when the child exits. A state is far smaller than the pipe's buffer, so the child never waits.
        with os.fdopen(reading) as states:
            lines = states.read().splitlines()
        _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    return _report_crash(signal.Signals(os.WTERMSIG(status)), lines)


def _run_child(work: Callable[[Callable[[State], None]], int], writing: int) -> None:
    """Do the work and exit this process."""
    code = 1
    try:
        _end_with_parent()

        def announce(state: State) -> None:
            os.write(writing, (json.dumps(asdict(state)) + "\n").encode())

        code = work(announce)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        print("scop: interrupted", file=sys.stderr)
        code = 130
    except BaseException as error:
        code = _report(error)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _report(error: BaseException) -> int:
    """Print an unexpected error, and return the exit code."""
    import traceback

    if isinstance(error, ModuleNotFoundError):
        with contextlib.suppress(ModuleNotFoundError):
            return report_missing_module(error)
    traceback.print_exception(error)
    return 1


def _end_with_parent() -> None:
    """Receive SIGTERM when the parent dies, even by SIGKILL (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _forwarding_signals(child: int) -> Iterator[None]:
    """Forward stop signals to the child, which receives Ctrl-C twice, also from the terminal."""

    def forward(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    before = {number: signal.getsignal(number) for number in _FORWARDED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup
            signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report_crash(killer: signal.Signals, lines: list[str]) -> int:
    hint = " (possibly out of memory)" if killer is signal.SIGKILL else ""
    if not lines:
        print(f"scop: the run was killed by {killer.name}{hint}", file=sys.stderr)
        return 1
    state = State(**json.loads(lines[-1]))
    failed = f"step {state.step} failed" if state.step else "the run failed"
    message = f"{failed}: its process was killed by {killer.name}{hint}; see {state.uri}/log.txt"
    print(f"scop: {message}", f"scop: continue with: scop run --resume {state.uri}", sep="\n", file=sys.stderr)
    from scop.tracking.pipeline_run import end_parent
    from scop.tracking.server import make_client

    end_parent(make_client(state.tracking_uri), state.parent, False, {}, [], message, alone=True)
    return 1
