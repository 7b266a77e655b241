"""Tests of `scop compare` on the artifacts of runs, in S3 and locally, including failed variants."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli.main import main
from pipelines.compare.comparison import compare
from pipelines.compare.experiments import Source
from pipelines.runs import find_record
from pipelines.select import dense_of_run
from scop import UserError
from scop.storage.cache import Cache
from scop.storage.files import join_uri, write_bytes
from tests.helpers import run_step

DENSE = {"model": "tests.networks:Plain", "epochs": 2, "batch_size": 64, "lr": 0.05}
FINETUNE = {"epochs": 1, "batch_size": 64, "recalibration_batches": 0}
ROOT_PIPELINE = "scop"
SOURCE = Source("runs")
NOT_STARTED = (
    "this run has no record of it: it was not started, or its result came from KFP's cache; then name that run, too"
)


class Run:
    """A run in the layout of KFP: ROOT/PIPELINE/RUN_ID/TASK/POD/NAME."""

    def __init__(self, root: str, name: str, dataset: Path) -> None:
        self.uri = join_uri(root, ROOT_PIPELINE, name)
        self.dataset = str(dataset)

    def at(self, task: str, variant: str, output: str) -> str:
        return join_uri(self.uri, task.replace("_", "-"), f"pod-of-{variant}", output)

    def step(
        self, task: str, config: dict[str, Any], inputs: dict[str, Any], output: str, variant: str = "all"
    ) -> None:
        run_step(task, config, inputs, {output: self.at(task, variant, output)})

    def prune(self, variant: dict[str, Any], dense: str, scores: str, batch_size: int = 64) -> None:
        name = variant["name"]
        self.step("select_channels", {"variant": variant}, {"dense": dense, "scores": scores}, "plan", name)
        config = {"finetune": FINETUNE | {"batch_size": batch_size}, "variant": variant}
        inputs = {"dataset": self.dataset, "dense": dense, "plan": self.at("select_channels", name, "plan")}
        self.step("finetune", config, inputs, "model", name)
        inputs = {"dataset": self.dataset, "dense": dense, "pruned": self.at("finetune", name, "model")}
        config = {"evaluate": {"batch_sizes": [1], "repeats": 2}, "variant": variant}
        self.step("evaluate", config, inputs, "evaluation", name)
        inputs = {"dataset": self.dataset, "pruned": inputs["pruned"]}
        inputs["evaluation"] = self.at("evaluate", name, "evaluation")
        self.step("export", {"export": {}, "variant": variant}, inputs, "exported", name)


def test_compares_a_sweep_with_a_failed_variant_and_its_resubmission(
    digits_folder: Path, bucket: str, tmp_path: Path, capsys, monkeypatch, cache: Cache
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    first = Run(bucket, "first", digits_folder)
    first.step("train_dense", {"dense": DENSE}, {"dataset": first.dataset}, "model")
    dense = first.at("train_dense", "all", "model")
    knockoff = {"epochs": 1, "batch_size": 64}
    first.step("train_knockoff", {"knockoff": knockoff}, {"dataset": first.dataset, "dense": dense}, "scores")
    scores = first.at("train_knockoff", "all", "scores")
    half, failing = ({"name": name, "prune_rate": 0.5} for name in ("half", "failing"))
    first.prune(half, dense, scores)
    with pytest.raises(UserError):
        first.prune(failing, dense, scores, batch_size=100_000)

    assert main(["compare", first.uri, "--html", str(tmp_path / "page.html")]) == 1
    printed = capsys.readouterr()
    assert "half" in printed.out
    why = "finetune failed: 1295 training images are fewer than a batch: batch_size is 100000"
    assert printed.err == f"missing: failing: {why}\n"
    page = (tmp_path / "page.html").read_text()
    assert f"<b>failing</b>: {why}" in page
    assert "Score histograms" in page

    # The configuration, which `scop submit` stores with the run, lists the expected variants.
    never = {"variants": [half, failing, {"name": "never"}]}
    write_bytes(join_uri(first.uri, "config.yaml"), yaml.safe_dump(never).encode())
    assert compare([first.uri], SOURCE, cache).missing == {"failing": why, "never": NOT_STARTED}

    # The record of a step is found by the run's URI.
    assert find_record(f"{first.uri}/failing/finetune", "runs").error == why.removeprefix("finetune failed: ")

    # In a resubmission, KFP's cache provides the other steps: only missing ones run and have records.
    second = Run(bucket, "second", digits_folder)
    second.prune(failing, dense, scores)
    alone = compare([second.uri], SOURCE, cache)
    assert ([result.name for result in alone.results], alone.missing) == (["failing"], {})
    both = compare([first.uri, second.uri], SOURCE, cache)
    assert [result.name for result in both.results] == ["half", "failing"]
    assert both.missing == {"never": NOT_STARTED}
    assert both.title == "first, second"

    # The last step gets the results of both runs as inputs.
    inputs = {"scores": scores, "evaluations": [], "exports": []}
    for run, name in ((first, "half"), (second, "failing")):
        inputs["evaluations"].append(run.at("evaluate", name, "evaluation"))
        inputs["exports"].append(run.at("export", name, "exported"))
    second.step("compare", {}, inputs, "report")
    assert main(["compare", second.uri, "--json", str(tmp_path / "summary.json")]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [variant["name"] for variant in summary["variants"]] == ["half", "failing"]

    # Success with another seed does not cancel a failure.
    for run, seed in ((first, 0), (second, 1)):
        config = {"variants": [half, failing], "finetune": FINETUNE | {"seed": seed}}
        write_bytes(join_uri(run.uri, "config.yaml"), yaml.safe_dump(config).encode())
    assert compare([first.uri, second.uri], SOURCE, cache).missing["failing of first"] == why
    write_bytes(join_uri(second.uri, "config.yaml"), yaml.safe_dump({"variants": [failing]}).encode())
    write_bytes(join_uri(first.uri, "config.yaml"), yaml.safe_dump({"variants": [half, failing]}).encode())
    assert compare([first.uri, second.uri], SOURCE, cache).missing == {}


@pytest.fixture(scope="module")
def extended_run(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose last step saw one variant; later a second one succeeded and a third one failed."""
    run = Run(str(tmp_path_factory.mktemp("extended_run")), "run", digits_folder)
    run.step("train_dense", {"dense": DENSE}, {"dataset": run.dataset}, "model")
    dense, scores = run.at("train_dense", "all", "model"), run.at("train_knockoff", "all", "scores")
    inputs = {"dataset": run.dataset, "dense": dense}
    run.step("train_knockoff", {"knockoff": {"epochs": 1, "batch_size": 64}}, inputs, "scores")
    run.prune({"name": "early", "prune_rate": 0.5}, dense, scores)
    inputs = {"scores": scores, "evaluations": [run.at("evaluate", "early", "evaluation")]}
    run.step("compare", {}, inputs | {"exports": [run.at("export", "early", "exported")]}, "report")
    run.prune({"name": "late", "prune_rate": 0.5}, dense, scores)
    with pytest.raises(UserError):
        run.prune({"name": "failed", "prune_rate": 0.5}, dense, scores, batch_size=100_000)
    return run


