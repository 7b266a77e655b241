"""Results of measured networks, as flat rows: the same in MLflow, in the table and on the page."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Value = str | float | int | bool

# Settings that become parameters of a result: section.key -> name of the parameter.
_OF_SECTIONS = {
    "dense.model": "network",
    "dense.weights": "dense_weights",
    "dense.pretrained": "dense_pretrained",
    "dense.epochs": "dense_epochs",
    "dense.seed": "dense_seed",
    "knockoff.source": "knockoff_source",
    "knockoff.score": "score",
    "knockoff.epochs": "knockoff_epochs",
    "knockoff.seed": "knockoff_seed",
    "variant.selection": "selection",
    "variant.budget.params": "budget_params",
    "variant.budget.macs": "budget_macs",
    "variant.budget.latency_ms": "budget_latency_ms",
    "variant.fdr": "fdr",
    "variant.floor": "floor",
    "variant.round_to": "round_to",
    "variant.min_channels": "min_channels",
    "variant.include": "include",
    "variant.exclude": "exclude",
    "variant.rates": "rates",
    "variant.rounds": "rounds",
    "variant.seed": "variant_seed",
    "finetune.epochs": "finetune_epochs",
    "finetune.batch_size": "finetune_batch_size",
    "finetune.optimizer": "finetune_optimizer",
    "finetune.lr": "finetune_lr",
    "finetune.schedule": "finetune_schedule",
    "finetune.warmup_epochs": "finetune_warmup_epochs",
    "finetune.weight_decay": "finetune_weight_decay",
    "finetune.label_smoothing": "finetune_label_smoothing",
    "finetune.seed": "seed",
    "finetune.distillation.weight": "distillation_weight",
    "finetune.distillation.temperature": "distillation_temperature",
    "finetune.distillation.attention": "distillation_attention",
    "finetune.distillation.attention_until": "distillation_attention_until",
    "finetune.distillation.mirror": "distillation_mirror",
}
SEEDS = ("seed", "dense_seed", "knockoff_seed", "variant_seed")
"""Parameters that may differ between results of one recipe."""

SIZES = ("params", "macs", "bytes")
NETWORKS = ("dense", "pruned")


@dataclass(frozen=True)
class Result:
    """Settings and measurements of a pruned network and of its dense network.

    Attributes:
        name: name of the variant.
        params: settings: network, method, prune_rate, seed, ...
        metrics: measurements: dense_top1, pruned_top1, top1_drop, pruned_latency_ms_batch1_p50 (milliseconds), ...
        dataset: content hash of the data that accuracy was measured on.
        device: device that latency was measured on.
        run: MLflow ID of the run that measured it.
        uri: path or ``s3://`` URI of the evaluation, from which the step can be rerun.
        right: per-image correctness of the pruned network on the test split, as `scop.report.correctness.packed`
            encodes it; None if unknown.
    """

    name: str
    params: Mapping[str, Value]
    metrics: Mapping[str, float]
    dataset: str
    device: str
    run: str | None = None
    uri: str | None = None
    right: str | None = None

    @property
    def identity(self) -> str:
        """Key that is equal for results that differ only in their seeds.

        It consists of the data set and the parameter `recipe`, a hash of all settings. Artifacts of earlier versions
        have no `recipe`; each of them has its own key.
        """
        if "recipe" not in self.params:
            return f"{self.run} {self.uri} {self.name}"
        return f"{self.dataset} {self.params['recipe']}"

    @property
    def rerun(self) -> str | None:
        """Command that repeats the measurement; None if the evaluation's URI is unknown."""
        return None if self.uri is None else f"scop rerun {shlex.quote(self.uri)}"

    @property
    def training(self) -> str | None:
        """Key that is equal for results with the same training, however they were pruned; None if unknown."""
        first, dash, _ = str(self.params.get("recipe", "")).partition("-")
        return first if dash else None

    @classmethod
    def of(cls, evaluation: Mapping[str, Any], uri: str | None = None) -> Result:
        """Return the result of an evaluation: the content of evaluation.json, merged by `with_timings`."""
        sections = evaluation.get("settings", {})
        made = {name: _entry(sections, path) for path, name in _OF_SECTIONS.items()}
        params = {
            "dataset": evaluation["dataset"]["source"],
            "method": evaluation["method"],
            "prune_rate": evaluation["prune_rate"],
            "residual": evaluation["residual"],
            **{name: _plain(value) for name, value in made.items() if value not in (None, [], {})},
        }
        if (device := evaluation.get("trained_on")) is not None:
            params["trained_on"] = device
        if sections:
            params["recipe"] = _recipe(sections)
        return cls(
            name=evaluation["variant"],
            params=params,
            metrics=_metrics(evaluation),
            dataset=evaluation["dataset"]["content"],
            device=evaluation["device"],
            run=evaluation.get("run"),
            uri=uri,
            right=evaluation["pruned"].get("right"),
        )


