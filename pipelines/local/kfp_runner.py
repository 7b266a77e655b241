"""KFP's local runner: each step in its own process or container."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelines.local.console import KfpView, console
from pipelines.local.container_variables import certificates, passed_on_variables
from pipelines.local.containers import Sandbox, containers_of, existing, image_id, require_image, stop_containers
from pipelines.local.job import KFP_FOLDER, LOG, Job, StepError
from pipelines.runs import records_of
from scop.environment import StepEnvironment
from scop.errors import Stopped, UserError
from scop.runtime.execution import STOP_FILE
from scop.runtime.exit_codes import ExitCode, Status
from scop.runtime.record import EXTERNAL_FILES, StepRecord
from scop.runtime.registry import STEPS, VARIANT_STEPS
from scop.runtime.uris import uri_in_run
from scop.storage import cache
from scop.storage.files import is_s3, read_if_exists
from scop.system.signals import handle_stop_signals, restore_handlers


@dataclass(frozen=True)
class KfpLocal:
    """Runs the steps with kfp.local.

    Attributes:
        image: image of the steps' containers; None runs the steps in processes on this machine.
        gpus: whether the containers can use the GPUs.
    """

    image: str | None = None
    gpus: bool = False

    def check(self) -> None:
        if self.image is not None:
            require_image(self.image)

    def refuse_if_running(self, run_id: str) -> None:
        if running := containers_of(run_id):
            raise UserError(f"container {running[0]} is running a step of this run; wait for it, or: docker stop it")

    def prepare(self, environment: StepEnvironment) -> StepEnvironment:
        if self.image is None:
            return environment
        return environment.model_copy(update={"image": self.image, "image_id": image_id(self.image)})

    def run(self, job: Job) -> str:
        from kfp import local

        from pipelines.pipeline import make_pipeline

        kfp_root = job.folder / KFP_FOLDER
        mapping = {"kfp_root": str(kfp_root), "run_root": job.uri, "variants": job.labels}
        environment = job.environment.model_copy(update=mapping)
        # Without settings that are None: KFP's parameters have no null.
        sections = job.config.model_dump(mode="json", exclude={"run"}, exclude_none=True)
        if is_s3(job.uri) and (before := read_if_exists(job.log)):
            (job.folder / LOG).write_bytes(before)
        stopping = self._stopping_steps(kfp_root, environment.run_id or "")
        with console(KfpView, job.folder / LOG) as view, stopping as stopped:
            local.init(
                runner=self._kfp_runner(job, environment),
                pipeline_root=str(kfp_root),
                workspace_root=str(job.folder / ".workspace"),
            )
            pipeline = make_pipeline() if self.image is None else make_pipeline(self.image)
            job.announce(job.state())
            try:
                with _environment_variables(environment.as_variables() if self.image is None else {}):
                    task = pipeline(**sections)
            except RuntimeError as error:
                if stopped():
                    raise Stopped(f"stopped; {job.how_to_resume}", code=128 + stopped()) from error
                raise _failure(job, view.task) from error
        if vanished := _unfinished(job):
            raise StepError(f"step {vanished} ended without a record; see {job.log}; {job.how_to_resume}")
        return uri_in_run(task.output.path, environment)

    def _kfp_runner(self, job: Job, environment: StepEnvironment) -> Any:
        from kfp import local

        if self.image is None:
            return local.SubprocessRunner(use_venv=False)
        # Only writable folders are mounted here: other files and folders are inside them, or KFP mounts them.
        folder, config = job.folder, job.config
        writable, folders, files = [folder], [folder / KFP_FOLDER, folder / ".workspace"], []
        if (uri := environment.tracking_uri or "").startswith("sqlite:///"):
            files.append(Path(uri.removeprefix("sqlite:///")))
            writable.append(files[0].parent)
        for uri in filter(None, (environment.checkpoints, environment.artifact_root)):
            if not is_s3(uri):
                writable.append(Path(uri))
        external = [getattr(getattr(config, section), key) for section, key in EXTERNAL_FILES]
        uses_s3 = any(is_s3(uri) for uri in (job.uri, *external, config.run.checkpoints) if uri)
        variables = environment.model_copy(update={"cache": None, "terminal": None})
        if uses_s3:
            variables = variables.model_copy(update={"cache": environment.cache_folder})
            writable.append(environment.cache_folder)
            folders += [environment.cache_folder / part for part in cache.PARTS]
        for path in (*writable, *folders):
            path.mkdir(parents=True, exist_ok=True)
        files += folder.rglob("*")  # of an earlier attempt, perhaps with another runner
        uses_s3 |= is_s3(environment.artifact_root or "")
        sandbox = Sandbox(
            self.image,
            tuple(writable),
            existing(external) + certificates(),
            variables.as_variables(),
            passed_on_variables(with_s3=uses_s3),
            self.gpus,
            run_id=environment.run_id or "",
        )
        sandbox.open_to_user((*folders, *files))
        return local.DockerRunner(**sandbox.for_kfp())

    @contextlib.contextmanager
    def _stopping_steps(self, kfp_root: Path, run_id: str) -> Iterator[Callable[[], int]]:
        """Forward stop signals to the running step; yield a function that returns the number of the received signal.

        The step writes a checkpoint, and no further step starts. KFP alone would continue with the next variant.
        """
        received = 0

        def stop(number: int, _: object) -> None:
            nonlocal received
            received = number
            (kfp_root / STOP_FILE).touch()
            found = stop_containers(run_id) if self.image is not None else 0
            children = psutil.Process().children(recursive=True)
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.terminate()
            if not children and not found:
                raise RuntimeError("stopped between two steps")

        (kfp_root / STOP_FILE).unlink(missing_ok=True)
        before = handle_stop_signals(stop)
        try:
            yield lambda: received
        finally:
            restore_handlers(before)


def _failure(job: Job, task: str | None) -> Exception:
    """Return the error of the failed step, from its record."""
    own = [record for record in records_of(job.uri) if record.launch.attempt == job.environment.attempt]
    failed = next((record for record in own if record.status is Status.FAILED), None)
    failure: Exception = StepError(f"step {failed.title if failed else task} failed; see {job.log}")
    if failed and failed.error and failed.exit_code in (ExitCode.USER_ERROR, ExitCode.NO_DEVICE):
        failure = UserError(f"{failed.step}: {failed.error}")
    failure.add_note(job.how_to_resume)
    if len(job.labels) > 1:
        failure.add_note(f"to compare the finished variants: scop compare {job.uri}")
    return failure


def _unfinished(job: Job) -> str | None:
    """Return a step that this attempt neither finished nor kept, or None.

    For KFP, a container that disappears has succeeded; the result of an earlier attempt must not count as a new one.
    """
    done: list[StepRecord] = [
        record
        for record in records_of(job.uri)
        if record.status is Status.DONE and record.launch.attempt == job.environment.attempt
    ]
    for step in STEPS:
        expected = len(job.labels) if step in VARIANT_STEPS else 1
        if sum(record.step == step for record in done) < expected:
            return step
    return None


@contextlib.contextmanager
def _environment_variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables within the context; the processes of kfp.local inherit them."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
