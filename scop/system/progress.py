"""Progress: a bar where a person watches, a line every few seconds where nobody does."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Self, TextIO

# Set by `scop run` to its terminal's device file, since kfp.local reads a step's output through a pipe.
TERMINAL_VARIABLE = "SCOP_TERMINAL"
_SECONDS_BETWEEN_LINES = 10.0


class _Lines:
    """The face of a tqdm bar for logs: prints a line now and then."""

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
            print(f"{self.label}: {self.done}{of} {plural}, {rate:.1f} a second{self.notes}", flush=True)

    def set_postfix(self, **notes: Any) -> None:
        self.notes = "".join(f", {key} {value}" for key, value in notes.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def progress(total: int | None, label: str, unit: str = "batch") -> Any:
    """A progress display: a context manager with ``update(n)`` and ``set_postfix(**notes)``.

    Args:
        total: how many units there are, or None where that is unknown.
        label: what is being done.
        unit: what is counted, in the singular.
    """
    terminal = _terminal()
    if terminal is None:
        return _Lines(total, label, unit)
    from tqdm import tqdm  # late: what only trains, without a terminal, does without

    return tqdm(total=total, desc=label, unit=unit, file=terminal, leave=False, dynamic_ncols=True, mininterval=0.2)


def _terminal() -> TextIO | None:
    if os.environ.get("RANK", "0") != "0":  # torchrun's; one bar for all processes is enough
        return None
    if sys.stderr.isatty():
        return sys.stderr
    if path := os.environ.get(TERMINAL_VARIABLE):
        try:
            return Path(path).open("w")
        except OSError:
            return None
    return None
