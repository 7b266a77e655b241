"""Training in two processes over gloo: the real steps give the same result as one process and write it once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scop import UserError
from scop.data.batches import Augmentation, Batches
from scop.data.dataset import Dataset
from scop.runtime.processes import _reason
from scop.selection.scores import Scores
from scop.storage.manifest import read_folder
from tests.helpers import ROOT, run_step

# Momentum would amplify rounding errors; without it, the weights of two runs can be compared directly.
STEADY = {"epochs": 2, "batch_size": 64, "lr": 0.02, "momentum": 0.0, "precision": "fp32", "crop_padding": 1}
DENSE = STEADY | {"model": "tests.networks:Plain"}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def mirrored(batches: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a source whose knockoffs depend only on the image, not on the process."""
    return lambda images, labels: images.flip(3)


def run(step: str, config: dict[str, Any], inputs: dict[str, Path], output: dict[str, Path], processes: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCOP_PROCESSES", str(processes))
        patch.setenv("PYTHONPATH", str(ROOT))
        paths = {name: str(path) for name, path in inputs.items()}
        return run_step(step, config, paths, {name: str(path) for name, path in output.items()})


@pytest.fixture(scope="module")
def dense(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of the same training in one process and in two, by number of processes."""
    folder = tmp_path_factory.mktemp("dense")
    for processes in (1, 2):
        output = {"model": folder / str(processes)}
        run("train_dense", {"dense": DENSE}, {"dataset": digits_folder}, output, processes)
    return {processes: folder / str(processes) for processes in (1, 2)}


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "history.json").read_text())


def test_two_processes_train_the_same_network_as_one(dense: dict[int, Path]) -> None:
    one, two = (load_file(dense[count] / "model.safetensors") for count in (1, 2))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, **CLOSE)


def test_metrics_cover_the_whole_batch(dense: dict[int, Path]) -> None:
    for one, two in zip(history(dense[1]), history(dense[2]), strict=True):
        for key in ("loss", "top1", "validation_loss", "validation_top1"):
            assert two[key] == pytest.approx(one[key], rel=0.01), key


def test_outputs_are_complete_and_written_once(dense: dict[int, Path]) -> None:
    assert read_folder(dense[1]).files.keys() == read_folder(dense[2]).files.keys()
    assert [json.loads((dense[count] / "step.json").read_text())["machine"]["processes"] for count in (1, 2)] == [1, 2]
    assert sorted(path.name for path in dense[2].iterdir()) == sorted(path.name for path in dense[1].iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("score", ["fisher", "published"])
def test_two_processes_compute_the_same_scores_as_one(
    score: str, dense: dict[int, Path], digits_folder: Path, tmp_path: Path
) -> None:
    section = {"source": "tests.compute.test_distributed:mirrored", "epochs": 1, "batch_size": 64, "precision": "fp32"}
    section |= {"score": score}
    inputs = {"dataset": digits_folder, "dense": dense[1]}
    scores = {}
    for processes in (1, 2):
        output = {"scores": tmp_path / str(processes)}
        run("train_knockoff", {"knockoff": section}, inputs, output, processes)
        scores[processes] = Scores.load(output["scores"] / "scores.safetensors")
    one, two = (scores[n].gate if score == "published" else scores[n].score for n in (1, 2))
    moved = max(float((values - values.mean()).abs().max()) for values in one.values())
    assert moved > 0
    for layer, values in one.items():
        scale = moved if score == "published" else float(values.max())
        torch.testing.assert_close(two[layer], values, rtol=0, atol=0.03 * scale)


def test_shards_partition_each_batch(digits: Dataset) -> None:
    def batches(share: tuple[int, int]) -> Batches:
        augmentation = Augmentation(crop_padding=1, flip=True)
        return Batches(digits["train"], digits.info, 60, torch.device("cpu"), augmentation, shard=share)

    for whole, *parts in zip(batches((0, 1)), *(batches((rank, 3)) for rank in range(3)), strict=True):
        assert torch.equal(torch.cat([images for images, _ in parts]), whole[0])
        assert torch.equal(torch.cat([labels for _, labels in parts]), whole[1])


def test_evaluation_shards_cover_every_image_once(digits: Dataset) -> None:
    split = digits["validation"]
    shares = [Batches(split, digits.info, 50, torch.device("cpu"), shard=(rank, 3)) for rank in range(3)]
    labels = torch.cat([labels for share in shares for _, labels in share])
    assert len(labels) == len(split)
    assert torch.equal(labels.bincount(), torch.from_numpy(split.labels).bincount())


@pytest.mark.parametrize(
    ("count", "batch_size", "message"),
    [
        (
            "two",
            64,
            "variable SCOP_PROCESSES is 'two': Input should be a valid integer, unable to parse string as an integer",
        ),
        ("2", 63, "batch_size 63 cannot be divided among 2 processes; use a multiple of 2"),
    ],
)
def test_reports_impossible_settings_in_one_line(
    digits_folder: Path, tmp_path: Path, monkeypatch, count: str, batch_size: int, message: str
) -> None:
    monkeypatch.setenv("SCOP_PROCESSES", count)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = {"dense": DENSE | {"batch_size": batch_size}}
    with pytest.raises(UserError) as error:
        run_step("train_dense", config, {"dataset": str(digits_folder)}, {"model": str(tmp_path / "model")})
    assert message in str(error.value)
    assert count == "two" or json.loads((tmp_path / "model" / "step.json").read_text())["error"] == message


def test_reports_the_first_failure_as_the_cause(tmp_path: Path) -> None:
    failures = [(0, "failure", "connection closed by peer", 2.0), (1, "failure", "CUDA out of memory", 1.0)]
    for rank, kind, message, when in failures:
        failure = {"rank": rank, "kind": kind, "message": message, "time": when}
        (tmp_path / f"failure-{rank}.json").write_text(json.dumps(failure))
    assert str(_reason(tmp_path, RuntimeError())) == "process 1: CUDA out of memory"
    killed = RuntimeError()
    killed.failures = {1: SimpleNamespace(exitcode=-signal.SIGKILL), 0: SimpleNamespace(exitcode=1)}
    assert str(_reason(tmp_path, killed)) == "process 1 was ended by SIGKILL, perhaps for lack of memory"


@pytest.mark.slow
def test_unsynchronised_batch_norms_use_only_their_shard(
    dense: dict[int, Path], digits_folder: Path, tmp_path: Path
) -> None:
    section = DENSE | {"sync_batch_norm": False}
    run("train_dense", {"dense": section}, {"dataset": digits_folder}, {"model": tmp_path / "model"}, 2)
    name = "first_norm.running_var"
    one, two = load_file(dense[1] / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert not torch.allclose(one[name], two[name], **CLOSE)
    assert history(tmp_path / "model")[-1]["loss"] == pytest.approx(history(dense[1])[-1]["loss"], rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_preempted_pod_resumes_after_a_restart(
    dense: dict[int, Path], digits_folder: Path, tmp_path: Path, processes: int
) -> None:
    """Simulates a cluster: SIGTERM, a grace period, and the same command again."""
    checkpoints = tmp_path / "checkpoints"
    environment = os.environ | {
        "SCOP_PROCESSES": str(processes),
        "SCOP_CHECKPOINTS": str(checkpoints),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "KFP_RUN_ID": "a-run",
    }
    settings = [f"--set=dense={json.dumps(DENSE | {'epochs': 12})}"]
    paths = ["--input", f"dataset={digits_folder}", "--output", f"model={tmp_path}/model"]
    command = [sys.executable, "-m", "pipelines.cli", "step", "train_dense", *settings, *paths]
    first = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not list(checkpoints.rglob("*.json")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 143, output
    assert "stopped in epoch" in output
    assert "Traceback" not in output
    record = json.loads((tmp_path / "model" / "step.json").read_text())
    assert record["status"] == "stopped"
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("resumes after epoch") == 1
    assert not list(checkpoints.rglob("*.pt"))

    whole = {"model": tmp_path / "whole"}
    run("train_dense", {"dense": DENSE | {"epochs": 12}}, {"dataset": digits_folder}, whole, processes)
    one, two = load_file(tmp_path / "whole" / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("scop").experiment_id], "tags.`scop.step` = 'train_dense'")
    steps = [metric.step for run in runs for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, 13))


@pytest.mark.slow
def test_two_processes_fine_tune_with_a_teacher_like_one(
    dense: dict[int, Path], digits_folder: Path, tmp_path: Path
) -> None:
    variant = {"method": "l1", "prune_rate": 0.5, "rounds": 2}
    section = STEADY | {"recalibration_batches": 5, "distillation": {"weight": 0.5}}
    scores = tmp_path / "scores"
    knockoff = {"epochs": 1, "batch_size": 64}
    run("train_knockoff", {"knockoff": knockoff}, {"dataset": digits_folder, "dense": dense[1]}, {"scores": scores}, 1)
    artifacts = {"dense": dense[1], "scores": scores}
    run("select_channels", {"variant": variant}, artifacts, {"plan": tmp_path / "plan"}, 1)
    models = {}
    for processes in (1, 2):
        inputs = {"dataset": digits_folder, "dense": dense[1], "plan": tmp_path / "plan"}
        output = {"model": tmp_path / str(processes)}
        run("finetune", {"finetune": section, "variant": variant}, inputs, output, processes)
        models[processes] = load_file(output["model"] / "model.safetensors")
    for name, tensor in models[1].items():
        torch.testing.assert_close(models[2][name], tensor, **CLOSE)


@pytest.mark.slow
def test_workers_exit_when_their_step_is_killed(digits_folder: Path, tmp_path: Path) -> None:
    settings = [f"--set=dense={json.dumps(DENSE | {'epochs': 500})}"]
    paths = ["--input", f"dataset={digits_folder}", "--output", f"model={tmp_path}/model"]
    command = [sys.executable, "-m", "pipelines.cli", "step", "train_dense", *settings, *paths]
    environment = os.environ | {"SCOP_PROCESSES": "2"}
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL) as step:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "model").glob("checkpoints/*/*.json")):
            assert step.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers = psutil.Process(step.pid).children(recursive=True)
        step.kill()
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=30)[1] == []
