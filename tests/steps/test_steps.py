"""Steps on folders, as `scop step` and the components run them."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.cli.main import main
from scop import UserError, load_model
from scop.environment import StepEnvironment
from scop.models.artifacts import WEIGHTS, load_settings
from scop.report.plots import confusion_matrix
from scop.runtime.record import StepRecord
from scop.runtime.registry import STEPS
from scop.runtime.result import StepResult
from scop.runtime.step import find_step
from scop.selection.scores import Scores
from scop.storage.manifest import MANIFEST, read_folder
from tests.helpers import ROOT, run_step

TINY = {"model": "tests.networks:Plain", "epochs": 1, "batch_size": 64}


def train_dense(dataset: Path, output: Path, **settings: object) -> None:
    run_step("train_dense", {"dense": TINY | settings}, {"dataset": str(dataset)}, {"model": str(output)})


def test_all_steps_in_a_row(digits_folder: Path, tmp_path: Path) -> None:
    def folder(name: str) -> str:
        return str(tmp_path / name)

    dataset = {"dataset": str(digits_folder)}
    variant = {"method": "scop", "prune_rate": 0.5, "residual": "coupled", "round_to": 8}
    finetune = {"epochs": 3, "batch_size": 64, "lr": 0.05, "distillation": {"weight": 0.5}}
    train_dense(digits_folder, tmp_path / "dense", epochs=6, lr=0.05)
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
    assert (exported.first.out_channels, exported.second.out_channels) == (8, 8)  # 12 of 24 is a tie of 8 and 16
    assert summary["pruned"]["top1"] > 0.7
    record = json.loads((tmp_path / "pruned" / "step.json").read_text())
    assert record["status"] == "done"
    assert record["config"]["finetune"]["epochs"] == 3
    assert record["inputs"]["plan"]["uri"] == folder("plan")
    assert len(record["inputs"]["plan"]["content"]) == 64


def test_given_weights_are_taken_as_they_are(digits_folder: Path, model_folder: Path, tmp_path: Path, trained) -> None:
    train_dense(digits_folder, tmp_path / "dense", weights=str(model_folder / "model.safetensors"))
    loaded = load_model(tmp_path / "dense")
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_step_that_fails_leaves_a_record_and_no_whole_output(digits_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "dense"
    train_dense(digits_folder, output)
    assert (output / MANIFEST).exists()
    with pytest.raises(UserError, match="the loss is"):
        train_dense(digits_folder, output, lr=1e30, epochs=2)
    assert not (output / MANIFEST).exists()
    record = json.loads((output / "step.json").read_text())
    assert record["status"] == "failed"
    assert "the loss is" in record["error"]
    with pytest.raises(UserError, match="so it is unfinished"):
        load_model(output)


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
    assert len(whole) == 1  # nothing is removed at 0, of whichever layer
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
    section, taken, made, weights = {
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
        f"{{{made!r}: {str(killed)!r}}})"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not list(killed.glob("checkpoints/*/*.json")):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match="so it is unfinished"):
        read_folder(killed)
    other = config | {name: config[name] | {"lr": 0.01}}
    with pytest.raises(UserError, match="another configuration or other inputs"):
        run_step(step, other, inputs, {made: str(killed)})

    for folder in (killed, whole):
        run_step(step, config, inputs, {made: str(folder)})
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert not list(killed.glob("checkpoints/*/*"))
    assert len(json.loads((killed / "history.json").read_text())) == 30


def test_inputs_and_outputs_are_checked_before_any_work(
    digits_folder: Path, tmp_path: Path, model_folder: Path
) -> None:
    dataset = {"dataset": str(digits_folder)}
    out = {"model": str(tmp_path / "out")}
    for config, inputs, outputs, message in (
        ({"dense": TINY}, {}, out, "needs --input dataset=FOLDER"),
        ({"dense": TINY}, dataset | {"modle": "x"}, out, "has no input 'modle'"),
        ({"dense": TINY}, dataset, {}, "needs --output model=FOLDER"),
        ({"dense": TINY}, {"dataset": str(model_folder)}, out, "holds a model, but a dataset is needed"),
        ({"dense": TINY}, {"dataset": str(tmp_path / "no")}, out, "does not exist"),
        ({"dense": TINY | {"epoch": 1}}, dataset, out, "did you mean 'epochs'"),
        ({"dense": TINY | {"batch_size": 5000}}, dataset, out, "1295 training images are fewer than a batch"),
        ({"dense": TINY | {"weights": "no.pt"}}, dataset, out, "weights no.pt do not exist"),
        ({"dense": TINY | {"model": "tests.networks:OnlyLinear"}}, dataset, out, "no prunable layer .*no convolution"),
        ({"dense": TINY | {"model": "tests.networks:View"}}, dataset, out, r"replace \.view by \.reshape or \.flatten"),
        (
            {"dense": TINY | {"arguments": {"num_classes": 7}}},
            dataset,
            out,
            "2x10 logits are needed",
        ),
        ({"dense": TINY | {"model": "torchvision:resnet18"}}, dataset, out, "set data.channels: 3"),
    ):
        with pytest.raises(UserError, match=message):
            run_step("train_dense", config, inputs, outputs)
        assert not (tmp_path / "out" / MANIFEST).exists()
    with pytest.raises(UserError, match="step 'train' is unknown"):
        run_step("train", {}, {}, {})


def test_foreign_files_in_an_output_folder_are_not_touched(digits_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis\.tex', which no step has written"):
        train_dense(digits_folder, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_second_signal_does_not_cut_off_what_the_first_one_ends(tmp_path: Path) -> None:
    """Ctrl-C reaches a step twice: from the terminal, and handed on by `scop run`."""
    code = """