def write_config(run: str, *names: str) -> None:
    (Path(run) / "config.yaml").write_text(yaml.safe_dump({"variants": [{"name": name} for name in names]}))


def test_includes_late_variants_and_ignores_unconfigured_ones(extended_run: Run, cache: Cache) -> None:
    write_config(extended_run.uri, "early", "late", "failed")
    found = compare([extended_run.uri], SOURCE, cache)
    assert [result.name for result in found.results] == ["early", "late"]
    assert list(found.missing) == ["failed"]
    write_config(extended_run.uri, "early", "late")
    assert compare([extended_run.uri], SOURCE, cache).missing == {}
    write_config(extended_run.uri, "late")
    assert [result.name for result in compare([extended_run.uri], SOURCE, cache).results] == ["late"]


def test_lists_failures_of_each_run_and_seed(extended_run: Run, tmp_path: Path, cache: Cache) -> None:
    runs = [shutil.copytree(extended_run.uri, tmp_path / name) for name in ("one", "two", "three")]
    for run, seed in zip(runs, (0, 1, 1), strict=True):
        config = {"variants": [{"name": "early"}, {"name": "failed"}], "finetune": {"seed": seed}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    why = "finetune failed: 1295 training images are fewer than a batch: batch_size is 100000"
    assert compare([str(runs[0])], SOURCE, cache).missing == {"failed": why}
    assert compare([*map(str, runs)], SOURCE, cache).missing == {f"failed of {run.name}": why for run in runs}


def test_lists_a_damaged_evaluation_as_missing(extended_run: Run, tmp_path: Path, cache: Cache) -> None:
    copy = shutil.copytree(extended_run.uri, tmp_path / "copy")
    write_config(str(copy), "early", "late")
    (copy / "evaluate" / "pod-of-late" / "evaluation" / "evaluation.json").write_text("{}")
    found = compare([str(copy)], SOURCE, cache)
    assert [result.name for result in found.results] == ["early"]
    assert "evaluation.json does not match manifest.json" in found.missing["late"]


def test_reads_copied_and_moved_runs(extended_run: Run, tmp_path: Path, cache: Cache) -> None:
    write_config(extended_run.uri, "early", "late")
    copy = str(shutil.copytree(extended_run.uri, tmp_path / "archive" / "other name"))
    both = compare([extended_run.uri, copy], SOURCE, cache)
    assert [result.uri.startswith(copy) for result in both.results] == [False, False, True, True]
    moved = str(shutil.move(copy, tmp_path / "moved"))
    assert [result.name for result in compare([moved], SOURCE, cache).results] == ["early", "late"]
    record = find_record(f"{moved}/late/evaluate", "runs")
    assert record.inputs["pruned"].uri == f"{moved}/finetune/pod-of-late/model"
    assert record.inputs["dataset"].uri == extended_run.dataset
    assert dense_of_run(moved, cache).scores is not None


def test_reports_missing_and_incomplete_runs(bucket: str, tmp_path: Path, capsys) -> None:
    assert main(["compare", f"{bucket}/scop/none"]) == 2
    assert "there is no run" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("variants: [{name: half}]")
    assert main(["compare", str(tmp_path / "run")]) == 2
    assert (
        f"no variant of run is complete, so there is nothing to compare (half: {NOT_STARTED})"
        in capsys.readouterr().err
    )
