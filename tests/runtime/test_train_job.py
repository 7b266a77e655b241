"""Training on two nodes: the step's pod makes a TrainJob, whose nodes find each other, S3 and the record."""

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
        handed = ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
        server.surroundings = {key: os.environ[key] for key in handed} | {"PYTHONPATH": str(ROOT)}
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
def places(digits_folder: Path, bucket: str) -> tuple[dict[str, str], dict[str, str]]:
    upload_folder(digits_folder, f"{bucket}/dataset")
    return {"dataset": f"{bucket}/dataset"}, {"model": f"{bucket}/runs/model"}


@pytest.mark.slow
def test_two_nodes_train_the_network_that_one_process_would(
    cluster: KubernetesServer, places, digits_folder: Path, tmp_path: Path, monkeypatch, capfd, cache: Cache
) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "a-run")
    result = run_step("train_dense", {"dense": STEADY_DENSE}, *places)
    (name,) = cluster.jobs
    assert name.startswith("scop-train-dense-")
    assert "dense: epoch 2/2" in capfd.readouterr().out  # the first node's log
    record = read_record(places[1]["model"])
    assert record is not None
    assert (record.status, record.machine.processes) == ("done", 2)
    assert record.result == result
    # A pod that was lost when its job was done: the next try takes what is there.
    assert run_step("train_dense", {"dense": STEADY_DENSE}, *places) == result
    assert "has finished already" in capfd.readouterr().out
    assert [method for method, path in cluster.seen if path.endswith("/trainjobs")] == ["POST"]
    assert "KFP_RUN_ID" in {entry["name"] for entry in cluster.jobs[name]["spec"]["trainer"]["env"]}
    assert SECRET not in json.dumps(cluster.jobs)

    monkeypatch.delenv("SCOP_TRAIN_JOB")
    run_step(
        "train_dense", {"dense": STEADY_DENSE}, {"dataset": str(digits_folder)}, {"model": str(tmp_path / "alone")}
    )
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    together = load_file(fetch_folder(places[1]["model"], cache, "model") / "model.safetensors")
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, **CLOSE)


@pytest.mark.slow
def test_a_failed_job_says_why_and_the_next_try_replaces_it(cluster: KubernetesServer, places) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="^batch_size 63 cannot be divided among 2 processes"):
            run_step("train_dense", {"dense": STEADY_DENSE | {"batch_size": 63}}, *places)
    assert [method for method, path in cluster.seen if path.endswith("/trainjobs")] == ["POST", "POST"]


@pytest.mark.slow
def test_a_job_that_runs_is_gone_on_with_and_removed_when_its_step_is_told_to_end(
    cluster: KubernetesServer, places, tmp_path: Path
) -> None:
    settings = f"--set=dense={json.dumps(STEADY_DENSE | {'epochs': 500})}"
    command = [sys.executable, "-m", "pipelines.cli", "step", "train_dense", settings]
    command += ["--input", f"dataset={places[0]['dataset']}", "--output", f"model={places[1]['model']}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
    assert first.stdout is not None
    assert "2 nodes" in first.stdout.readline()
    first.kill()  # nothing could be done about it: the job goes on
    first.communicate()
    second = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
    assert second.stdout is not None
    assert "is running already; following it" in second.stdout.readline()
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=60)
    assert second.returncode == 143
    assert cluster.jobs == {}
    assert [method for method, path in cluster.seen if path.endswith("/trainjobs")] == ["POST"]


def test_places_of_one_pod_are_refused(cluster: KubernetesServer, places, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with several nodes, inputs and outputs must be in S3"):
        run_step("train_dense", {"dense": STEADY_DENSE}, places[0], {"model": str(tmp_path / "model")})
    assert cluster.jobs == {}


def test_a_refusal_says_what_may_be_missing(cluster: KubernetesServer, places) -> None:
    cluster.refuse = lambda method, path: 403 if method == "POST" else None
    with pytest.raises(UserError, match=r"cannot be created \(.*403.*\); check that Kubeflow Trainer is"):
        run_step("train_dense", {"dense": STEADY_DENSE}, *places)


def test_without_a_cluster_it_says_so(places, tmp_path: Path, monkeypatch) -> None:
    point_to(tmp_path / "none", monkeypatch)
    monkeypatch.setenv("SCOP_TRAIN_JOB", plan().model_dump_json())
    with pytest.raises(UserError, match="Kubernetes cannot be reached from here"):
        run_step("train_dense", {"dense": STEADY_DENSE}, *places)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    path = tmp_path_factory.mktemp("compiled")
    values = yaml.safe_load(EXAMPLE.read_text())
    values["classes"]["gpu"] |= {"nodes": 2, "accelerator": {"count": 4}}
    (path / "cluster.yaml").write_text(yaml.safe_dump(values))
    compile_for(load_profile(path / "cluster.yaml"), RunSection(experiment="mine"), path / "pipeline.yaml")
    pipeline, platform = yaml.safe_load_all((path / "pipeline.yaml").read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_a_profile_with_nodes_gives_the_training_steps_a_plan(documents) -> None:
    values = container(documents, "finetune")
    variables = {entry["name"]: entry["value"] for entry in values["env"]}
    made = TrainJobPlan.model_validate_json(variables["SCOP_TRAIN_JOB"])
    assert (made.nodes, made.processes) == (2, 4)
    assert made.resources == {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "4"}
    assert made.environment["OMP_NUM_THREADS"] == "2"  # 8 cores, 4 processes
    assert made.environment["SCOP_REQUIRED_DEVICE"].startswith("class gpu: resource nvidia.com/gpu x4")
    assert made.pod["node_selector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert made.pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert made.pod["security_context"] == {"runAsUser": 10001, "runAsGroup": 0, "runAsNonRoot": True}
    assert made.shared_memory == "8Gi"
    assert made.deadline == 172800
    # The step's own pod only waits: it must not hold GPUs, nor end before the job.
    assert values["resources"] == {
        **dict.fromkeys(("resourceCpuRequest", "resourceCpuLimit"), "1"),
        **dict.fromkeys(("resourceMemoryRequest", "resourceMemoryLimit"), "2Gi"),
    } | {key: value for key, value in values["resources"].items() if not key.startswith("resource")}
    assert "accelerator" not in values["resources"]
    assert "SCOP_REQUIRED_DEVICE" not in variables
    platform = documents[1][executor("finetune")]
    assert not {"nodeSelector", "activeDeadlineSeconds", "emptyDirMounts"} & platform.keys()
    assert "SCOP_TRAIN_JOB" not in {entry["name"] for entry in container(documents, "evaluate")["env"]}


def test_the_job_is_what_kubeflow_trainer_and_kubernetes_take(
    documents, cluster: KubernetesServer, monkeypatch
) -> None:
    import kubernetes_validate

    variables = {entry["name"]: entry["value"] for entry in container(documents, "finetune")["env"]}
    made = TrainJobPlan.model_validate_json(variables["SCOP_TRAIN_JOB"])
    cluster.objects = {name: dict.fromkeys(keys, "x") for name, keys in (made.secrets | made.config_maps).items()}
    train_job._create(train_job._client(), made, "a-job", ["scop", "--version"], {})
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
