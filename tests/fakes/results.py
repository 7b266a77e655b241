"""Synthetic results for tests and benchmarks of comparisons, in memory and in MLflow."""

from __future__ import annotations

from typing import Any

from scop.report.results import Result

METHODS = {"scop": 0.94, "l1": 0.93, "random": 0.90}


def result(method: str = "scop", rate: float = 0.5, seed: int = 0, **changes: Any) -> Result:
    """Return a network's row; its accuracy falls with the rate and the seed."""
    kept = (1 - rate) ** 2
    top1 = METHODS[method] - 0.05 * rate - 0.001 * seed
    metrics = {"dense_top1": 0.95, "dense_top5": 0.99, "dense_macs": 40e6, "dense_params": 270e3, "dense_bytes": 1.1e6}
    metrics |= {"pruned_top1": top1, "pruned_top5": 0.99, "top1_drop": 0.95 - top1, "pruned_macs": 40e6 * kept}
    metrics |= {"pruned_params": 270e3 * kept, "pruned_bytes": 1.1e6 * kept, "macs_removed": 1 - kept}
    metrics |= {"dense_latency_ms_batch1_p50": 2.0, "pruned_latency_ms_batch1_p50": 1 + kept}
    metrics |= {"speedup_batch1": 2 / (1 + kept), "device_seconds": 10.0}
    params = {"network": "resnet20", "dataset": "digits", "method": method, "prune_rate": rate, "seed": seed}
    params["recipe"] = f"alike-{method}-{rate}"
    values = {"name": f"{method}-{rate}", "params": params, "metrics": metrics, "dataset": "d0" * 32, "device": "a CPU"}
    return Result(**(values | {"run": f"run-{method}-{rate}-{seed}", "uri": None} | changes))


HISTORY = [
    {"epoch": epoch, "loss": float("nan"), "top1": 0.5, "validation_top1": 0.5 + epoch / 10} for epoch in (1, 2, 3)
]
EVALUATION: dict[str, Any] = {
    "kept": {"conv1": 4, "conv2": 16},
    "channels": {"conv1": 16, "conv2": 32},
    "unsure": {"conv1": {"kept": [3], "removed": [5, 7]}, "conv2": {"kept": [], "removed": []}},
    "history": HISTORY,
    "dense_history": HISTORY,
    "confusion": [[9, 1], [0, 10]],
    "classes": ["cat", "</script><b>dog"],
    "scores": {"conv1": [0.1, 0.2, -0.1], "conv2": [0.3] * 4},
}
URI = "a run/scop/evaluate/evaluation"
SWEEP = [
    result(method, rate, seed, uri=URI) for method in ("scop", "l1", "random") for rate in (0.3, 0.5) for seed in (0, 1)
]


def log(client: Any, experiment: str, row: Result, parent: str | None = None, status: str = "FINISHED") -> str:
    """Write a row to MLflow as step evaluate does; return the run ID."""
    from mlflow.entities import Metric, Param, RunTag

    tags = {"scop.step": "evaluate", "scop.variant": row.name, "scop.dataset": row.dataset}
    tags |= {"scop.measured_on": row.device, "scop.device": row.device}
    tags |= {"mlflow.parentRunId": parent} if parent else {}
    tags |= {"scop.right": row.right} if row.right else {}
    run = client.create_run(experiment, run_name=f"{row.name} evaluate").info.run_id
    client.log_batch(
        run,
        metrics=[Metric(key, value, 0, 0) for key, value in row.metrics.items()],
        params=[Param(key, str(value)) for key, value in row.params.items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    client.set_terminated(run, status)
    return str(run)
