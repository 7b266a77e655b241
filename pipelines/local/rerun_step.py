"""`scop rerun`: run a recorded step on this machine, from its recorded inputs and configuration."""

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

from pipelines.local.container_variables import CERTIFICATES, certificates, passed_on_variables
from pipelines.local.containers import IMAGE, Sandbox, image_id, image_label
from pipelines.local.run import mlflow_command
from scop.config import Config, ConfigWithoutFinetuning
from scop.config.parsing import override, parse
from scop.environment import THREADS_VARIABLE, StepEnvironment, UserEnvironment, name_of
from scop.errors import UserError
from scop.runtime.record import EXTERNAL_FILES, RecordedInput, StepRecord
from scop.runtime.registry import STEPS
from scop.runtime.uris import flatten
from scop.storage.cache import Cache
from scop.storage.fetch import content_version, local_path
from scop.storage.files import is_s3
from scop.storage.folders import fetch_folder
from scop.storage.manifest import TIMINGS, read_folder
from scop.system.revision import git_revision


@dataclass(frozen=True)
class Rerun:
    """A step that is ready to rerun.

    Attributes:
        record: record of the step.
        folder: new folder for the configuration and the outputs.
        inputs: verified local folders by name.
        files: local files named in the configuration.
        track: whether metrics go to the user's MLflow server instead of a file in the folder.
    """

    record: StepRecord
    folder: Path
    inputs: Mapping[str, Path | list[Path]]
    files: tuple[Path, ...]
    track: bool = False

    @property
    def outputs(self) -> dict[str, Path]:
        """Output folders by name."""
        return {name: self.folder / name for name in self.record.outputs}

    @property
    def tracking_uri(self) -> str:
        """URI of the MLflow database in the folder."""
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def step_command(self) -> list[str]:
        """The command line, the same on this machine and in a container."""
        command = ["scop", "step", self.record.step, "--config", str(self.folder / "config.yaml")]
        for name, value in self.inputs.items():
            for path in value if isinstance(value, list) else [value]:
                command += ["--input", f"{name}={path}"]
        for name, path in self.outputs.items():
            command += ["--output", f"{name}={path}"]
        return command

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables for the step."""
        environment = StepEnvironment(run_id=self.record.launch.run)
        if self.record.step == list(STEPS)[-1]:  # its summary contains the URIs
            recorded = {name: value.uri for name, value in self.record.inputs.items()}
            environment = environment.model_copy(update={"input_uris": recorded})
        if not self.track:
            environment = environment.model_copy(update={"tracking_uri": self.tracking_uri})
        threads = self.record.machine.threads
        return environment.as_variables() | ({THREADS_VARIABLE: str(threads)} if threads else {})

    def sandbox(self, image: str, gpus: bool) -> Sandbox:
        """Return the settings of the container, which has network and credentials only for tracking."""
        inputs = flatten(self.inputs)
        passed_on: dict[str, str] = {}
        if self.track:
            passed_on = passed_on_variables(("MLFLOW_", "AWS_", *CERTIFICATES), with_s3=True)
            tracking = name_of(StepEnvironment, "tracking_uri")
            passed_on |= {key: value for key, value in os.environ.items() if key == tracking}
        return Sandbox(
            image,
            writable=(self.folder,),
            readable=(*inputs, *self.files, *(certificates() if self.track else ())),
            environment=self.variables,
            passed_on=passed_on,
            gpus=gpus,
            network="host" if self.track else "none",
        )


def make_ready(record: StepRecord, out: Path, overrides: Sequence[str], track: bool, cache: Cache) -> Rerun:
    """Fetch and verify a step's inputs, and write its configuration to a new folder.

    Args:
        record: record of the step.
        out: folder in which the new folder is created.
        overrides: configuration overrides, ``section.key=value``.
        track: see `Rerun`.
        cache: the local cache.

    Raises:
        UserError: an input is missing or has changed, or the configuration is invalid.
    """
    if record.step not in STEPS:
        raise UserError(f"the record is of step {record.step!r}, which this version does not have")
    values = _configuration(record, overrides)
    files = []
    for section, name in EXTERNAL_FILES:
        uri, recorded = values.get(section, {}).get(name), record.config.get(section, {}).get(name)
        if uri is not None:
            key = f"{section}.{name}"
            path = _external(key, uri, record.files.get(key) if uri == recorded else None, cache)
            values[section][name] = str(path)
            files.append(path)
    inputs = {name: _input(name, artifact, cache) for name, artifact in record.inputs.items()}
    title = "-".join(filter(None, (record.step, record.variant)))
    folder = out.expanduser().absolute() / f"{title}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    except OSError as error:
        raise UserError(f"folder {folder} cannot be created: {error.strerror}") from error
    return Rerun(record, folder, inputs, tuple(files), track)


def _configuration(record: StepRecord, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the recorded sections as the values of a configuration file, with overrides."""
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


def _external(key: str, uri: str, content: str | None, cache: Cache) -> Path:
    found = content_version(uri)
    if found is None:
        raise UserError(f"{key} {uri} does not exist; restore it, or set another one with --set {key}=PATH")
    if content not in (None, found):
        raise UserError(f"{key} {uri} has changed since the step ran; restore the old version")
    return local_path(uri, cache).absolute()


