"""Tests of checkpoints in a local folder and in S3: resuming, retention and damage."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scop import UserError
from scop.data.batches import Batches
from scop.data.dataset import Dataset
from scop.errors import Stopped
from scop.knockoffs.phase import train_knockoffs
from scop.storage import s3
from scop.storage.cache import Cache
from scop.storage.checkpoints import Checkpoints
from scop.storage.files import delete_files, join_uri, list_files, read_bytes, read_if_exists, write_bytes
from scop.storage.folders import fetch_folder
from scop.storage.manifest import read_folder
from scop.training.checkpointing import Checkpointing
from tests.fakes import services
from tests.helpers import ROOT, run_step
from tests.training.test_training import same, train


@pytest.fixture(params=["folder", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("bucket") + "/checkpoints" if request.param == "s3" else str(tmp_path / "kept")


def after(steps: int) -> Callable[[], bool]:
    """Return a callback that requests a stop after this number of steps."""
    count = itertools.count(1)
    return lambda: next(count) >= steps


def test_resumes_after_a_kill_with_identical_weights(digits: Dataset, folder: str, capsys) -> None:
    expected, history = train(digits, epochs=4)
    checkpoints = Checkpoints(folder, "abc")
    train(digits, epochs=4, checkpoints=checkpoints, stop_after=2)
    resumed, resumed_history = train(digits, epochs=4, checkpoints=checkpoints)
    assert f"resumes after epoch 2 of 4, from {folder}" in capsys.readouterr().out
    assert same(expected, resumed)
    assert [record.loss for record in resumed_history] == [record.loss for record in history]


def test_resumes_within_an_epoch_with_identical_weights(digits: Dataset, tmp_path: Path, capsys) -> None:
    expected, history = train(digits, epochs=3, crop_padding=1)
    checkpoints = Checkpoints(str(tmp_path), "abc")
    for steps in (27, 20):  # an epoch has 20 steps
        with pytest.raises(Stopped, match="stopped in epoch"):
            train(digits, epochs=3, checkpoints=checkpoints, stopping=after(steps), crop_padding=1)
    resumed, resumed_history = train(digits, epochs=3, checkpoints=checkpoints, crop_padding=1)
    assert "resumes after epoch 1 and 7 steps of 3" in capsys.readouterr().out
    assert same(expected, resumed)
    assert [record.loss for record in resumed_history] == [record.loss for record in history]
    assert [record.top1 for record in resumed_history] == [record.top1 for record in history]


@pytest.mark.parametrize("score", ["fisher", "published"])
def test_knockoff_training_resumes_with_identical_scores(score: str, model, batches: Batches, tmp_path: Path) -> None:
    """Knockoffs are drawn from torch's global generator; a checkpoint stores its state."""

    def run(**keys) -> dict[str, torch.Tensor]:
        batches.set_epoch(0)
        scores = train_knockoffs(model, batches, epochs=2, precision="fp32", score=score, **keys)
        return {f"{kind} {layer}": getattr(scores, kind)[layer] for kind in ("score", "signed") for layer in scores}

    expected = run()
    with pytest.raises(Stopped):
        run(checkpointing=Checkpointing(Checkpoints(str(tmp_path), "abc"), after(9)))
    resumed = run(checkpointing=Checkpointing(Checkpoints(str(tmp_path), "abc")))
    assert all(torch.equal(expected[layer], resumed[layer]) for layer in expected)


def test_resumes_the_average_of_weights(digits: Dataset, tmp_path: Path) -> None:
    def weights(**keys) -> dict[str, torch.Tensor]:
        return train(digits, epochs=3, ema=0.9, keep="best", **keys)[0].state_dict()

    expected = weights()
    checkpoints = Checkpoints(str(tmp_path), "abc")
    with pytest.raises(Stopped):
        weights(checkpoints=checkpoints, stopping=after(30))
    resumed = weights(checkpoints=checkpoints)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_keeps_only_the_newest_checkpoints(digits: Dataset, folder: str) -> None:
    train(digits, epochs=4, checkpoints=Checkpoints(folder, "abc", keep=2))
    assert list_files(folder) == [f"0000{n}-00000000.{end}" for n in (3, 4) for end in ("json", "pt")]
    Checkpoints(folder, "abc").remove()
    assert list_files(folder) == []


