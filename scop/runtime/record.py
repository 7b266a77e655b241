"""`step.json`: everything needed to rerun a step, and its outcome.

The record is written beside the step's first output, also in S3, before the work starts, so a killed step has one. It
contains no secrets. A resumed run reads it: a complete result with unchanged inputs is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

import scop
from scop.config import VariantSection
from scop.config.parsing import parse
from scop.environment import StepEnvironment
from scop.errors import UserError
from scop.runtime.exit_codes import ExitCode, Status
from scop.runtime.result import StepResult
from scop.runtime.uris import absolute_uri, map_values, shared_uri
from scop.storage.fetch import content_version
from scop.storage.files import join_uri, read_if_exists, write_bytes
from scop.storage.manifest import RECORD, Manifest
from scop.system.cost import Cost
from scop.system.processor import processor_name
from scop.system.revision import git_revision

EXTERNAL_FILES = (("data", "path"), ("dense", "weights"), ("dense", "pretrained"))
"""Settings, as (section, key), that name files or folders outside the run, whose content hashes are recorded."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class RecordedInput(_Part):
    """An input's origin and content.

    Attributes:
        uri: a path or an ``s3://`` URI; a list if the step takes several.
        content: content hash, see `scop.storage.manifest.Manifest.content`; a list if the step takes several.
    """

    uri: str | list[str]
    content: str | list[str] | None = None


class RecordedOutput(_Part):
    """An output's location and, once the step is done, its content.

    Attributes:
        uri: a path or an ``s3://`` URI.
        content: its content hash.
        files: the sha256 of each file.
    """

    uri: str
    content: str | None = None
    files: dict[str, str] = {}


class Launch(_Part):
    """What started the step.

    Attributes:
        run: ID of the pipeline run.
        attempt: ID of the start of the pipeline that last ran the step or kept its result.
        mlflow_run: MLflow ID of the step's run.
    """

    run: str | None = None
    attempt: str | None = None
    mlflow_run: str | None = None


class Software(_Part):
    """Versions.

    Attributes:
        scop: version of this package.
        revision: commit of this package, with ``+`` if the source tree had changes.
        image: name of the image.
        image_id: Docker's ID of the image, which identifies it even if the name is reassigned.
        python: version of Python.
        torch: version of PyTorch.
    """

    scop: str
    revision: str | None = None
    image: str | None = None
    image_id: str | None = None
    python: str | None = None
    torch: str | None = None


class Machine(_Part):
    """Where the step ran.

    Attributes:
        device: cuda or cpu; None if PyTorch was not loaded.
        threads: PyTorch's number of threads, which determines the order of summation; None if PyTorch was not loaded.
        processes: number of processes that train together.
        cpus: number of the machine's processors.
        host: name of the machine.
        pid: ID of the step's process.
        process_started: start time of that process, in seconds since the epoch; process IDs are reused.
    """

    device: str | None = None
    threads: int | None = None
    processes: int = 1
    cpus: int | None = None
    host: str | None = None
    pid: int | None = None
    process_started: float | None = None


