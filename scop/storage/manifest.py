"""Manifests: what makes a folder an artifact that can be trusted to be whole.

`manifest.json` lists every file of the folder with its size and sha256. It is written last, and atomically, so a folder
without one is unfinished; a folder whose files do not match is damaged. Readers accept neither.
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
"""How long things took: the one file of an artifact that is different each time a step runs."""
FORMAT = 1
# Not part of an artifact's content: the record of the step that made it, and what a killed step leaves behind.
LEFTOVERS = {MANIFEST, RECORD, "tracking-unsent.jsonl"}
CHECKPOINTS = "checkpoints"
"""The folder, in a step's output, for checkpoints that have no other place; no part of the artifact either."""


class FileEntry(BaseModel):
    """One file.

    Attributes:
        size: in bytes.
        sha256: in hexadecimal.
        stored_as: the object's name in S3 where it is not the file's; see `scop.storage.folders.send_folder`.
        etag: S3's, of the object that was sent; another one means that the object is another.
    """

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str
    stored_as: str | None = None
    etag: str | None = None

    def key(self, name: str) -> str:
        """The object's name, for a file of this name."""
        return self.stored_as or name


class Manifest(BaseModel):
    """The content of an artifact folder.

    Attributes:
        format: version of the folder's layout.
        kind: dataset, model, scores, plan, evaluation or report.
        files: by path relative to the folder, with forward slashes.
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
    def parse(cls, content: str | bytes, place: str | Path) -> Manifest:
        """Read a manifest; raises UserError, which names its place, if it is damaged or of another format."""
        try:
            manifest = cls.model_validate_json(content)
        except ValidationError as error:
            raise UserError(f"{place} is damaged; run the step that makes it again") from error
        if manifest.format != FORMAT:
            raise UserError(f"{place} has format {manifest.format}, this version of scop reads {FORMAT}")
        return manifest

    @property
    def content(self) -> str:
        """sha256 over the names and hashes of all files but the timings, unless these are what was measured."""
        return self._hash({name for name in self.files if name != TIMINGS or self.kind == "evaluation"})

    @property
    def identity(self) -> str:
        """sha256 over the names and hashes of all files."""
        return self._hash(set(self.files))

    def _hash(self, names: set[str]) -> str:
        lines = (f"{name} {self.files[name].sha256}\n" for name in sorted(names))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_name(name: str) -> str:
    """The name, if it is that of a file inside a folder; raises UserError at one that leaves it."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or "\\" in name or "\0" in name or ":" in parts[0]:
        raise UserError(f"file name {name!r} leads out of its folder; refused")
    return name


def write_manifest(folder: Path, kind: str, names: Sequence[str] | None = None) -> Manifest:
    """Hash the files of a folder and write its manifest: the folder is whole from here on.

    Args:
        folder: the artifact.
        kind: what it is.
        names: the files that belong to it, as far as they exist; all by default.
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
    """Check that a folder is a whole artifact, file by file.

    Args:
        folder: the artifact.
        kind: what it must be, or None for any.

    Raises:
        UserError: there is no manifest, it is of another kind or version, or a file does not match it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "is not there" if not folder.exists() else "has no manifest.json: it was not finished"
        raise UserError(f"{kind or 'artifact'} folder {folder} {what}; name one that a step finished")
    manifest = Manifest.parse(path.read_bytes(), path)
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{folder} holds a {manifest.kind}, but a {kind} is needed")
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing though manifest.json lists it; run the step that makes it again")
        if file.stat().st_size != entry.size or _sha256_once(file) != entry.sha256:
            raise UserError(f"{file} does not match manifest.json (changed or damaged); run its step again")
    return manifest


_known: dict[tuple[int, int, int, int], str] = {}


def _sha256_once(path: Path) -> str:
    """The sha256 of a file, taken once for as long as nobody writes to it: a step opens its inputs repeatedly."""
    state = path.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    if key in _known:
        return _known[key]
    digest = sha256_of(path)
    # A file that is seconds old might be written to again without its time of change moving on.
    if time.time() - state.st_mtime > 2:
        _known[key] = digest
    return digest


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file such that a reader sees the old one or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