def test_skips_a_damaged_checkpoint_with_a_warning(digits: Dataset, folder: str, capsys) -> None:
    expected, _ = train(digits, epochs=4)
    checkpoints = Checkpoints(folder, "abc")
    train(digits, epochs=4, checkpoints=checkpoints, stop_after=2)
    newest = join_uri(folder, "00002-00000000.pt")
    write_bytes(newest, read_bytes(newest)[:1000])
    capsys.readouterr()
    resumed, _ = train(digits, epochs=4, checkpoints=checkpoints)
    printed = capsys.readouterr().out
    assert f"warning: checkpoint {newest} is skipped: it does not match its checksum" in printed
    assert "resumes after epoch 1 of 4" in printed
    assert same(expected, resumed)


def test_skips_a_checkpoint_of_another_configuration(digits: Dataset, folder: str, capsys) -> None:
    train(digits, epochs=1, checkpoints=Checkpoints(folder, "abc"))
    assert Checkpoints(folder, "def").load() is None
    assert "it belongs to another configuration or other inputs" in capsys.readouterr().out


def test_keeps_new_checkpoints_if_later_ones_are_damaged(digits: Dataset, folder: str) -> None:
    train(digits, epochs=3, checkpoints=Checkpoints(folder, "abc"))
    for epoch in (2, 3):
        write_bytes(f"{folder}/{epoch:05}-00000000.pt", b"damaged")
    checkpoints = Checkpoints(folder, "abc")
    assert checkpoints.load() is None
    checkpoints.save({"epoch": 1}, 1)
    assert checkpoints.load() == {"epoch": 1}
    checkpoints.save({"epoch": 2}, 2)
    assert checkpoints.load() == {"epoch": 2}


def test_an_unreachable_server_is_an_error_not_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in services.environment(f"http://127.0.0.1:{services.free_port()}").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.forget_client()
    with pytest.raises(UserError, match="cannot be reached"):  # starting over would discard all progress
        Checkpoints("s3://bucket/checkpoints", "abc").load()
    s3.forget_client()


def test_training_continues_if_a_checkpoint_cannot_be_written(
    digits: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    train(digits, epochs=1, checkpoints=Checkpoints(str(tmp_path / "file" / "below"), "abc"))
    assert "warning: test: no checkpoint after epoch 1: cannot write" in capsys.readouterr().out


def test_ignores_a_checkpoint_without_its_json_file(digits: Dataset, folder: str) -> None:
    train(digits, epochs=1, checkpoints=Checkpoints(folder, "abc"))
    delete_files(folder, ["00001-00000000.json"])
    assert Checkpoints(folder, "abc").load() is None


@pytest.mark.parametrize("step", ["train_dense", pytest.param("train_knockoff", marks=pytest.mark.slow)])
def test_step_writes_a_checkpoint_on_sigterm_and_resumes(
    step: str, digits_folder: Path, model_folder: Path, bucket: str, tmp_path: Path, cache: Cache
) -> None:
    config, inputs, output, weights = {
        "train_dense": (
            {"dense": {"model": "tests.networks:Plain", "epochs": 16, "batch_size": 64, "precision": "fp32"}},
            {"dataset": str(digits_folder)},
            "model",
            "model.safetensors",
        ),
        "train_knockoff": (
            {"knockoff": {"epochs": 20, "batch_size": 64, "precision": "fp32"}},
            {"dataset": str(digits_folder), "dense": str(model_folder)},
            "scores",
            "scores.safetensors",
        ),
    }[step]
    stopped, expected = f"{bucket}/stopped", tmp_path / "expected"
    call = f"execute({step!r}, {config!r}, {inputs!r}, {{{output!r}: {stopped!r}}})"
    code = f"from scop.runtime.execution import execute; {call}"
    environment = os.environ | {"SCOP_CHECKPOINTS": f"{bucket}/checkpoints"}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while not list_files(f"{bucket}/checkpoints"):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 143
    assert "rerun it to resume" in printed
    assert json.loads(read_bytes(f"{stopped}/step.json"))["status"] == "stopped"
    assert read_if_exists(f"{stopped}/manifest.json") is None

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "resumes after epoch" in again.stdout
    assert list_files(f"{bucket}/checkpoints") == []
    run_step(step, config, inputs, {output: str(expected)})
    read_folder(expected)
    assert (fetch_folder(stopped, cache) / weights).read_bytes() == (expected / weights).read_bytes()
    assert json.loads(read_bytes(f"{stopped}/step.json"))["status"] == "done"