class StepRecord(BaseModel):
    """A step that is running or has run.

    Attributes:
        step: name of the step.
        status: running, done, failed or stopped.
        exit_code: exit code of its process.
        error: reason of a failure or stop, in one line.
        started: start time, ISO 8601.
        seconds: duration.
        cost: device time and energy.
        launch, software, machine: what started it, versions, and where it ran.
        config: sections of the step's configuration, by name.
        files: content hashes of external files and folders in the configuration, by setting.
        inputs, outputs: artifacts by name.
        result: return value of the step.
    """

    step: str
    status: Status
    exit_code: ExitCode | None = None
    error: str | None = None
    started: str | None = None
    seconds: float | None = None
    cost: Cost | None = None
    launch: Launch
    software: Software
    machine: Machine
    config: dict[str, Any]
    files: dict[str, str | None] = {}
    inputs: dict[str, RecordedInput]
    outputs: dict[str, RecordedOutput]
    result: StepResult | None = None

    @classmethod
    def parse(cls, content: bytes, uri: str) -> StepRecord:
        """Parse a record; raise a UserError that names its URI if this version cannot read it."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise UserError(f"{uri} is not a step record that this version can read: {message}") from error

    @classmethod
    def start(
        cls,
        step: str,
        config: dict[str, Any],
        inputs: dict[str, RecordedInput],
        outputs: Mapping[str, str],
        environment: StepEnvironment,
        processes: int = 1,
    ) -> StepRecord:
        """Create the record of a step that this process is about to run.

        Args:
            step: name of the step.
            config: sections of its configuration, by name.
            inputs: inputs by name.
            outputs: URIs by name.
            environment: variables set by the launcher.
            processes: number of processes that train together.
        """
        files = {}
        for section, key in EXTERNAL_FILES:
            if uri := config.get(section, {}).get(key):
                config[section][key] = absolute_uri(uri)
                files[f"{section}.{key}"] = content_version(uri)
        return cls(
            step=step,
            status=Status.RUNNING,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            launch=Launch(run=environment.run_id, attempt=environment.attempt),
            software=_software(environment),
            machine=_machine(processes),
            config=config,
            files=files,
            inputs=inputs,
            outputs={name: RecordedOutput(uri=shared_uri(uri)) for name, uri in outputs.items()},
        )

    @property
    def tags(self) -> dict[str, str]:
        """MLflow tags: the step, the URI of its output, versions and machine."""
        tags = {"scop.step": self.step, "mlflow.source.name": f"scop step {self.step}"}
        tags |= run_tags(self.launch.run, self.software)
        tags["scop.uri"] = next(iter(self.outputs.values())).uri
        return tags if self.variant is None else tags | {"scop.variant": self.variant}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the result depends on: configuration, external files and inputs."""
        depends = self.model_dump(mode="json", include={"step", "config", "files"})
        depends["inputs"] = {name: value.content for name, value in self.inputs.items()}
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    @property
    def is_running_elsewhere(self) -> bool:
        """Whether another process on this machine is running the step."""
        machine = self.machine
        if self.status is not Status.RUNNING or machine.host != platform.node() or machine.pid is None:
            return False
        try:
            process = psutil.Process(machine.pid)
            return process.pid != os.getpid() and abs(process.create_time() - (machine.process_started or 0)) < 0.01
        except psutil.Error:
            return False

    @property
    def variant(self) -> str | None:
        """Label of the variant, or None for a step that runs once for all variants."""
        values = self.config.get("variant")
        return None if values is None else parse(VariantSection, values).label

    @property
    def title(self) -> str:
        """VARIANT/STEP, or STEP for a step that runs once for all variants."""
        return self.step if self.variant is None else f"{self.variant}/{self.step}"

    def relocated(self, run: str, folder: str) -> StepRecord:
        """Return the record with its URIs adjusted to a run that was moved or copied as a whole.

        Args:
            run: the URI at which the run was found.
            folder: the record's folder, relative to the run.
        """
        recorded = next((output.uri for output in self.outputs.values()), "")
        before = recorded.removesuffix(f"/{folder}")
        if before in (recorded, run):
            return self

        def moved(uri: str) -> str:
            return run + uri.removeprefix(before) if f"{uri}/".startswith(f"{before}/") else uri

        uris = map_values({name: value.uri for name, value in self.inputs.items()}, lambda _, uri: moved(uri))
        inputs = {name: value.model_copy(update={"uri": uris[name]}) for name, value in self.inputs.items()}
        outputs = {name: value.model_copy(update={"uri": moved(value.uri)}) for name, value in self.outputs.items()}
        return self.model_copy(update={"inputs": inputs, "outputs": outputs})

    def describe_outputs(self, manifests: Mapping[str, Manifest]) -> dict[str, RecordedOutput]:
        """Return the outputs with their content hashes, for the record of a finished step."""
        return {
            name: RecordedOutput(
                uri=self.outputs[name].uri,
                content=manifest.content,
                files={file: entry.sha256 for file, entry in manifest.files.items()},
            )
            for name, manifest in manifests.items()
        }


class RecordFile:
    """The file of a record: beside the step's first output and, in a folder of KFP's launcher, also in S3.

    Args:
        record: the record; `write` updates it.
        output: URI of the step's first output.
    """

    def __init__(self, record: StepRecord, output: str) -> None:
        self.record = record
        own = absolute_uri(output)
        self._uris = [join_uri(uri, RECORD) for uri in dict.fromkeys((own, shared_uri(output)))]

    def write(self, **changes: Any) -> None:
        """Update fields and write the record; raise UserError if that fails."""
        self.record = self.record.model_copy(update=changes)
        for uri in self._uris:
            write_bytes(uri, (self.record.model_dump_json(indent=1) + "\n").encode())


def read_record(output: str) -> StepRecord | None:
    """Read the record beside an output, or return None if there is none; raise UserError if it cannot be read."""
    uri = join_uri(output, RECORD)
    content = read_if_exists(uri)
    return None if content is None else StepRecord.parse(content, uri)


def _software(environment: StepEnvironment) -> Software:
    return Software(
        scop=scop.__version__,
        revision=environment.revision or git_revision(),
        image=environment.image,
        image_id=environment.image_id,
        python=platform.python_version(),
        torch=version("torch"),
    )


def _machine(processes: int) -> Machine:
    torch = sys.modules.get("torch")
    return Machine(
        device=None if torch is None else "cuda" if torch.cuda.is_available() else "cpu",
        threads=torch.get_num_threads() if torch else None,
        processes=processes,
        cpus=os.cpu_count(),
        host=platform.node(),
        pid=os.getpid(),
        process_started=psutil.Process().create_time(),
    )


def run_tags(run: str | None, software: Software) -> dict[str, str]:
    """Return the MLflow tags of a pipeline run: its ID, versions, commit, image and machine."""
    known = {
        "scop.version": software.scop,
        "scop.run": run,
        "mlflow.source.git.commit": software.revision,
        "scop.image": software.image,
        "scop.image_id": software.image_id,
        "scop.python": software.python,
        "scop.torch": software.torch,
        "scop.machine": f"{processor_name()}, {os.cpu_count()} processors",
    }
    return {key: value for key, value in known.items() if value}


def launcher_tags(environment: StepEnvironment) -> dict[str, str]:
    """Return `run_tags` for a pipeline run that this process launches."""
    return run_tags(environment.run_id, _software(environment))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted names, for MLflow's parameters.

    A mapping with keys that are not identifiers, such as rates by pattern, remains one entry.
    """
    entries: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value and all(name.isidentifier() for name in value):
            entries |= flat(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            entries[f"{prefix}{key}"] = value
    return entries
