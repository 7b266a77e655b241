"""`scop rerun`: a recorded step again, from its recorded inputs and configuration, at one's desk."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from pipelines.local.containers import (
    CERTIFICATES,
    DEFAULT_IMAGE,
    Sandbox,
    certificates,
    image_id,
    image_label,
    variables_of_steps,
)
from scop.config import Config, ConfigWithoutFinetuning
from scop.config.parsing import override, parse
from scop.errors import UserError
from scop.runtime.execution import PLACES_VARIABLE
from scop.runtime.record import EXTERNAL_FILES, RUN_VARIABLE, RecordedInput, StepRecord
from scop.runtime.registry import STEPS
from scop.runtime.resume import CHECKPOINTS_VARIABLE
from scop.storage import cache
from scop.storage import files as storage
from scop.storage import folders as remote
from scop.storage.manifest import TIMINGS, read_folder
from scop.system.revision import git_revision
from scop.tracking.mlflow import PARENT_VARIABLE


@dataclass(frozen=True)
class Rerun:
    """A step made ready to run again.

    Attributes:
        record: of the step.
        folder: a new one, for the configuration and the outputs.
        inputs: local folders by name, verified.
        files: further local files that the configuration names.
        track: whether figures go where the environment says, rather than into the folder.
    """

    record: StepRecord
    folder: Path
    inputs: Mapping[str, Path | list[Path]]
    files: tuple[Path, ...]
    track: bool = False

    @property
    def outputs(self) -> dict[str, Path]:
        return {name: self.folder / name for name in self.record.outputs}

    @property
    def step_command(self) -> list[str]:
        """The same here and in a container."""
        command = ["scop", "step", self.record.step, "--config", str(self.folder / "config.yaml")]
        for name, value in self.inputs.items():
            for path in value if isinstance(value, list) else [value]:
                command += ["--input", f"{name}={path}"]
        for name, path in self.outputs.items():
            command += ["--output", f"{name}={path}"]
        return command

    @property
    def environment(self) -> dict[str, str]:
        """What the step goes by beside its arguments."""
        variables = {}
        if self.record.run:
            variables[RUN_VARIABLE] = self.record.run
        if self.record.step == list(STEPS)[-1]:  # its summary names the places
            variables[PLACES_VARIABLE] = json.dumps({name: value.uri for name, value in self.record.inputs.items()})
        if self.record.threads:
            variables["OMP_NUM_THREADS"] = str(self.record.threads)
        if not self.track:
            variables["MLFLOW_TRACKING_URI"] = f"sqlite:///{self.folder / 'mlflow.db'}"
        return variables

    def sandbox(self, image: str, gpus: bool) -> Sandbox:
        """The container's surroundings; network and credentials are in there only for tracking."""
        inputs = [p for v in self.inputs.values() for p in (v if isinstance(v, list) else [v])]
        return Sandbox(
            image,
            writable=(self.folder,),
            readable=(*inputs, *self.files, *(certificates() if self.track else ())),
            environment=self.environment,
            handed_on=variables_of_steps(("MLFLOW_", "AWS_", *CERTIFICATES), with_s3=True) if self.track else {},
            gpus=gpus,
            network="host" if self.track else "none",
        )


def make_ready(record: StepRecord, out: Path, overrides: Sequence[str], track: bool) -> Rerun:
    """Fetch and verify what the step was given, and write its configuration into a new folder.

    Raises:
        UserError: an input is gone or has changed, or the configuration is bad.
    """
    if record.step not in STEPS:
        raise UserError(f"the record is of step {record.step!r}, which this version does not know")
    values = _configuration(record, overrides)
    files = []
    for section, name in EXTERNAL_FILES:
        place, recorded = values.get(section, {}).get(name), record.config.get(section, {}).get(name)
        if place is not None:
            key = f"{section}.{name}"
            path = _external(key, place, record.files.get(key) if place == recorded else None)
            values[section][name] = str(path)
            files.append(path)
    inputs = {name: _input(name, artifact) for name, artifact in record.inputs.items()}
    title = "-".join(filter(None, (record.step, record.variant)))
    folder = out.expanduser().absolute() / f"{title}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    except OSError as error:
        raise UserError(f"folder {folder} cannot be made: {error.strerror}") from error
    return Rerun(record, folder, inputs, tuple(files), track)


def _configuration(record: StepRecord, overrides: Sequence[str]) -> dict[str, Any]:
    """The record's sections as a configuration file has them, with changes put in."""
    values = {name: section for name, section in json.loads(json.dumps(record.config)).items() if name != "variant"}
    if "variant" in record.config:
        values["variants"] = [record.config["variant"]]
    for change in overrides:
        section = change.partition(".")[0]
        if section not in record.config and section not in values:
            raise UserError(
                f"--set {change!r}: step {record.step!r} has no section {section!r} (it has: "
                f"{', '.join(record.config) or 'none'})"
            )
        override(values, f"variants.0.{change.partition('.')[2]}" if section == "variant" else change)
    parse(Config if "finetune" in values else ConfigWithoutFinetuning, values)
    return values