import os, signal
from scop.runtime.exit_codes import Terminated, stop_signals_raise
with stop_signals_raise():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except Terminated:
        os.kill(os.getpid(), signal.SIGTERM)
        print("recorded")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "recorded\n"


@pytest.mark.parametrize(("by_nohup", "said"), [(False, "terminated"), (True, "went on")])
def test_a_closed_terminal_ends_a_step_unless_nohup_ran_it(by_nohup: bool, said: str) -> None:
    code = f"""
import os, signal
from scop.runtime.exit_codes import Terminated, stop_signals_raise
signal.signal(signal.SIGHUP, signal.{"SIG_IGN" if by_nohup else "SIG_DFL"})
try:
    with stop_signals_raise():
        os.kill(os.getpid(), signal.SIGHUP)
        print("went on")
except Terminated as end:
    print(end)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == f"{said}\n"


def test_a_figure_that_is_no_number_leaves_a_record_that_can_be_read(tmp_path: Path) -> None:
    result = StepResult({"validation_loss": float("nan"), "top1": 0.5})
    record = StepRecord.start("train_dense", {}, {}, {"model": str(tmp_path)}, StepEnvironment())
    record = record.model_copy(update={"result": result})
    read = StepRecord.parse(record.model_dump_json().encode(), "step.json")
    assert read.result is not None
    assert read.result.metrics == {"top1": 0.5}


@pytest.mark.parametrize("comment", ["", "// of the wizard\n"])
@pytest.mark.parametrize("text", ['{"name": "my app", "step": ["first", "second"]}', '{"step": "export", "next": "/"}'])
@pytest.mark.parametrize("name", [MANIFEST, "step.json"])
def test_others_have_files_of_these_names_too(
    name: str, text: str, comment: str, digits_folder: Path, tmp_path: Path
) -> None:
    for own in (name, "icon.png", "index.html", "weights.pt"):
        (tmp_path / own).write_text(comment + text)
    with pytest.raises(UserError, match="holds 'icon.png', which no step has written"):
        train_dense(digits_folder, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_record_that_is_torn_off_still_tells_whose_the_folder_is(digits_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "dense"
    train_dense(digits_folder, output)
    (output / MANIFEST).unlink()
    record = output / "step.json"
    record.write_bytes(record.read_bytes()[:100])
    train_dense(digits_folder, output)
    assert load_model(output) is not None
    assert json.loads(record.read_text())["status"] == "done"


@pytest.mark.parametrize("name", ["notes.json", "figure.png", "mine.safetensors"])
def test_foreign_files_beside_an_artifact_are_not_touched_whatever_their_kind(
    name: str, digits_folder: Path, tmp_path: Path
) -> None:
    train_dense(digits_folder, tmp_path / "dense")
    (tmp_path / "dense" / name).write_text("years of work")
    with pytest.raises(UserError, match=f"holds '{name}', which no step has written; move it away"):
        train_dense(digits_folder, tmp_path / "dense")
    assert load_model(tmp_path / "dense") is not None
    (tmp_path / "dense" / name).unlink()
    (tmp_path / "dense" / ".step.json.17.part").write_text("{")  # of a step that was killed
    train_dense(digits_folder, tmp_path / "dense")
    assert not (tmp_path / "dense" / ".step.json.17.part").exists()


def test_a_tilde_means_the_same_for_all_that_a_step_writes(digits_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    train_dense(digits_folder, Path("~/dense"))
    assert not (tmp_path / "~").exists()
    assert (tmp_path / "home" / "dense" / "step.json").exists()
    assert load_model(tmp_path / "home" / "dense") is not None


def test_how_many_checkpoints_are_kept_must_be_a_number(digits_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SCOP_KEEP_CHECKPOINTS", "all")
    with pytest.raises(UserError, match="SCOP_KEEP_CHECKPOINTS is 'all': Input should be a valid integer"):
        train_dense(digits_folder, tmp_path / "dense")


def test_a_class_may_be_called_like_a_formula(tmp_path: Path) -> None:
    confusion_matrix([[3, 1], [0, 2]], ["$10_$20", "a^b$"], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_an_output_that_cannot_be_written_is_named(digits_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output folder .*file/model cannot be written"):
        train_dense(digits_folder, tmp_path / "file" / "model")
    with pytest.raises(UserError, match="output folder /proc/model cannot be written"):
        train_dense(digits_folder, Path("/proc/model"))


def test_an_output_never_overlaps_with_an_input(digits_folder: Path, tmp_path: Path) -> None:
    train_dense(digits_folder, tmp_path / "dense")
    for output in (digits_folder, digits_folder / "inside", digits_folder.parent):
        with pytest.raises(UserError, match="overlaps with"):
            train_dense(digits_folder, output)
    assert (digits_folder / MANIFEST).exists()
    (tmp_path / "dense" / "notes").mkdir()
    with pytest.raises(UserError, match="holds 'notes', which no step has written"):
        train_dense(digits_folder, tmp_path / "dense")
    assert load_model(tmp_path / "dense") is not None


def test_a_network_is_known_by_the_weights_that_it_was_made_of_wherever_they_lie(
    digits_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    def made_of(name: str, **settings: object) -> dict[str, object]:
        train_dense(digits_folder, tmp_path / name, **settings)
        return load_settings(tmp_path / name)["dense"]

    (tmp_path / "elsewhere").mkdir()
    same = shutil.copy(model_folder / WEIGHTS, tmp_path / "elsewhere" / "copy.safetensors")
    first, again = (made_of(n, weights=str(w)) for n, w in (("a", model_folder / WEIGHTS), ("b", same)))
    trained, started = made_of("c"), made_of("d", pretrained=str(same))
    other = made_of("e", weights=str(tmp_path / "c" / WEIGHTS))
    assert first == again
    assert len({json.dumps(made, sort_keys=True) for made in (first, other, started, trained)}) == 4


@pytest.mark.parametrize("score", ["fisher", "published"])
@pytest.mark.parametrize("model", ["Aliased", "OneConvolutionBlocks"])
def test_unusual_networks_have_scores(model: str, score: str, digits_folder: Path, tmp_path: Path) -> None:
    train_dense(digits_folder, tmp_path / "dense", model=f"tests.networks:{model}")
    inputs = {"dataset": str(digits_folder), "dense": str(tmp_path / "dense")}
    knockoff = {"score": score, "epochs": 1, "batch_size": 64}
    run_step("train_knockoff", {"knockoff": knockoff}, inputs, {"scores": str(tmp_path / "scores")})
    found = Scores.load(tmp_path / "scores" / "scores.safetensors")
    assert found.keys() == ({"first", "second", "third"} if model == "Aliased" else {"blocks.0", "blocks.1"})
    assert all(scores.unique().numel() > len(scores) // 2 for scores in found.values())


def test_a_dense_model_is_not_taken_for_a_pruned_one(digits_folder: Path, tmp_path: Path, model_folder: Path) -> None:
    inputs = {"dataset": str(digits_folder), "dense": str(model_folder), "pruned": str(model_folder)}
    with pytest.raises(UserError, match="holds no pruned model"):
        run_step("evaluate", {"evaluate": {}, "variant": {}}, inputs, {"evaluation": str(tmp_path / "out")})


def test_the_exactness_gate_fails_the_step(digits_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    train_dense(digits_folder, tmp_path / "dense", model="tests.networks:Offset")
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


def test_the_command_line_runs_a_step_and_tells_mistakes_by_exit_code_2(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["step", "prepare_data", "--output", f"dataset={tmp_path / 'data'}"]) == 0
    assert (tmp_path / "data" / MANIFEST).exists()
    capsys.readouterr()
    for arguments, message in (
        (["step", "prepare_data"], "needs --output dataset=FOLDER"),
        (["step", "prepare_data", "--output", "dataset"], "must have the form NAME=DIR"),
        (["step", "prepare", "--output", "dataset=x"], "step 'prepare' is unknown"),
        (["step", "finetune", "--variant", "x"], "--variant 'x' is not in the configuration"),
        (["run", "-f", "nowhere.yaml"], "neither a file nor a preset"),
        (["run", "--set", "variants.0.prune_rate=2", "--out", str(tmp_path)], "'variants.0.prune_rate' is 2"),
        (["run", "--set", "dense.weights=no.pt", "--out", str(tmp_path)], "no.pt does not exist"),
        (["run", "--out", "/proc/runs"], "output folder /proc/runs cannot be created"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("scop: error: ")
        assert error.count("\n") == 1


def test_help_knows_the_inputs_and_outputs_of_every_step() -> None:
    for name, (inputs, output) in STEPS.items():
        step = find_step(name)
        assert [name.removesuffix("...") for name in inputs] == [
            field.name for field in dataclasses.fields(step.Inputs)
        ]
        assert [output] == [field.name for field in dataclasses.fields(step.Outputs)]


def test_help_needs_no_heavy_imports() -> None:
    code = "import sys, pipelines.cli.main; pipelines.cli.main.make_parser().format_help(); print(*sys.modules)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert not {"torch", "mlflow", "kfp", "numpy", "pydantic"} & set(result.stdout.split())
