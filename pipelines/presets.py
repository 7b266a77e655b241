"""Configurations that come with the project."""

from __future__ import annotations

import difflib
from pathlib import Path

from scop.errors import UserError

FOLDER = Path(__file__).parent / "configs"


def find_config(name: str) -> Path:
    """The file of a configuration: a path, or the name of a preset.

    Raises:
        UserError: it is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    presets = {preset.stem: preset for preset in sorted(FOLDER.glob("*.yaml"))}
    if name in presets:
        return presets[name]
    hint = difflib.get_close_matches(name, presets, n=1)
    meant = f"did you mean {hint[0]!r}?" if hint else f"presets: {', '.join(presets)}"
    raise UserError(f"configuration {name!r} is neither a file nor a preset ({meant})")
