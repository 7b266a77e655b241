"""`scop run`: the pipeline on this machine, through KFP's local runner."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

import scop
from pipelines.console import console
from scop.config import Config
from scop.errors import UserError
from scop.manifest import write_atomically
from scop.progress import TERMINAL_VARIABLE
from scop.steps.runtime import RUN_VARIABLE, git_revision
from scop.text import human
from scop.tracking import PARENT_VARIABLE, end_parent, start_parent


class StepError(Exception):
    """A step of the pipeline failed; its traceback has been printed."""


@dataclass(frozen=True)
class LocalRun:
    """A finished run.

    Attributes:
        folder: where everything of it lies.
        summary: the content of its summary.json.
        tracking_uri: of MLflow.
    """

    folder: Path
    summary: dict[str, Any]
    tracking_uri: str


def run_locally(config: Config, out: Path, name: str) -> LocalRun:
    """Run the pipeline, each step in a process of its own.

    Args:
        config: what to run.
        out: the run gets a folder in here, and MLflow's database, shared by all runs, lies here too.
        name: what the run's id begins with.

    Raises:
        UserError: the output folder cannot be written, MLflow cannot be used, or a step refused its input.
        StepError: a step failed.
    """
    started = time.monotonic()
    _refuse_missing_files(config)
    out = out.expanduser().absolute()
    run_id = f"{config.run.name or name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = out / run_id
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be made: {error.strerror}") from error
    write_atomically(folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    print(f"run {run_id}: {len(config.variants)} variant(s), everything in {folder}", flush=True)

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out / 'mlflow.db'}"
    with _environment({"MLFLOW_TRACKING_URI": uri}):
        return _run_tracked(config, folder, run_id, started)


def _refuse_missing_files(config: Config) -> None:
    """What the steps would find missing minutes later is said at once."""
    for key, value in (("data.path", config.data.path), ("dense.weights", config.dense.weights)):
        if value is not None and not Path(value).expanduser().exists():
            raise UserError(f"{key} {value} does not exist")


def _run_tracked(config: Config, folder: Path, run_id: str, started: float) -> LocalRun:
    tags = {"scop.run": run_id, "scop.version": scop.__version__, "scop.revision": git_revision() or "unknown"}
    parent = start_parent(config.run.experiment, run_id, tags)
    succeeded = False
    try:
        with _environment({RUN_VARIABLE: run_id, PARENT_VARIABLE: parent, **_terminal()}):
            report = _execute(config, folder)
        succeeded = True
    finally:
        if not succeeded:
            end_parent(parent, False, {}, [folder / "config.yaml"])
    summary = json.loads((report / "summary.json").read_text())
    _link_deliverables(summary, folder)
    summary = {"run_id": run_id, "seconds": round(time.monotonic() - started, 1), **summary, "mlflow_run": parent}
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomically(folder / "report.html", (report / "report.html").read_text(encoding="utf-8"))
    end_parent(
        parent,
        True,
        _headline(summary),
        [folder / "config.yaml", folder / "summary.json", folder / "report.html"],
    )
    return LocalRun(folder, summary, os.environ["MLFLOW_TRACKING_URI"])


def _link_deliverables(summary: dict[str, Any], folder: Path) -> None:
    """RUN/models/VARIANT for what lies as deep as KFP puts it; the summary names these short paths."""
    (folder / "models").mkdir()
    for variant in summary["variants"]:
        deep, link = Path(variant["model"]), folder / "models" / variant["name"]
        link.symlink_to(os.path.relpath(deep, link.parent), target_is_directory=True)
        variant["model"], variant["onnx"] = str(link), str(link / Path(variant["onnx"]).name)


def _headline(summary: dict[str, Any]) -> dict[str, float]:
    """The figures by which pipeline runs are compared, for the parent run."""
    metrics = {"seconds": float(summary["seconds"]), "dense/top1": summary["variants"][0]["dense"]["top1"]}
    for variant in summary["variants"]:
        metrics |= {f"{variant['name']}/{key}": variant["pruned"][key] for key in ("top1", "params", "macs")}
    return metrics


def _execute(config: Config, folder: Path) -> Path:
    """Run the steps; returns the folder of the report."""
    from kfp import local

    from pipelines.pipeline import scop_pipeline

    # What is None is left out: KFP's parameters know no null.
    sections = config.model_dump(mode="json", exclude={"run"}, exclude_none=True)
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder),
        workspace_root=str(folder / ".workspace"),
    )
    with console(folder / "log.txt") as view:
        try:
            task = scop_pipeline(**sections)
        except RuntimeError as error:
            if view.error:
                raise UserError(view.error) from error
            raise StepError(f"step {view.task} failed; everything that it said is in {folder / 'log.txt'}") from error
    return Path(task.output.path)


def _terminal() -> dict[str, str]:
    """The terminal that somebody watches, for the steps' progress bars."""
    try:
        return {TERMINAL_VARIABLE: os.ttyname(sys.stderr.fileno())}
    except (OSError, io.UnsupportedOperation):
        return {}


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def print_result(run: LocalRun) -> None:
    """The table dense against pruned, where things are, and how to open MLflow."""
    from rich.console import Console
    from rich.table import Table

    variants = run.summary["variants"]
    sizes = list(variants[0]["dense"]["latency_ms"])
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column("network")
    for column in ("top-1", "parameters", "MACs", "file", *(f"ms at batch {size}" for size in sizes)):
        table.add_column(column, justify="right")
    rows = [("dense", variants[0]["dense"]), *((v["name"], v["pruned"]) for v in variants)]
    for name, figures in rows:
        latencies = [f"{figures['latency_ms'][size]['p50']:.2f}" for size in sizes]
        cells = [
            f"{figures['top1']:.2%}",
            human(figures["params"]),
            human(figures["macs"]),
            human(figures["bytes"], "B"),
        ]
        table.add_row(name, *cells, *latencies)
    console = Console(width=max(80, Console().width) if sys.stdout.isatty() else 120, highlight=False, markup=False)
    console.print()
    console.print(table)
    console.print()
    for variant in variants:
        console.print(f"{variant['name']}: {variant['model']}", soft_wrap=True)
    console.print(f"report:  {run.folder / 'report.html'}", soft_wrap=True)
    console.print(f"summary: {run.folder / 'summary.json'} ({run.summary['seconds']:.0f} s)", soft_wrap=True)
    console.print(f"MLflow:  {mlflow_command(run.tracking_uri)}", soft_wrap=True)


def mlflow_command(uri: str) -> str:
    """The line that opens MLflow's pages on the results."""
    if uri.startswith("http"):
        return uri
    # By its path where the virtual environment is not active, as after `make run`.
    command = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    return f"{shlex.join([command, 'server', '--backend-store-uri', uri, '--port', '5000'])}  # http://127.0.0.1:5000"
