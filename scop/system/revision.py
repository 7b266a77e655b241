"""The commit of the running source tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

_NOT_SOURCES = (":(top,exclude)docs", ":(top,exclude)README.md", ":(top,exclude)tests/benchmarks/results")


def git_revision() -> str | None:
    """Return the commit of the running source tree, with ``+`` if sources have changed, or None outside git.

    Changes of documents and measured figures do not count: the figures of one benchmark must not affect the next one.
    """
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 5, "check": True}
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()  # type: ignore[call-overload]
        state = ["git", "status", "--porcelain", "-uno", "--", ":/", *_NOT_SOURCES]
        changes = subprocess.run(state, **options).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")
