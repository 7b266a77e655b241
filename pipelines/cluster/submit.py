"""Submission of the pipeline to a cluster with KFP's client."""

from __future__ import annotations

import hashlib
import json
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
from scop.environment import ClusterEnvironment
from scop.errors import UserError, first_line
from scop.runtime.exit_codes import Status
from scop.runtime.record import EXTERNAL_FILES
from scop.storage.fetch import pin
from scop.storage.files import join_uri, read_if_exists, write_bytes
from scop.tracking.pipeline_run import close_parent


@dataclass(frozen=True)
class Submission:
    """A run on a cluster, or a recurring one.

    Attributes:
        id: KFP's ID.
        address: URL of its page.
        experiment: name of the MLflow experiment.
        uri: URI below which KFP stores its artifacts; None for a recurring run.
    """

    id: str
    address: str
    experiment: str
    uri: str | None = None


class Cluster:
    """A cluster to which pipelines are submitted.

    Args:
        profile: cluster profile.
        access: host and credentials set by the user.

    Attributes:
        server: KFP server of the cluster.

    Raises:
        UserError: no server can be found.
    """

    def __init__(self, profile: ClusterProfile, access: ClusterEnvironment) -> None:
        self._profile = profile
        self.server = Server(profile, access)

    def submit(self, config: Config, name: str, *, caching: bool = True, cron: str | None = None) -> Submission:
        """Start a run, or a recurring one.

        Args:
            config: configuration, whose sections become the pipeline's parameters.
            name: name of the run.
            caching: whether KFP may use earlier results of steps.
            cron: schedule of a recurring run: six fields, of which the first is seconds.

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
        # KFP's driver writes a run's outputs there (backend/src/v2/driver, GenerateOutputURI).
        uri = None if cron else self._uri(identity)
        return Submission(identity, f"{self.server.host}/#/{page}/details/{identity}", config.run.experiment, uri)

    def find(self, identity: str) -> Submission:
        """Return an earlier run, by KFP's ID; its configuration names the experiment.

        Raises:
            UserError: the server is unreachable or refuses, or there is no such run.
        """
        with self.server.errors(f"find run {identity}"):
            self.server.client.get_run(identity)
        uri, experiment = self._uri(identity), RunSection().experiment
        try:
            if (content := read_if_exists(join_uri(uri, CONFIG))) is not None:
                experiment = parse(RunSection, (yaml.safe_load(content) or {}).get("run", {})).experiment
        except (UserError, yaml.YAMLError) as error:
            print(f"note: the run's configuration cannot be read ({first_line(error)})", file=sys.stderr)
        return Submission(identity, f"{self.server.host}/#/runs/details/{identity}", experiment, uri)

    def _uri(self, identity: str) -> str:
        return join_uri(self._profile.pipeline_root.rstrip("/"), NAME, identity)

    def _find_or_create_experiment(self, name: str) -> Any:
        create = partial(self.server.client.create_experiment, name, namespace=self.server.namespace)  # or find
        with self.server.errors(f"use experiment {name!r}"), quiet():
            try:
                return create()
            except kfp_server_api.ApiException as error:
                if error.status != 409:
                    raise
                return create()  # another client has just created it

    def _version(self, config: Config, caching: bool) -> tuple[str, str]:
        """Return the IDs of the pipeline and of its version, found by the hash of the file or uploaded."""
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
            except kfp_server_api.ApiException:  # another client was faster
                known = self._find_version(pipeline_id, version)
                if known is None:
                    raise UserError(
                        f"KFP at {self.server.host} reports that version {version} of pipeline {NAME!r} exists, but "
                        "does not list it; see the pipeline's page"
                    ) from None
                return pipeline_id, known

    def _pipeline(self) -> str:
        if (found := self._find_pipeline()) is not None:
            return found
        pipeline = kfp_server_api.V2beta1Pipeline(
            name=NAME, display_name=NAME, namespace=self.server.namespace, description="SCOP channel pruning"
        )
        try:
            with self.server.errors("create the pipeline", let_pass=409):
                made = self.server.client.pipelines.pipeline_service_create_pipeline(pipeline=pipeline).pipeline_id
        except kfp_server_api.ApiException:  # another client was faster
            made = self._find_pipeline()
        if made is None:
            raise UserError(
                f"{self.server.host} does not answer like KFP (perhaps with a login page); set {TOKEN_VARIABLE}, or "
                "correct `host` in the cluster profile"
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


def pin_files(config: Config) -> Config:
    """Append a content hash to the URIs of external files, see `scop.storage.fetch.pin`.

    Raises:
        UserError: a file does not exist, or pods cannot read it.
    """
    refuse_paths(config)
    values = config.model_dump()
    for section, key in EXTERNAL_FILES:
        if (uri := values[section][key]) is not None:
            values[section][key] = pin(uri)
    return parse(Config, values)


def keep_configuration(run: Submission, config: Config) -> None:
    """Store the configuration with the run's artifacts, where `scop compare` reads it."""
    if run.uri is None:
        return
    try:
        content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_bytes(join_uri(run.uri, CONFIG), content.encode())
        print(f"artifacts: {run.uri}", flush=True)
    except UserError as error:  # the run has started and does not need the file
        print(f"artifacts: {run.uri} (the configuration could not be written there: {error})", flush=True)


def failed_steps(run: Submission) -> list[str]:
    """Return one line for each failed step, with the reason from its record, which KFP does not know."""
    try:
        records = records_of(run.uri) if run.uri else []
    except UserError:
        return []
    return [f"scop: {record.title} failed: {record.error}" for record in records if record.status is Status.FAILED]


def close_tracking(run: Submission, outcome: Outcome, tracking_uri: str | None) -> None:
    """Close the run in MLflow, if a server is configured; a killed pod cannot do it."""
    if tracking_uri:
        try:
            close_parent(tracking_uri, run.experiment, run.id, outcome.succeeded, outcome.error)
        except Exception as error:  # the outcome is known anyway
            print(f"tracking: the run could not be closed in MLflow ({first_line(error)})", flush=True)


def run_name(config: Config, name: str) -> str:
    """Return the name of a run: the configured name or that of the configuration file, with the time."""
    return f"{config.run.name or name}-{datetime.now():%Y%m%d-%H%M%S}"
