"""Tests of comparison tables: order, groups over seeds, baselines, data sets and devices."""

import csv
import io
import math
from statistics import fmean, stdev

import pytest

from pipelines.compare.table import as_csv, as_json, print_table, tables
from scop import UserError
from tests.fakes.results import result


def test_sorts_by_accuracy_and_shows_columns_that_differ() -> None:
    (table,) = tables([result("random"), result("scop", 0.3), result("scop", 0.5)])
    assert list(table.labels["name"]) == ["scop-0.3", "scop-0.5", "random-0.5"]
    assert list(table.labels) == ["name", "method", "prune_rate"]  # seeds are the same
    assert list(table.metrics)[:2] == ["pruned_top1", "top1_drop"]
    assert list(table.metrics)[-2:] == ["pruned_latency_ms_batch1_p50", "speedup_batch1"]
    assert table.best("pruned_top1") == pytest.approx(0.94 - 0.015)
    assert table.best("pruned_macs") == pytest.approx(10e6)
    assert table.notes == ["times on a CPU", "dense: top-1 95.00%, MACs 40 M, parameters 270 k"]
    (by_macs,) = tables([result("random"), result("scop", 0.3)], ["pruned_macs"])
    assert list(by_macs.labels["name"]) == ["random-0.5", "scop-0.3"]


def test_sorts_equal_accuracy_by_size() -> None:
    large, small = result("scop", 0.3), result("l1", 0.5, metrics=result("l1", 0.5).metrics | {"pruned_top1": 0.925})
    small.metrics["top1_drop"] = large.metrics["top1_drop"]
    (table,) = tables([large, small])
    assert list(table.labels["name"]) == ["l1-0.5", "scop-0.3"]
    (other,) = tables([large, result("l1", metrics=small.metrics | {"dense_top1": 0.9})])
    assert other.notes == ["times on a CPU", "dense: MACs 40 M, parameters 270 k"]  # the dense networks differ in top-1


def test_groups_have_mean_deviation_and_n_over_seeds() -> None:
    results = [result("scop", 0.5, seed) for seed in range(3)] + [result("l1", 0.5, 7)]
    (table,) = tables(results, ["pruned_top1"], ["method", "prune_rate"])
    values = [r.metrics["pruned_top1"] for r in results[:3]]
    assert table.labels.to_dict("records")[0] == {"method": "scop", "prune_rate": 0.5, "network": "resnet20"}
    assert list(table.n["pruned_top1"]) == [3, 1]
    assert table.mean["pruned_top1"].iloc[0] == pytest.approx(fmean(values))
    assert table.deviation["pruned_top1"].iloc[0] == pytest.approx(stdev(values))
    assert math.isnan(table.deviation["pruned_top1"].iloc[1])  # of one result
    assert table.runs.iloc[0] == [r.run for r in results[:3]]


def test_each_data_set_has_its_own_table() -> None:
    found = tables([result(), result(dataset="e1" * 32)])
    assert [table.content[:2] for table in found] == ["d0", "e1"]
    assert [len(table.mean) for table in found] == [1, 1]


def test_never_groups_different_networks() -> None:
    other = result(params=result().params | {"network": "resnet56"})
    (table,) = tables([result(), other], ["pruned_top1"], ["method"])
    assert list(table.labels["network"]) == ["resnet20", "resnet56"]


def test_latency_has_one_column_per_device(capsys) -> None:
    results = [result(), result("l1", device="a GPU")]
    (table,) = tables(results, ["pruned_top1", "pruned_latency_ms_batch1_p50"])
    assert list(table.metrics) == [
        "pruned_top1",
        "pruned_latency_ms_batch1_p50 on a CPU",
        "pruned_latency_ms_batch1_p50 on a GPU",
    ]
    assert table.n.to_numpy().tolist() == [[1, 1, 0], [1, 0, 1]]
    print_table(table)
    printed = capsys.readouterr().out
    assert "times are listed per device" in printed
    assert "latency, batch 1 on a GPU" in printed
    assert printed.splitlines()[2].split()[-1] == "-"  # no value