def _external(key: str, place: str, content: str | None) -> Path:
    found = storage.version_of(place)
    if found is None:
        raise UserError(f"{key} {place} is not there; bring it back, or give another by --set {key}=PLACE")
    if content not in (None, found):
        raise UserError(f"{key} {place} has changed since the step ran; bring the old one back")
    return storage.local(place).absolute()


def _input(name: str, artifact: RecordedInput) -> Path | list[Path]:
    if isinstance(artifact.uri, list):
        contents = artifact.content if isinstance(artifact.content, list) else [None] * len(artifact.uri)
        return [_fetched(name, uri, content) for uri, content in zip(artifact.uri, contents, strict=True)]
    return _fetched(name, artifact.uri, artifact.content if isinstance(artifact.content, str) else None)


def _fetched(name: str, place: str, content: str | None) -> Path:
    path = remote.fetch_folder(place) if storage.is_uri(place) else Path(place)
    found = read_folder(path).content
    if content is not None and found != content:
        raise UserError(
            f"input {name!r}, {place}, has changed since the step ran (content {found[:12]}, not {content[:12]})"
        )
    return path


def rerun(ready: Rerun, *, image: str | None, gpus: bool, dry_run: bool, shell: bool) -> int:
    """Run it, here or in a container of an image; returns the step's exit code."""
    _tell_differences(ready.record, image)
    inside = ready.step_command
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SCOP_") or k == cache.CACHE_VARIABLE}
    environment.pop(PARENT_VARIABLE, None)
    if image is None:
        command = [str(Path(sys.executable).with_name("scop")), *inside[1:]]
        shown = ["env", f"--unset={CHECKPOINTS_VARIABLE}", f"--unset={PARENT_VARIABLE}"]
        shown += [*(f"{key}={value}" for key, value in ready.environment.items()), *command]
        environment |= ready.environment
    else:
        sandbox = ready.sandbox(image, gpus)
        sandbox.open_to_user([ready.folder / "config.yaml"])
        environment |= sandbox.handed_on
        shown = command = sandbox.command(["bash"] if shell else inside, interactive=shell)
    if dry_run:
        print(shlex.join(shown))
        return 0
    if shell:
        print(f"everything is in place; the step itself is\n\n  {shlex.join(inside)}\n", flush=True)
    return subprocess.run(command, env=environment).returncode


def _tell_differences(record: StepRecord, image: str | None) -> None:
    """What may make the result another one."""
    if image is None:
        from importlib.metadata import version

        here = {"commit": git_revision(), "PyTorch": version("torch")}
    else:
        here = {"commit": image_label(image, "org.opencontainers.image.revision")}
    if image is None and record.device:
        import torch

        here["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if record.processes > 1:
        print(f"note: recorded with {record.processes} processes, runs with one", file=sys.stderr)
    if image is not None and record.image_id and image_id(image) != record.image_id:
        print(f"note: {image} is another image than the recorded one, {record.image_id[:19]}", file=sys.stderr)
    for what, recorded in (("commit", record.revision), ("PyTorch", record.torch), ("device", record.device)):
        if what in here and recorded and here[what] != recorded:
            print(f"note: recorded with {what} {recorded}, runs with {here[what]}", file=sys.stderr)


def verify(ready: Rerun) -> bool:
    """Compare every output file with its recorded hash and say which differ; timings may. True if none does."""
    record = ready.record
    same, count = True, 0
    for name, artifact in record.outputs.items():
        made = {file: entry.sha256 for file, entry in read_folder(ready.outputs[name]).files.items()}
        for file in sorted((artifact.files.keys() | made.keys()) - {TIMINGS}):
            count += 1
            if made.get(file) != artifact.files.get(file):
                same = False
                what = (
                    "differs"
                    if file in made and file in artifact.files
                    else "is missing"
                    if file not in made
                    else "is new"
                )
                print(f"verify: {name}/{file} {what}")
    print(f"verify: {f'all {count} files are equal to the byte' if same else 'not the same result'}", flush=True)
    return same


def print_result(ready: Rerun) -> None:
    """How to look at what came out."""
    for name, path in ready.outputs.items():
        print(f"{name}: {path}")
    looks = {
        "model": "python -c \"import scop; print(scop.load_model('{}'))\"",
        "exported": "python -c \"import scop; print(scop.load_model('{}'))\"",
        "plan": "see {}/plan.png",
        "scores": "see {}/scores.png",
        "evaluation": "see {}/evaluation.json and {}/confusion.png",
        "report": "see {}/report.html",
        "dataset": "see {}/dataset.json",
    }
    for name, path in ready.outputs.items():
        print(f"look:   {looks[name].format(path, path)}")
    if not ready.track:
        from pipelines.local.run import mlflow_command

        print(f"MLflow: {mlflow_command(ready.environment['MLFLOW_TRACKING_URI'])}")


def default_image(record: StepRecord) -> str:
    """The image that the step ran in, by its id if this machine has that, or the project's own."""
    if record.image_id and image_id(record.image_id):
        return record.image_id
    return record.image or DEFAULT_IMAGE
