"""Tests of tracking with a real MLflow server, including one that fails or stops."""

import contextlib
import http.server
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from scop import UserError, load_model
from scop.environment import StepEnvironment
from scop.tracking import pipeline_run
from scop.tracking.mlflow import MlflowTracker
from scop.tracking.pipeline_run import close_parent, end_parent, start_parent
from scop.tracking.server import find_or_create_experiment
from scop.tracking.tags import KFP_TAG, PARENT_TAG
from scop.tracking.tracker import UNSENT
from tests.fakes import services
from tests.helpers import run_step

TINY = {"model": "tests.networks:Plain", "epochs": 2, "batch_size": 64}


def uri() -> str:
    """Return MLFLOW_TRACKING_URI."""
    return os.environ["MLFLOW_TRACKING_URI"]


def tracker_for(run_name: str, tags: Mapping[str, str], unsent: Path) -> MlflowTracker:
    """Start a tracker with the current environment variables."""
    return MlflowTracker.start(StepEnvironment.read(), run_name, tags, unsent)


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@pytest.fixture
def server(mlflow_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a real MLflow server, set as MLFLOW_TRACKING_URI."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_address)
    return mlflow_address


def test_step_is_tracked_as_a_child_run(server: str, digits_folder: Path, tmp_path: Path, monkeypatch) -> None:
    parent = start_parent(uri(), "experiment", "run", {"scop.run": "run"})
    monkeypatch.setenv("SCOP_PARENT_RUN_ID", parent)
    run_step("train_dense", {"dense": TINY}, {"dataset": str(digits_folder)}, {"model": str(tmp_path / "model")})
    end_parent(MlflowClient(), parent, True, {"seconds": 1.0}, [])
    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    (child,) = (run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent)
    assert child.info.status == "FINISHED"
    assert child.data.params["dense.batch_size"] == "64"
    assert len(client.get_metric_history(child.info.run_id, "validation_top1")) >= 2
    assert client.get_run(parent).info.status == "FINISHED"


@pytest.fixture
def kfp_run(server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ID of a KFP run, which its steps share; it is also the name of the experiment."""
    name: str = request.node.name
    monkeypatch.setenv("KFP_RUN_ID", name)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    return name


def runs_of(experiment: str) -> tuple[list, list]:
    """Return the parent runs and the child runs of an experiment."""
    client = MlflowClient()
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    parents = [run for run in found if PARENT_TAG not in run.data.tags]
    return parents, [run for run in found if PARENT_TAG in run.data.tags]


def test_concurrent_steps_share_one_parent_run(kfp_run: str, tmp_path: Path) -> None:
    find_or_create_experiment(MlflowClient(), kfp_run)
    barrier = threading.Barrier(4)

    def step(number: int) -> None:
        barrier.wait()
        tracker = tracker_for(f"step {number}", {"scop.version": "1"}, tmp_path / f"{number}-{UNSENT}")
        barrier.wait()
        tracker.close(succeeded=True)

    threads = [threading.Thread(target=step, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (parent,), children = runs_of(kfp_run)
    assert parent.data.tags[KFP_TAG] == kfp_run
    assert {run.data.tags[PARENT_TAG] for run in children} == {parent.info.run_id}
    assert len(children) == 4
    assert parent.info.status == "RUNNING"


def test_parent_run_has_tags_for_image_device_and_versions(
    kfp_run: str, digits_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    image = f"registry.example.com/scop@sha256:{64 * '0'}"
    monkeypatch.setenv("SCOP_IMAGE", image)
    run_step("train_dense", {"dense": TINY}, {"dataset": str(digits_folder)}, {"model": str(tmp_path / "model")})
    (parent,), (child,) = runs_of(kfp_run)
    tags = parent.data.tags
    assert (tags["scop.image"], tags["scop.device"]) == (image, child.data.tags["scop.device"])
    assert {"scop.version", "scop.torch", "scop.python", "scop.machine", "mlflow.source.git.commit"} <= tags.keys()
    configuration = MlflowClient().list_artifacts(parent.info.run_id, "configuration")
    assert [entry.path for entry in configuration] == ["configuration/train_dense.yaml"]


def test_merges_duplicate_parent_runs(kfp_run: str, tmp_path: Path, monkeypatch) -> None:
    """Each step looks for a parent before the other one has created it."""
    with monkeypatch.context() as blind:
        look, looks = pipeline_run._parents, iter([True, False, True, False])
        blind.setattr(pipeline_run, "_parents", lambda *a: [] if next(looks) else look(*a)[-1:])
        first = tracker_for("first", {}, tmp_path / "first")
        blind.setattr(pipeline_run, "_parents", lambda *a: [] if next(looks) else look(*a)[-1:])
        second = tracker_for("second", {}, tmp_path / "second")
    assert len(runs_of(kfp_run)[0]) == 2
    first.close(succeeded=True)
    second.close(succeeded=True)
    (parent,), children = runs_of(kfp_run)
    assert [run.data.tags[PARENT_TAG] for run in children] == [parent.info.run_id] * 2


def test_retry_reopens_a_failed_run_and_success_closes_it(kfp_run: str, tmp_path: Path) -> None:
    tracker_for("finetune", {}, tmp_path / "a").close(succeeded=False, error="finetune: out of memory")
    (parent,), _ = runs_of(kfp_run)
    assert (parent.info.status, parent.data.tags["scop.error"]) == ("FAILED", "finetune: out of memory")
    retry = tracker_for("finetune", {}, tmp_path / "b")
    assert runs_of(kfp_run)[0][0].info.status == "RUNNING"
    retry.close(succeeded=True)
    assert runs_of(kfp_run)[0][0].info.status == "RUNNING"
    tracker_for("compare", {}, tmp_path / "c").close(succeeded=True, last={"scop/top1": 0.9})
    (parent,), _ = runs_of(kfp_run)
    assert (parent.info.status, parent.data.metrics) == ("FINISHED", {"scop/top1": 0.9})
    assert "scop.error" not in parent.data.tags


def test_run_stays_failed_until_the_failed_variant_succeeds(kfp_run: str, tmp_path: Path) -> None:
    tracker_for("a finetune", {}, tmp_path / "a").close(succeeded=False, error="finetune: out of memory")
    for name in ("b finetune", "b evaluate"):
        tracker_for(name, {}, tmp_path / name).close(succeeded=True)
    assert runs_of(kfp_run)[0][0].info.status == "FAILED"
    tracker_for("a finetune", {}, tmp_path / "retry").close(succeeded=True)
    assert runs_of(kfp_run)[0][0].info.status == "RUNNING"


def test_close_parent_closes_the_runs_of_a_killed_pod(kfp_run: str, tmp_path: Path) -> None:
    tracker_for("finetune", {}, tmp_path / "a")  # its pod is killed
    close_parent(uri(), kfp_run, kfp_run, succeeded=False, error="step finetune failed: OOMKilled")
    (parent,), (child,) = runs_of(kfp_run)
    assert (parent.info.status, child.info.status) == ("FAILED", "KILLED")
    assert parent.data.tags["scop.error"] == "step finetune failed: OOMKilled"
    assert close_parent(uri(), kfp_run, "another", succeeded=True) is None


def test_step_uses_the_run_that_kfp_opened(kfp_run: str, tmp_path: Path, monkeypatch) -> None:
    client = MlflowClient()
    experiment = find_or_create_experiment(client, kfp_run)
    kfp_parent = client.create_run(experiment).info.run_id
    kfp_child = client.create_run(experiment, tags={PARENT_TAG: kfp_parent}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", kfp_child)
    tracker = tracker_for("finetune", {"scop.step": "finetune"}, tmp_path / "a")
    assert tracker.run_id == kfp_child
    tracker.close(succeeded=True)
    (parent,), (child,) = runs_of(kfp_run)
    assert (parent.info.run_id, child.info.run_id) == (kfp_parent, kfp_child)
    assert child.data.tags["scop.step"] == "finetune"


def test_tracking_stores_metrics_locally_after_the_server_stops(tmp_path: Path, monkeypatch, capsys) -> None:
    with services.mlflow_server(tmp_path, str(tmp_path / "artifacts"), os.environ) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        tracker = tracker_for("train_dense", {}, tmp_path / UNSENT)
        tracker.log_metrics({"loss": 1.0}, step=1)
        assert not (tmp_path / UNSENT).exists()
    tracker.log_metrics({"loss": 0.5}, step=2)
    tracker.log_metrics({"loss": 0.25}, step=3)
    tracker.close(succeeded=True)
    assert capsys.readouterr().out.count("tracking: MLflow failed") == 1
    unsent = [json.loads(line) for line in (tmp_path / UNSENT).read_text().splitlines()]
    assert [entry["what"] for entry in unsent] == ["metrics", "metrics", "close"]
    assert unsent[1]["content"] == {"step": 3, "loss": 0.25}


@pytest.mark.parametrize("status", [401, 403, 500])
def test_training_continues_if_the_server_fails_midway(
    server: str, digits_folder: Path, tmp_path: Path, monkeypatch, capsys, status: int
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    with services.faulty(int(server.rpartition(":")[2])) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.address)
        parent = start_parent(uri(), "midway", str(status), {"scop.run": str(status)})
        monkeypatch.setenv("SCOP_PARENT_RUN_ID", parent)
        logged = [("POST", "/api/2.0/mlflow/runs/log-batch")] * 3  # from the third one on, the server fails

        def plan(method: str, path: str) -> str | None:
            return str(status) if proxy.seen.count(logged[0]) >= len(logged) else None

        proxy.plan = plan
        output = tmp_path / "model"
        run_step("train_dense", {"dense": TINY}, {"dataset": str(digits_folder)}, {"model": str(output)})
    assert load_model(output) is not None
    printed = capsys.readouterr().out
    assert printed.count("tracking: MLflow failed") == 1
    assert str(status) in printed.partition("tracking: MLflow failed")[2].splitlines()[0]
    unsent = [json.loads(line)["what"] for line in (output / UNSENT).read_text().splitlines()]
    assert unsent[-1] == "close"
    assert "metrics" in unsent


def test_rejected_parameters_do_not_block_later_ones(server: str, tmp_path: Path, capsys) -> None:
    tracker = tracker_for("select_channels", {}, tmp_path / UNSENT)
    tracker.log_params({"layer3.*": 0.3})
    tracker.log_params({"prune_rate": 0.5})
    tracker.close(succeeded=True)
    assert "tracking: MLflow rejected params" in capsys.readouterr().out
    (unsent,) = (json.loads(line) for line in (tmp_path / UNSENT).read_text().splitlines())
    assert unsent == {"what": "params", "content": {"layer3.*": "0.3"}}
    run = MlflowClient().get_run(tracker.run_id)
    assert (run.data.params, run.info.status) == ({"prune_rate": "0.5"}, "FINISHED")


def test_records_system_metrics_during_a_step(server: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    tracker = tracker_for("train_dense", {}, tmp_path / UNSENT)
    tracker.watch_system()
    client, deadline = MlflowClient(), time.monotonic() + 60
    while not (found := client.get_run(tracker.run_id).data.metrics):
        assert time.monotonic() < deadline
    tracker.close(succeeded=True)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= found.keys()


def test_step_succeeds_without_a_reachable_server(digits_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{services.free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    output = tmp_path / "model"
    run_step("train_dense", {"dense": TINY}, {"dataset": str(digits_folder)}, {"model": str(output)})
    assert load_model(output) is not None
    assert "the step continues" in capsys.readouterr().out
    assert (output / UNSENT).exists()


def test_pipeline_does_not_start_without_a_reachable_server(monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{services.free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(UserError, match="check MLFLOW_TRACKING_URI and its credentials"):
        start_parent(uri(), "experiment", "run", {})


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers with `status`, or, if it is 0, waits until the client gives up."""

    status = 401

    def do_GET(self) -> None:
        if not self.status:
            self.connection.settimeout(20)
            with contextlib.suppress(OSError):
                self.rfile.read()  # until the client hangs up
            return
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def refusing(monkeypatch) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
        yield
        server.shutdown()


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_stop_a_step_at_its_start(tmp_path: Path, monkeypatch, refusing, status: int) -> None:
    monkeypatch.setattr(Refusing, "status", status)
    with pytest.raises(UserError, match="refuses access .*MLFLOW_TRACKING_USERNAME"):
        tracker_for("train_dense", {}, tmp_path / UNSENT)


@pytest.mark.parametrize("status", [500, 0])
def test_step_continues_if_the_server_fails_or_does_not_answer(
    digits_folder: Path, tmp_path: Path, monkeypatch, refusing, capsys, status: int
) -> None:
    monkeypatch.setattr(Refusing, "status", status)
    output = tmp_path / "model"
    run_step("train_dense", {"dense": TINY}, {"dataset": str(digits_folder)}, {"model": str(output)})
    assert load_model(output) is not None
    assert "the step continues" in capsys.readouterr().out
