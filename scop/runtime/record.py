"""`step.json`: all that it takes to run a step again, and how it ended.

It lies beside the step's output from before the work starts, in S3 too, so that a step that died has one. It holds no
secret. A run that is resumed goes by it: what is whole, and made of the same, is not made again.
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
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

import scop
from scop.config import VariantSection
from scop.config.parsing import parse
from scop.errors import UserError
from scop.runtime.places import absolute, each, exchanged
from scop.runtime.result import StepResult
from scop.storage import files as storage
from scop.storage import folders as remote
from scop.storage.manifest import RECORD, Manifest, read_folder
from scop.system.cost import Cost
from scop.system.processor import processor_name
from scop.system.revision import git_revision

RUN_VARIABLE = "SCOP_RUN_ID"
IMAGE_VARIABLE, IMAGE_ID_VARIABLE = "SCOP_IMAGE", "SCOP_IMAGE_ID"
ATTEMPT_VARIABLE = "SCOP_ATTEMPT"
"""Set by `scop run`, another one each time: who started or kept the step last."""

# Entries of the configuration that name files or folders; what they hold is recorded with the step.
EXTERNAL_FILES = (("data", "path"), ("dense", "weights"), ("dense", "pretrained"))


class RecordedInput(BaseModel):
    """Where an input came from, and its content; lists where the step takes several.

    Attributes:
        uri: a path or an ``s3://`` URI.
        content: its content hash; see `scop.storage.manifest.Manifest.content`.
    """

    model_config = ConfigDict(frozen=True)

    uri: str | list[str]
    content: str | list[str] | None = None


class RecordedOutput(BaseModel):
    """Where an output went and, once the step is done, what it holds.

    Attributes:
        uri: a path or an ``s3://`` URI.
        content: its content hash.
        files: the sha256 of each file.
    """

    model_config = ConfigDict(frozen=True)

    uri: str
    content: str | None = None
    files: dict[str, str] = {}


class StepRecord(BaseModel):
    """A step that was run, or is being run.

    Attributes:
        step: its name.
        status: running, done, failed or stopped.
        version, revision: of scop; the commit has a ``+`` behind it where the source tree had changes.
        started: when.
        run: the id of the pipeline run.
        tracking_run: MLflow's id of the step's run.
        attempt: which start of the pipeline ran it, or kept it, last.
        image, image_id: that it ran in: the name, and docker's id, which does not move as names do.
        device: cuda or cpu; None where the step did not load PyTorch.
        python, torch: their versions.
        threads: PyTorch's, by which the order of additions goes; None where the step did not load it.
        processes: that train together.
        cpus: of the machine.
        host, process, process_started: which process it is.
        config: the step's sections by name.
        files: of the files and folders that the configuration names a hash of what they hold, by the entry's name.
        inputs, outputs: by name.
        seconds: that it took.
        cost: time on devices, and energy.
        error: why it ended early.
        code: that the process ended with: 0, 1 for an error, 2 for a mistake of the user's, 3 for want of a device, 143
            for one that was told to stop.
        result: what it told its caller.
    """

    step: str
    status: str
    version: str
    revision: str | None = None
    started: str | None = None
    run: str | None = None
    tracking_run: str | None = None
    attempt: str | None = None
    image: str | None = None
    image_id: str | None = None
    device: str | None = None
    python: str | None = None
    torch: str | None = None
    threads: int | None = None
    processes: int = 1
    cpus: int | None = None
    host: str | None = None
    process: int | None = None
    process_started: float | None = None
    config: dict[str, Any]
    files: dict[str, str | None] = {}
    inputs: dict[str, RecordedInput]
    outputs: dict[str, RecordedOutput]
    seconds: float | None = None
    cost: Cost | None = None
    error: str | None = None
    code: int | None = None
    result: StepResult | None = None

    @classmethod
    def parse(cls, content: bytes, place: str) -> StepRecord:
        """Read a record; raises UserError, which names its place, where it is none."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise UserError(f"{place} is no record of a step that this version can read: {message}") from error

    @classmethod
    def starting(
        cls,
        step: str,
        config: dict[str, Any],
        inputs: dict[str, RecordedInput],
        outputs: Mapping[str, str],
        processes: int = 1,
    ) -> StepRecord:
        """The record of a step that this process is about to run; arguments as the attributes, outputs by place."""
        files = {}
        for section, key in EXTERNAL_FILES:
            if place := config.get(section, {}).get(key):
                config[section][key] = absolute(place)
                files[f"{section}.{key}"] = storage.version_of(place)
        torch = sys.modules.get("torch")
        return cls(
            step=step,
            status="running",
            version=scop.__version__,
            revision=git_revision(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            run=os.environ.get(RUN_VARIABLE),
            attempt=os.environ.get(ATTEMPT_VARIABLE),
            image=os.environ.get(IMAGE_VARIABLE),
            image_id=os.environ.get(IMAGE_ID_VARIABLE),
            device=None if torch is None else "cuda" if torch.cuda.is_available() else "cpu",
            python=platform.python_version(),
            torch=version("torch"),
            threads=torch.get_num_threads() if torch else None,
            processes=processes,
            cpus=os.cpu_count(),
            host=platform.node(),
            process=os.getpid(),
            process_started=psutil.Process().create_time(),
            config=config,
            files=files,
            inputs=inputs,
            outputs={name: RecordedOutput(uri=exchanged(place)) for name, place in outputs.items()},
        )

    @property
    def tags(self) -> dict[str, str]:
        """What MLflow is told of the step beside its configuration."""
        tags = {"scop.step": self.step, "mlflow.source.name": f"scop step {self.step}", **surroundings()}
        tags["scop.place"] = next(iter(self.outputs.values())).uri
        return tags if self.variant is None else tags | {"scop.variant": self.variant}

    @property
    def fingerprint(self) -> str:
        """sha256 over all that the result depends on: configuration, files and inputs."""
        depends = self.model_dump(mode="json", include={"step", "config", "files"})
        depends["inputs"] = {name: value.content for name, value in self.inputs.items()}
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    @property
    def still_runs(self) -> bool:
        """Whether the very process is alive; numbers are used again, above all in containers."""
        if self.status != "running" or self.host != platform.node() or self.process is None:
            return False
        try:
            process = psutil.Process(self.process)
            return process.pid != os.getpid() and abs(process.create_time() - (self.process_started or 0)) < 0.01
        except psutil.Error:
            return False

    @property
    def variant(self) -> str | None:
        """The label of the variant that the step worked for."""
        values = self.config.get("variant")
        return None if values is None else parse(VariantSection, values).label

    @property
    def title(self) -> str:
        """VARIANT/STEP, or STEP where it is for all variants."""
        return self.step if self.variant is None else f"{self.variant}/{self.step}"

    def found_in(self, run: str, folder: str) -> StepRecord:
        """The record as it is true where it was found: of a run that was moved or copied as a whole, all has moved.

        Args:
            run: the run's place now.
            folder: within it, that of the record.
        """
        said = next((output.uri for output in self.outputs.values()), "")
        before = said.removesuffix(f"/{folder}")
        if before in (said, run):
            return self

        def moved(uri: str) -> str:
            return run + uri.removeprefix(before) if f"{uri}/".startswith(f"{before}/") else uri

        uris = each({name: value.uri for name, value in self.inputs.items()}, lambda _, uri: moved(uri))
        inputs = {name: value.model_copy(update={"uri": uris[name]}) for name, value in self.inputs.items()}
        outputs = {name: value.model_copy(update={"uri": moved(value.uri)}) for name, value in self.outputs.items()}
        return self.model_copy(update={"inputs": inputs, "outputs": outputs})

    def made(self, outputs: Mapping[str, Manifest]) -> dict[str, RecordedOutput]:
        """The outputs with what they hold, for the record of a step that is done."""
        return {
            name: RecordedOutput(
                uri=self.outputs[name].uri,
                content=manifest.content,
                files={file: entry.sha256 for file, entry in manifest.files.items()},
            )
            for name, manifest in outputs.items()
        }


class RecordFile:
    """The record where it is kept: beside a step's first output and, below a KFP launcher's folder, in S3 too."""

    def __init__(self, record: StepRecord, output: str) -> None:
        self.record = record
        own = absolute(output)
        self._places = [storage.join(place, RECORD) for place in dict.fromkeys((own, exchanged(output)))]

    def write(self, **changes: Any) -> None:
        """Change entries, and write it; raises UserError where that cannot be done."""
        self.record = self.record.model_copy(update=changes)
        for place in self._places:
            storage.write(place, (self.record.model_dump_json(indent=1) + "\n").encode())


def earlier_record(output: str) -> StepRecord | None:
    """The record of an earlier try beside an output, or None; raises UserError where it cannot be read."""
    place = storage.join(output, RECORD)
    content = storage.read(place, must_exist=False)
    return None if content is None else StepRecord.parse(content, place)


def reason_to_run(now: StepRecord, before: StepRecord, places: Mapping[str, str]) -> str | None:
    """Why a step must be run though it was before, or None: it is whole, and made of the same.

    Args:
        now: the record of the step about to be run.
        before: the one of the earlier try.
        places: of its outputs, by name.
    """
    if before.status != "done" or before.result is None:
        return f"it did not finish ({before.status})"
    config, earlier = flat(now.config), flat(before.config)
    changed = sorted(key for key in config.keys() | earlier.keys() if config.get(key) != earlier.get(key))
    if changed:
        return f"its configuration has changed ({', '.join(changed)})"
    if before.files != now.files:
        return f"{', '.join(before.files)} has changed"
    for name, value in now.inputs.items():
        if name not in before.inputs or before.inputs[name].content != value.content:
            return f"its input {name!r} has changed"
    for name, place in places.items():
        try:
            if storage.is_uri(place) and not remote.stands(place):
                return f"{place} is not whole any more"
            folder = remote.fetch_folder(place) if storage.is_uri(place) else Path(place)
            if name not in before.outputs or read_folder(folder).content != before.outputs[name].content:
                return f"its output {name!r} has changed"
        except UserError as error:
            return str(error)
    return None


def surroundings() -> dict[str, str]:
    """Tags of MLflow for where something runs: versions, commit, image, machine."""
    known = {
        "scop.version": scop.__version__,
        "scop.run": os.environ.get(RUN_VARIABLE),
        "mlflow.source.git.commit": git_revision(),
        "scop.image": os.environ.get(IMAGE_VARIABLE),
        "scop.image_id": os.environ.get(IMAGE_ID_VARIABLE),
        "scop.python": platform.python_version(),
        "scop.torch": version("torch"),
        "scop.machine": f"{processor_name()}, {os.cpu_count()} processors",
    }
    return {key: value for key, value in known.items() if value}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level with dotted names, as MLflow wants parameters.

    A mapping whose keys are no names, such as rates by pattern, is one entry.
    """
    entries: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value and all(name.isidentifier() for name in value):
            entries |= flat(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            entries[f"{prefix}{key}"] = value
    return entries
