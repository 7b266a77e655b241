"""Tests of `scop submit` and `scop watch` with a fake KFP server (`tests.fakes.kfp_server`)."""

import os
from collections.abc import Iterator
from pathlib import Path

import kfp_server_api as api
import pytest
import yaml

from pipelines.cli.main import main
from pipelines.cluster import submit
from scop import UserError
from scop.config import Config, DataSection
from scop.storage.cache import Cache
from scop.storage.fetch import local_path
from scop.storage.files import read_bytes, write_bytes
from tests.fakes.kfp_server import KfpServer, kfp_server
from tests.fakes.services import free_port
from tests.helpers import ROOT

EXAMPLE = ROOT / "pipelines" / "clusters" / "example.yaml"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KfpServer]:
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_TOKEN", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with kfp_server() as running:
        yield running
        assert running.problems == []


@pytest.fixture
def profile(server: KfpServer, tmp_path: Path, bucket: str) -> Path:
    values = yaml.safe_load(EXAMPLE.read_text()) | {"host": server.address, "pipeline_root": f"{bucket}/root"}
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(profile: Path, *more: str) -> int:
    try:
        return main(["submit", "--cluster", str(profile), "--every", "0.01", *more])
    except SystemExit as end:
        return int(end.code or 0)


def test_uploads_a_pipeline_once_and_passes_sections_as_parameters(server, profile, bucket, capsys) -> None:
    assert run(profile, "--name", "first", "--set", "finetune.epochs=3") == 0
    (first,) = server.runs
    assert capsys.readouterr().out.splitlines() == [
        f"run first: {server.address}/#/runs/details/{first.run_id}",
        f"artifacts: {bucket}/root/scop/{first.run_id}",
    ]
    kept = yaml.safe_load(read_bytes(f"{bucket}/root/scop/{first.run_id}/config.yaml") or b"")
    assert kept["finetune"]["epochs"] == 3
    assert first.display_name == "first"
    assert first.runtime_config.parameters["finetune"]["epochs"] == 3
    assert first.runtime_config.pipeline_root == f"{bucket}/root"
    assert run(profile, "--set", "finetune.epochs=4") == 0  # other parameters, the same pipeline
    assert (len(server.pipelines), len(server.versions), len(server.experiments), len(server.runs)) == (1, 1, 1, 2)
    assert server.experiments[0].display_name == "digits-resnet20"
    assert server.runs[1].pipeline_version_reference == first.pipeline_version_reference
    values = yaml.safe_load(profile.read_text())
    profile.write_text(yaml.safe_dump(values | {"parallelism": 3}))
    assert run(profile) == 0
    assert len(server.versions) == 2


