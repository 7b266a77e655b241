"""Which state of the source tree is running."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_NO_SOURCES = (":(top,exclude)docs", ":(top,exclude)README.md", ":(top,exclude)tests/benchmarks/results")


def git_revision() -> str | None:
    """The commit of the source tree that is running, ``+`` behind it where the sources have changes; None outside git.

    Pages and measured figures are no sources: those of one benchmark must not mark the next one.
    """
    if stated := os.environ.get("SCOP_REVISION"):
        return stated
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 5, "check": True}
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()  # type: ignore[call-overload]
        state = ["git", "status", "--porcelain", "-uno", "--", ":/", *_NO_SOURCES]
        changes = subprocess.run(state, **options).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")
