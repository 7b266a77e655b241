"""The speed benchmarks and their bounds; ratios compare measurements from one process."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from scop.compute.device import pick_device
from scop.compute.narrow_batch_norm import NarrowBatchNorms
from scop.config import BudgetSection, DenseSection, ScoreKind
from scop.data.batches import Augmentation, Batches
from scop.data.dataset import Dataset, Split, make_dataset
from scop.environment import StepEnvironment
from scop.knockoffs.phase import Competition
from scop.knockoffs.sources import shuffle
from scop.models.factories import make_model
from scop.models.history import load_history
from scop.pruning.graph import RESIDUAL_RULES, ChannelGraph
from scop.pruning.surgery import prune
from scop.runtime.execution import run_step
from scop.selection.latency import Stopwatch
from scop.selection.select import select_channels
from scop.storage.cache import Cache
from scop.storage.folders import fetch_folder, upload_folder
from scop.storage.manifest import write_manifest
from scop.storage.s3 import client, forget_client
from scop.tracking.pipeline_run import start_parent
from scop.training.loop import Step
from scop.training.supervised import Supervised, make_optimizer
from tests.benchmarks.experiments import compare
from tests.benchmarks.measure import take_turns
from tests.fakes import services
from tests.helpers import ROOT, SHARED

SHAPE = (3, 32, 32)


def synthetic(count: int = 20_000) -> Dataset:
    """Return random images of CIFAR's shape; speed does not depend on their content."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    labels = np.arange(count, dtype=np.int64) % 10
    small = Split(images[:100], labels[:100])
    return make_dataset("noise", [str(i) for i in range(10)], Split(images, labels), small)


