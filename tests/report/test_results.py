"""Tests of result rows: their parameters and metrics, and when two rows have the same recipe."""

import copy
from typing import Any

import pytest

from scop.report.results import Result

FIGURES = {"top1": 0.9, "top5": 0.99, "loss": 0.3, "params": 100, "macs": 1000, "bytes": 400}
LATENCY = {"latency_ms": {"1": {"p50": 2.0, "p95": 3.0}}, "train_seconds": 10.0}
EVALUATION: dict[str, Any] = {
    "variant": "half",
    "method": "scop",
    "prune_rate": 0.5,
    "residual": "scatter",
    "threads": 2,
    "device": "a CPU (2 threads)",
    "dataset": {"source": "digits", "content": "d0"},
    "dense": FIGURES | LATENCY,
    "pruned": FIGURES | LATENCY | {"top1": 0.8, "params": 25, "loss": float("inf")},
    "settings": {
        "dense": {"model": "resnet20", "epochs": 3, "seed": 0, "weights": "a54f0041a9e15b05"},
        "knockoff": {"source": "shuffle", "seed": 0},
        "variant": {"name": "half", "method": "scop", "prune_rate": 0.5, "seed": 0},
        "finetune": {"epochs": 5, "schedule": "cosine", "seed": 0},
    },
    "run": "an-id",
}


def changed(section: str, key: str, value: object) -> Result:
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["settings"][section][key] = value
    return Result.of(evaluation)


def test_parameters_are_flat_and_typed_and_metrics_finite() -> None:
    row = Result.of(EVALUATION, "s3://bucket/run")
    assert (row.name, row.run, row.uri) == ("half", "an-id", "s3://bucket/run")
    assert (row.params["network"], row.params["finetune_epochs"], row.params["seed"]) == ("resnet20", 5, 0)
    assert row.metrics["top1_drop"] == pytest.approx(0.1)
    assert row.metrics["params_removed"] == 0.75
    assert row.metrics["pruned_latency_ms_batch1_p95"] == 3.0
    assert row.metrics["dense_loss"] == 0.3
    assert "pruned_loss" not in row.metrics  # it is not finite


@pytest.mark.parametrize("section", ["dense", "knockoff", "variant", "finetune"])
def test_seeds_do_not_change_the_recipe(section: str) -> None:
    assert changed(section, "seed", 7).identity == Result.of(EVALUATION).identity


def test_fine_tuning_seeds_of_a_variant_do_not_change_the_recipe() -> None:
    rows = [changed("variant", "finetune", {"seed": seed}) for seed in (0, 1)]
    assert rows[0].identity == rows[1].identity


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("finetune", "schedule", "poly"),
        ("dense", "epochs", 4),
        ("dense", "weights", "5f0e51a2f4b2b6f8"),
        ("knockoff", "lr", 0.1),
        ("finetune", "compile", True),
    ],
)
def test_any_other_setting_changes_the_recipe(section: str, key: str, value: object) -> None:
    assert changed(section, key, value).identity != Result.of(EVALUATION).identity


@pytest.mark.parametrize(
    ("section", "key", "value", "alike"),
    [
        ("variant", "method", "l1", True),
        ("variant", "prune_rate", 0.7, True),
        ("knockoff", "source", "gaussian", True),
        ("finetune", "seed", 3, True),
        ("finetune", "epochs", 6, False),
        ("dense", "epochs", 4, False),
        ("variant", "rounds", 3, False),
    ],
)
def test_training_identity_ignores_what_was_pruned(section: str, key: str, value: object, alike: bool) -> None:
    assert (changed(section, key, value).training == Result.of(EVALUATION).training) is alike


def test_other_data_and_unknown_settings_are_separate_recipes() -> None:
    other = Result.of(EVALUATION | {"dataset": {"source": "digits", "content": "e1"}})
    assert other.identity != Result.of(EVALUATION).identity
    unknown = {key: value for key, value in EVALUATION.items() if key != "settings"}
    assert Result.of(unknown | {"run": "one"}).identity != Result.of(unknown | {"run": "two"}).identity
