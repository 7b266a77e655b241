"""Tests of cluster profiles and of the pipelines compiled with them."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli.main import main
from pipelines.cluster.compilation import compile_for
from pipelines.cluster.profile import load_profile
from scop import UserError
from scop.config import RunSection
from scop.runtime.registry import STEPS, TRAINING_STEPS
from tests.helpers import ROOT

EXAMPLE = ROOT / "pipelines" / "clusters" / "example.yaml"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_for(load_profile(EXAMPLE), RunSection(experiment="mine"), path)
    return path.read_text()


@pytest.fixture(scope="module")
def documents(compiled: str) -> tuple[dict[str, Any], dict[str, Any]]:
    pipeline, platform = yaml.safe_load_all(compiled)
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def executor(step: str) -> str:
    return f"exec-{step.replace('_', '-')}"


def container(documents, step: str) -> dict[str, Any]:
    return documents[0]["deploymentSpec"]["executors"][executor(step)]["container"]


def test_tasks_and_their_inputs_are_those_of_the_local_pipeline(documents) -> None:
    local = next(yaml.safe_load_all((ROOT / "tests" / "golden" / "pipeline.yaml").read_text()))
    for part in ("root", "components"):
        assert _without_policies(documents[0][part]) == _without_policies(local[part])


def _without_policies(value: Any) -> Any:
    """Leave out what a cluster profile sets: retries and parallelism."""
    if isinstance(value, dict):
        return {k: _without_policies(v) for k, v in value.items() if k not in ("retryPolicy", "iteratorPolicy")}
    return [_without_policies(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize("step", list(STEPS))
def test_every_step_has_image_variables_secrets_and_user(documents, step: str) -> None:
    values, platform = container(documents, step), documents[1][executor(step)]
    profile = load_profile(EXAMPLE)
    assert values["image"] == profile.image
    variables = {entry["name"]: entry["value"] for entry in values["env"]}
    assert variables["SCOP_IMAGE"] == profile.image
    assert variables["SCOP_CHECKPOINTS"] == "s3://ml-artifacts/scop/checkpoints"
    assert variables["MLFLOW_EXPERIMENT_NAME"] == "mine"
    assert platform["fieldPathAsEnv"] == [{"name": "KFP_RUN_ID", "fieldPath": "metadata.labels['pipeline/runid']"}]
    secrets = {entry["secretName"]: entry["keyToEnv"] for entry in platform["secretAsEnv"]}
    assert {"envVar": "AWS_SECRET_ACCESS_KEY", "secretKey": "secret_key"} in secrets["scop-s3"]
    assert {"envVar": "MLFLOW_TRACKING_PASSWORD", "secretKey": "password"} in secrets["scop-mlflow"]
    (settings,) = platform["configMapAsEnv"]
    assert {"envVar": "AWS_ENDPOINT_URL_S3", "configMapKey": "s3_endpoint"} in settings["keyToEnv"]
    assert [entry["secretName"] for entry in platform["imagePullSecret"]] == ["registry"]
    assert platform["securityContext"] == {"runAsUser": "10001", "runAsGroup": "0", "runAsNonRoot": True}


@pytest.mark.parametrize("step", list(STEPS))
def test_only_training_steps_get_gpus(documents, step: str) -> None:
    values, platform = container(documents, step), documents[1][executor(step)]
    resources, variables = values["resources"], {entry["name"]: entry["value"] for entry in values["env"]}
    if step in TRAINING_STEPS:
        assert (resources["accelerator"]["resourceType"], resources["accelerator"]["resourceCount"]) == (
            "nvidia.com/gpu",
            "1",
        )
        assert (resources["resourceCpuRequest"], resources["resourceMemoryLimit"]) == ("8", "32Gi")
        assert platform["nodeSelector"]["labels"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
        (toleration,) = platform["tolerations"]
        assert toleration == {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        (affinity,) = platform["nodeAffinity"]
        assert affinity["weight"] == 50
        assert affinity["matchExpressions"][0]["values"] == ["eu-west-1a"]
        (memory,) = platform["emptyDirMounts"]
        assert (memory["mountPath"], memory["medium"], memory["sizeLimit"]) == ("/dev/shm", "Memory", "8Gi")
        assert platform["activeDeadlineSeconds"] == "172800"
        assert "nvidia.com/gpu x1" in variables["SCOP_REQUIRED_DEVICE"]
        assert "nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3" in variables["SCOP_REQUIRED_DEVICE"]
    else:
        assert "accelerator" not in resources
        assert (resources["resourceCpuRequest"], resources["resourceCpuLimit"]) == ("2", "4")
        assert platform["activeDeadlineSeconds"] == "7200"
        assert "SCOP_REQUIRED_DEVICE" not in variables
        assert not {"nodeSelector", "nodeAffinity", "tolerations", "emptyDirMounts"} & platform.keys()


def test_rejects_a_file_larger_than_kfp_accepts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.cluster.compilation.SIZE_LIMIT", 2**14)
    with pytest.raises(UserError, match="KFP accepts up to"):
        compile_for(load_profile(EXAMPLE), RunSection(), tmp_path / "pipeline.yaml")
    assert not (tmp_path / "pipeline.yaml").exists()


def test_retries_and_parallelism(documents) -> None:
    pipeline = documents[0]
    tasks = dict(pipeline["root"]["dag"]["tasks"])
    loop = next(task for task in tasks.values() if "parameterIterator" in task)
    assert loop["iteratorPolicy"] == {"parallelismLimit": 2}
    tasks |= pipeline["components"][loop["componentRef"]["name"]]["dag"]["tasks"]
    assert tasks["finetune"]["retryPolicy"] == {
        "maxRetryCount": 5,
        "backoffDuration": "30s",
        "backoffFactor": 2.0,
        "backoffMaxDuration": "600s",
    }
    assert tasks["evaluate"]["retryPolicy"]["maxRetryCount"] == 2


def test_evaluate_on_gpu(tmp_path: Path) -> None:
    values = yaml.safe_load(EXAMPLE.read_text()) | {"evaluate_on": "gpu"}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(values))
    compile_for(load_profile(tmp_path / "cluster.yaml"), RunSection(), tmp_path / "pipeline.yaml")
    pipeline, _ = yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text())
    executors = pipeline["deploymentSpec"]["executors"]
    assert "accelerator" in executors["exec-evaluate"]["container"]["resources"]
    assert "accelerator" not in executors["exec-export"]["container"]["resources"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("clases=1", "key 'clases' is unknown (did you mean 'classes'?)"),
        ("classes.gpu.node_selectors=1", "key 'classes.gpu.node_selectors' is unknown (did you mean 'node_selector'?)"),
        ("classes.gpu={node_selector: {a: b}}", "'classes.gpu.requests' is missing"),
        ("classes.cpu.requests.memory=8 GB", "'classes.cpu.requests.memory' is '8 GB'"),
        ("image=registry.example.com/scop-python:0.1.0", "has no digest, but require_digest is true"),
        ("image=NOT AN IMAGE", "not a valid image name"),
        ("classes.cpu.requests.cpu=8Gi", "'classes.cpu.requests.cpu' is '8Gi'"),
        ("classes.cpu.requests.memory=500m", "'classes.cpu.requests.memory' is '500m'"),
        ("classes.gpu.affinity=[{key: a, operator: In}]", "operator In requires values"),
        ("classes.cpu.nodes=2", "only class gpu supports several nodes"),
        ("pipeline_root=/home/me", "'pipeline_root' is '/home/me'"),
        ("secrets.scop-s3.key=not a variable", "'secrets.scop-s3.key' is 'not a variable'"),
        ("classes.gpu.tolerations=[{operator: Equal, value: x}]", "a toleration without a key requires"),
        ("classes.cpu.limits.cpu=1500m", "limits.cpu 1500m is below requests.cpu 2"),
        ("classes.cpu.limits.memory=8G", "limits.memory 8G is below requests.memory 8Gi"),
        ("classes.gpu={requests: {cpu: 1, memory: 1Gi}, limits: {cpu: 2, memory: 1Gi}, nodes: 2}", "remove gpu.limits"),
        ("secrets.scop-s3.key=SCOP_CHECKPOINTS", "sets SCOP_CHECKPOINTS, but SCOP_* and KFP_* are reserved"),
        ("secrets.scop-s3.key=AWS_REGION", "sets AWS_REGION, but secrets.scop-s3 sets it, too"),
    ],
)
def test_rejects_an_invalid_profile_in_one_line(tmp_path: Path, capsys, change: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_profile(EXAMPLE, [change])
    values = yaml.safe_load(EXAMPLE.read_text())
    key, _, value = change.partition("=")
    if "." not in key:
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(values | {key: yaml.safe_load(value)}))
        command = ["compile", "--cluster", str(tmp_path / "cluster.yaml"), "-o", str(tmp_path / "pipeline.yaml")]
        assert main(command) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("scop: error: cluster profile cluster.yaml:")
        assert printed.count("\n") == 1
        assert not (tmp_path / "pipeline.yaml").exists()


def test_compiles_offline_with_the_configuration_as_defaults(tmp_path: Path, capsys, monkeypatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("compiling needs no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    for path in (first, second):
        command = ["compile", "-f", "digits-resnet20", "--set", "finetune.epochs=7", "--cluster", str(EXAMPLE)]
        assert main([*command, "-o", str(path)]) == 0
    assert first.read_bytes() == second.read_bytes()
    pipeline, _ = yaml.safe_load_all(first.read_text())
    assert pipeline["root"]["inputDefinitions"]["parameters"]["finetune"]["defaultValue"]["epochs"] == 7
    assert main(["compile", "--cluster", str(tmp_path / "none.yaml"), "-o", str(first)]) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(("uri", "kind"), [("gs://bucket/checkpoints", "checkpoints"), ("runs", "artifact_root")])
def test_rejects_storage_that_pods_cannot_use(uri: str, kind: str, tmp_path: Path, capsys) -> None:
    command = ["compile", "--cluster", str(EXAMPLE), "-o", str(tmp_path / "pipeline.yaml")]
    assert main([*command, "--set", f"run.{kind}={uri}"]) == 2
    assert f"run.{kind} {uri} is " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["knockoff.batch_size=250"], "knockoff.batch_size 250 cannot be divided evenly: "),
        (["variants=[{finetune: {batch_size: 100}}]"], "(scop-0.45).finetune.batch_size 100 cannot be divided"),
        (["dense.compile=true"], "dense.compile does not support sync_batch_norm, and "),
    ],
)
def test_rejects_settings_that_the_profiles_gpus_cannot_share(
    tmp_path: Path, capsys, changes: list[str], message: str
) -> None:
    values = yaml.safe_load(EXAMPLE.read_text())
    values["classes"]["gpu"] |= {"nodes": 2, "accelerator": {"count": 4}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(values))
    command = ["--cluster", str(tmp_path / "cluster.yaml"), *(f"--set={change}" for change in changes)]
    assert main(["compile", "-o", str(tmp_path / "pipeline.yaml"), *command]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "classes.gpu of the cluster profile has 2 x 4 processes" in printed
    assert main(["submit", *command]) == 2
    assert message in capsys.readouterr().err


def test_warns_about_an_image_tag(tmp_path: Path, capsys) -> None:
    values = yaml.safe_load(EXAMPLE.read_text()) | {"image": "registry.example.com/scop:1", "require_digest": False}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(values))
    assert main(["compile", "--cluster", str(tmp_path / "cluster.yaml"), "-o", str(tmp_path / "p.yaml")]) == 0
    assert "KFP's cache does not notice when a tag moves" in capsys.readouterr().err


def test_step_without_its_required_gpu_exits_with_code_3(tmp_path: Path) -> None:
    wanted = "class gpu: resource nvidia.com/gpu x1, node selector gpu=h100"
    environment = os.environ | {"SCOP_REQUIRED_DEVICE": wanted, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    # The input does not exist: the device is checked before any data are read.
    command = [sys.executable, "-m", "pipelines.cli", "step", "train_dense", "--input", "dataset=none"]
    command += ["--output", f"model={tmp_path / 'out'}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1
    assert wanted in result.stderr
    record = json.loads((tmp_path / "out" / "step.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", 3)
    assert wanted in record["error"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step.json"]


def test_manifests_in_the_docs_are_valid() -> None:
    import kubernetes_validate

    text = (ROOT / "docs" / "cluster.md").read_text()
    manifests = [m for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) for m in yaml.safe_load_all(block)]
    assert len(manifests) >= 4
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.31", strict=True)
    launcher = next(m for m in manifests if m["metadata"]["name"] == "kfp-launcher")
    assert yaml.safe_load(launcher["data"]["providers"])["s3"]["default"]["credentials"]["secretRef"]
