"""Speed of `scop compare` on experiments of 1,000 and 10,000 results, with a local MLflow server."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scop.report.correctness import packed
from tests.benchmarks.measure import take_turns
from tests.fakes import services
from tests.fakes.results import METHODS, result
from tests.helpers import ROOT

AT_MOST = {1_000: 5.0, 10_000: 30.0}
"""Number of results -> maximum seconds of the command."""
IMAGES = 10_000
"""Size of CIFAR-10's test split."""


def compare(turns: int) -> dict[str, Any]:
    """Time `scop compare NAME --group-by ...`, including its start, on rows as wide as those of step evaluate."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in AT_MOST:
            fill(folder / "server.db", f"of-{count}", count)
        with services.mlflow_server(folder, str(folder / "artifacts"), os.environ, workers=4) as address:
            environment = os.environ | {"MLFLOW_TRACKING_URI": address}

            def table(count: int) -> None:
                command = [sys.executable, "-m", "pipelines.cli", "compare", f"of-{count}"]
                command += ["--group-by", "method,prune_rate"]
                subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)

            times = take_turns({str(count): partial(table, count) for count in AT_MOST}, turns, warmup=0)
    return {f"{count} runs": {"seconds": round(times[str(count)], 2), "at_most": AT_MOST[count]} for count in AT_MOST}


def fill(database: Path, experiment: str, count: int) -> None:
    """Write runs directly into MLflow's database: through its API, 10,000 runs take half an hour."""
    from mlflow.store.tracking.dbmodels import models
    from mlflow.tracking import MlflowClient
    from sqlalchemy import create_engine, insert

    own = MlflowClient(f"sqlite:///{database}").create_experiment(experiment)
    rows: dict[Any, list[dict[str, Any]]] = {
        kind: [] for kind in (models.SqlRun, models.SqlParam, models.SqlLatestMetric, models.SqlTag)
    }
    now, random = int(time.time() * 1000), np.random.default_rng(0)
    parents = [uuid.uuid4().hex for _ in range(count // 3 + 1)]
    for number in range(count):
        row = result(list(METHODS)[number % 3], 0.1 + 0.01 * (number % 60), number // 180)
        run = uuid.uuid4().hex
        failed = number % 100 == 99
        values = {"run_uuid": run, "name": f"{row.name} evaluate", "experiment_id": int(own)}
        values |= {"status": "FAILED" if failed else "FINISHED"}
        values |= {"start_time": now + number, "end_time": now + number + 1, "lifecycle_stage": "active"}
        values |= {"source_type": "UNKNOWN", "source_name": "", "entry_point_name": "", "user_id": ""}
        rows[models.SqlRun].append(values | {"source_version": "", "artifact_uri": f"mlflow-artifacts:/{run}"})
        more = {f"finetune_{key}": key for key in range(20)}
        for key, value in {**row.params, **more}.items():
            rows[models.SqlParam].append({"key": key, "value": str(value), "run_uuid": run})
        figures = {**row.metrics, **{f"pruned_figure_{key}": float(key) for key in range(16)}}
        for key, figure in figures.items():
            metric = {"key": key, "value": figure, "timestamp": now, "step": 0, "is_nan": False, "run_uuid": run}
            rows[models.SqlLatestMetric].append(metric)
        tags = {
            "scop.step": "evaluate",
            "scop.variant": row.name,
            "scop.measured_on": row.device,
            "scop.dataset": row.dataset,
            "scop.right": packed(random.random(IMAGES) < row.metrics["pruned_top1"]),
        }
        tags |= {"mlflow.parentRunId": parents[number // 3], "mlflow.runName": f"{row.name} evaluate"}
        tags |= {f"scop.fact{key}": "as long as a tag of the steps is" for key in range(6)}
        for key, value in tags.items():
            rows[models.SqlTag].append({"key": key, "value": value, "run_uuid": run})
    engine = create_engine(f"sqlite:///{database}")
    with engine.begin() as connection:
        for kind, values_of_kind in rows.items():
            for start in range(0, len(values_of_kind), 20_000):
                connection.execute(insert(kind), values_of_kind[start : start + 20_000])
    engine.dispose()
