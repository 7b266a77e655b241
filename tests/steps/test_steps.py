"""All steps on folders, as `scop step` and the components run them."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scop import UserError, load_model
from scop.models.artifacts import WEIGHTS, load_settings
from scop.report.plots import confusion_matrix
from scop.selection.scores import Scores
from scop.storage.manifest import read_folder
from tests.helpers import ROOT, TINY, run_step, train_tiny


def test_steps_run_on_the_outputs_of_earlier_steps(digits_folder: Path, tmp_path: Path) -> None:
    def folder(name: str) -> str:
        return str(tmp_path / name)

    dataset = {"dataset": str(digits_folder)}
    variant = {"method": "scop", "prune_rate": 0.5, "residual": "coupled", "round_to": 8}
    finetune = {"epochs": 3, "batch_size": 64, "lr": 0.05, "distillation": {"weight": 0.5}}
    train_tiny(digits_folder, tmp_path / "dense", epochs=6, lr=0.05)
    dense = {"dense": folder("dense")}
    knockoff = {"epochs": 1, "batch_size": 64}
    run_step("train_knockoff", {"knockoff": knockoff}, dataset | dense, {"scores": folder("scores")})
    run_step("select_channels", {"variant": variant}, dense | {"scores": folder("scores")}, {"plan": folder("plan")})
    run_step(
        "finetune",
        {"finetune": finetune, "variant": variant},
        dataset | dense | {"plan": folder("plan")},
        {"model": folder("pruned")},
    )
    measured = run_step(
        "evaluate",
        {"evaluate": {"batch_sizes": [1, 8], "repeats": 3}, "variant": variant},
        dataset | dense | {"pruned": folder("pruned")},
        {"evaluation": folder("evaluation")},
    )
    run_step(
        "export",
        {"export": {}, "variant": variant},
        dataset | {"pruned": folder("pruned"), "evaluation": folder("evaluation")},
        {"exported": folder("exported")},
    )
    run_step(
        "compare",
        {},
        {"scores": folder("scores"), "evaluations": [folder("evaluation")], "exports": [folder("exported")]},
        {"report": folder("report")},
    )

    assert sum(map(sum, measured.confusion)) == 360
    assert measured.metrics["params_removed"] > 0.5
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())["variants"][0]
    assert set(summary["dense"]) == {"top1", "top5", "params", "macs", "bytes", "latency_ms"}
    assert set(summary["pruned"]["latency_ms"]) == {"1", "8"}
    assert set(summary["pruned"]["latency_ms"]["1"]) == {"p50", "p95"}
    assert set(summary["exactness"]) == {"masked_pruned", "pruned_reloaded", "pruned_onnx", "pruned_pt2"}
    assert max(summary["exactness"].values()) < 1e-4
    assert Path(summary["onnx"]).is_file()
    exported = load_model(summary["model"])
    assert (exported.first.out_channels, exported.second.out_channels) == (
        8,
        8,
    )  # 12 of 24 is equally far from 8 and 16
    assert summary["pruned"]["top1"] > 0.7
    record = json.loads((tmp_path / "pruned" / "step.json").read_text())
    assert record["status"] == "done"
    assert record["config"]["finetune"]["epochs"] == 3
    assert record["inputs"]["plan"]["uri"] == folder("plan")
    assert len(record["inputs"]["plan"]["content"]) == 64


def test_given_weights_are_used_unchanged(digits_folder: Path, model_folder: Path, tmp_path: Path, trained) -> None:
    train_tiny(digits_folder, tmp_path / "dense", weights=str(model_folder / "model.safetensors"))
    loaded = load_model(tmp_path / "dense")
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.fixture(scope="module")
def plan_folder(digits_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    dense = {"dense": str(model_folder)}
    knockoff = {"knockoff": {"epochs": 1, "batch_size": 64}}
    run_step("train_knockoff", knockoff, dense | {"dataset": str(digits_folder)}, {"scores": str(folder / "scores")})
    scores = dense | {"scores": str(folder / "scores")}
    run_step("select_channels", {"variant": {"method": "l1"}}, scores, {"plan": str(folder / "plan")})
    return folder / "plan"


def test_sensitivity_is_an_artifact_of_the_knockoff_phase(
    digits_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    settings = {"epochs": 1, "batch_size": 64, "sensitivity": {"rates": [0, 0.5, 0.75], "images": 50}}
    inputs, scores = {"dataset": str(digits_folder), "dense": str(model_folder)}, tmp_path / "scores"
    run_step("train_knockoff", {"knockoff": settings}, inputs, {"scores": str(scores)})
    table = json.loads((scores / "sensitivity.json").read_text())
    assert (table["split"], table["images"], table["rates"]) == ("validation", 50, [0, 0.5, 0.75])
    assert set(table["top1"]) == {"first", "second", "third"}
    whole = {accuracies[0] for accuracies in table["top1"].values()}
    assert len(whole) == 1  # at rate 0, no layer loses channels
    assert all(accuracies[2] < accuracies[0] for accuracies in table["top1"].values())
    assert {"sensitivity.json", "sensitivity.png"} <= set(read_folder(scores).files)


@pytest.mark.parametrize(
    "step",
    ["train_dense", *(pytest.param(step, marks=pytest.mark.slow) for step in ("train_knockoff", "finetune"))],
)
def test_a_killed_step_resumes_to_the_same_weights(
    step: str, digits_folder: Path, model_folder: Path, plan_folder: Path, tmp_path: Path
) -> None:
    inputs = {"dataset": str(digits_folder), "dense": str(model_folder), "plan": str(plan_folder)}
    section, taken, output, weights = {
        "train_dense": ({"dense": TINY}, ["dataset"], "model", "model.safetensors"),
        "train_knockoff": ({"knockoff": {}}, ["dataset", "dense"], "scores", "scores.safetensors"),
        "finetune": ({"finetune": {}, "variant": {}}, ["dataset", "dense", "plan"], "model", "model.safetensors"),
    }[step]
    name = next(iter(section))
    config = section | {name: section[name] | {"epochs": 30, "lr": 0.05, "precision": "fp32", "batch_size": 64}}
    inputs = {key: inputs[key] for key in taken}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = (
        f"from scop.runtime.execution import execute; execute({step!r}, {config!r}, {inputs!r}, "
        f"{{{output!r}: {str(killed)!r}}})"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not list(killed.glob("checkpoints/*/*.json")):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match="so it is unfinished"):
        read_folder(killed)
    other = config | {name: config[name] | {"lr": 0.01}}
    with pytest.raises(UserError, match="another configuration or other inputs"):
        run_step(step, other, inputs, {output: str(killed)})

    for folder in (killed, whole):
        run_step(step, config, inputs, {output: str(folder)})
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert not list(killed.glob("checkpoints/*/*"))
    assert len(json.loads((killed / "history.json").read_text())) == 30


def test_plots_class_names_that_look_like_formulas(tmp_path: Path) -> None:
    confusion_matrix([[3, 1], [0, 2]], ["$10_$20", "a^b$"], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_settings_identify_weights_by_content_not_by_path(
    digits_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    def settings_of(name: str, **settings: object) -> dict[str, object]:
        train_tiny(digits_folder, tmp_path / name, **settings)
        return load_settings(tmp_path / name)["dense"]

    (tmp_path / "elsewhere").mkdir()
    same = shutil.copy(model_folder / WEIGHTS, tmp_path / "elsewhere" / "copy.safetensors")
    first, again = (settings_of(n, weights=str(w)) for n, w in (("a", model_folder / WEIGHTS), ("b", same)))
    trained, started = settings_of("c"), settings_of("d", pretrained=str(same))
    other = settings_of("e", weights=str(tmp_path / "c" / WEIGHTS))
    assert first == again
    assert len({json.dumps(found, sort_keys=True) for found in (first, other, started, trained)}) == 4


@pytest.mark.parametrize("score", ["fisher", "published"])
@pytest.mark.parametrize("model", ["Aliased", "OneConvolutionBlocks"])
def test_scores_unusual_networks(model: str, score: str, digits_folder: Path, tmp_path: Path) -> None:
    train_tiny(digits_folder, tmp_path / "dense", model=f"tests.networks:{model}")
    inputs = {"dataset": str(digits_folder), "dense": str(tmp_path / "dense")}
    knockoff = {"score": score, "epochs": 1, "batch_size": 64}
    run_step("train_knockoff", {"knockoff": knockoff}, inputs, {"scores": str(tmp_path / "scores")})
    found = Scores.load(tmp_path / "scores" / "scores.safetensors")
    assert found.keys() == ({"first", "second", "third"} if model == "Aliased" else {"blocks.0", "blocks.1"})
    assert all(scores.unique().numel() > len(scores) // 2 for scores in found.values())


def test_rejects_a_dense_model_as_the_pruned_one(digits_folder: Path, tmp_path: Path, model_folder: Path) -> None:
    inputs = {"dataset": str(digits_folder), "dense": str(model_folder), "pruned": str(model_folder)}
    with pytest.raises(UserError, match="holds no pruned model"):
        run_step("evaluate", {"evaluate": {}, "variant": {}}, inputs, {"evaluation": str(tmp_path / "out")})


def test_inexact_pruning_fails_the_step(digits_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    train_tiny(digits_folder, tmp_path / "dense", model="tests.networks:Offset")
    variant = {"method": "l1", "prune_rate": 0.5}
    inputs = {"dataset": str(digits_folder), "dense": str(tmp_path / "dense")}
    run_step("train_knockoff", {"knockoff": {"epochs": 1}}, inputs, {"scores": str(tmp_path / "scores")})
    select = {"dense": inputs["dense"], "scores": str(tmp_path / "scores")}
    run_step("select_channels", {"variant": variant}, select, {"plan": str(tmp_path / "plan")})
    with pytest.raises(UserError, match="channels of 'conv' cannot be removed exactly"):
        run_step(
            "finetune",
            {"finetune": {"epochs": 1}, "variant": variant},
            inputs | {"plan": str(tmp_path / "plan")},
            {"model": str(tmp_path / "pruned")},
        )
