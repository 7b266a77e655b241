"""A step in several processes: settings, failures, signals and resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from scop import UserError
from scop.runtime.processes import _reason
from tests.helpers import ROOT, STEADY_DENSE, run_in_processes, run_step


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
    config = {"dense": STEADY_DENSE | {"batch_size": batch_size}}
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
    assert str(_reason(tmp_path, killed)) == "process 1 was killed by SIGKILL (possibly out of memory)"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_preempted_pod_resumes_after_a_restart(digits_folder: Path, tmp_path: Path, processes: int) -> None:
    """Simulates a cluster: SIGTERM, a grace period, and the same command again."""
    checkpoints = tmp_path / "checkpoints"
    environment = os.environ | {
        "SCOP_PROCESSES": str(processes),
        "SCOP_CHECKPOINTS": str(checkpoints),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "KFP_RUN_ID": "a-run",
    }
    settings = [f"--set=dense={json.dumps(STEADY_DENSE | {'epochs': 12})}"]
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
    run_in_processes(
        "train_dense", {"dense": STEADY_DENSE | {"epochs": 12}}, {"dataset": digits_folder}, whole, processes
    )
    one, two = load_file(tmp_path / "whole" / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("scop").experiment_id], "tags.`scop.step` = 'train_dense'")
    steps = [metric.step for run in runs for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, 13))


@pytest.mark.slow
def test_workers_exit_when_their_step_is_killed(digits_folder: Path, tmp_path: Path) -> None:
    settings = [f"--set=dense={json.dumps(STEADY_DENSE | {'epochs': 500})}"]
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
