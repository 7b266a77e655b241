"""`scop submit`: the pipeline on a cluster, through KFP's own client."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import kfp
import kfp_server_api
import urllib3
import yaml

from pipelines.cluster import compile_for, refuse_paths
from pipelines.pipeline import NAME
from pipelines.profile import ClusterProfile
from pipelines.runs import CONFIG, records_of
from scop import storage
from scop.config import Config, RunSection
from scop.errors import UserError
from scop.mlflow_server import first_line
from scop.parents import close_parent
from scop.parsing import parse
from scop.steps import STEPS
from scop.steps.record import EXTERNAL_FILES

HOST_VARIABLE, TOKEN_VARIABLE = "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN"
NAMESPACE_VARIABLE = "KF_PIPELINES_NAMESPACE"
ENDED = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"}
# To connect and to answer; a pair, since the generated client heeds no float.
_SECONDS = (10.0, 30.0)
_FAILURES_BORNE = 8
T = TypeVar("T")


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


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: KFP's: SUCCEEDED, FAILED, SKIPPED or CANCELED.
        error: the failing task and what it said, or None.
    """

    state: str
    error: str | None = None

    @property
    def succeeded(self) -> bool:
        return self.state == "SUCCEEDED"


class _Client(kfp.Client):  # type: ignore[misc]
    """KFP's client with limits: by itself it would wait without end for a server that does not answer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        rest = self._run_api.api_client.rest_client
        ask = rest.request

        def ask_in_time(method: str, url: str, _request_timeout: Any = None, **more: Any) -> Any:
            return ask(method, url, _request_timeout=_request_timeout or _SECONDS, **more)

        rest.request = ask_in_time

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        """Ask once: KFP's own asks five times, with a traceback and a wait after each."""
        return self._healthz_api.healthz_service_get_healthz(_request_timeout=_SECONDS)


class UnavailableError(UserError):
    """The server does not answer, or fails: it may be there again in a while."""


