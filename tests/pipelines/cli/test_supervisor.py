"""Runs that a signal stops, and runs whose step is killed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from pipelines.compare.experiments import Mlflow, Source
from tests.helpers import ROOT


@pytest.mark.slow
def test_names_a_killed_step_and_marks_it_in_mlflow(tmp_path: Path, monkeypatch, capsys) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "run", "--out", str(tmp_path), "--set", "dense.epochs=500"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "SCOP_"))}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        while not list(tmp_path.glob("checkpoints/train_dense-*/*.json")):
            assert run.poll() is None
        for step in psutil.Process(run.pid).children(recursive=True):
            step.kill()
        error = run.communicate(timeout=120)[1].decode()
    assert run.returncode == 1
    assert "step train_dense failed" in error
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(database)
    runs = client.search_runs([client.get_experiment_by_name("digits-resnet20").experiment_id])
    status = {run.info.run_name: run.info.status for run in runs}
    assert (status.pop("train_dense"), status.pop("prepare_data")) == ("KILLED", "FINISHED")
    assert list(status.values()) == ["FAILED"]
    (failure,) = Mlflow(Source("none", database)).read(["digits-resnet20"]).failures
    assert failure.name == "train_dense"
    assert failure.error.startswith("step train_dense failed: its process was killed by SIGKILL")


@pytest.mark.slow
def test_stopping_a_run_stops_its_step_after_a_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "run", "--out", str(tmp_path), "--set", "dense.epochs=500"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "SCOP_"))}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        while not list(tmp_path.glob("checkpoints/train_dense-*/*.json")):
            assert run.poll() is None
        steps = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGTERM)
        error = run.communicate(timeout=120)[1].decode()
    assert run.returncode == 143
    assert re.search(rf"scop: stopped; continue with: scop run --resume {tmp_path}/digits-resnet20-\S+$", error.strip())
    alive = [step for step in steps if step.is_running() and step.status() != psutil.STATUS_ZOMBIE]
    assert steps and not alive
    (record,) = tmp_path.glob("*/train_dense/model/step.json")
    assert json.loads(record.read_text())["status"] == "stopped"
    assert list(tmp_path.glob("checkpoints/train_dense-*/*.json"))


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopping_a_run_starts_no_further_variant(tmp_path: Path, sign: signal.Signals, code: int) -> None:
    """Only the command receives the signal, as from a scheduler. KFP alone would continue with the next variant."""
    small = {"dense.epochs": 1, "knockoff.epochs": 1, "finetune.epochs": 500}
    variants = "variants=[{name: a}, {name: b, method: l1}, {name: c, method: none}]"
    command = [sys.executable, "-m", "pipelines.cli", "run", "--set", variants]
    command += [f"--set={key}={value}" for key, value in small.items()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SCOP_"))}
    environment |= {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as run:
        while not list(tmp_path.glob("runs/checkpoints/finetune-*/*.json")):
            assert run.poll() is None
        run.send_signal(sign)
        _, error = run.communicate(timeout=120)
    assert run.returncode == code
    (folder,) = (path.parent for path in tmp_path.glob("runs/*/config.yaml"))
    assert error.splitlines()[-1] == f"scop: stopped; continue with: scop run --resume {folder}"
    records = [json.loads(path.read_text()) for path in folder.glob("*/*/*/step.json")]
    assert {(r["config"]["variant"]["name"], r["step"], r["status"]) for r in records} == {
        ("a", "select_channels", "done"),
        ("a", "finetune", "stopped"),
    }
