"""Logging to standard output, as plain lines. Programs set it up; the library only logs."""

from __future__ import annotations

import logging
import sys


class _Plain(logging.Formatter):
    """The message, with the level in front of warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _StandardOutput(logging.Handler):
    """Writes to the current `sys.stdout`, which a runner or a test may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stdout, flush=True)


def log_to_standard_output() -> None:
    """Print log messages of scop at level INFO and above. Programs call this once."""
    logger = logging.getLogger("scop")
    if not any(isinstance(handler, _StandardOutput) for handler in logger.handlers):
        handler = _StandardOutput()
        handler.setFormatter(_Plain())
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_nothing() -> None:
    """Drop all log messages of scop; for processes other than the first of several."""
    logger = logging.getLogger("scop")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
