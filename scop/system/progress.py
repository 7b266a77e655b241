"""Progress: a bar on a terminal, or a line in the log every few seconds."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TextIO

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_terminal: TextIO | None = None
_enabled = True


@contextlib.contextmanager
def show_progress_on(path: str | None, enabled: bool = True) -> Iterator[None]:
    """Draw bars on a terminal within the context.

    Args:
        path: the terminal's device file; by default standard error, if it is a terminal.
        enabled: False shows no bars; used by all processes but the first.
    """
    global _terminal, _enabled
    before = _terminal, _enabled
    _terminal, _enabled = None, enabled
    with contextlib.ExitStack() as stack:
        if path is not None:
            with contextlib.suppress(OSError):
                _terminal = stack.enter_context(Path(path).open("w"))
        try:
            yield
        finally:
            _terminal, _enabled = before


def progress(total: int | None, label: str, unit: str = "batch") -> Any:
    """Return a progress display: a context manager with ``update(n)`` and ``set_postfix(**notes)``.

    Args:
        total: number of units, or None if it is unknown.
        label: name of the work.
        unit: unit of the count, singular.
    """
    terminal = (_terminal or (sys.stderr if sys.stderr.isatty() else None)) if _enabled else None
    if terminal is None:
        return _Lines(total, label, unit)
    from tqdm import tqdm  # imported here: training without a terminal does not need it

    return tqdm(total=total, desc=label, unit=unit, file=terminal, leave=False, dynamic_ncols=True, mininterval=0.2)


class _Lines:
    """The interface of a tqdm bar for logs: writes a line every few seconds."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done, self.notes = 0, ""
        self.started = self.printed = time.monotonic()

    def update(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self.printed >= _SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            rate = self.done / (self.printed - self.started)
            of = f"/{self.total}" if self.total else ""
            plural = self.unit + ("es" if self.unit.endswith("ch") else "s")
            logger.info("%s: %d%s %s, %.1f per second%s", self.label, self.done, of, plural, rate, self.notes)

    def set_postfix(self, **notes: Any) -> None:
        self.notes = "".join(f", {key} {value}" for key, value in notes.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
