"""The default runner of `scop run`: all steps in this process, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.local.console import View, console
from pipelines.local.job import LOG, Job, StepError
from scop.environment import StepEnvironment, TorchrunEnvironment
from scop.errors import Stopped, UserError
from scop.runtime.execution import run_step
from scop.runtime.exit_codes import StepFailedError, Terminated, stop_signals_raise
from scop.runtime.logs import log_to_standard_output
from scop.runtime.registry import STEPS
from scop.runtime.uris import Uris
from scop.storage.files import is_s3, join_uri, read_if_exists


class InProcess:
    """Runs all steps in this process."""

    def check(self) -> None:
        """Do nothing: there are no requirements."""

    def refuse_if_running(self, run_id: str) -> None:
        """Do nothing: the lock of the run's folder suffices."""

    def prepare(self, environment: StepEnvironment) -> StepEnvironment:
        """Return the environment unchanged."""
        return environment

    def run(self, job: Job) -> str:
        log = job.folder / LOG
        if is_s3(job.uri) and (before := read_if_exists(job.log)):
            log.write_bytes(before)
        log_to_standard_output()
        with console(View, log) as view, stop_signals_raise():
            try:
                return _Steps(job, view).run()
            except (Stopped, Terminated) as error:
                code = error.code if isinstance(error.code, int) else 143
                raise Stopped(f"stopped; {job.how_to_resume}", code=code) from error


class _Steps:
    """The DAG of `pipelines.pipeline`, as function calls."""

    def __init__(self, job: Job, view: View) -> None:
        self._job, self._view = job, view
        self._torchrun = TorchrunEnvironment.read()
        # As KFP passes them: without settings that are None.
        self._sections = job.config.model_dump(mode="json", exclude={"run"}, exclude_none=True)
        self._failure: Exception | None = None

    def run(self) -> str:
        dataset = self._step("prepare_data", {})
        dense = self._step("train_dense", {"dataset": dataset})
        scores = self._step("train_knockoff", {"dataset": dataset, "dense": dense})
        evaluations, exports = [], []
        for label, variant in zip(self._job.labels, self._sections["variants"], strict=True):
            try:
                shared = {"dataset": dataset, "dense": dense}
                plan = self._step("select_channels", {"dense": dense, "scores": scores}, label, variant)
                pruned = self._step("finetune", {**shared, "plan": plan}, label, variant)
                evaluation = self._step("evaluate", {**shared, "pruned": pruned}, label, variant)
                inputs = {"dataset": dataset, "pruned": pruned, "evaluation": evaluation}
                exports.append(self._step("export", inputs, label, variant))
                evaluations.append(evaluation)
            except (UserError, StepError) as error:  # the other variants still run, as on a cluster
                self._failure = self._failure or error
        if self._failure is not None:
            raise self._failure
        return self._step("compare", {"scores": scores, "evaluations": evaluations, "exports": exports})

    def _step(self, name: str, inputs: Uris, label: str | None = None, variant: Mapping[str, Any] | None = None) -> str:
        """Run a step and return the URI of its output."""
        job, output = self._job, STEPS[name].output
        title = name if label is None else f"{label}/{name}"
        uri = join_uri(job.uri, *filter(None, (label, name)), output)
        job.announce(job.state(title))
        self._view.start(name)
        succeeded = False
        try:
            run_step(name, self._config(name, variant), inputs, {output: uri}, job.environment, self._torchrun)
            succeeded = True
        except UserError as error:
            raise self._with_notes(UserError(f"{name}: {error}")) from error
        except StepFailedError as error:
            raise self._with_notes(StepError(f"step {title} failed; see {job.log}")) from error
        finally:
            self._view.finish(succeeded)
        return uri

    def _config(self, name: str, variant: Mapping[str, Any] | None) -> dict[str, Any]:
        from scop.runtime.step import find_step

        known = {**self._sections, "variant": variant}
        return {section: known[section] for section in find_step(name).Config.model_fields}

    def _with_notes(self, error: Exception) -> Exception:
        error.add_note(self._job.how_to_resume)
        if len(self._job.labels) > 1:
            error.add_note(f"to compare the finished variants: scop compare {self._job.uri}")
        return error
