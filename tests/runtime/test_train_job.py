"""Training on two nodes: the step's pod creates a TrainJob and waits for it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipelines.cluster.compilation import compile_for
from pipelines.cluster.profile import load_profile
from scop import UserError
from scop.config import RunSection
from scop.runtime import train_job
from scop.runtime.record import read_record
from scop.runtime.train_job import TrainJobPlan
from scop.storage.cache import Cache
from scop.storage.folders import fetch_folder, upload_folder
from tests.fakes.kubernetes_server import KubernetesServer, kubernetes_server
from tests.fakes.services import KEY, SECRET
from tests.helpers import CLOSE, ROOT, STEADY_DENSE, run_step
from tests.pipelines.cluster.test_compilation import EXAMPLE, container, executor


@pytest.fixture
def cluster(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    with kubernetes_server(tmp_path) as server:
        server.objects = {"scop-s3": {"access_key": KEY, "secret_key": SECRET}}
        copied = ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
        server.surroundings = {key: os.environ[key] for key in copied} | {"PYTHONPATH": str(ROOT)}
        server.surroundings |= {"SCOP_CACHE": str(tmp_path / "cache-of-nodes"), "OMP_NUM_THREADS": "1"}
        point_to(server.kubeconfig, monkeypatch)
        monkeypatch.setenv("SCOP_TRAIN_JOB", plan().model_dump_json())
        monkeypatch.setattr(train_job, "_POLL_SECONDS", 0.2)
        yield server


def point_to(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    # Read from the environment when the module is imported, which KFP may have done already.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))


def plan(**changes: Any) -> TrainJobPlan:
    secrets = {"scop-s3": {"access_key": "AWS_ACCESS_KEY_ID", "secret_key": "AWS_SECRET_ACCESS_KEY"}}
    values = {"runtime": "torch-distributed", "image": "scop", "nodes": 2, "processes": 1, "secrets": secrets}
    return TrainJobPlan.model_validate(values | {"resources": {"cpu": "1", "memory": "4Gi"}} | changes)


@pytest.fixture
def uris(digits_folder: Path, bucket: str) -> tuple[dict[str, str], dict[str, str]]:
    upload_folder(digits_folder, f"{bucket}/dataset")
    return {"dataset": f"{bucket}/dataset"}, {"model": f"{bucket}/runs/model"}


@pytest.mark.slow
def test_two_nodes_train_the_same_network_as_one_process(
    cluster: KubernetesServer, uris, digits_folder: Path, tmp_path: Path, monkeypatch, capfd, cache: Cache
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "a-run")
    result = run_step("train_dense", {"dense": STEADY_DENSE}, *uris)
    (name,) = cluster.jobs
    assert name.startswith("scop-train-dense-")
    assert "dense: epoch 2/2" in capfd.readouterr().out  # the first node's log
    record = read_record(uris[1]["model"])
    assert record is not None
    assert (record.status, record.machine.processes) == ("done", 2)
    assert record.result == result
    # If the pod is lost after its job has finished, the retry uses the result.
    assert run_step("train_dense", {"dense": STEADY_DENSE}, *uris) == result
    assert "has already finished" in capfd.readouterr().out
    assert [method for method, path in cluster.seen if path.endswith("/trainjobs")] == ["POST"]
    assert "KFP_RUN_ID" in {entry["name"] for entry in cluster.jobs[name]["spec"]["trainer"]["env"]}
    assert SECRET not in json.dumps(cluster.jobs)

    monkeypatch.delenv("SCOP_TRAIN_JOB")
    run_step(
        "train_dense", {"dense": STEADY_DENSE}, {"dataset": str(digits_folder)}, {"model": str(tmp_path / "alone")}
    )
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    together = load_file(fetch_folder(uris[1]["model"], cache, "model") / "model.safetensors")
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, **CLOSE)


@pytest.mark.slow
def test_reports_why_a_job_failed_and_replaces_it_on_retry(cluster: KubernetesServer, uris) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="^batch_size 63 cannot be divided among 2 processes"):
            run_step("train_dense", {"dense": STEADY_DENSE | {"batch_size": 63}}, *uris)
    assert [method for method, path in cluster.seen if path.endswith("/trainjobs")] == ["POST", "POST"]


@pytest.mark.slow
def test_a_retry_follows_the_running_job_and_a_stop_deletes_it(cluster: KubernetesServer, uris, tmp_path: Path) -> None:
    settings = f"--set=dense={json.dumps(STEADY_DENSE | {'epochs': 500})}"
    command = [sys.executable, "-m", "pipelines.cli", "step", "train_dense", settings]
    command += ["--input", f"dataset={uris[0]['dataset']}", "--output", f"model={uris[1]['model']}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
    assert first.stdout is not None
    assert "2 nodes" in first.stdout.readline()
    first.kill()  # SIGKILL cannot be handled, so the job continues
    first.communicate()
    second = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
    assert second.stdout is not None
    assert "is already running; following it" in second.stdout.readline()
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=60)
    assert second.returncode == 143
    assert cluster.jobs == {}
    assert [method for method, path in cluster.seen if path.endswith("/trainjobs")] == ["POST"]


def test_rejects_local_folders(cluster: KubernetesServer, uris, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with several nodes, inputs and outputs must be in S3"):
        run_step("train_dense", {"dense": STEADY_DENSE}, uris[0], {"model": str(tmp_path / "model")})
    assert cluster.jobs == {}


def test_an_api_error_names_the_likely_cause(cluster: KubernetesServer, uris) -> None:
    cluster.refuse = lambda method, path: 403 if method == "POST" else None
    with pytest.raises(UserError, match=r"cannot be created \(.*403.*\); check that Kubeflow Trainer is"):
        run_step("train_dense", {"dense": STEADY_DENSE}, *uris)


def test_reports_an_unreachable_cluster(uris, tmp_path: Path, monkeypatch) -> None:
    point_to(tmp_path / "none", monkeypatch)
    monkeypatch.setenv("SCOP_TRAIN_JOB", plan().model_dump_json())
    with pytest.raises(UserError, match="the Kubernetes API cannot be reached"):
        run_step("train_dense", {"dense": STEADY_DENSE}, *uris)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    path = tmp_path_factory.mktemp("compiled")
    values = yaml.safe_load(EXAMPLE.read_text())
    values["classes"]["gpu"] |= {"nodes": 2, "accelerator": {"count": 4}}
    (path / "cluster.yaml").write_text(yaml.safe_dump(values))
    compile_for(load_profile(path / "cluster.yaml"), RunSection(experiment="mine"), path / "pipeline.yaml")
    pipeline, platform = yaml.safe_load_all((path / "pipeline.yaml").read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_a_profile_with_nodes_sets_the_plan_of_training_steps(documents) -> None:
    values = container(documents, "finetune")
    variables = {entry["name"]: entry["value"] for entry in values["env"]}
    parsed = TrainJobPlan.model_validate_json(variables["SCOP_TRAIN_JOB"])
    assert (parsed.nodes, parsed.processes) == (2, 4)
    assert parsed.resources == {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "4"}
    assert parsed.environment["OMP_NUM_THREADS"] == "2"  # 8 cores, 4 processes
    assert parsed.environment["SCOP_REQUIRED_DEVICE"].startswith("class gpu: resource nvidia.com/gpu x4")
    assert parsed.pod["node_selector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert parsed.pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert parsed.pod["security_context"] == {"runAsUser": 10001, "runAsGroup": 0, "runAsNonRoot": True}
    assert parsed.shared_memory == "8Gi"
    assert parsed.deadline == 172800
    # The step's own pod only waits: it must neither hold GPUs nor end before the job.
    assert values["resources"] == {
        **dict.fromkeys(("resourceCpuRequest", "resourceCpuLimit"), "1"),
        **dict.fromkeys(("resourceMemoryRequest", "resourceMemoryLimit"), "2Gi"),
    } | {key: value for key, value in values["resources"].items() if not key.startswith("resource")}
    assert "accelerator" not in values["resources"]
    assert "SCOP_REQUIRED_DEVICE" not in variables
    platform = documents[1][executor("finetune")]
    assert not {"nodeSelector", "activeDeadlineSeconds", "emptyDirMounts"} & platform.keys()
    assert "SCOP_TRAIN_JOB" not in {entry["name"] for entry in container(documents, "evaluate")["env"]}


def test_job_is_valid_for_kubeflow_trainer_and_kubernetes(documents, cluster: KubernetesServer, monkeypatch) -> None:
    import kubernetes_validate

    variables = {entry["name"]: entry["value"] for entry in container(documents, "finetune")["env"]}
    parsed = TrainJobPlan.model_validate_json(variables["SCOP_TRAIN_JOB"])
    cluster.objects = {name: dict.fromkeys(keys, "x") for name, keys in (parsed.secrets | parsed.config_maps).items()}
    train_job._create(train_job._client(), parsed, "a-job", ["scop", "--version"], {})
    job = cluster.jobs["a-job"]
    assert job["spec"]["runtimeRef"] == {"kind": "ClusterTrainingRuntime", "name": "torch-distributed"}
    trainer = job["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "4"
    pod = cluster.pod("a-job")
    assert pod["volumes"] == [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}]
    spec = pod | {
        "containers": [{"image": trainer["image"], "resources": trainer["resourcesPerNode"], **pod["containers"][0]}]
    }
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": spec}
    kubernetes_validate.validate(manifest, "1.31", strict=True)
