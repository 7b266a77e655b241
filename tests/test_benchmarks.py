"""Tests of the benchmarks: their configurations, stored results and tables."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipelines.presets import find_config
from scop import make_model
from scop.config import Config, load_config
from scop.environment import StepEnvironment
from scop.pruning.graph import ChannelGraph
from scop.report.correctness import packed
from scop.runtime.record import StepRecord
from scop.selection.candidates import find_candidates
from scop.storage.cache import Cache
from tests.benchmarks import tables
from tests.benchmarks.accuracy_tables import targets
from tests.benchmarks.cells import Table
from tests.benchmarks.tables import DOCUMENTS, MARKER, add, make_tables, render
from tests.helpers import ROOT

CONFIGURATIONS = sorted((ROOT / "tests" / "benchmarks").glob("*.yaml"))
RUNS = dict(re.findall(r"benchmark,([a-z/]\S*?),(\S+?)\)", (ROOT / "Makefile").read_text()))
"""The configurations that `make bench-*` runs, and the names of their results."""
ROWS = {
    "accuracy-resnet20": {"resnet20 scop", "resnet20 l1", "resnet20 scratch"},
    "accuracy-resnet50": {"resnet50 scop", "resnet50 l1"},
    "accuracy-resnet56": {"resnet56 scop", "resnet56 l1"},
    "accuracy-resnet56-short": {"resnet56-short scop"},
    "accuracy-resnet20-recipes": {"resnet20-once scop", "resnet20-60 scop", "resnet20-long scop"},
}
"""The rows of the accuracy table that results fill."""


def test_every_configuration_has_a_target() -> None:
    assert {path.name for path in CONFIGURATIONS} == {Path(name).name for name in RUNS if name.endswith(".yaml")}


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configurations_can_be_planned(path: Path) -> None:
    config = load_config(path)
    graph = ChannelGraph(model := make_model(config.dense.model), (3, 32, 32))
    for residual in {variant.residual for variant in config.variants}:
        variant = config.variants[0].model_copy(update={"method": "random", "residual": residual})
        assert find_candidates(model, graph, variant)
    assert config.dense.weights
    assert config.dense.weights.startswith("../shared/") or (ROOT / config.dense.weights).exists()


@pytest.mark.parametrize("configuration", RUNS)
def test_runs_fill_the_tables(
    configuration: str, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, network = RUNS[configuration], {"top1": 0.9, "params": 1000, "macs": 1000}
    path = ROOT / configuration if configuration.endswith(".yaml") else find_config(configuration, cache)
    folder = finished_run(load_config(path), network, tmp_path / "run")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    add(name, folder, "make bench-accuracy")
    made, stored = make_tables(tmp_path), make_tables()
    if name in ROWS:
        assert rows_of(made["accuracy"]) == ROWS[name]
    else:
        for table in set(made) - {"accuracy", "targets", "commands"}:
            assert rows_of(made[table]) == rows_of(stored[table])


def finished_run(config: Config, network: dict[str, Any], folder: Path) -> Path:
    """Write the files of a finished run that the benchmarks read; each network has these figures."""
    start = StepRecord.start("prepare_data", {}, {}, {"dataset": "dataset"}, StepEnvironment())
    timed = network | {"latency_ms": {"1": {"p50": 1.0}, "64": {"p50": 2.0}}}
    variants = []
    for variant in config.variants:
        own = {"name": variant.label, "method": variant.method, "prune_rate": 0.5, "exactness": {}}
        variants.append(own | {"dense": timed, "pruned": timed, "model": "uri", "onnx": "uri"})
        evaluation = folder / variant.label / "evaluate" / "evaluation"
        evaluation.mkdir(parents=True)
        answers = {"right": packed(np.ones(4, bool))}
        (evaluation / "evaluation.json").write_text(json.dumps({"dense": answers, "pruned": answers}))
    (folder / "step.json").write_text(start.model_dump_json())
    (folder / "summary.json").write_text(json.dumps({"seconds": 1.0, "variants": variants}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder


def rows_of(table: Table) -> set[str]:
    """Return the first two cells of each row."""
    return {" ".join(list(row.values())[:2]) for row in table}


def test_networks_before_fine_tuning_become_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [{"name": "l1", "method": "l1", "seeds": [0, 1]}]
    variants.append({"name": "l1-before", "method": "l1", "seeds": [0, 1], "finetune": {"epochs": 0}})
    folder = finished_run(Config.model_validate({"variants": variants}), {"top1": 0.7}, tmp_path / "run")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    add("some", folder, "make bench-some")
    rows = json.loads((tmp_path / "some.json").read_text())["variants"]
    assert [(row["name"], row["before"], row["speedup"]) for row in rows] == [
        ("l1-seed0", 0.7, 1),
        ("l1-seed1", 0.7, 1),
    ]


@pytest.mark.parametrize(
    ("drops", "word"),
    [
        ((0.5,), "reached once"),
        ((1.5,), "missed once"),
        ((0.5, 0.51, 0.49), "reached"),
        ((0.5, 0.9, 0.7), "reached on average"),
        ((0.7, 1.1, 0.9), "missed on average"),
        ((1.5, 1.51, 1.49), "missed"),
    ],
)
def test_target_status_depends_on_the_interval(drops: tuple[float, ...], word: str) -> None:
    rows = [{"name": f"none-seed{seed}", "pruned": {"top1": 0.9}} for seed in range(len(drops))]
    rows += [{"name": f"scop-seed{seed}", "pruned": {"top1": 0.9 - drop / 100}} for seed, drop in enumerate(drops)]
    variants = [{"name": "scop-seed0", "finetune": {}}]
    config = {"dense": {"model": "resnet20"}, "finetune": {"epochs": 1}, "variants": variants}
    assert targets([{"variants": rows, "config": config}])[0]["status"] == word


def test_changed_results_and_docs_do_not_mark_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCOP_REVISION", raising=False)
    source, page, figures = (
        tmp_path / name
        for name in ("scop/system/revision.py", "docs/results.md", "tests/benchmarks/results/speed.json")
    )
    for file in (source, page, figures):
        file.parent.mkdir(parents=True)
        file.write_text((ROOT / "scop" / "system" / "revision.py").read_text())
    for command in ("init", "add .", "-c user.name=test -c user.email=test@example.com commit -m first"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    found = importlib.util.spec_from_file_location("revision", source)
    assert found is not None
    assert found.loader is not None
    revision = importlib.util.module_from_spec(found)
    found.loader.exec_module(revision)
    commit = revision.git_revision()
    assert len(commit) == 12
    for file, mark in ((page, ""), (figures, ""), (source, "+")):
        file.write_text(file.read_text() + "\n")
        assert revision.git_revision() == commit + mark


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_documents_contain_the_measured_figures(document: Path) -> None:
    text = document.read_text()
    assert text == render(text, make_tables()), "run make results"
    assert text.count("<!--") == 2 * len(MARKER.findall(text)), "a marker is misspelled or has no end"


def test_every_table_is_in_a_document() -> None:
    markers = [marker for document in DOCUMENTS for marker in MARKER.findall(document.read_text())]
    assert {name for kind, name, _ in markers if kind == "table"} == set(make_tables())


def test_markers_are_replaced_by_tables_cells_and_means() -> None:
    rows = [("small", "1", "80.0"), ("large", "3", "90.1 ± 0.2")]
    table: Table = [{"network": network, "seeds": seeds, "top-1": top1} for network, seeds, top1 in rows]
    text = "Mean <!-- mean: t / large / top-1 -->0<!-- end -->, <!-- cell: t / large 3 / top-1 --><!-- end -->"
    assert re.sub("<!--.*?-->", "", render(text, {"t": table})) == "Mean 90.1, 90.1 ± 0.2"
    assert "| large | 3 | 90.1 ± 0.2 |" in render("<!-- table: t -->old<!-- end -->", {"t": table}).splitlines()
    with pytest.raises(KeyError, match="medium / top-1: 0 rows"):
        render("<!-- cell: t / medium / top-1 --><!-- end -->", {"t": table})