def test_shows_changes_against_the_dense_network_or_a_variant(capsys) -> None:
    results = [result("scop", 0.5), result("l1", 0.5), result("l1", 0.5, 2)]
    (table,) = tables(results, ["pruned_top1", "pruned_macs"], baseline="dense")
    scop = table.change.iloc[0]
    assert scop["pruned_top1"] == pytest.approx(results[0].metrics["pruned_top1"] - 0.95)
    assert scop["pruned_macs"] == pytest.approx(0.25)
    (table,) = tables(results, ["pruned_top1"], baseline="l1-0.5")
    assert table.change["pruned_top1"].iloc[0] == pytest.approx(0.011)  # the mean over seeds
    print_table(table)
    assert "91.50% (+1.10)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metrics": ["pruned_top_1"]},
            "--metric 'pruned_top_1' is not in these results .did you mean 'pru",
        ),
        ({"group_by": ["methd"]}, r"--group-by 'methd' is not in these results \(did you mean 'method'\?\)"),
        ({"baseline": "l1"}, r"--baseline 'l1' is not in these results \(known: dense, scop-0.5\)"),
    ],
)
def test_rejects_unknown_metrics_groups_and_baselines(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tables([result()], **changes)


def test_notes_groups_that_mix_recipes() -> None:
    long = result(seed=1, params=result().params | {"finetune_epochs": 100, "recipe": "long"})
    (table,) = tables([result(), long, result("l1")], ["pruned_top1"], ["method"])
    assert table.notes[-1] == "some rows combine results that differ in finetune_epochs (-, 100)"
    other = result(seed=1, params=result().params | {"recipe": "other"})
    assert (
        tables([result(), other], ["pruned_top1"], ["method"])[0].notes[-1]
        == "some rows combine results of several recipes"
    )
    assert "some rows combine" not in tables([result(), result(seed=1)], group_by=["method"])[0].notes[-1]


def test_shows_n_of_figures_with_fewer_results_than_their_row(capsys) -> None:
    incomplete = result(seed=2)
    del incomplete.metrics["pruned_top1"]
    (table,) = tables([result(), result(seed=1), incomplete], ["pruned_macs", "pruned_top1"], ["method"])
    print_table(table)
    assert capsys.readouterr().out.splitlines()[2].endswith("3  10 M ± 0  91.45% ± 0.07, n 2")


def test_baselines_have_the_same_network_and_data_set() -> None:
    small = result("l1", params=result("l1").params | {"network": "resnet56"})
    small.metrics["pruned_top1"] = 0.6
    (table,) = tables([result("l1"), small], ["pruned_top1"], baseline="l1-0.5")
    assert list(table.change["pruned_top1"]) == [0, 0]
    _, without = tables([result("l1"), result(dataset="e1" * 32)], ["pruned_top1"], baseline="l1-0.5")
    assert without.notes[-1] == "no changes shown: baseline l1-0.5 has no comparable result on this data set"


def test_identical_results_have_a_run_column() -> None:
    (table,) = tables([result(), result(run="another-run")])
    assert list(table.labels["run"]) == ["run-scop", "another-"]


def test_narrow_terminal_shows_whole_figures_with_units(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    files = [result(seed=seed) for seed in (0, 1)]
    for size, row in zip((3.4e6, 3.42e6), files, strict=True):
        row.metrics["pruned_bytes"] = size
    print_table(*tables(files, ["pruned_bytes", "pruned_top1", "pruned_latency_ms_batch1_p50"], ["method"]))
    line = capsys.readouterr().out.splitlines()[2]
    assert line.endswith("3.41 MB ± 14.1 kB  91.45% ± 0.07  1.25 ms ± 0.00 ms")


def test_unknown_metric_has_no_best_value() -> None:
    rows = [result(), result("l1")]
    for row in rows:
        row.metrics["pruned_f1"] = row.metrics["pruned_top1"]
    assert tables(rows, ["pruned_f1"])[0].best("pruned_f1") is None


def test_csv_and_json_have_raw_values() -> None:
    found = tables([result(), result("l1", dataset="e1" * 32)], ["pruned_top1", "top1_drop"])
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [row["dataset_content"][:2] for row in rows] == ["d0", "e1"]
    assert float(rows[0]["pruned_top1"]) == found[0].mean["pruned_top1"].iloc[0]
    assert rows[0]["runs"] == "run-scop-0.5-0"
    assert as_json(found)[1]["rows"][0]["figures"]["top1_drop"]["n"] == 1
