"""Places of a step's inputs and outputs: folders and ``s3://`` URIs, by name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from scop.errors import UserError
from scop.runtime.registry import STEPS
from scop.storage import files as storage
from scop.storage import folders as remote
from scop.storage.manifest import CHECKPOINTS, LEFTOVERS, MANIFEST, RECORD, Manifest, read_folder

KFP_ROOT_VARIABLE, RUN_ROOT_VARIABLE, VARIANTS_VARIABLE = "SCOP_KFP_ROOT", "SCOP_RUN_ROOT", "SCOP_VARIANTS"
"""Set by `scop run`: what a component's path below KFP's root means as a place of the run; see `meant`."""

STOPPED = "stopped"
"""A file below KFP's root: the run was told to stop, so no step is begun any more."""

Places = Mapping[str, str | list[str]]
"""Paths or ``s3://`` URIs by name; a list where a step takes several."""

# What kind of artifact each input must be.
_KINDS = {
    "dataset": "dataset",
    "dense": "model",
    "pruned": "model",
    "scores": "scores",
    "plan": "plan",
    "evaluation": "evaluation",
    "evaluations": "evaluation",
    "exports": "model",
}


def absolute(place: str) -> str:
    """A path made absolute; a URI as it is; raises UserError at a place of another kind, such as gs://."""
    if storage.is_uri(place):
        return place
    if "://" in place:
        raise UserError(f"{place} is neither a path nor an s3:// URI")
    return str(Path(place).expanduser().absolute())


def exchanged(place: str) -> str:
    """The place by which others know it: the URI that a KFP launcher uploads a path like /s3/BUCKET/KEY to."""
    own = absolute(place)
    return f"{storage.SCHEME}{own.removeprefix('/s3/')}" if own.startswith("/s3/") else own


def meant(path: str) -> str:
    """The place that kfp.local's path of an artifact means in a run.

    kfp.local has ROOT/PIPELINE-TIME/for-loop-1-iteration-0/TASK/NAME; a run has VARIANT/TASK/NAME below its own root,
    which may be in S3, and is the same when the run is resumed.
    """
    here, there = os.environ.get(KFP_ROOT_VARIABLE), os.environ.get(RUN_ROOT_VARIABLE)
    if not here or not there or not path.startswith(f"{here}/"):
        return path
    _, *inside, task, name = path.removeprefix(f"{here}/").split("/")
    labels = json.loads(os.environ[VARIANTS_VARIABLE])
    variants = [labels[int(part.rpartition("-")[2])] for part in inside]
    return storage.join(there, *variants, task.replace("-", "_"), name)


def each(values: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """``change(name, value)`` of every value by name, of each entry where it is a list."""
    return {
        name: [change(name, entry) for entry in value] if isinstance(value, list) else change(name, value)
        for name, value in values.items()
    }


def fetched(name: str, place: str) -> Path:
    """The local folder of an input, by the input's name; raises UserError where it is not whole."""
    return remote.fetch_folder(place, _KINDS[name]) if storage.is_uri(place) else Path(place)


def content_of(name: str, folder: Path) -> str:
    """The content hash of an input's folder, by the input's name; raises UserError where it is not whole."""
    return read_folder(folder, _KINDS[name]).content


def check(step: str, kind: str, fields: type[Any], given: Places) -> Places:
    """The places, lists where the step takes several; raises UserError where one is missing or unknown."""
    wanted = get_type_hints(fields)
    for name in given.keys() - wanted.keys():
        known = ", ".join(wanted) or "none"
        raise UserError(f"step {step!r} has no {kind} {name!r} (known: {known})")
    places: dict[str, str | list[str]] = {}
    for name, annotation in wanted.items():
        if name not in given:
            raise UserError(f"step {step!r} needs --{kind} {name}=FOLDER")
        value = given[name]
        values = [value] if isinstance(value, str) else value
        several = bool(get_args(annotation))
        if not several and len(values) != 1:
            raise UserError(f"step {step!r} takes one {kind} {name!r}, not {len(values)}")
        places[name] = values if several else values[0]
    return places


def refuse_overlap(sources: Mapping[str, Any], targets: Mapping[str, Path]) -> None:
    """An output folder is emptied before the work: it must not be, hold or lie in an input or another output."""
    folders = [p for v in sources.values() for p in (v if isinstance(v, list) else [v])]
    for place, output in enumerate(targets.values()):
        for other in [*folders, *list(targets.values())[:place]]:
            a, b = output.resolve(), other.resolve()
            if a == b or a in b.parents or b in a.parents:
                raise UserError(f"output folder {output} overlaps with {other}; name another one")


def refuse_overlap_in_s3(inputs: Places, outputs: Mapping[str, str]) -> None:
    """The same of prefixes, before anything is written there."""
    uris = [u.rstrip("/") for v in inputs.values() for u in (v if isinstance(v, list) else [v]) if storage.is_uri(u)]
    for output_uri in filter(storage.is_uri, outputs.values()):
        for uri in uris:
            if f"{uri}/".startswith(f"{output_uri.rstrip('/')}/") or output_uri.startswith(f"{uri}/"):
                raise UserError(f"output {output_uri} overlaps with {uri}; name another one")


def make_ready(folder: Path) -> None:
    """Make an output folder, or clear the one of an earlier try, whose checkpoints stay.

    Only what that try wrote is removed: what its manifest lists or, where it did not come to that, what lies beside its
    record. Other folders, and files of any other kind, are somebody's: then nothing is touched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier, others = _told_apart(folder)
        if others:
            raise UserError(
                f"output folder {folder} holds {others[0].name!r}, which no step has written; move it away, or name a "
                "new or empty folder"
            )
        # The manifest first: from here on nobody takes the folder for whole.
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in earlier:
            if path.name not in (MANIFEST, RECORD, CHECKPOINTS):
                path.unlink()
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written: {error.strerror}") from error


def _told_apart(folder: Path) -> tuple[list[Path], list[Path]]:
    """What an earlier try has left in its output folder, and what is somebody else's."""
    present = sorted(folder.iterdir())
    try:
        listed = {*Manifest.parse((folder / MANIFEST).read_bytes(), folder).files}
    except (FileNotFoundError, UserError):  # a try that did not end, or whose end was lost
        listed = None
    begun = listed is not None or _is_record(folder / RECORD)

    def own(path: Path) -> bool:
        if path.name == CHECKPOINTS:
            return begun
        if not begun or not path.is_file():
            return False
        if listed is None:
            return path.suffix in _WRITTEN_BY_STEPS
        return path.name in listed | LEFTOVERS or (path.name.startswith(".") and path.suffix == ".part")

    return [path for path in present if own(path)], [path for path in present if not own(path)]


def _is_record(path: Path) -> bool:
    """Whether a step has left it, of whatever version, or torn off: others have files of that name, too."""
    try:
        text = path.read_bytes()
    except OSError:
        return False
    try:
        content = json.loads(text)
    except ValueError:
        beginning = re.match(rb'\{\s*"step": *"(\w+)",\s*"status":', text)
        return beginning is not None and beginning[1].decode() in STEPS
    return isinstance(content, dict) and content.get("step") in [*STEPS] and {"status", "version"} <= content.keys()


# Suffixes of all that a step leaves in its output folder, a killed one included.
_WRITTEN_BY_STEPS = {".json", ".jsonl", ".npy", ".onnx", ".png", ".html", ".pt", ".pt2", ".safetensors", ".part"}
