"""`scop select`: the table before training, and a plan from a run's scores under other settings."""

import json
from pathlib import Path

import pytest
import yaml

from pipelines.cli.main import main
from scop.pruning.plan import ChannelPlan
from tests.helpers import run_step


@pytest.fixture(scope="module")
def scored(digits_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a finished knockoff phase."""
    run = tmp_path_factory.mktemp("runs") / "scored"
    dense = {"epochs": 1, "batch_size": 64, "model": "tests.networks:Plain"}
    knockoff = {"epochs": 1, "batch_size": 64}
    model, scores = str(run / "train_dense" / "model"), str(run / "train_knockoff" / "scores")
    run_step("train_dense", {"dense": dense}, {"dataset": [str(digits_folder)]}, {"model": model})
    inputs = {"dataset": [str(digits_folder)], "dense": [model]}
    run_step("train_knockoff", {"knockoff": knockoff}, inputs, {"scores": scores})
    config = {"dense": dense, "knockoff": knockoff, "variants": [{"prune_rate": 0.5}, {"method": "l1"}]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def select(*arguments: str) -> int:
    return main(["select", *arguments])


def test_shows_a_configuration_before_training(capsys) -> None:
    assert select("--dry-run", "-f", "digits-resnet20", "--set", "variants.0.prune_rate=0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "scop-0.45: residual rule scatter, selection uniform, rate 0.5"
    assert lines[1].split() == ["layer", "channels", "kept", "removed", "parameters", "MACs"]
    row = next(line for line in lines if line.startswith("layer1.1.conv1"))
    assert row.split()[:4] == ["layer1.1.conv1", "16", "8", "50%"]
    assert row.split()[4:7] == ["2.3", "k", "->"]
    assert lines[-3].startswith("not pruned: conv1, layer2.0.downsample.0, layer3.0.downsample.0: writes to a residual")
    assert lines[-2].startswith("parameters: 272 k -> ")
    assert lines[-1].startswith("MACs: 2.5")


def test_selects_from_a_runs_scores_under_other_settings(scored: Path, tmp_path: Path, capsys) -> None:
    changes = ["--set", "variants.0.selection=global", "--set", "variants.0.budget={macs: 0.5}"]
    assert select(str(scored), "--dry-run", *changes) == 0
    printed = capsys.readouterr().out
    assert "scop-global-macs-0.5: residual rule scatter, selection global" in printed
    assert "unsure" in printed
    removed = float(printed.splitlines()[-1].rpartition(", ")[2].partition("%")[0])
    assert 50 <= removed < 56
    assert select(str(scored), "--output", str(tmp_path / "plan.json"), *changes) == 0
    assert "plan: " in capsys.readouterr().out
    plan = ChannelPlan.load(tmp_path / "plan.json")
    assert plan.selection == "global"
    assert select(str(scored), "--output", str(tmp_path), *changes) == 2
    assert f"--output {tmp_path} cannot be written: Is a directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert not [path for path in tmp_path.parent.iterdir() if path.suffix == ".part"]
    assert json.loads((tmp_path / "plan.json").read_text())["method"] == "scop"
    assert select("scored", "--runs", str(scored.parent), "--variant", "l1-0.45", "--dry-run") == 0
    assert "l1-0.45: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --output FILE for the plan, or --dry-run"),
        (["--output", "plan.json"], "--output writes a plan made from a run's scores: name the RUN"),
        (["nowhere", "--dry-run"], "there is no run 'nowhere'"),
        (["--dry-run", "--variant", "l2"], "--variant 'l2' is not in the configuration (known: scop-0.45)"),
        (["--dry-run", "--set", "variants.0.selection=global"], "selection global of method scop needs scores"),
        (["--dry-run", "--set", "variants.0.exclude=[conv9]"], "no prunable layer matches 'conv9'"),
        (["--dry-run", "--set", "variants.0.budget={macs: 10}"], "a budget of 10 macs is out of reach"),
        (["--dry-run", "--set", "data={source: imagefolder, path: /nowhere}"], "data.path /nowhere does not exist"),
    ],
)
def test_reports_mistakes(arguments: list[str], message: str, capsys) -> None:
    assert select(*arguments) == 2
    assert message in capsys.readouterr().err


def test_rejects_a_run_without_scores(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    assert select(str(tmp_path), "--dry-run") == 2
    assert "has no finished step train_dense" in capsys.readouterr().err
