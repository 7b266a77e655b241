"""Tests of the benchmarks on digits: resuming, reuse of figures, tables and required packages."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from pipelines.presets import find_config
from scop import make_model
from scop.config import DenseSection, FinetuneSection, VariantSection, load_config
from scop.data.dataset import Dataset
from scop.storage.cache import Cache
from tests.benchmarks.accuracy import plans
from tests.benchmarks.accuracy_tables import targets
from tests.benchmarks.cells import Table
from tests.benchmarks.sittings import WORK_LEFT, Deadline, work_through
from tests.benchmarks.tables import DOCUMENTS, MARKER, make_tables, render
from tests.benchmarks.work import Plan
from tests.helpers import ROOT


def test_resumes_until_all_variants_are_measured(digits: Dataset, tmp_path: Path) -> None:
    dense = DenseSection.model_validate(
        {"model": "tests.networks:Plain", "arguments": {"in_channels": 1}, "epochs": 6, "batch_size": 64, "lr": 0.05}
    )
    finetune = FinetuneSection.model_validate({"epochs": 2, "batch_size": 64, "lr": 0.02, "ema": 0.9})
    under = {"selection": "global", "budget": {"macs": 0.5}}
    variants = {"none": {"method": "none"}, "scop": under, "l1": under | {"method": "l1"}}
    sections = {name: VariantSection.model_validate(variant) for name, variant in variants.items()}
    plan = Plan(dense, finetune, sections, seeds=(0, 1), once=("l1",))
    steps = 0

    def time_is_up() -> bool:
        nonlocal steps
        steps += 1
        return steps % 30 == 0

    calls = 0
    while (code := work_through({"plain": plan}, digits, tmp_path, tmp_path, 2, time_is_up)) == WORK_LEFT:
        calls += 1
        assert calls < 30
    assert code == 0
    assert calls > 4
    report = json.loads((tmp_path / "accuracy-plain.json").read_text())
    assert set(report["variants"]) == {"none-0", "none-1", "scop-0", "scop-1", "l1-0"}
    assert report["dense"]["top1"] > 0.8
    assert report["variants"]["scop-0"]["macs"] <= 0.5 * report["dense"]["macs"]
    assert report["variants"]["none-0"]["params"] == report["dense"]["params"]


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
def test_target_status_depends_on_the_interval(drops: tuple[float, ...], word: str, tmp_path: Path) -> None:
    rows = {f"none-{seed}": {"top1": 0.9} for seed in range(len(drops))}
    rows |= {f"scop-{seed}": {"top1": 0.9 - drop / 100} for seed, drop in enumerate(drops)}
    content = {"variants": rows, "settings": {"finetune": {"epochs": 1}}}
    (tmp_path / "accuracy-resnet20.json").write_text(json.dumps(content))
    assert targets(tmp_path).cell("resnet20", "status") == word


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


def some_plan(**settings: Any) -> Plan:
    """Return a plan that trains a network and prunes it in two ways."""
    dense = {"model": "tests.networks:Plain", "arguments": {"in_channels": 1}, "epochs": 1}
    variants = {"none": {"method": "none"}, "l1": {"method": "l1"}, "random": {"method": "random"}}
    sections = {name: VariantSection.model_validate(variant) for name, variant in variants.items()}
    return Plan(DenseSection.model_validate(dense | settings), FinetuneSection(epochs=1, batch_size=256), sections)


def test_starts_nothing_when_time_is_up(digits: Dataset, tmp_path: Path) -> None:
    checks = 0

    def after_some_steps() -> bool:
        nonlocal checks
        checks += 1
        return checks > 14

    plan = some_plan(batch_size=256)
    assert work_through({"plain": plan}, digits, tmp_path, tmp_path, 3, after_some_steps) == WORK_LEFT
    (folder,) = tmp_path.glob("plain-*")
    started = {path.name.split("-")[1] for path in folder.glob("checkpoints-*")}
    assert started == {"l1"}
    assert work_through({"plain": plan}, digits, tmp_path, tmp_path, 3, Deadline(0)) == WORK_LEFT
    assert checks == 15
    assert set(json.loads((tmp_path / "accuracy-plain.json").read_text())["variants"]) == {"none-0"}


def test_measures_several_variants_at_a_time(digits: Dataset, tmp_path: Path) -> None:
    plan = some_plan(batch_size=64)
    assert work_through({"plain": plan}, digits, tmp_path, tmp_path, 1, Deadline(60), jobs=2) == 0
    rows = json.loads((tmp_path / "accuracy-plain.json").read_text())["variants"]
    assert set(rows) == {"none-0", "l1-0", "random-0"}
    assert {row["speedup"] for row in rows.values()} == {None}  # speedups need an otherwise idle machine


def test_errors_end_the_benchmark(digits: Dataset, tmp_path: Path) -> None:
    plan = some_plan(arguments={"in_channels": 3})
    for jobs in (1, 2):
        with pytest.raises(RuntimeError, match="channels"):
            work_through({"plain": plan}, digits, tmp_path / str(jobs), tmp_path, 1, Deadline(60), jobs=jobs)


def test_reuses_figures_measured_elsewhere(digits: Dataset, tmp_path: Path) -> None:
    """This requires the same dense network and the same settings of the variant."""
    weights = tmp_path / "dense.safetensors"
    save_file(make_model("tests.networks:Plain", in_channels=1).state_dict(), weights)
    dense = {"model": "tests.networks:Plain", "arguments": {"in_channels": 1}}
    finetune = FinetuneSection(epochs=1, batch_size=256)

    def measured(where: str, seeds: int, rate: float = 0.5, **given: str) -> dict[str, Any]:
        variants = {"none": {"method": "none"}, "l1": {"method": "l1", "prune_rate": rate}}
        sections = {name: VariantSection.model_validate(variant) for name, variant in variants.items()}
        plan = Plan(DenseSection.model_validate({**dense, **given, "epochs": 1}), finetune, sections)
        assert work_through({"plain": plan}, digits, tmp_path / where, tmp_path, seeds, lambda: False) == 0
        rows: dict[str, Any] = json.loads((tmp_path / "accuracy-plain.json").read_text())["variants"]
        return rows

    first = measured("here", 1, weights=str(weights))
    both = measured("there", 2, weights=str(weights))
    assert set(both) == {"none-0", "l1-0", "none-1", "l1-1"}
    assert {key: both[key] for key in first} == first
    assert not list((tmp_path / "there").rglob("*-0-*.json"))
    other = measured("there", 1, rate=0.25, weights=str(weights))
    assert other["none-0"] == first["none-0"]
    assert other["l1-0"]["params"] > first["l1-0"]["params"]
    trained = measured("there", 1, rate=0.25)
    assert trained["none-0"]["settings_hash"] != first["none-0"]["settings_hash"]


@pytest.mark.parametrize("network", ["resnet20", "resnet56", "resnet50"])
def test_plans_match_the_presets(network: str, cache: Cache) -> None:
    config, plan = load_config(find_config(f"cifar10-{network}", cache)), plans()[network]
    assert plan.dense.model_dump(exclude={"weights"}) == config.dense.model_dump(exclude={"weights"})
    assert plan.finetune == config.finetune
    by_name = {variant.label.partition("-seed")[0]: variant for variant in config.variants}
    for name, variant in plan.variants.items():
        same = {"name", "seed", "seeds", "finetune"}
        assert variant.model_dump(exclude=same) == by_name[name].model_dump(exclude=same)


def test_fine_tuning_settings_can_be_changed() -> None:
    usual, longer = plans()["resnet20"], plans(changes={"epochs": 100})["resnet20"]
    assert longer.finetune == usual.finetune.model_copy(update={"epochs": 100})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_documents_contain_the_measured_figures(document: Path) -> None:
    text = document.read_text()
    assert text == render(text, make_tables()), "run make results"
    assert text.count("<!--") == 2 * len(MARKER.findall(text)), "a marker is misspelled or has no end"


def test_every_table_is_in_a_document() -> None:
    markers = [marker for document in DOCUMENTS for marker in MARKER.findall(document.read_text())]
    assert {name for kind, name, _ in markers if kind == "table"} == set(make_tables())


def test_markers_are_replaced_by_tables_cells_and_means() -> None:
    table = Table(["network", "seeds", "top-1"], [["small", "1", "80.0"], ["large", "3", "90.1 ± 0.2"]])
    text = "Mean <!-- mean: t / large / top-1 -->0<!-- end -->, <!-- cell: t / large 3 / top-1 --><!-- end -->"
    assert re.sub("<!--.*?-->", "", render(text, {"t": table})) == "Mean 90.1, 90.1 ± 0.2"
    assert "| large | 3 | 90.1 ± 0.2 |" in render("<!-- table: t -->old<!-- end -->", {"t": table}).splitlines()
    with pytest.raises(KeyError, match="medium / top-1: 0 rows"):
        render("<!-- cell: t / medium / top-1 --><!-- end -->", {"t": table})


def test_runs_without_optional_packages(tmp_path: Path) -> None:
    """Hides the packages that a bare machine with PyTorch lacks."""
    absent = "boto3 botocore mlflow tqdm kfp rich plotly jinja2 yaml sklearn scipy matplotlib psutil docker onnx pynvml"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent.split()!r}))  # importing them fails
import numpy as np
from pathlib import Path
from scop import make_model
from scop.storage.cache import Cache
from scop.config import DenseSection, FinetuneSection, VariantSection
from scop.data.dataset import Split, make_dataset
from tests.benchmarks.accuracy import plans
from tests.benchmarks.cells import Table
from tests.benchmarks.sittings import work_through
from tests.benchmarks.work import Plan

images = np.random.default_rng(0).integers(0, 256, (256, 1, 8, 8), dtype=np.uint8)
split = Split(images, np.arange(256) % 10)
dataset = make_dataset("noise", [str(i) for i in range(10)], split, split)
training = {{"epochs": 1, "batch_size": 64, "ema": 0.9}}
plan = Plan(
    DenseSection.model_validate(training | {{"model": "resnet20", "arguments": {{"in_channels": 1}}}}),
    FinetuneSection.model_validate(training | {{"distillation": {{"weight": 0.5}}}}),
    {{name: plans()["resnet56"].variants[name] for name in ("none", "scop")}},
)
folder = Path({str(tmp_path)!r})
assert work_through({{"noise": plan}}, dataset, folder, folder, 1, lambda: False, graphs=True) == 0
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert set(json.loads((tmp_path / "accuracy-noise.json").read_text())["variants"]) == {"none-0", "scop-0"}
