"""A fake KFP server with the v2beta1 REST API, built on the models of the generated client.

Requests are checked against these models: an unknown field or a wrong type is recorded as a problem. An uploaded
pipeline is parsed as KFP's backend parses it, and the parameters of runs are checked against it.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

# Python types of the models' types in JSON. Models are objects, or strings if they are enumerations.
_JSON = {
    "str": str,
    "int": (int, str),
    "float": (int, float),
    "bool": bool,
    "dict": dict,
    "list": list,
    "datetime": str,
}

_LONG = {"max_concurrency"}  # int64: a string in the models, a number from KFP's client; both are accepted


@dataclass
class KfpServer:
    """State of the server and the behaviour that a test has set.

    Attributes:
        address: URL of the server.
        plan: called with the method and path of each request; returns a status to fail with, "hang", "page" (a login
            page), or None.
        progress: state and tasks of a run, one entry per query; the last entry is repeated.
        seen: requests received, as (method, path).
        problems: errors in requests that KFP would reject.
        token: bearer token that requests must have, or None.
    """

    address: str = ""
    plan: Callable[[str, str], int | str | None] = lambda method, path: None
    progress: list[tuple[str, list[api.V2beta1PipelineTaskDetail]]] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    token: str | None = None
    pipelines: list[api.V2beta1Pipeline] = field(default_factory=list)
    versions: list[api.V2beta1PipelineVersion] = field(default_factory=list)
    specs: dict[str, Any] = field(default_factory=dict)
    experiments: list[api.V2beta1Experiment] = field(default_factory=list)
    runs: list[api.V2beta1Run] = field(default_factory=list)
    recurring: list[api.V2beta1RecurringRun] = field(default_factory=list)
    looks: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, kind: str) -> Any:
        """Return the model that answers a request, or None if KFP has no such path."""
        match method, path.removeprefix("/apis/v2beta1/").split("/"):
            case "GET", ["healthz"]:
                return api.V2beta1GetHealthzResponse(multi_user=False)
            case "GET", ["pipelines"]:
                own = [entry for entry in self.pipelines if (entry.namespace or "") == query.get("namespace", "")]
                return api.V2beta1ListPipelinesResponse(pipelines=self._filtered(own, query) or None)
            case "POST", ["pipelines"]:
                pipeline = self._read(body, "V2beta1Pipeline")
                pipeline.pipeline_id = str(uuid.uuid4())
                self.pipelines.append(pipeline)
                return pipeline
            case "GET", ["pipelines", _, "versions"]:
                return api.V2beta1ListPipelineVersionsResponse(pipeline_versions=self._filtered(self.versions, query))
            case "POST", ["pipelines", "upload_version"]:
                return self._upload(query, body, kind)
            case "GET", ["experiments"]:
                return api.V2beta1ListExperimentsResponse(experiments=self._filtered(self.experiments, query) or None)
            case "POST", ["experiments"]:
                experiment = self._read(body, "V2beta1Experiment")
                experiment.experiment_id = str(uuid.uuid4())
                self.experiments.append(experiment)
                return experiment
            case "POST", ["runs"]:
                run = self._read(body, "V2beta1Run")
                self._check_parameters(run)
                run.run_id, run.state, run.created_at = str(uuid.uuid4()), "PENDING", datetime.now(UTC)
                self.runs.append(run)
                return run
            case "POST", ["recurringruns"]:
                recurring = self._read(body, "V2beta1RecurringRun")
                self._check_parameters(recurring)
                recurring.recurring_run_id = str(uuid.uuid4())
                self.recurring.append(recurring)
                return recurring
            case "GET", ["runs", run_id]:
                (run,) = (run for run in self.runs if run.run_id == run_id)
                run.state, tasks = self.progress[min(self.looks, len(self.progress) - 1)]
                run.run_details = api.V2beta1RunDetails(task_details=tasks)
                self.looks += 1
                return run
        return None

    def _filtered(self, entries: list[Any], query: dict[str, str]) -> list[Any]:
        predicates = json.loads(query["filter"])["predicates"] if query.get("filter") else []
        for predicate in predicates:
            if predicate["operation"] not in ("EQUALS", 1) or predicate["key"] not in ("display_name", "name"):
                self.problems.append(f"filter {predicate}")
        wanted = [predicate["stringValue"] for predicate in predicates]
        return [entry for entry in entries if all(entry.display_name == value for value in wanted)]

    def _read(self, body: bytes, model: str) -> Any:
        values = json.loads(body)
        self._check_keys(values, getattr(api, model), model)
        return api.ApiClient().deserialize(type("Answer", (), {"data": body.decode()})(), model)

    def _check_keys(self, values: Any, model: Any, where: str) -> None:
        if not isinstance(values, dict) or not hasattr(model, "attribute_map"):
            return
        attributes = {wire: attribute for attribute, wire in model.attribute_map.items()}
        for key, value in values.items():
            if key not in attributes:
                self.problems.append(f"{where} has no field {key!r}")
                continue
            kind = model.openapi_types[attributes[key]]
            long = key in _LONG and isinstance(value, int)
            if not long and not isinstance(value, _JSON.get(re.match(r"\w+", kind)[0], (dict, str))):
                self.problems.append(f"{where}.{key} is {value!r} but must be {kind}")
            self._check_keys(value, getattr(api, kind, None), f"{where}.{key}")

    def _upload(self, query: dict[str, str], body: bytes, kind: str) -> api.V2beta1PipelineVersion:
        message = BytesParser().parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
        (part,) = message.get_payload()
        documents = list(yaml.safe_load_all(part.get_payload(decode=True)))
        spec, platform = pipeline_spec_pb2.PipelineSpec(), pipeline_spec_pb2.PlatformSpec()
        json_format.ParseDict(documents[0], spec)
        json_format.ParseDict(documents[1], platform)
        if not any(pipeline.pipeline_id == query["pipelineid"] for pipeline in self.pipelines):
            self.problems.append("a version of an unknown pipeline")
        version = api.V2beta1PipelineVersion(
            pipeline_id=query["pipelineid"], pipeline_version_id=str(uuid.uuid4()), display_name=query["name"]
        )
        self.versions.append(version)
        self.specs[version.pipeline_version_id] = documents
        return version

    def _check_parameters(self, run: Any) -> None:
        documents = self.specs[run.pipeline_version_reference.pipeline_version_id]
        wanted = documents[0]["root"]["inputDefinitions"]["parameters"]
        given = run.runtime_config.parameters
        kinds = {"STRUCT": dict, "LIST": list}
        for name, definition in wanted.items():
            if not isinstance(given.get(name), kinds[definition["parameterType"]]):
                self.problems.append(f"parameter {name!r} is {given.get(name)!r}")
        if given.keys() - wanted.keys():
            self.problems.append(f"unknown parameters {given.keys() - wanted.keys()}")


@contextlib.contextmanager
def kfp_server() -> Iterator[KfpServer]:
    """Run the server on a free port."""
    state = KfpServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        state.released.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: KfpServer

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.state.seen.append((self.command, parts.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.state.plan(self.command, parts.path)
        if self.state.token and self.headers.get("authorization") != f"Bearer {self.state.token}":
            fault = 401
        if fault == "hang":
            self.state.released.wait()
            return
        if fault == "page":
            self._send(200, b"<!doctype html><title>Log in</title>", "text/html")
            return
        if isinstance(fault, int):
            self._reply(fault, {"code": fault, "message": f"injected by the test: {fault}"})
            return
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        answer = self.state.answer(self.command, parts.path, query, body, self.headers.get("Content-Type", ""))
        if answer is None:
            self._reply(404, {"code": 5, "message": f"Not Found: {re.sub('[^/a-z0-9]', '', parts.path)}"})
            return
        self._reply(200, api.ApiClient().sanitize_for_serialization(answer))

    def _reply(self, status: int, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = _serve  # noqa: N815 - the standard library's names

    def log_message(self, *_: object) -> None:
        pass
