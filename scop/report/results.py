"""One measured network, flat: the row that people compare, the same in MLflow, in a table and on a page."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Value = str | float | int | bool

# What of the sections by which a network was made is a parameter of its own: section.key -> the parameter's name.
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
"""Parameters in which results of one recipe differ."""

SIZES = ("params", "macs", "bytes")
NETWORKS = ("dense", "pruned")


@dataclass(frozen=True)
class Result:
    """A pruned network beside the dense one it came from.

    Attributes:
        name: of the variant.
        params: what it was made by: network, method, prune_rate, seed, ...
        metrics: what was measured: dense_top1, pruned_top1, top1_drop, pruned_latency_ms_batch1_p50 (milliseconds), ...
        dataset: content hash of the data that accuracy was measured on.
        device: that latency was measured on.
        run: MLflow's id of the run that measured it.
        place: of the evaluation, a path or URI, by which the step can be run again.
        right: which test images the pruned network gets right, as `scop.report.correctness` packs it; None if unknown.
    """

    name: str
    params: Mapping[str, Value]
    metrics: Mapping[str, float]
    dataset: str
    device: str
    run: str | None = None
    place: str | None = None
    right: str | None = None

    @property
    def identity(self) -> str:
        """The same for results that differ in nothing but their seeds, and for no others.

        It goes by the parameter `recipe`, a hash of all settings. Where there is none, an artifact of an earlier
        version, a result is like no other one.
        """
        if "recipe" not in self.params:
            return f"{self.run} {self.place} {self.name}"
        return f"{self.dataset} {self.params['recipe']}"

    @property
    def rerun(self) -> str | None:
        """The command that measures it again; None where nobody knows where it is."""
        return None if self.place is None else f"scop rerun {shlex.quote(self.place)}"

    @property
    def training(self) -> str | None:
        """The same for results of networks that were trained alike, whatever was pruned; None where that is unknown."""
        first, dash, _ = str(self.params.get("recipe", "")).partition("-")
        return first if dash else None

    @classmethod
    def of(cls, evaluation: Mapping[str, Any], place: str | None = None) -> Result:
        """What an evaluation says, as step evaluate has it, with the timings put in."""
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
            place=place,
            right=evaluation["pruned"].get("right"),
        )


@dataclass(frozen=True)
class VariantResult:
    """What the steps found out about one variant.

    Attributes:
        evaluation: the content of evaluation.json, the timings put in.
        export: the content of export.json.
        place: of the evaluation, a path or URI.
    """

    evaluation: Mapping[str, Any]
    export: Mapping[str, Any]
    place: str | None = None

    @property
    def name(self) -> str:
        return str(self.evaluation["variant"])

    @property
    def result(self) -> Result:
        """Its row."""
        return Result.of(self.evaluation, self.place)

    def summary(self) -> dict[str, Any]:
        """The variant's entry in summary.json."""
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
    """An evaluation with what was timed, and by which run: it lies apart from what a rerun reproduces."""
    merged = {**evaluation, "run": timings.get("run"), "trained_on": timings.get("trained_on")}
    for network in NETWORKS:
        seconds = timings.get("train_seconds", {}).get(network)
        merged[network] = evaluation[network] | {"latency_ms": timings["latency_ms"][network], "train_seconds": seconds}
    return merged


def _recipe(sections: Mapping[str, Any]) -> str:
    """A hash of all settings that a network was trained by, and one of all that it was made by.

    Its name and the seeds are left out. What a variant changes of section finetune is in that section already; in
    each of its rounds there are epochs of training too.
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
    """Lists and mappings as text, which fits into a cell."""
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
    # As a metric too, since MLflow keeps parameters as text, which it cannot search by size.
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
