"""The output folder of a step: created, or cleared of the files of an earlier attempt."""

from __future__ import annotations

import json
import re
from pathlib import Path

from scop.errors import UserError
from scop.runtime.registry import STEPS
from scop.storage.manifest import CHECKPOINTS, LEFTOVERS, MANIFEST, RECORD, Manifest

_STEP_SUFFIXES = {".json", ".jsonl", ".npy", ".onnx", ".png", ".html", ".pt", ".pt2", ".safetensors", ".part"}
"""Suffixes of all files that a step writes, including a killed one."""


def prepare_output(folder: Path) -> None:
    """Create an output folder, or clear the one of an earlier attempt, except its checkpoints.

    Only files written by a step are removed: those in the manifest or, without a manifest, those beside a step's
    record. If the folder contains anything else, nothing is removed.

    Raises:
        UserError: the folder holds other files, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own, others = _split_files(folder)
        if others:
            raise UserError(
                f"output folder {folder} holds {others[0].name!r}, which no step has written; move it away, or choose "
                "a new or empty folder"
            )
        # Remove the manifest first: without it, the folder counts as incomplete.
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in own:
            if path.name not in (MANIFEST, RECORD, CHECKPOINTS):
                path.unlink()
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written: {error.strerror}") from error


def _split_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Split a folder's entries into those of an earlier attempt and all others."""
    present = sorted(folder.iterdir())
    try:
        listed = {*Manifest.parse((folder / MANIFEST).read_bytes(), folder).files}
    except (FileNotFoundError, UserError):  # an unfinished attempt, or a damaged manifest
        listed = None
    started = listed is not None or _is_record(folder / RECORD)

    def is_own(path: Path) -> bool:
        if path.name == CHECKPOINTS:
            return started
        if not started or not path.is_file():
            return False
        if listed is None:
            return path.suffix in _STEP_SUFFIXES
        return path.name in listed | LEFTOVERS or (path.name.startswith(".") and path.suffix == ".part")

    return [path for path in present if is_own(path)], [path for path in present if not is_own(path)]


def _is_record(path: Path) -> bool:
    """Whether a file is a step's record, of any version or truncated. Other programs may use the same file name."""
    try:
        text = path.read_bytes()
    except OSError:
        return False
    try:
        content = json.loads(text)
    except ValueError:
        start = re.match(rb'\{\s*"step": *"(\w+)",\s*"status":', text)
        return start is not None and start[1].decode() in STEPS
    return isinstance(content, dict) and content.get("step") in [*STEPS] and "status" in content