def _input(name: str, artifact: RecordedInput, cache: Cache) -> Path | list[Path]:
    if isinstance(artifact.uri, list):
        contents = artifact.content if isinstance(artifact.content, list) else [None] * len(artifact.uri)
        return [_fetch(name, uri, content, cache) for uri, content in zip(artifact.uri, contents, strict=True)]
    return _fetch(name, artifact.uri, artifact.content if isinstance(artifact.content, str) else None, cache)


def _fetch(name: str, uri: str, content: str | None, cache: Cache) -> Path:
    path = fetch_folder(uri, cache) if is_s3(uri) else Path(uri)
    found = read_folder(path).content
    if content is not None and found != content:
        raise UserError(
            f"input {name!r}, {uri}, has changed since the step ran (content {found[:12]}, not {content[:12]})"
        )
    return path


def rerun(ready: Rerun, *, image: str | None, gpus: bool, dry_run: bool, shell: bool) -> int:
    """Run the step, on this machine or in a container.

    Args:
        ready: the step.
        image: image of the container; None runs the step on this machine.
        gpus: whether the container can use the GPUs.
        dry_run: print the command instead of running it.
        shell: open a shell in the container instead.

    Returns:
        The step's exit code.
    """
    _note_differences(ready.record, image)
    inside = ready.step_command
    # Variables set by a launcher for another step must not affect this one.
    own = {name_of(UserEnvironment, field) for field in UserEnvironment.model_fields}
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SCOP_") or k in own}
    if image is None:
        command = [str(Path(sys.executable).with_name("scop")), *inside[1:]]
        unset = (name_of(StepEnvironment, field) for field in ("checkpoints", "parent_run"))
        shown = ["env", *(f"--unset={name}" for name in unset)]
        shown += [*(f"{key}={value}" for key, value in ready.variables.items()), *command]
        variables |= ready.variables
    else:
        sandbox = ready.sandbox(image, gpus)
        sandbox.open_to_user([ready.folder / "config.yaml"])
        variables |= sandbox.passed_on
        shown = command = sandbox.command(["bash"] if shell else inside, interactive=shell)
    if dry_run:
        print(shlex.join(shown))
        return 0
    if shell:
        print(f"the inputs are ready; to run the step:\n\n  {shlex.join(inside)}\n", flush=True)
    return subprocess.run(command, env=variables).returncode


def _note_differences(record: StepRecord, image: str | None) -> None:
    """Print differences from the recorded environment that may change the result."""
    if image is None:
        from importlib.metadata import version

        here = {"commit": git_revision(), "PyTorch": version("torch")}
    else:
        here = {"commit": image_label(image, "org.opencontainers.image.revision")}
    software, machine = record.software, record.machine
    if image is None and machine.device:
        import torch

        here["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if machine.processes > 1:
        print(f"note: recorded with {machine.processes} processes, runs with one", file=sys.stderr)
    if image is not None and software.image_id and image_id(image) != software.image_id:
        print(f"note: {image} is another image than the recorded one, {software.image_id[:19]}", file=sys.stderr)
    recorded = {"commit": software.revision, "PyTorch": software.torch, "device": machine.device}
    for what, value in recorded.items():
        if what in here and value and here[what] != value:
            print(f"note: recorded with {what} {value}, runs with {here[what]}", file=sys.stderr)


def verify(ready: Rerun) -> bool:
    """Compare output files except timings with the recorded hashes; print differences and return whether all match."""
    record = ready.record
    same, count = True, 0
    for name, artifact in record.outputs.items():
        made = {file: entry.sha256 for file, entry in read_folder(ready.outputs[name]).files.items()}
        for file in sorted((artifact.files.keys() | made.keys()) - {TIMINGS}):
            count += 1
            if made.get(file) != artifact.files.get(file):
                same = False
                state = "is missing" if file not in made else "is new" if file not in artifact.files else "differs"
                print(f"verify: {name}/{file} {state}")
    print(f"verify: {f'all {count} files are byte-equal' if same else 'the results differ'}", flush=True)
    return same


_LOOK = {
    "model": "python -c \"import scop; print(scop.load_model('{}'))\"",
    "exported": "python -c \"import scop; print(scop.load_model('{}'))\"",
    "plan": "see {}/plan.png",
    "scores": "see {}/scores.png",
    "evaluation": "see {}/evaluation.json and {}/confusion.png",
    "report": "see {}/report.html",
    "dataset": "see {}/dataset.json",
}
"""Command or hint for viewing each output."""


def print_result(ready: Rerun) -> None:
    """Print the paths of the outputs and how to view them."""
    for name, path in ready.outputs.items():
        print(f"{name}: {path}")
    for name, path in ready.outputs.items():
        print(f"look:   {_LOOK[name].format(path, path)}")
    if not ready.track:
        print(f"MLflow: {mlflow_command(ready.tracking_uri)}")


def default_image(record: StepRecord) -> str:
    """Return the recorded image, by its ID if this machine has it; without a recorded image, the project's own."""
    software = record.software
    if software.image_id and image_id(software.image_id):
        return software.image_id
    return software.image or IMAGE
