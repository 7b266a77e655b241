"""Terminal output of a local run: a heading, the log and the duration of each step. A log file gets all lines."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from scop.report.formatting import human

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_KFP_LINE = re.compile(r"^\d\d:\d\d:\d\d\.\d+ - \w+ - (?P<text>.*)$")
_EXECUTOR = "[KFP Executor "


class View(io.TextIOBase):
    """Replaces standard output during a run.

    Args:
        log: file for all lines.
        terminal: stream that the user sees.
    """

    def __init__(self, log: TextIO, terminal: TextIO) -> None:
        self._log, self._terminal = log, terminal
        self._part = ""
        self._started = time.monotonic()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        *lines, self._part = (self._part + text).split("\n")
        for line in lines:
            self._log.write(_COLOUR.sub("", line) + "\n")
            self._show(_COLOUR.sub("", line))
        self._log.flush()
        return len(text)

    def start(self, step: str) -> None:
        """Show the heading of a step."""
        self._started = time.monotonic()
        self._log.write(f"{step}\n")
        self._say(step)

    def finish(self, succeeded: bool) -> None:
        """Show the outcome of a step."""
        line = f"  {'done' if succeeded else 'FAILED'} in {time.monotonic() - self._started:.1f} s"
        self._log.write(f"{line}\n")
        self._log.flush()
        self._say(line)

    def _show(self, line: str) -> None:
        """Show one line of a step."""
        if line.strip():
            self._say(f"  {line}")

    def _say(self, line: str) -> None:
        # Not with print, which kfp.local replaces with a version that indents.
        self._terminal.write(line + "\n")
        self._terminal.flush()


class KfpView(View):
    """Shows only the lines of the steps, not those of KFP.

    Attributes:
        task: name of the last task, or None.
    """

    def __init__(self, log: TextIO, terminal: TextIO) -> None:
        super().__init__(log, terminal)
        self._in_dump = False
        self.task: str | None = None

    def _show(self, line: str) -> None:
        line = line.removeprefix("    ")
        if self._in_dump:  # KFP's dump of the executor's input, which ends with a brace on a line of its own
            self._in_dump = line != "}"
        elif line.startswith(_EXECUTOR):
            self._in_dump = line.endswith("Got executor_input:")
        elif match := _KFP_LINE.match(line):
            self._show_event(match["text"])
        elif set(line) != {"-"} and not self._is_output_listing(line) and not line.startswith("scop: error: "):
            super()._show(line)

    def _show_event(self, text: str) -> None:
        if match := re.match(r"Executing task '(.+)'", text):
            self.task = match[1].replace("-", "_")
            self.start(self.task)
        elif match := re.match(r"Task '(.+)' finished with status (\w+)", text):
            self.finish(match[2] == "SUCCESS")

    @staticmethod
    def _is_output_listing(line: str) -> bool:
        """Whether a line lists a task's output artifact; KFP prints three for each."""
        return bool(re.match(r"\w+: \w+\( name=|\s+(uri|metadata)=", line))


V = TypeVar("V", bound=View)


@contextlib.contextmanager
def console(kind: type[V], log: Path) -> Iterator[V]:
    """Replace standard output by a view that appends to a log file."""
    with log.open("a", encoding="utf-8") as file:  # keeps the lines of earlier attempts
        view = kind(file, sys.stdout)
        with contextlib.redirect_stdout(view):
            yield view


def _speed(figures: Mapping[str, Any], dense: Mapping[str, Any] | None, size: str) -> str:
    """Format a variant's speed-up over the dense network."""
    if dense is None:
        return " " * 8
    return f" ({dense['latency_ms'][size]['p50'] / figures['latency_ms'][size]['p50']:4.2f}x)"


def print_variants(variants: Sequence[Mapping[str, Any]]) -> None:
    """Print a dense-vs-pruned table.

    Each variant's latency was measured alternately with the dense network's; the dense row shows the latencies
    measured with the first variant. Only speed-ups can be compared between variants, so each latency has one.

    Args:
        variants: as in `summary.json`.
    """
    from rich.console import Console as RichConsole
    from rich.table import Table

    sizes = list(variants[0]["dense"]["latency_ms"])
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column("network")
    for column in ("top-1", "parameters", "MACs", "file", *(f"ms at batch {size}" for size in sizes)):
        table.add_column(column, justify="right")
    rows = [("dense", variants[0]["dense"], None), *((v["name"], v["pruned"], v["dense"]) for v in variants)]
    for name, figures, dense in rows:
        latencies = [f"{figures['latency_ms'][size]['p50']:.2f}{_speed(figures, dense, size)}" for size in sizes]
        cells = [
            f"{figures['top1']:.2%}",
            human(figures["params"]),
            human(figures["macs"]),
            human(figures["bytes"], "B"),
        ]
        table.add_row(name, *cells, *latencies)
    width = max(80, RichConsole().width) if sys.stdout.isatty() else 120
    terminal = RichConsole(width=width, highlight=False, markup=False)
    terminal.print()
    terminal.print(table)
    terminal.print()