@dataclass(frozen=True)
class VariantResult:
    """Outputs of the steps evaluate and export for one variant.

    Attributes:
        evaluation: content of evaluation.json, merged by `with_timings`.
        export: content of export.json, with the URIs of the exported model as ``model`` and ``onnx``.
        uri: path or URI of the evaluation.
    """

    evaluation: Mapping[str, Any]
    export: Mapping[str, Any]
    uri: str | None = None

    @property
    def name(self) -> str:
        return str(self.evaluation["variant"])

    @property
    def result(self) -> Result:
        """The variant's result as a flat row."""
        return Result.of(self.evaluation, self.uri)

    def summary(self) -> dict[str, Any]:
        """Return the variant's entry in summary.json."""
        figures = ("top1", "top5", "params", "macs", "bytes", "latency_ms")
        return {
            "name": self.name,
            "method": self.evaluation["method"],
            "prune_rate": self.evaluation["prune_rate"],
            "dense": {key: self.evaluation["dense"][key] for key in figures},
            "pruned": {key: self.evaluation["pruned"][key] for key in figures},
            "exactness": self.export["exactness"],
            "model": self.export["model"],
            "onnx": self.export["onnx"],
        }


def with_timings(evaluation: Mapping[str, Any], timings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the timings and the run's ID into an evaluation.

    They are stored in a separate file, because a rerun does not reproduce them.
    """
    merged = {**evaluation, "run": timings.get("run"), "trained_on": timings.get("trained_on")}
    for network in NETWORKS:
        seconds = timings.get("train_seconds", {}).get(network)
        merged[network] = evaluation[network] | {"latency_ms": timings["latency_ms"][network], "train_seconds": seconds}
    return merged


def _recipe(sections: Mapping[str, Any]) -> str:
    """Return "TRAINING-ALL": a hash of the training settings and a hash of all settings.

    Names and seeds are excluded. The variant's entry `finetune` is excluded because section `finetune` already contains
    it. `rounds` counts as a training setting because each round trains for some epochs.
    """
    without = {
        name: {key: value for key, value in section.items() if key not in ("seed", "name")}
        for name, section in sections.items()
    }
    variant = without.get("variant", {})
    variant.pop("finetune", None)
    training = {"rounds": variant.get("rounds", 1), **{name: without.get(name) for name in ("dense", "finetune")}}
    return f"{_hash(training, 8)}-{_hash(without, 12)}"


def _hash(settings: Mapping[str, Any], digits: int) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:digits]


def _plain(value: Any) -> Value:
    """Convert lists and mappings to text for a table cell."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {entry}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _entry(sections: Mapping[str, Any], path: str) -> Any:
    value: Any = sections
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    # The rate is a metric, too: MLflow stores parameters as text and cannot compare them as numbers.
    metrics: dict[str, float] = {"prune_rate": float(evaluation["prune_rate"])}
    for network in NETWORKS:
        figures = evaluation[network]
        metrics |= {f"{network}_{key}": float(figures[key]) for key in ("top1", "top5", "loss", *SIZES)}
        for batch_size, latency in figures["latency_ms"].items():
            metrics |= {f"{network}_latency_ms_batch{batch_size}_{key}": ms for key, ms in latency.items()}
        if (seconds := figures.get("train_seconds")) is not None:
            metrics[f"{network}_train_seconds"] = seconds
    metrics["top1_drop"] = metrics["dense_top1"] - metrics["pruned_top1"]
    for key in ("params", "macs"):
        metrics[f"{key}_removed"] = 1 - metrics[f"pruned_{key}"] / metrics[f"dense_{key}"]
    for batch_size in evaluation["dense"]["latency_ms"]:
        dense, pruned = (metrics[f"{n}_latency_ms_batch{batch_size}_p50"] for n in NETWORKS)
        metrics[f"speedup_batch{batch_size}"] = dense / pruned
    return {key: value for key, value in metrics.items() if math.isfinite(value)}