def test_no_cache_disables_caching_of_all_steps(server, profile) -> None:
    assert run(profile, "--no-cache") == 0
    assert run(profile) == 0
    without, with_cache = (server.specs[version.pipeline_version_id][0] for version in server.versions)

    def cached(spec: dict) -> set[str]:
        dags = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
        tasks = {name: task for dag in dags for name, task in dag["tasks"].items()}
        return {name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")}

    assert {"train-dense", "finetune", "compare"} <= cached(with_cache)
    assert cached(without) <= {"for-loop-1"}


def test_starts_the_run_even_if_its_configuration_cannot_be_stored(server, profile, bucket, capsys) -> None:
    values = yaml.safe_load(profile.read_text()) | {"pipeline_root": f"{bucket}-gone/root"}
    profile.write_text(yaml.safe_dump(values))
    assert run(profile) == 0
    assert "the configuration could not be written there: bucket" in capsys.readouterr().out
    assert len(server.runs) == 1


def test_doctor_checks_the_cluster(server, profile, bucket, capsys) -> None:
    server.token = "of-the-user"
    assert main(["doctor", "--cluster", str(profile)]) == 1
    lines = {line[9:19].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["KFP"].startswith("MISSING")
    assert "set KF_PIPELINES_TOKEN" in lines["KFP"]
    assert f"{bucket}/root/checkpoints: wrote, read, listed and deleted a test file" in lines["S3"]
    server.token = None
    assert main(["doctor", "--cluster", str(profile)]) == 0
    assert f"{server.address} answers, and these credentials may list experiments" in capsys.readouterr().out


def test_creates_a_recurring_run(server, profile, capsys) -> None:
    assert run(profile, "--recurring", "0 0 3 * * *", "--name", "nightly") == 0
    (recurring,) = server.recurring
    assert recurring.trigger.cron_schedule.cron == "0 0 3 * * *"
    assert f"#/recurringrun/details/{recurring.recurring_run_id}" in capsys.readouterr().out
    assert run(profile, "--recurring", "0 0 3 * * *", "--wait") == 2


def task(name: str, state: str, parent: str | None = None, **more: object) -> api.V2beta1PipelineTaskDetail:
    task_id = f"{parent}/{name}" if parent else name
    return api.V2beta1PipelineTaskDetail(task_id=task_id, display_name=name, state=state, parent_task_id=parent, **more)


def test_wait_prints_each_task_state_once_and_the_outcome(server, profile, capsys) -> None:
    # KFP also lists the root, and a driver and an executor for each step.
    internal = [task("root", "RUNNING"), task("executor", "RUNNING"), task("iteration(0:0)", "RUNNING")]
    loop = [*internal, task("for-loop-1", "RUNNING"), task("for-loop-1-iteration-1", "RUNNING", "for-loop-1")]
    inside = "for-loop-1/for-loop-1-iteration-1"
    server.progress = [
        ("PENDING", []),
        ("RUNNING", [task("train-dense-driver", "SUCCEEDED"), task("train-dense", "RUNNING")]),
        ("RUNNING", [task("train-dense", "RUNNING")]),
        ("RUNNING", [task("train-dense", "SUCCEEDED"), *loop, task("finetune", "RUNNING", inside)]),
        ("SUCCEEDED", [task("train-dense", "SUCCEEDED"), *loop, task("finetune", "SUCCEEDED", inside)]),
    ]
    # Occasional server errors are tolerated.
    errors = iter([None, 503, None, None, 500])
    server.plan = lambda method, path: next(errors, None) if "/runs/" in path else None
    assert run(profile, "--wait", "--name", "it") == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "train-dense: running",
        "train-dense: succeeded",
        "variant 1 finetune: running",
        "variant 1 finetune: succeeded",
        "the run succeeded",
    ]


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_wait_exits_with_code_1_and_names_the_failed_task(server, profile, capsys, state) -> None:
    error = api.GoogleRpcStatus(code=1, message="exit code 3: no GPU")
    failing = [task("train-dense", "FAILED", error=error, pod_name="scop-x-1")] if state == "FAILED" else []
    server.progress = [(state, failing)]
    assert run(profile, "--wait") == 1
    printed = capsys.readouterr().err
    wanted = "step train-dense failed (pod scop-x-1): exit code 3: no GPU" if failing else "the run ended as CANCELED"
    assert printed == f"scop: {wanted}\n"


@pytest.mark.parametrize(
    ("status", "path", "message"),
    [
        (401, "/pipelines", "refuses the credentials (401"),
        (403, "/experiments", "refuses to use experiment 'digits-resnet20' (403"),
        (404, "/pipelines", "is this the address of KFP's API, version 2?"),
        (500, "/runs", "fails to start a run (500"),
    ],
)
def test_reports_server_errors_in_one_line_with_the_address(
    server, profile, capsys, status: int, path: str, message: str
) -> None:
    server.plan = lambda method, seen: status if seen.endswith(path) else None
    assert run(profile) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert message in printed
    assert server.address in printed
    assert server.runs == []


def test_uses_a_version_that_another_client_just_uploaded(server, profile) -> None:
    uploads = 0

    def plan(method: str, path: str) -> int | None:
        nonlocal uploads
        if not path.endswith("upload_version"):
            return None
        uploads += 1
        version = api.V2beta1PipelineVersion(
            pipeline_id=server.pipelines[0].pipeline_id, pipeline_version_id="theirs", display_name=expected[0]
        )
        server.versions.append(version)
        server.specs["theirs"] = next(iter(specs.values()))
        return 409

    assert run(profile) == 0
    expected, specs = [server.versions[0].display_name], dict(server.specs)
    server.versions.clear()
    server.plan = plan
    assert run(profile) == 0
    assert uploads == 1
    assert server.runs[1].pipeline_version_reference.pipeline_version_id == "theirs"


def test_uses_an_experiment_that_another_client_just_created(server, profile) -> None:
    def plan(method: str, path: str) -> int | None:
        if (method, path.rpartition("/")[2]) != ("POST", "experiments") or server.experiments:
            return None
        theirs = api.V2beta1Experiment(experiment_id="theirs", display_name="digits-resnet20")
        server.experiments.append(theirs)
        return 409

    server.plan = plan
    assert run(profile) == 0
    assert server.runs[0].experiment_id == "theirs"


def watch(profile: Path, run_id: str) -> int:
    return main(["watch", run_id, "--cluster", str(profile), "--every", "0.01"])


def test_watch_reports_a_run_and_closes_it_in_mlflow(server, profile, capsys, monkeypatch, tmp_path) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert run(profile, "--set", "run.experiment=of-mine") == 0
    run_id = server.runs[0].run_id
    client = MlflowClient()
    experiment = client.create_experiment("of-mine")
    parent = client.create_run(experiment, tags={"kfp.run_id": run_id}).info.run_id
    step = client.create_run(experiment, tags={"mlflow.parentRunId": parent}).info.run_id  # its pod was killed
    error = api.GoogleRpcStatus(code=1, message="OOMKilled")
    server.progress = [("FAILED", [task("finetune", "FAILED", error=error)])]
    capsys.readouterr()
    assert watch(profile, run_id) == 1
    printed = capsys.readouterr()
    assert printed.out == "finetune: failed\n"
    assert printed.err == "scop: step finetune failed: OOMKilled\n"
    assert [client.get_run(one).info.status for one in (parent, step)] == ["FAILED", "KILLED"]
    assert "OOMKilled" in client.get_run(parent).data.tags["scop.error"]


def test_watch_reports_an_unknown_run(server, profile, capsys) -> None:
    server.plan = lambda method, path: 404 if "/runs/" in path else None
    assert watch(profile, "none") == 2
    printed = capsys.readouterr().err
    assert "cannot find run none: not found (404" in printed
    assert printed.count("\n") == 1


def test_reports_a_login_page(server, profile, capsys) -> None:
    server.plan = lambda method, path: "page"
    assert run(profile) == 2
    assert "does not answer like KFP (perhaps with a login page)" in capsys.readouterr().err


def test_reuses_the_pipeline_of_its_own_namespace(server, profile, monkeypatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_NAMESPACE", "team")
    assert run(profile) == 0
    assert run(profile) == 0
    assert [pipeline.namespace for pipeline in server.pipelines] == ["team"]
    assert len(server.runs) == 2


def test_sends_the_token(server, profile, monkeypatch, capsys) -> None:
    server.token = "of-the-user"
    assert run(profile) == 2
    assert "set KF_PIPELINES_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "of-the-user")
    assert run(profile) == 0


def test_reports_a_server_that_does_not_answer(server, profile, monkeypatch, capsys) -> None:
    monkeypatch.setattr("pipelines.cluster.server._TIMEOUT", (0.2, 0.2))
    server.plan = lambda method, path: "hang"
    assert run(profile) == 2
    assert "cannot be reached" in capsys.readouterr().err


def test_reports_an_unreachable_or_unconfigured_server(profile, monkeypatch, capsys, tmp_path) -> None:
    values = yaml.safe_load(profile.read_text())
    nowhere = f"http://127.0.0.1:{free_port()}"
    profile.write_text(yaml.safe_dump(values | {"host": nowhere}))
    assert run(profile) == 2
    printed = capsys.readouterr().err
    assert f"KFP at {nowhere} cannot be reached" in printed
    assert "check `host` in the cluster profile or KF_PIPELINES_ENDPOINT" in printed
    del values["host"]
    profile.write_text(yaml.safe_dump(values))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert run(profile) == 2
    assert "no KFP server is known" in capsys.readouterr().err


def test_pinned_uris_have_a_content_hash(bucket: str, tmp_path: Path, cache: Cache) -> None:
    archive = f"{bucket}/images.tar"
    write_bytes(archive, b"old")
    config = Config(data=DataSection(source="cifar10", path=archive))
    pinned = submit.pin_files(config).data.path
    assert pinned is not None
    assert pinned.startswith(f"{archive}#content=")
    assert submit.pin_files(submit.pin_files(config)).data.path == pinned
    assert local_path(pinned, cache).read_bytes() == b"old"
    write_bytes(archive, b"new!")
    assert submit.pin_files(config).data.path != pinned
    with pytest.raises(UserError, match="has changed since the run was submitted"):
        local_path(pinned, cache)
    with pytest.raises(UserError, match="is a path of this machine; upload it to S3"):
        submit.pin_files(Config(data=DataSection(source="cifar10", path=os.devnull)))
