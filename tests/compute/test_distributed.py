"""Training in two processes over gloo gives the same result as in one, and writes it once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scop.selection.scores import Scores
from scop.storage.manifest import read_folder
from tests.helpers import CLOSE, STEADY, STEADY_DENSE, run_in_processes


def mirrored(batches: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a source whose knockoffs depend only on the image, not on the process."""
    return lambda images, labels: images.flip(3)


@pytest.fixture(scope="module")
def dense(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of the same training in one process and in two, by number of processes."""
    folder = tmp_path_factory.mktemp("dense")
    for processes in (1, 2):
        output = {"model": folder / str(processes)}
        run_in_processes("train_dense", {"dense": STEADY_DENSE}, {"dataset": digits_folder}, output, processes)
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
        run_in_processes("train_knockoff", {"knockoff": section}, inputs, output, processes)
        scores[processes] = Scores.load(output["scores"] / "scores.safetensors")
    one, two = (scores[n].gate if score == "published" else scores[n].score for n in (1, 2))
    moved = max(float((values - values.mean()).abs().max()) for values in one.values())
    assert moved > 0
    for layer, values in one.items():
        scale = moved if score == "published" else float(values.max())
        torch.testing.assert_close(two[layer], values, rtol=0, atol=0.03 * scale)


@pytest.mark.slow
def test_unsynchronised_batch_norms_use_only_their_shard(
    dense: dict[int, Path], digits_folder: Path, tmp_path: Path
) -> None:
    section = STEADY_DENSE | {"sync_batch_norm": False}
    run_in_processes("train_dense", {"dense": section}, {"dataset": digits_folder}, {"model": tmp_path / "model"}, 2)
    name = "first_norm.running_var"
    one, two = load_file(dense[1] / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert not torch.allclose(one[name], two[name], **CLOSE)
    assert history(tmp_path / "model")[-1]["loss"] == pytest.approx(history(dense[1])[-1]["loss"], rel=0.2)


@pytest.mark.slow
def test_two_processes_fine_tune_with_a_teacher_like_one(
    dense: dict[int, Path], digits_folder: Path, tmp_path: Path
) -> None:
    variant = {"method": "l1", "prune_rate": 0.5, "rounds": 2}
    section = STEADY | {"recalibration_batches": 5, "distillation": {"weight": 0.5}}
    scores = tmp_path / "scores"
    knockoff = {"epochs": 1, "batch_size": 64}
    run_in_processes(
        "train_knockoff", {"knockoff": knockoff}, {"dataset": digits_folder, "dense": dense[1]}, {"scores": scores}, 1
    )
    artifacts = {"dense": dense[1], "scores": scores}
    run_in_processes("select_channels", {"variant": variant}, artifacts, {"plan": tmp_path / "plan"}, 1)
    models = {}
    for processes in (1, 2):
        inputs = {"dataset": digits_folder, "dense": dense[1], "plan": tmp_path / "plan"}
        output = {"model": tmp_path / str(processes)}
        run_in_processes("finetune", {"finetune": section, "variant": variant}, inputs, output, processes)
        models[processes] = load_file(output["model"] / "model.safetensors")
    for name, tensor in models[1].items():
        torch.testing.assert_close(models[2][name], tensor, **CLOSE)
