"""Fixtures: the digits as a dataset artifact, and a small network trained on them."""

from __future__ import annotations

import copy
import inspect
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

# Set before torch starts its threads. The tests are planned for two cores: one thread in each of two test processes,
# or two threads in one. More threads than cores mostly wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.pop("MLFLOW_TRACKING_URI", None)

import torch
from torch import nn

from scop.config import DataSection, DenseSection
from scop.data.batches import Augmentation, Batches
from scop.data.dataset import Dataset, load_dataset, save_dataset
from scop.data.sources import load_source
from scop.models.artifacts import save_model
from scop.models.factories import make_model
from scop.pruning.spec import attach_spec, spec_of
from scop.runtime.logs import log_to_standard_output
from scop.storage import s3
from scop.storage.cache import Cache
from scop.system.garbage import collect_garbage_rarely
from scop.training.learning_rate import Schedule
from scop.training.loop import fit
from scop.training.supervised import Supervised, make_optimizer
from tests.fakes import services

CPU = torch.device("cpu")
collect_garbage_rarely()


@pytest.fixture(scope="session", autouse=True)
def _short_stacks() -> None:
    """Make compilation of pipelines fast.

    At each call, KFP's tasks read the whole stack with source lines to find their caller's name. In a test process,
    with its many modules, this takes 15 seconds for one pipeline.
    """
    from kfp.dsl import pipeline_task

    pipeline_task.inspect = SimpleNamespace(stack=lambda: inspect.stack(context=0)[1:])


@pytest.fixture(autouse=True)
def _log() -> None:
    """Log as a step does in its own process; pytest captures it."""
    log_to_standard_output()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache for one test."""
    return Cache(tmp_path / "cache")


@pytest.fixture(scope="session")
def mlflow_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real MLflow server; each test creates its own experiments."""
    folder = tmp_path_factory.mktemp("mlflow")
    with services.mlflow_server(folder, str(folder / "artifacts"), os.environ) as address:
        yield address


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "dataset"
    save_dataset(load_source(DataSection()), folder)
    return folder


@pytest.fixture(scope="session")
def digits(digits_folder: Path) -> Dataset:
    return load_dataset(digits_folder)


@pytest.fixture
def batches(digits: Dataset) -> Batches:
    return Batches(digits["train"], digits.info, 64, CPU, Augmentation(crop_padding=1))


@pytest.fixture(scope="session")
def trained(digits: Dataset) -> nn.Module:
    """A small network trained on the digits; tests that change it use the copy `model`."""
    torch.manual_seed(0)
    model = make_model("tests.networks:Plain", num_classes=10, in_channels=1)
    spec = spec_of(model)
    assert spec is not None
    info = digits.info
    attach_spec(
        model,
        spec.model_copy(
            update={"input_shape": info.shape, "mean": info.mean, "std": info.std, "classes": info.classes}
        ),
    )
    section = DenseSection(epochs=12, batch_size=64, lr=0.1)
    training = Batches(digits["train"], info, 64, CPU, Augmentation(crop_padding=1))
    fit(
        Supervised(model, CPU, section),
        training,
        make_optimizer(model, section),
        Schedule(12, "one_cycle"),
        label="trained",
    )
    return model.eval()


@pytest.fixture
def model(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


@pytest.fixture(scope="session")
def model_folder(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dense"
    save_model(trained, folder, history=[])
    return folder


@pytest.fixture(scope="session")
def s3_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real S3 server."""
    with services.s3_server(tmp_path_factory.mktemp("s3")) as address:
        yield address


@pytest.fixture
def bucket(s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of an empty bucket; sets the environment variables to access it, and a cache for this test."""
    for key, value in services.environment(s3_address).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("SCOP_CACHE", str(tmp_path / "cache"))
    s3.forget_client()
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3.client().create_bucket(Bucket=name)
    yield f"s3://{name}"
    s3.forget_client()
