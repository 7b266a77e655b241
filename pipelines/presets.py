"""Presets: configurations included in the project."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from scop.errors import UserError

if TYPE_CHECKING:
    from scop.storage.cache import Cache

FOLDER = Path(__file__).parent / "configs"


def preset_names() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def run_name_of(path: Path) -> str:
    """Return the default run name for a configuration: its file name, with invalid characters replaced by "-"."""
    from scop.config.values import LONGEST_NAME  # imported here to keep `--help` fast

    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-._")[:LONGEST_NAME] or "run"


def find_config(name: str, cache: Cache) -> Path:
    """Return the path of a configuration file.

    Args:
        name: a path, an ``s3://`` URI, or the name of a preset.
        cache: local cache of files fetched from S3.

    Raises:
        UserError: there is no such file or preset.
    """
    if name.startswith("s3://"):
        from scop.storage.fetch import fetch_file

        return fetch_file(name, cache)
    path = Path(name).expanduser()
    if path.is_file():
        return path
    presets = preset_names()
    if name in presets:
        return FOLDER / f"{name}.yaml"
    hint = difflib.get_close_matches(name, presets, n=1)
    meant = f"did you mean {hint[0]!r}?" if hint else f"presets: {', '.join(presets)}"
    raise UserError(f"configuration {name!r} is neither a file nor a preset ({meant})")
