"""Where log lines of scop go: to standard output, as plain lines. Programs call this; the library only logs."""

from __future__ import annotations

import logging
import sys


class _Plain(logging.Formatter):
    """The message, with the level in front of warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _StandardOutput(logging.Handler):
    """Writes to standard output as it is at the time, which a runner or a test may have redirected."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stdout, flush=True)


def log_to_standard_output() -> None:
    """Print the log lines of scop, from level INFO on; to be called once by a program."""
    logger = logging.getLogger("scop")
    if not any(isinstance(handler, _StandardOutput) for handler in logger.handlers):
        handler = _StandardOutput()
        handler.setFormatter(_Plain())
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_nothing() -> None:
    """Drop all log lines of scop; for processes other than the first of several."""
    logger = logging.getLogger("scop")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
