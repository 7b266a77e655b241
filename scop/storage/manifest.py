"""Manifests of artifact folders, used to check that they are complete and unchanged.

`manifest.json` lists every file of the folder with its size and sha256. It is written last, atomically: a folder
without one is unfinished, and a folder whose files do not match it is damaged. Readers accept neither.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from scop.errors import UserError

MANIFEST = "manifest.json"
RECORD = "step.json"
TIMINGS = "timings.json"
"""Measured times: the only file of an artifact that differs between runs of a step."""
FORMAT = 1
# Files that do not belong to an artifact: the record of its step, and leftovers of a killed step.
LEFTOVERS = {MANIFEST, RECORD, "tracking-unsent.jsonl"}
CHECKPOINTS = "checkpoints"
"""The subfolder of an output for checkpoints, unless another is configured; it does not belong to the artifact."""


class FileEntry(BaseModel):
    """A file of an artifact.

    Attributes:
        size: in bytes.
        sha256: in hexadecimal.
        stored_as: the object's name in S3 if it differs from the file's; see `scop.storage.folders.upload_folder`.
        etag: S3's ETag of the uploaded object; a different one means that the object was replaced.
    """

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str
    stored_as: str | None = None
    etag: str | None = None

    def key(self, name: str) -> str:
        """Return the name of the object for a file with this name."""
        return self.stored_as or name


class Manifest(BaseModel):
    """The content of an artifact folder.

    Attributes:
        format: version of the folder's layout.
        kind: dataset, model, scores, plan, evaluation or report.
        files: by relative path, with forward slashes.
    """

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    kind: str
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name, entry in files.items():
            check_name(name)
            check_name(entry.key(name))
        return files

    @classmethod
    def parse(cls, content: str | bytes, uri: str | Path) -> Manifest:
        """Parse a manifest; raise a UserError that names its path or URI if it is damaged or has another format."""
        try:
            manifest = cls.model_validate_json(content)
        except ValidationError as error:
            raise UserError(f"{uri} is damaged; rerun the step that wrote it") from error
        if manifest.format != FORMAT:
            raise UserError(f"{uri} has format {manifest.format}, and this version of scop reads format {FORMAT}")
        return manifest

    @property
    def content(self) -> str:
        """Return the sha256 of all names and hashes, without the timings unless they are the artifact's content."""
        return self._hash({name for name in self.files if name != TIMINGS or self.kind == "evaluation"})

    @property
    def identity(self) -> str:
        """Return the sha256 of all names and hashes."""
        return self._hash(set(self.files))

    def _hash(self, names: set[str]) -> str:
        lines = (f"{name} {self.files[name].sha256}\n" for name in sorted(names))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_name(name: str) -> str:
    """Return the name of a file in a folder; raise UserError if it points outside the folder."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name or ":" in parts[0]:
        raise UserError(f"file name {name!r} points outside its folder, which is refused")
    return name


def write_manifest(folder: Path, kind: str, names: Sequence[str] | None = None) -> Manifest:
    """Hash the files of a folder and write its manifest, which makes the folder complete.

    Args:
        folder: the artifact.
        kind: kind of the artifact.
        names: files that belong to it, if they exist; by default all files.
    """
    paths = [folder / name for name in names] if names is not None else sorted(folder.rglob("*"))
    files = {
        path.relative_to(folder).as_posix(): FileEntry(size=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
        if path.is_file() and not _is_leftover(path.relative_to(folder).as_posix())
    }
    manifest = Manifest(kind=kind, files=files)
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1, exclude_none=True) + "\n")
    return manifest


def _is_leftover(name: str) -> bool:
    return name in LEFTOVERS or name.startswith(f"{CHECKPOINTS}/")


def read_folder(folder: Path, kind: str | None = None) -> Manifest:
    """Check every file of an artifact folder.

    Args:
        folder: the artifact.
        kind: required kind, or None for any.

    Raises:
        UserError: the manifest is missing or has another kind or format, or a file does not match it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "does not exist" if not folder.exists() else "has no manifest.json, so it is unfinished"
        raise UserError(f"{kind or 'artifact'} folder {folder} {what}; use the output of a finished step")
    manifest = Manifest.parse(path.read_bytes(), path)
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{folder} holds a {manifest.kind}, but a {kind} is needed")
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing, though manifest.json lists it; rerun the step that wrote it")
        if file.stat().st_size != entry.size or _sha256_once(file) != entry.sha256:
            raise UserError(f"{file} does not match manifest.json (changed or damaged); rerun the step that wrote it")
    return manifest


_known: dict[tuple[int, int, int, int], str] = {}


def _sha256_once(path: Path) -> str:
    """Return the sha256 of a file, computed once until the file changes: a step opens its inputs repeatedly."""
    state = path.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    if key in _known:
        return _known[key]
    digest = sha256_of(path)
    # A file that is seconds old might change again without a new modification time.
    if time.time() - state.st_mtime > 2:
        _known[key] = digest
    return digest


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old content or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
