"""Execution of a step: checks before the work, failures and paths."""

import dataclasses
import json
from pathlib import Path

import pytest

from scop import UserError, load_model
from scop.runtime.registry import STEPS
from scop.runtime.step import find_step
from scop.storage.manifest import MANIFEST
from tests.helpers import TINY, run_step, train_tiny


def test_a_failed_step_leaves_a_record_and_an_incomplete_output(digits_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "dense"
    train_tiny(digits_folder, output)
    assert (output / MANIFEST).exists()
    with pytest.raises(UserError, match="the loss is"):
        train_tiny(digits_folder, output, lr=1e30, epochs=2)
    assert not (output / MANIFEST).exists()
    record = json.loads((output / "step.json").read_text())
    assert record["status"] == "failed"
    assert "the loss is" in record["error"]
    with pytest.raises(UserError, match="so it is unfinished"):
        load_model(output)


def test_rejects_invalid_settings_and_folders_before_the_work(
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


def test_expands_a_tilde_in_paths(digits_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    train_tiny(digits_folder, Path("~/dense"))
    assert not (tmp_path / "~").exists()
    assert (tmp_path / "home" / "dense" / "step.json").exists()
    assert load_model(tmp_path / "home" / "dense") is not None


def test_number_of_kept_checkpoints_must_be_an_integer(digits_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SCOP_KEEP_CHECKPOINTS", "all")
    with pytest.raises(UserError, match="SCOP_KEEP_CHECKPOINTS is 'all': Input should be a valid integer"):
        train_tiny(digits_folder, tmp_path / "dense")


def test_registry_lists_the_inputs_and_outputs_of_every_step() -> None:
    for name, (inputs, output) in STEPS.items():
        step = find_step(name)
        assert [name.removesuffix("...") for name in inputs] == [
            field.name for field in dataclasses.fields(step.Inputs)
        ]
        assert [output] == [field.name for field in dataclasses.fields(step.Outputs)]