class Cluster:
    """A KFP server.

    Args:
        profile: of the cluster; its host comes before that of KF_PIPELINES_ENDPOINT, and that before what KFP's client
            finds by itself (inside a cluster, or by kubectl's context). A token comes from KF_PIPELINES_TOKEN.

    Raises:
        UserError: no server can be found.
    """

    def __init__(self, profile: ClusterProfile) -> None:
        self._profile = profile
        host, said = profile.host or os.environ.get(HOST_VARIABLE), io.StringIO()
        self._host = host or "the address that KFP's client finds"
        try:
            with self._errors("find the server"), warnings.catch_warnings(), contextlib.redirect_stdout(said):
                warnings.simplefilter("ignore")
                token = os.environ.get(TOKEN_VARIABLE)
                self._client = _Client(host=host, existing_token=token)
        finally:
            if "Failed to load kube config" in said.getvalue():  # it says so, and goes on to localhost
                raise UserError(
                    f"there is no KFP server to submit to; set `host` in the cluster profile, or {HOST_VARIABLE}, or "
                    "point kubectl to the cluster"
                )
        self._host = host or self._client._existing_config.host
        # Of the runs; KFP's own context is what `kfp` commands were told last.
        told = profile.namespace or os.environ.get(NAMESPACE_VARIABLE) or self._client.get_user_namespace()
        self._namespace: str | None = told or None

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
            with self._errors("start a recurring run"), _quiet():
                recurring = self._client.create_recurring_run(
                    **arguments, cron_expression=cron, max_concurrency=1, no_catchup=True
                )
            identity, page = recurring.recurring_run_id, "recurringrun"
        else:
            with self._errors("start a run"), _quiet():
                identity, page = self._client.run_pipeline(**arguments).run_id, "runs"
        # Where KFP's driver puts a run's outputs (backend/src/v2/driver, GenerateOutputURI).
        place = None if cron else self._place(identity)
        return Submission(identity, f"{self._host}/#/{page}/details/{identity}", config.run.experiment, place)

    def find(self, identity: str) -> Submission:
        """A run that was submitted before, by KFP's id of it; its experiment as the configuration beside it says.

        Raises:
            UserError: the server is unreachable, refuses, or knows no such run.
        """
        with self._errors(f"find run {identity}"):
            self._client.get_run(identity)
        place, experiment = self._place(identity), RunSection().experiment
        try:
            if (content := storage.read(storage.join(place, CONFIG))) is not None:
                experiment = parse(RunSection, (yaml.safe_load(content) or {}).get("run", {})).experiment
        except (UserError, yaml.YAMLError) as error:
            print(f"note: the run's configuration cannot be read ({first_line(error)})", file=sys.stderr)
        return Submission(identity, f"{self._host}/#/runs/details/{identity}", experiment, place)

    def _place(self, identity: str) -> str:
        return storage.join(self._profile.pipeline_root.rstrip("/"), NAME, identity)

    def check(self) -> str:
        """Ask for something that needs credentials; raises UserError where it is refused. Returns the address."""
        with self._errors("list experiments"), _quiet():
            self._client.list_experiments(page_size=1, namespace=self._namespace)
        return self._host

    def _find_or_create_experiment(self, name: str) -> Any:
        create = partial(self._client.create_experiment, name, namespace=self._namespace)  # or find
        with self._errors(f"use experiment {name!r}"), _quiet():
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
                with self._errors("upload the pipeline", let_pass=409), _quiet():
                    made = self._client.upload_pipeline_version(str(file), version, pipeline_id=pipeline_id)
                    return pipeline_id, made.pipeline_version_id
            except kfp_server_api.ApiException:  # somebody else was quicker
                known = self._find_version(pipeline_id, version)
                if known is None:
                    raise UserError(
                        f"KFP at {self._host} says that version {version} of pipeline {NAME!r} exists, but does not "
                        "list it; look at the pipeline's page"
                    ) from None
                return pipeline_id, known

    def _pipeline(self) -> str:
        if (found := self._find_pipeline()) is not None:
            return found
        pipeline = kfp_server_api.V2beta1Pipeline(
            name=NAME, display_name=NAME, namespace=self._namespace, description="SCOP channel pruning"
        )
        try:
            with self._errors("make the pipeline", let_pass=409):
                made = self._client.pipelines.pipeline_service_create_pipeline(pipeline=pipeline).pipeline_id
        except kfp_server_api.ApiException:  # somebody else was quicker
            made = self._find_pipeline()
        if made is None:
            raise UserError(
                f"KFP at {self._host} answers, but not as KFP does (with a page to log in?); set {TOKEN_VARIABLE}, or "
                "mend `host` in the cluster profile"
            )
        return str(made)

    def _find_pipeline(self) -> str | None:
        predicate = {"operation": "EQUALS", "key": "name", "stringValue": NAME}
        with self._errors(f"find the pipeline {NAME!r}"):
            listed = self._client.list_pipelines(
                filter=json.dumps({"predicates": [predicate]}), namespace=self._namespace
            )
        found = [entry for entry in listed.pipelines or [] if NAME in (entry.name, entry.display_name)]
        return str(found[0].pipeline_id) if found else None

    def _find_version(self, pipeline_id: str, version: str) -> str | None:
        predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": version}
        with self._errors("list the pipeline's versions"):
            listed = self._client.list_pipeline_versions(pipeline_id, filter=json.dumps({"predicates": [predicate]}))
        found = [entry for entry in listed.pipeline_versions or [] if entry.display_name == version]
        return str(found[0].pipeline_version_id) if found else None

    def follow(self, run: Submission, tell: Callable[[str], None], every: float) -> Outcome:
        """Wait for a run's end.

        Args:
            run: to wait for.
            tell: called with a line for each task and state.
            every: seconds between looks.

        Raises:
            UserError: the server cannot be reached any more, or refuses.
        """
        told: dict[str, str] = {}
        failures = 0
        while True:
            try:
                with self._errors("look after the run"):
                    state = self._client.get_run(run.id)
                failures = 0
            except UnavailableError:
                failures += 1
                if failures > _FAILURES_BORNE:
                    raise
                time.sleep(every)
                continue
            tasks = (state.run_details and state.run_details.task_details) or []
            for task in _worth_telling(tasks):
                if told.get(task.task_id) != task.state:
                    told[task.task_id] = task.state
                    tell(f"{_title(task, tasks)}: {task.state.lower()}")
            if state.state in ENDED:
                return Outcome(state.state, None if state.state == "SUCCEEDED" else _error_of(state, tasks))
            time.sleep(every)

    @contextlib.contextmanager
    def _errors(self, doing: str, let_pass: int | None = None) -> Iterator[None]:
        """Whatever the client raises as a UserError of one line, but for answers of the status `let_pass`."""
        try:
            yield
        except kfp_server_api.ApiException as error:
            if let_pass is not None and error.status == let_pass:
                raise
            kind = UnavailableError if (error.status or 500) >= 500 else UserError
            raise kind(self._explain(error, doing)) from error
        except (urllib3.exceptions.HTTPError, OSError, TimeoutError) as error:
            reason = getattr(error, "reason", None) or error
            raise UnavailableError(
                f"KFP at {self._host} cannot be reached ({first_line(reason)}); check `host` in the cluster profile or "
                f"{HOST_VARIABLE}, and the network (kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80)"
            ) from error

    def _explain(self, error: kfp_server_api.ApiException, doing: str) -> str:
        where = f"KFP at {self._host}"
        message = _message(error)
        match error.status:
            case 401:
                return f"{where} refuses the credentials (401 {message}); set {TOKEN_VARIABLE}, or log in again"
            case 403:
                namespace = self._namespace
                remedy = f"in namespace {namespace!r}" if namespace else "set `namespace` in the cluster profile"
                return f"{where} refuses to {doing} (403 {message}); ask for the right to it, {remedy}"
            case 404:
                return f"{where} cannot {doing}: not found (404 {message}); is this address KFP's API, version 2?"
            case status if status and status >= 500:
                return f"{where} fails to {doing} ({status} {message}); try again later, or look at its log"
        return f"{where} refuses to {doing} ({error.status} {message})"


def _message(error: kfp_server_api.ApiException) -> str:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        said = json.loads(error.body).get("message") or json.loads(error.body).get("error")
        if said:
            return " ".join(str(said).split())[:300]
    return str(error.reason or "no answer")


def _worth_telling(tasks: list[Any]) -> list[Any]:
    """The steps: not the drivers, executors, loops and iterations around them, which KFP lists as well."""
    steps = {step.replace("_", "-") for step in STEPS}
    return [task for task in tasks if task.state and task.display_name in steps]


def _title(task: Any, tasks: list[Any]) -> str:
    """The step's name, with the number of the variant where it belongs to one."""
    by_id = {other.task_id: other for other in tasks}
    name, above = task.display_name, task
    while (above := by_id.get(above.parent_task_id)) is not None:
        label = above.display_name or ""
        if "iteration" in label:
            return f"variant {label.rpartition('-')[2]} {name}"
    return str(name)


def _error_of(run: Any, tasks: list[Any]) -> str:
    failed = [task for task in _worth_telling(tasks) if task.state == "FAILED"]
    for task in failed:
        message = task.error.message if task.error else None
        pod = f" (pod {task.pod_name})" if task.pod_name else ""
        return f"step {_title(task, tasks)} failed{pod}: {message or 'KFP has no message; see its log'}"
    return (run.error.message if run.error else None) or f"the run ended as {run.state}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """KFP's client prints links of its own."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
