"""Configurations that come with the project."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from scop.errors import UserError

FOLDER = Path(__file__).parent / "configs"


def preset_names() -> list[str]:
    """The names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def run_name_of(path: Path) -> str:
    """What runs of a configuration are called that does not say so itself: as its file, where a name may be so."""
    from scop.config.values import LONGEST_NAME  # late, as below

    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-._")[:LONGEST_NAME] or "run"


def find_config(name: str) -> Path:
    """The file of a configuration: a path, an ``s3://`` URI, or the name of a preset.

    Raises:
        UserError: it is none of these.
    """
    if name.startswith("s3://"):
        from scop.storage import files as storage  # late: the command line's help must not wait for it

        return storage.fetch_file(name)
    path = Path(name).expanduser()
    if path.is_file():
        return path
    presets = preset_names()
    if name in presets:
        return FOLDER / f"{name}.yaml"
    hint = difflib.get_close_matches(name, presets, n=1)
    meant = f"did you mean {hint[0]!r}?" if hint else f"presets: {', '.join(presets)}"
    raise UserError(f"configuration {name!r} is neither a file nor a preset ({meant})")
