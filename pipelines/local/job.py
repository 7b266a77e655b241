"""A run on this machine: its configuration, location, state and runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from scop.config import Config
from scop.environment import StepEnvironment
from scop.storage.cache import Cache
from scop.storage.files import join_uri

LOG = "log.txt"
KFP_FOLDER = ".kfp"
"""Folder of a run for the files with which KFP's launcher and the steps communicate."""


class StepError(Exception):
    """A step of the pipeline failed; its traceback has been logged."""


@dataclass(frozen=True)
class State:
    """State of a run, needed to close it if its process is killed.

    Attributes:
        uri: folder or ``s3://`` URI of the run.
        tracking_uri: URI of MLflow.
        parent: MLflow ID of the pipeline run.
        step: title of the step that is running.
    """

    uri: str
    tracking_uri: str
    parent: str
    step: str | None = None


@dataclass(frozen=True)
class Job:
    """A run that is about to start.

    Attributes:
        config: the configuration.
        uri: folder or ``s3://`` URI of the run.
        folder: local folder, temporary if the run is in S3.
        environment: environment variables for the steps.
        announce: called with the run's state when a step starts.
    """

    config: Config
    uri: str
    folder: Path
    environment: StepEnvironment
    announce: Callable[[State], None] = lambda state: None

    @property
    def log(self) -> str:
        """URI of the log."""
        return join_uri(self.uri, LOG)

    @property
    def how_to_resume(self) -> str:
        """The command that continues the run."""
        return f"continue with: scop run --resume {self.uri}"

    @property
    def cache(self) -> Cache:
        """The local cache of files fetched from S3."""
        return Cache(self.environment.cache_folder)

    @property
    def labels(self) -> list[str]:
        """Names of the variants, in order."""
        return [variant.label for variant in self.config.variants]

    def state(self, step: str | None = None) -> State:
        """Return the run's state while a step is running."""
        environment = self.environment
        assert environment.tracking_uri is not None
        assert environment.parent_run is not None
        return State(self.uri, environment.tracking_uri, environment.parent_run, step)

    def below(self, parent_run: str) -> Job:
        """Return the job with its steps tracked as children of an MLflow run."""
        return replace(self, environment=self.environment.model_copy(update={"parent_run": parent_run}))


class Runner(Protocol):
    """Runs the steps of a job."""

    def check(self) -> None:
        """Raise UserError if this runner cannot run here."""

    def refuse_if_running(self, run_id: str) -> None:
        """Raise UserError if a step of the run is known to be running."""

    def prepare(self, environment: StepEnvironment) -> StepEnvironment:
        """Return the steps' environment, with the variables of this runner."""
        ...

    def run(self, job: Job) -> str:
        """Run all steps.

        Returns:
            URI of the report's folder.

        Raises:
            UserError: a step rejected its configuration or an input.
            StepError: a step failed.
            Stopped: a signal stopped the run.
        """
        ...