def training_step(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    """Return a plain training step: forward, backward, optimizer."""
    device = pick_device()
    section = DenseSection(lr=1e-4)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    return partial(Step(Supervised(model, device, section), make_optimizer(model, section)), images, labels)


def random_batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    device = pick_device()
    images = torch.randn(count, *SHAPE).to(device, memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (count,)).to(device)


def scop(*arguments: str) -> None:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


def batches(turns: int) -> dict[str, Any]:
    """Measure loading a batch, as a share of a ResNet-20 training step."""
    dataset, device = synthetic(), pick_device()
    source = Batches(dataset["train"], dataset.info, 128, device, Augmentation(crop_padding=4, flip=True))
    stream = iter(source)

    def batch() -> None:
        nonlocal stream
        try:
            next(stream)
        except StopIteration:
            stream = iter(source)
            next(stream)

    times = take_turns({"batch": batch, "step": training_step(make_model("resnet20"), *random_batch(128))}, turns)
    return {"ms": _ms(times), "ratio": times["batch"] / times["step"], "at_most": 0.05}


def knockoff_step(turns: int) -> dict[str, Any]:
    """Measure a knockoff step against a plain training step, ResNet-20, batch 256."""
    model, device = make_model("resnet20"), pick_device()
    images, labels = random_batch(256)

    def knockoffs(score: ScoreKind) -> Callable[[], object]:
        competition = Competition(model, ChannelGraph(model, SHAPE), shuffle, device, score=score)
        return partial(Step(competition, competition.optimizer()), images, labels)

    work = {"fisher": knockoffs("fisher"), "published": knockoffs("published")}
    times = take_turns(work | {"plain": training_step(model, images, labels)}, turns)
    ratios = {score: {"ratio": times[score] / times["plain"], "at_most": 1.4} for score in work}
    return {"ms": _ms(times)} | ratios


def finetuning(turns: int) -> dict[str, Any]:
    """Measure the training throughput of pruned ResNet-56 against dense, rate 0.45, batch 128."""
    dense = make_model("resnet56")
    images, labels = random_batch(128)
    scatter = prune(dense, select_channels(dense, method="l1", input_shape=SHAPE))
    scatter8 = prune(dense, select_channels(dense, method="l1", input_shape=SHAPE, round_to=8))
    coupled = prune(dense, select_channels(dense, method="l1", input_shape=SHAPE, residual="coupled", round_to=8))
    work = {
        name: training_step(model, images, labels)
        for name, model in (("dense", dense), ("scatter", scatter), ("scatter8", scatter8), ("coupled", coupled))
    }
    times = take_turns(work, turns)
    return {
        "ms": _ms(times),
        "scatter": {"ratio": times["dense"] / times["scatter"], "at_least": 1.4},
        "scatter rounded to 8": {"ratio": times["dense"] / times["scatter8"], "at_least": 1.4},
        "coupled": {"ratio": times["dense"] / times["coupled"], "at_least": 1.8},
    }


def narrow_batch_norm(turns: int) -> dict[str, Any]:
    """Measure a training step of a pruned ResNet-20, batch 128, with PyTorch's batch norms against folded ones."""
    dense = make_model("resnet20")
    images, labels = random_batch(128)
    results: dict[str, Any] = {}
    for residual in RESIDUAL_RULES:
        model = prune(dense, select_channels(dense, method="l1", input_shape=SHAPE, residual=residual))
        folded = training_step(model, images, labels)

        def plain(step: Callable[[], object] = folded) -> None:
            with patch.object(NarrowBatchNorms, "train", lambda self, norm: F.batch_norm(*norm)):
                step()

        times = take_turns({"plain": plain, "folded": folded}, turns)
        results[residual] = {"ratio": times["plain"] / times["folded"], "at_least": 1.05}
    return results


def latency_budget(turns: int) -> dict[str, Any]:
    """Measure the time of a selection under a latency budget, and the deviation when measured again."""
    device, share, batch = pick_device(), 0.8, 64  # `scatter` cannot reach 0.6 where width hardly affects kernels
    model = make_model("resnet20").eval()
    graph = ChannelGraph(model, SHAPE)
    seconds, off = [], []
    for _ in range(turns):
        for residual in ("scatter", "coupled"):
            before = Stopwatch(model, graph, BudgetSection(latency_ms=1, batch_size=batch), device)
            budget = {"latency_ms": share * before.dense_ms, "batch_size": batch}
            started = time.perf_counter()
            plan = select_channels(
                model, method="l1", selection="global", residual=residual, budget=budget, input_shape=SHAPE
            )
            seconds.append(time.perf_counter() - started)
            after = Stopwatch(model, graph, BudgetSection(latency_ms=1, batch_size=batch), device)
            off.append(abs(after(plan) / after.dense_ms / share - 1))
    return {
        "answer": {"seconds": max(seconds), "at_most": 120},
        "off": {"ratio": statistics.median(off), "worst": max(off), "at_most": 0.03},
    }


def help_seconds(turns: int) -> dict[str, Any]:
    """Measure `scop --help`."""
    return {"seconds": take_turns({"help": lambda: scop("--help")}, turns)["help"], "at_most": 0.5}


def step_overhead(turns: int) -> dict[str, Any]:
    """Measure the wall time of the cheapest step that loads a model, started as KFP starts it, with tracking.

    `select_channels` with the control `l1` on a ResNet-20 computes for some milliseconds. The rest is the start of the
    process, imports, records and tracking.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        data, dense, scores = (str(folder / part) for part in ("data", "dense", "scores"))
        run_step("prepare_data", {"data": {}}, {}, {"dataset": data})
        run_step("train_dense", {"dense": {"epochs": 0}}, {"dataset": data}, {"model": dense})
        knockoff = {"epochs": 1, "batch_size": 1024}
        run_step("train_knockoff", {"knockoff": knockoff}, {"dataset": data, "dense": dense}, {"scores": scores})
        command = _as_kfp_does("select_channels", {"dense": dense, "scores": scores}, folder)
        variables = os.environ | tracked(folder).as_variables()
        times = take_turns(
            {"step": lambda: subprocess.run(command, check=True, capture_output=True, env=variables)}, turns, 1
        )
    return {"seconds": times["step"], "at_most": 8.0}


def tracked(folder: Path) -> StepEnvironment:
    """Return the environment of a step that is tracked under a parent run in a new MLflow database."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    parent = start_parent(uri, "benchmark", "benchmark", {})
    return StepEnvironment(tracking_uri=uri, parent_run=parent)


def _as_kfp_does(step: str, inputs: dict[str, str], folder: Path) -> list[str]:
    """Return the command with which KFP's launcher runs a component, with a variant and input artifacts."""

    def artifacts(paths: dict[str, str]) -> dict[str, Any]:
        kind = {"schemaTitle": "system.Artifact", "schemaVersion": "0.0.1"}
        return {
            name: {"artifacts": [{"name": name, "type": kind, "uri": path, "metadata": {}}]}
            for name, path in paths.items()
        }

    executor_input = {
        "inputs": {"artifacts": artifacts(inputs), "parameterValues": {"variant": {"method": "l1"}}},
        "outputs": {
            "artifacts": artifacts({"plan": str(folder / "plan")}),
            "outputFile": str(folder / "executor_output.json"),
        },
    }
    module = ROOT / "components" / step / "component.py"
    command = [sys.executable, "-m", "kfp.dsl.executor_main", "--component_module_path", str(module)]
    return [*command, "--function_to_execute", step, "--executor_input", json.dumps(executor_input)]


def _ms(times: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds * 1e3, 2) for name, seconds in times.items()}


