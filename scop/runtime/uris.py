"""URIs of a step's inputs and outputs, by name: paths and ``s3://`` URIs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from scop.environment import StepEnvironment
from scop.errors import UserError
from scop.storage.cache import Cache
from scop.storage.files import S3_SCHEME, is_s3, join_uri
from scop.storage.folders import fetch_folder
from scop.storage.manifest import read_folder

Uris = Mapping[str, str | list[str]]
"""Paths or ``s3://`` URIs by name; a list if a step takes several."""

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
"""The kind of artifact of each input."""


def absolute_uri(uri: str) -> str:
    """Make a path absolute; raise UserError for a URI of another kind, such as gs://."""
    if is_s3(uri):
        return uri
    if "://" in uri:
        raise UserError(f"{uri} is neither a path nor an s3:// URI")
    return str(Path(uri).expanduser().absolute())


def shared_uri(uri: str) -> str:
    """Return the URI of a path for other steps: KFP's launcher uploads /s3/BUCKET/KEY to s3://BUCKET/KEY."""
    own = absolute_uri(uri)
    return f"{S3_SCHEME}{own.removeprefix('/s3/')}" if own.startswith("/s3/") else own


def uri_in_run(path: str, environment: StepEnvironment) -> str:
    """Return the URI in the run that corresponds to a path of KFP's local runner.

    KFP writes to ROOT/PIPELINE-TIME/for-loop-1-iteration-0/TASK/NAME. A run stores VARIANT/TASK/NAME below its own
    root, which may be in S3 and does not change when the run is resumed.
    """
    kfp_root, run_root = environment.kfp_root, environment.run_root
    if not kfp_root or not run_root or not path.startswith(f"{kfp_root}/"):
        return path
    _, *loops, task, name = path.removeprefix(f"{kfp_root}/").split("/")
    variants = [environment.variants[int(part.rpartition("-")[2])] for part in loops]
    return join_uri(run_root, *variants, task.replace("-", "_"), name)


def map_values(values: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Apply ``change(name, value)`` to every value, and to every entry of a list."""
    return {
        name: [change(name, entry) for entry in value] if isinstance(value, list) else change(name, value)
        for name, value in values.items()
    }


def flatten(values: Mapping[str, Any]) -> list[Any]:
    """Return all values, with lists flattened."""
    return [entry for value in values.values() for entry in (value if isinstance(value, list) else [value])]


def input_folder(name: str, uri: str, cache: Cache) -> Path:
    """Return the local folder of an input, fetched from S3 if necessary; raise UserError if that fails."""
    return fetch_folder(uri, cache, _KINDS[name]) if is_s3(uri) else Path(uri)


def content_of(name: str, folder: Path) -> str:
    """Return the content hash of an input's folder; raise UserError if the folder is incomplete."""
    return read_folder(folder, _KINDS[name]).content


def check_names(step: str, kind: str, fields: type[Any], given: Uris) -> Uris:
    """Check that all inputs or outputs of a step are given, and no others.

    Args:
        step: name of the step.
        kind: input or output.
        fields: dataclass of the step's inputs or outputs.
        given: URIs by name.

    Returns:
        A list of URIs for each name that takes several, else one URI.

    Raises:
        UserError: a name is missing or unknown.
    """
    wanted = get_type_hints(fields)
    for name in given.keys() - wanted.keys():
        known = ", ".join(wanted) or "none"
        raise UserError(f"step {step!r} has no {kind} {name!r} (known: {known})")
    uris: dict[str, str | list[str]] = {}
    for name, annotation in wanted.items():
        if name not in given:
            raise UserError(f"step {step!r} needs --{kind} {name}=FOLDER")
        value = given[name]
        values = [value] if isinstance(value, str) else value
        several = bool(get_args(annotation))
        if not several and len(values) != 1:
            raise UserError(f"step {step!r} takes one {kind} {name!r}, not {len(values)}")
        uris[name] = values if several else values[0]
    return uris


def refuse_overlap(sources: Mapping[str, Any], targets: Mapping[str, Path]) -> None:
    """Raise UserError if an output folder, which is cleared first, overlaps with an input or another output."""
    folders = flatten(sources)
    for index, output in enumerate(targets.values()):
        for other in [*folders, *list(targets.values())[:index]]:
            a, b = output.resolve(), other.resolve()
            if a == b or a in b.parents or b in a.parents:
                raise UserError(f"output folder {output} overlaps with {other}; choose another output folder")


def refuse_overlap_in_s3(inputs: Uris, outputs: Mapping[str, str]) -> None:
    """Raise UserError if an output's prefix overlaps with an input's, before anything is written."""
    uris = [uri.rstrip("/") for uri in flatten(inputs) if is_s3(uri)]
    for output in filter(is_s3, outputs.values()):
        for uri in uris:
            if f"{uri}/".startswith(f"{output.rstrip('/')}/") or output.startswith(f"{uri}/"):
                raise UserError(f"output {output} overlaps with {uri}; choose another output")
