"""What a person sees of a local run: the steps' own lines. All that KFP says goes into the run's log file."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from scop.report.formatting import human

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_KFP_LINE = re.compile(r"^\d\d:\d\d:\d\d\.\d+ - \w+ - (?P<text>.*)$")
_EXECUTOR = "[KFP Executor "
_ERROR = "scop: error: "


class Console(io.TextIOBase):
    """Stands in for standard output while kfp.local runs.

    Every line goes to the log; the terminal gets a heading for each task, what the step printed, and the time it took.

    Args:
        log: the file that gets everything.
        terminal: what the person looks at.

    Attributes:
        error: the line by which a step refused its input, or None.
        task: the task that ran last.
    """

    def __init__(self, log: TextIO, terminal: TextIO) -> None:
        self._log, self._terminal = log, terminal
        self._part = ""
        self._in_dump = False
        self._started = time.monotonic()
        self.error: str | None = None
        self.task: str | None = None

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        *lines, self._part = (self._part + text).split("\n")
        for line in lines:
            self._log.write(_COLOUR.sub("", line) + "\n")
            self._show(_COLOUR.sub("", line).removeprefix("    "))
        self._log.flush()
        return len(text)

    def _show(self, line: str) -> None:
        if self._in_dump:  # KFP's print of the executor's input, which ends with a brace of its own
            self._in_dump = line != "}"
        elif line.startswith(_EXECUTOR):
            self._in_dump = line.endswith("Got executor_input:")
        elif match := _KFP_LINE.match(line):
            self._show_event(match["text"])
        elif line.startswith(_ERROR):
            self.error = line.removeprefix(_ERROR)
        elif line.strip() and set(line) != {"-"} and not self._is_output_listing(line):
            self._say(f"  {line}")

    def _show_event(self, text: str) -> None:
        if match := re.match(r"Executing task '(.+)'", text):
            self.task, self._started = match[1].replace("-", "_"), time.monotonic()
            self._say(self.task)
        elif match := re.match(r"Task '(.+)' finished with status (\w+)", text):
            outcome = "done" if match[2] == "SUCCESS" else "FAILED"
            self._say(f"  {outcome} in {time.monotonic() - self._started:.1f} s")

    def _say(self, line: str) -> None:
        # Not by print, which kfp.local replaces by one that indents.
        self._terminal.write(line + "\n")
        self._terminal.flush()

    @staticmethod
    def _is_output_listing(line: str) -> bool:
        """KFP's lines on a task's output artifacts, three for each."""
        return bool(re.match(r"\w+: \w+\( name=|\s+(uri|metadata)=", line))


@contextlib.contextmanager
def console(log: Path) -> Iterator[Console]:
    """Replace standard output by a `Console` that logs to a file."""
    with log.open("a", encoding="utf-8") as file:  # behind what an earlier try of the run said
        view = Console(file, sys.stdout)
        with contextlib.redirect_stdout(view):
            yield view


def _speed(figures: Mapping[str, Any], dense: Mapping[str, Any] | None, size: str) -> str:
    """By how much a variant is faster than the dense network, where it is one."""
    if dense is None:
        return " " * 8
    return f" ({dense['latency_ms'][size]['p50'] / figures['latency_ms'][size]['p50']:4.2f}x)"


def print_variants(variants: Sequence[Mapping[str, Any]]) -> None:
    """The table dense against pruned; variants as `summary.json` has them.

    Each variant's latency was taken in turn with the dense network's, whose own row is the first variant's: what can be
    compared is by how much a variant was faster at its time, so that is what stands beside.
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