def archive(turns: int) -> dict[str, Any]:
    """Measure decoding and packing the 60,000 JPEG files of the shared CIFAR-10 archive by `prepare_data`."""
    path = SHARED / "data" / "cifar10-jpeg.tar.gz"
    if not path.exists():
        return {"skipped": f"{path.name} does not exist"}
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--set", "data.source=imagefolder", "--set", f"data.path={path}"]

        def pack() -> None:
            scop("step", "prepare_data", "--output", f"dataset={folder}/data", *settings)
            shutil.rmtree(f"{folder}/data")

        times = take_turns({"pack": pack}, turns, 0)
    return {"seconds": times["pack"], "at_most": 60}


def s3(turns: int) -> dict[str, Any]:
    """Measure upload and verified download of 1 GiB with a local S3 server, against `rclone copy`."""
    with tempfile.TemporaryDirectory() as name:
        folder, generator = Path(name), np.random.default_rng(0)
        (folder / "files").mkdir()
        for number in range(4):
            (folder / "files" / f"{number}.bin").write_bytes(generator.bytes(256 * 2**20))
        with services.s3_server(folder) as address, patch.dict(os.environ, services.environment(address)):
            forget_client()
            client().create_bucket(Bucket="bench")
            theirs = f":s3,provider=Other,env_auth=true,endpoint='{address}':bench"
            copy = [services.rclone(), "copy", "--config", "/dev/null"]

            ours, others = itertools.count(), itertools.count()
            uploads = {
                "up": lambda: upload_folder(folder / "files", f"s3://bench/ours{next(ours)}"),
                "rclone up": lambda: subprocess.run([*copy, f"{folder}/files", f"{theirs}/{next(others)}"], check=True),
            }
            # Always the same objects: rclone's server computes their MD5 at the first request, which would be timed.
            downloads = {
                "down": lambda: fetch_folder("s3://bench/ours0", Cache(folder / "cache")),
                "rclone down": lambda: subprocess.run([*copy, f"{theirs}/0", f"{folder}/copy"], check=True),
            }

            def clean() -> None:
                for copied in ("cache", "copy"):
                    shutil.rmtree(folder / copied, ignore_errors=True)
                os.sync()  # so that a run does not wait for the last one's writes

            write_manifest(folder / "files", "dataset")
            # First all uploads, then all downloads, so that only the timed work writes within each group.
            seconds = take_turns(uploads, turns, 1, clean) | take_turns(downloads, turns, 1, clean)
    return {
        "mb_per_second": {label: round(2**30 / 1e6 / value, 1) for label, value in seconds.items()},
        "up": {"ratio": seconds["rclone up"] / seconds["up"], "at_least": 0.8},
        "down": {"ratio": seconds["rclone down"] / seconds["down"], "at_least": 0.8},
    }


def run_overhead(turns: int) -> dict[str, Any]:
    """Compare a default run with the training that it contains, and time a step that computes for milliseconds."""
    ratios, others, steps = [], [], []
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            scop("run", "--out", folder)
            seconds = time.perf_counter() - started
            histories = [load_history(path.parent) for path in Path(folder).rglob("history.json")]
            training = sum(epoch.seconds for history in histories for epoch in history)
            ratios.append(seconds / training)
            others.append(seconds - training)
            log = next(Path(folder).glob("*/log.txt")).read_text()
            # The wall time of select_channels, records, tracking and plots included.
            steps.append(float(re.findall(r"select_channels\n(?:.*\n)*?  done in ([\d.]+) s", log)[0]))
    return {
        "run over training": {"ratio": statistics.median(ratios), "at_most": 1.3},
        "seconds outside training": round(statistics.median(others), 1),
        "step": {"seconds": statistics.median(steps), "at_most": 0.5},
    }


def default_run(turns: int) -> dict[str, Any]:
    """Measure `scop run` with its default configuration, from its start to the table."""
    with tempfile.TemporaryDirectory() as folder:
        times = take_turns({"run": lambda: scop("run", "--out", folder)}, turns, 0)
    return {"seconds": times["run"], "at_most": 240}


BENCHMARKS = {
    "compare": (compare, 3),
    "batches": (batches, 30),
    "knockoff_step": (knockoff_step, 12),
    "finetuning": (finetuning, 10),
    "narrow_batch_norm": (narrow_batch_norm, 20),
    "latency_budget": (latency_budget, 2),
    "help": (help_seconds, 9),
    "step_overhead": (step_overhead, 5),
    "archive": (archive, 2),
    "s3": (s3, 5),
    "default_run": (default_run, 1),
    "run_overhead": (run_overhead, 3),
}
