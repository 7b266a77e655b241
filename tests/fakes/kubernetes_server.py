"""A fake Kubernetes API with Kubeflow Trainer, which runs each node of a TrainJob as a process.

TrainJobs are checked against Kubeflow Trainer's models. A node gets the variables of the torch plugin (PET_...) and the
values of the secrets and config maps that the job references.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from kubeflow_trainer_api import models

from tests.fakes.services import free_port

NAMESPACE = "team"
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                            "spec": {"template": {"spec": {"containers": [{"name": "node", "image": "pytorch"}]}}},
                        },
                    }
                ]
            }
        },
    },
}


@dataclass
class KubernetesServer:
    """State of the server and the behaviour that a test has set.

    Attributes:
        kubeconfig: the kubeconfig file that names the server.
        objects: contents of secrets and config maps, by name.
        surroundings: additional environment variables of nodes.
        refuse: called with the method and path of each request; returns a status to fail with, or None.
        jobs: TrainJobs by name, as received.
        processes: processes of each job, one per node.
        logs: log file of each job's first node.
        seen: requests received, as (method, path).
    """

    kubeconfig: Path
    objects: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    surroundings: Mapping[str, str] = field(default_factory=dict)
    refuse: Callable[[str, str], int | None] = lambda method, path: None
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    processes: dict[str, list[subprocess.Popen[str]]] = field(default_factory=dict)
    logs: dict[str, Path] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes) -> dict[str, Any] | str | None:
        """Return a JSON object or a log, or None if the path does not exist."""
        jobs = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
        if path.endswith("/clustertrainingruntimes/torch-distributed"):
            return RUNTIME
        if method == "POST" and path == jobs:
            return self._create(json.loads(body))
        name = path.removeprefix(f"{jobs}/")
        if name in self.jobs and method == "DELETE":
            del self.jobs[name]
            for process in self.processes.pop(name, []):
                process.terminate()
            return {"kind": "Status", "status": "Success"}
        if name in self.jobs:
            return self._shown(name)
        if path == f"/api/v1/namespaces/{NAMESPACE}/pods":
            return {
                "kind": "PodList",
                "apiVersion": "v1",
                "items": [pod for job in self.jobs for pod in self._pods(job)],
            }
        if path.endswith("-node-0-0/log"):
            job = path.split("/")[-2].removesuffix("-node-0-0")
            for process in self.processes.get(job, []):
                process.wait()
            return self.logs[job].read_text() if job in self.logs else ""
        return None

    def _create(self, job: dict[str, Any]) -> dict[str, Any]:
        checked = models.TrainerV1alpha1TrainJob.from_dict(job)
        assert checked is not None and checked.to_dict() == job
        name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
        job["metadata"] |= {"namespace": NAMESPACE, "creationTimestamp": "2026-01-01T00:00:00Z"}
        self.jobs[name] = job
        variables = {entry["name"]: entry["value"] for entry in trainer["env"]}
        for entry in self.container(name).get("env", []):
            (reference,) = entry["valueFrom"].values()
            variables[entry["name"]] = self.objects[reference["name"]][reference["key"]]
        clean = {key: os.environ[key] for key in ("PATH", "HOME")} | dict(self.surroundings) | variables
        clean |= {"PET_NNODES": str(trainer["numNodes"]), "PET_MASTER_ADDR": "127.0.0.1"}
        clean |= {"PET_MASTER_PORT": str(free_port())}
        command = [sys.executable, "-m", "pipelines.cli", *trainer["command"][1:]]
        self.logs[name] = Path(tempfile.mkstemp(suffix=".log", dir=self.kubeconfig.parent)[1])
        self.processes[name] = [
            subprocess.Popen(
                command,
                env=clean | {"PET_NODE_RANK": str(node)},
                stdout=self.logs[name].open("w") if node == 0 else subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for node in range(trainer["numNodes"])
        ]
        return job

    def pod(self, name: str) -> dict[str, Any]:
        """Return the pod spec that a job requests."""
        (patch,) = self.jobs[name]["spec"]["runtimePatches"]
        (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        return job["template"]["spec"]["template"]["spec"]

    def container(self, name: str) -> dict[str, Any]:
        """Return the container of that pod spec."""
        (container,) = self.pod(name)["containers"]
        return container

    def _shown(self, name: str) -> dict[str, Any]:
        codes = [process.poll() for process in self.processes[name]]
        if any(codes):
            for process in self.processes[name]:
                process.terminate()
            state = "Failed"
        elif None in codes:
            return self.jobs[name]
        else:
            state = "Complete"
        condition = {"type": state, "status": "True", "reason": state, "message": ""}
        condition |= {"lastTransitionTime": "2026-01-01T00:00:00Z"}
        return self.jobs[name] | {"status": {"conditions": [condition]}}

    def _pods(self, job: str) -> list[dict[str, Any]]:
        return [
            {
                "metadata": {
                    "name": f"{job}-node-0-{node}",
                    "creationTimestamp": "2026-01-01T00:00:00Z",
                    "labels": {
                        "jobset.sigs.k8s.io/jobset-name": job,
                        "jobset.sigs.k8s.io/replicatedjob-name": "node",
                        "batch.kubernetes.io/job-completion-index": str(node),
                    },
                },
                "spec": {"containers": [{"name": "node", "image": "scop", "resources": {}}]},
                "status": {"phase": "Running"},
            }
            for node in range(len(self.processes[job]))
        ]


@contextlib.contextmanager
def kubernetes_server(folder: Path) -> Iterator[KubernetesServer]:
    """Run the server; clients need KUBECONFIG set to its `kubeconfig`."""
    state = KubernetesServer(folder / "kubeconfig.yaml")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    cluster = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}
    context = {"name": "here", "context": {"cluster": "here", "user": "me", "namespace": NAMESPACE}}
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
    config |= {"clusters": [cluster], "contexts": [context], "users": [{"name": "me", "user": {}}]}
    state.kubeconfig.write_text(yaml.safe_dump(config))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        for process in (process for group in state.processes.values() for process in group):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: KubernetesServer

    def do_GET(self) -> None:
        self._do("GET")

    def do_POST(self) -> None:
        self._do("POST")

    def do_DELETE(self) -> None:
        self._do("DELETE")

    def _do(self, method: str) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.seen.append((method, path))
        status = self.state.refuse(method, path)
        answer = None if status else self.state.answer(method, path, body)
        if answer is None:
            status = status or 404
            answer = {"kind": "Status", "status": "Failure", "code": status, "message": "no"}
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status or 200)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
