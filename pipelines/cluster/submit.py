"""`scop submit`: the pipeline on a cluster, through KFP's own client."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import kfp_server_api
import yaml

from pipelines.cluster.compilation import compile_for, refuse_paths
from pipelines.cluster.profile import ClusterProfile
from pipelines.cluster.progress import Outcome
from pipelines.cluster.server import TOKEN_VARIABLE, Server, quiet
from pipelines.pipeline import NAME
from pipelines.runs import CONFIG, records_of
from scop.config import Config, RunSection
from scop.config.parsing import parse
from scop.errors import UserError, first_line
from scop.runtime.record import EXTERNAL_FILES
from scop.storage import files as storage
from scop.tracking.pipeline_run import close_parent


@dataclass(frozen=True)
class Submission:
    """A run on a cluster, or a recurring one.

    Attributes:
        id: KFP's.
        address: of its page.
        experiment: MLflow's.
        place: where KFP keeps its artifacts; a recurring run has none.
    """

    id: str
    address: str
    experiment: str
    place: str | None = None


class Cluster:
    """Where pipelines are submitted to.

    Args:
        profile: of the cluster.

    Attributes:
        server: its KFP.

    Raises:
        UserError: no server can be found.
    """

    def __init__(self, profile: ClusterProfile) -> None:
        self._profile = profile
        self.server = Server(profile)

    def submit(self, config: Config, name: str, *, caching: bool = True, cron: str | None = None) -> Submission:
        """Start a run, or a recurring one.

        Args:
            config: its sections become the pipeline's parameters.
            name: of the run.
            caching: whether steps whose result KFP knows are not run again.
            cron: KFP's expression of six fields, seconds first, for a recurring run.

        Raises:
            UserError: the server is unreachable, or refuses.
        """
        profile = self._profile
        pipeline_id, version_id = self._version(config, caching)
        experiment = self._find_or_create_experiment(profile.experiment or config.run.experiment)
        sections = config.model_dump(mode="json", exclude={"run"}, exclude_none=True)
        arguments = {
            "experiment_id": experiment.experiment_id,
            "job_name": name,
            "params": sections,
            "pipeline_id": pipeline_id,
            "version_id": version_id,
            "pipeline_root": profile.pipeline_root,
        }
        if cron is not None:
            with self.server.errors("start a recurring run"), quiet():
                recurring = self.server.client.create_recurring_run(
                    **arguments, cron_expression=cron, max_concurrency=1, no_catchup=True
                )
            identity, page = recurring.recurring_run_id, "recurringrun"
        else:
            with self.server.errors("start a run"), quiet():
                identity, page = self.server.client.run_pipeline(**arguments).run_id, "runs"
        # Where KFP's driver puts a run's outputs (backend/src/v2/driver, GenerateOutputURI).
        place = None if cron else self._place(identity)
        return Submission(identity, f"{self.server.host}/#/{page}/details/{identity}", config.run.experiment, place)

    def find(self, identity: str) -> Submission:
        """A run that was submitted before, by KFP's id of it; its experiment as the configuration beside it says.

        Raises:
            UserError: the server is unreachable, refuses, or knows no such run.
        """
        with self.server.errors(f"find run {identity}"):
            self.server.client.get_run(identity)
        place, experiment = self._place(identity), RunSection().experiment
        try:
            if (content := storage.read(storage.join(place, CONFIG))) is not None:
                experiment = parse(RunSection, (yaml.safe_load(content) or {}).get("run", {})).experiment
        except (UserError, yaml.YAMLError) as error:
            print(f"note: the run's configuration cannot be read ({first_line(error)})", file=sys.stderr)
        return Submission(identity, f"{self.server.host}/#/runs/details/{identity}", experiment, place)

    def _place(self, identity: str) -> str:
        return storage.join(self._profile.pipeline_root.rstrip("/"), NAME, identity)

    def _find_or_create_experiment(self, name: str) -> Any:
        create = partial(self.server.client.create_experiment, name, namespace=self.server.namespace)  # or find
        with self.server.errors(f"use experiment {name!r}"), quiet():
            try:
                return create()
            except kfp_server_api.ApiException as error:
                if error.status != 409:
                    raise
                return create()  # somebody else was quicker: now it is found

    def _version(self, config: Config, caching: bool) -> tuple[str, str]:
        """The pipeline and its version for this source and profile: found by the hash of its file, or uploaded."""
        with tempfile.TemporaryDirectory(prefix="scop-") as folder:
            file = Path(folder) / "pipeline.yaml"
            compile_for(self._profile, config.run, file, caching=caching)
            version = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            pipeline_id = self._pipeline()
            if known := self._find_version(pipeline_id, version):
                return pipeline_id, known
            try:
                with self.server.errors("upload the pipeline", let_pass=409), quiet():
                    made = self.server.client.upload_pipeline_version(str(file), version, pipeline_id=pipeline_id)
                    return pipeline_id, made.pipeline_version_id
            except kfp_server_api.ApiException:  # somebody else was quicker
                known = self._find_version(pipeline_id, version)
                if known is None:
                    raise UserError(
                        f"KFP at {self.server.host} says that version {version} of pipeline {NAME!r} exists, but does "
                        "not list it; look at the pipeline's page"
                    ) from None
                return pipeline_id, known

    def _pipeline(self) -> str:
        if (found := self._find_pipeline()) is not None:
            return found
        pipeline = kfp_server_api.V2beta1Pipeline(
            name=NAME, display_name=NAME, namespace=self.server.namespace, description="SCOP channel pruning"
        )
        try:
            with self.server.errors("make the pipeline", let_pass=409):
                made = self.server.client.pipelines.pipeline_service_create_pipeline(pipeline=pipeline).pipeline_id
        except kfp_server_api.ApiException:  # somebody else was quicker
            made = self._find_pipeline()
        if made is None:
            raise UserError(
                f"KFP at {self.server.host} answers, but not as KFP does (with a page to log in?); set "
                f"{TOKEN_VARIABLE}, or mend `host` in the cluster profile"
            )
        return str(made)

    def _find_pipeline(self) -> str | None:
        predicate = {"operation": "EQUALS", "key": "name", "stringValue": NAME}
        with self.server.errors(f"find the pipeline {NAME!r}"):
            listed = self.server.client.list_pipelines(
                filter=json.dumps({"predicates": [predicate]}), namespace=self.server.namespace
            )
        found = [entry for entry in listed.pipelines or [] if NAME in (entry.name, entry.display_name)]
        return str(found[0].pipeline_id) if found else None

    def _find_version(self, pipeline_id: str, version: str) -> str | None:
        predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": version}
        with self.server.errors("list the pipeline's versions"):
            listed = self.server.client.list_pipeline_versions(
                pipeline_id, filter=json.dumps({"predicates": [predicate]})
            )
        found = [entry for entry in listed.pipeline_versions or [] if entry.display_name == version]
        return str(found[0].pipeline_version_id) if found else None


def pin_places(config: Config) -> Config:
    """The configuration with a hash of what they hold now behind the places that it names.

    KFP's cache goes by a step's parameters: the same place with new data would be taken for the old.

    Raises:
        UserError: a place is not there, or is none that a cluster reaches.
    """
    refuse_paths(config)
    values = config.model_dump()
    for section, key in EXTERNAL_FILES:
        if (place := values[section][key]) is not None:
            values[section][key] = storage.pinned(place)
    return parse(Config, values)


def keep_configuration(run: Submission, config: Config) -> None:
    """Put the configuration beside the run's artifacts, where `scop compare` looks for what a run was to have."""
    if run.place is None:
        return
    try:
        content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        storage.write(storage.join(run.place, CONFIG), content.encode())
        print(f"artifacts: {run.place}", flush=True)
    except UserError as error:  # the run has begun, and needs nothing of this
        print(f"artifacts: {run.place} (the configuration could not be put there: {error})", flush=True)


def failed_steps(run: Submission) -> list[str]:
    """A line for each step that failed, in its own words, which KFP's answers do not have; from the steps' records."""
    try:
        records = records_of(run.place) if run.place else []
    except UserError:
        return []
    return [f"scop: {record.title} failed: {record.error}" for record in records if record.status == "failed"]


def mend_tracking(run: Submission, outcome: Outcome) -> None:
    """Close the run in MLflow where a pod that was killed could not."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        try:
            close_parent(run.experiment, run.id, outcome.succeeded, outcome.error)
        except Exception as error:  # it is a courtesy: the outcome is known
            print(f"tracking: the run could not be closed in MLflow ({first_line(error)})", flush=True)


def run_name(config: Config, name: str) -> str:
    """What a run is called: as the configuration says, or after its file, with the time."""
    return f"{config.run.name or name}-{datetime.now():%Y%m%d-%H%M%S}"
