"""Tests of `scop compare` on MLflow experiments, with a real server and with failing ones."""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from pipelines.cli.main import main
from pipelines.compare import experiments
from pipelines.compare.experiments import Mlflow, Source
from scop import UserError
from scop.report.correctness import packed
from scop.tracking.pipeline_run import end_parent, start_parent
from tests.fakes import services
from tests.fakes.results import log, result


def uri() -> str:
    """Return MLFLOW_TRACKING_URI."""
    return os.environ["MLFLOW_TRACKING_URI"]


def source() -> Source:
    """Return a source with this server and without local runs."""
    return Source("none", uri())


@pytest.fixture
def client(mlflow_address: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_address)
    return MlflowClient(mlflow_address)


@pytest.fixture
def sweep(client: MlflowClient, request: pytest.FixtureRequest) -> str:
    """An experiment of two pipeline runs with six results, one of them from a retry, and a failed step."""
    name = request.node.name
    first, second = (start_parent(uri(), name, run, {"scop.run": run}) for run in ("first", "second"))
    experiment = client.get_experiment_by_name(name).experiment_id
    for method in ("scop", "l1"):
        for seed, parent in enumerate((first, second)):
            log(client, experiment, result(method, 0.5, seed), parent)
    log(client, experiment, result("random", 0.5), first)
    again = result("random", 0.5)
    log(client, experiment, result("random", 0.5, metrics=again.metrics | {"pruned_top1": 0.1}), second)
    log(client, experiment, again, second)  # the last attempt counts
    unfinished = log(client, experiment, result("scop", 0.9), second, status="FAILED")
    client.set_tag(unfinished, "scop.error", "evaluate: out of memory")
    end_parent(client, first, True, {}, [])
    end_parent(client, second, False, {}, [])
    return name


def compare(*arguments: str) -> int:
    return main(["compare", *arguments])


def test_shows_results_failures_and_cost_of_an_experiment(client, sweep: str, capsys, tmp_path: Path) -> None:
    assert compare(sweep, "--json", str(tmp_path / "all.json"), "--csv", str(tmp_path / "all.csv")) == 0
    printed = capsys.readouterr()
    rows = json.loads((tmp_path / "all.json").read_text())["tables"][0]["rows"]
    assert [row["labels"]["name"] for row in rows] == ["scop-0.5", "scop-0.5", "l1-0.5", "l1-0.5", *["random-0.5"] * 2]
    assert min(row["figures"]["pruned_top1"]["mean"] for row in rows) > 0.8
    assert printed.err.startswith("missing: scop-0.9 evaluate (run ")
    assert printed.err.endswith("): evaluate: out of memory\n")
    # The cost includes retried and failed steps.
    assert "cost:    80 s on a CPU, energy n/a, 2 runs" in printed.out
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 7


def test_groups_seeds_and_filters_with_mlflow_syntax(client, sweep: str, capsys) -> None:
    assert compare(sweep, "--group-by", "method,prune_rate", "--metric", "pruned_top1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["method", "prune_rate", "network", "n", "top-1"]
    assert lines[2].split() == ["scop", "0.5", "resnet20", "2", "91.45%", "±", "0.07"]
    assert compare(sweep, "--where", "params.method = 'l1' and metrics.pruned_top1 > 0.904") == 0
    printed = capsys.readouterr()
    assert printed.out.count("l1-0.5") == 1
    assert "scop-0.5" not in printed.out
    assert printed.err == ""  # the filter excludes the failed step


def test_a_difference_on_few_images_is_not_significant(client, request, capsys) -> None:
    experiment = client.create_experiment(request.node.name)
    every = np.ones(100, bool)
    for method, wrong in (("scop", 5), ("l1", 6)):
        right = packed(every & (np.arange(100) >= wrong))
        for seed in range(3):
            metrics = result(method, 0.5, seed).metrics | {"pruned_top1": 1 - wrong / 100}
            log(client, experiment, result(method, 0.5, seed, metrics=metrics, right=right))
    assert compare(request.node.name) == 0
    (paired,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("paired:"))
    assert "+1.00 points of top-1 (95% CI -0.98 to +2.98, 3 pairs); no significant difference" in paired


def test_filter_does_not_restore_superseded_results(client, sweep: str, capsys) -> None:
    assert compare(sweep, "--where", "metrics.pruned_top1 < 0.5") == 2
    assert "there is nothing to compare (no result matches --where)" in capsys.readouterr().err


def test_shows_costs_per_device(client, request, capsys) -> None:
    name = request.node.name
    parent = start_parent(uri(), name, "run", {})
    experiment = client.get_experiment_by_name(name).experiment_id
    log(client, experiment, result(), parent)
    training = client.create_run(experiment, run_name="finetune", tags={"mlflow.parentRunId": parent})
    client.set_tag(training.info.run_id, "scop.device", "a GPU")
    client.log_metric(training.info.run_id, "device_seconds", 36_000)
    client.log_metric(training.info.run_id, "energy_joules", 25e6)
    client.set_terminated(training.info.run_id)
    end_parent(client, parent, True, {}, [])
    assert client.get_run(parent).data.metrics["total_device_seconds"] == 36_010
    assert compare(name) == 0
    printed = capsys.readouterr().out
    assert "cost:    10.0 h on a GPU, energy 6.94 kWh, 1 run\n" in printed
    assert "cost:    10 s on a CPU, energy n/a, 1 run\n" in printed


def test_names_killed_steps_even_with_quotes_in_their_names(client, request, capsys) -> None:
    name = request.node.name
    parent = start_parent(uri(), name, "run", {"scop.run": "run"})
    experiment = client.get_experiment_by_name(name).experiment_id
    log(client, experiment, result(), parent)
    killed = log(client, experiment, result(), parent, status="KILLED")
    client.update_run(killed, name='it\'s "mine"')
    assert compare(name) == 0
    assert capsys.readouterr().err == f'missing: it\'s "mine" (run {killed}): it was killed\n'
    end_parent(client, parent, False, {}, [], "step finetune failed: OOMKilled")  # replaces the default reason
    assert compare(name) == 0
    assert capsys.readouterr().err == f'missing: it\'s "mine" (run {killed}): step finetune failed: OOMKilled\n'


def test_names_a_failed_run_without_a_failed_step(client, sweep: str, capsys) -> None:
    experiment = client.get_experiment_by_name(sweep).experiment_id
    log(client, experiment, result("l1", 0.7), alone := start_parent(uri(), sweep, "third", {"scop.run": "third"}))
    end_parent(client, alone, False, {}, [], "step finetune vanished without a word")
    other = client.create_run(experiment, run_name="somebody else's").info.run_id
    client.set_terminated(other, "FAILED")
    assert compare(sweep) == 0
    first, second = sorted(capsys.readouterr().err.splitlines())
    assert first.startswith("missing: scop-0.9 evaluate (run ")
    assert second == f"missing: third (run {alone}): step finetune vanished without a word"
    assert compare(sweep, "--where", "params.method = 'random'") == 0
    assert "third" not in capsys.readouterr().err


def test_unclosed_steps_count_as_killed_with_unknown_cost(client, request, capsys) -> None:
    name = request.node.name
    parent = start_parent(uri(), name, "run", {"scop.run": "run"})
    experiment = client.get_experiment_by_name(name).experiment_id
    log(client, experiment, result(), parent)
    tags = {"mlflow.parentRunId": parent, "scop.step": "finetune"}
    lost = client.create_run(experiment, run_name="scop finetune", tags=tags).info.run_id
    end_parent(client, parent, False, {}, [])  # as on a cluster, where other steps may be running
    assert client.get_run(lost).info.status == "RUNNING"
    end_parent(client, parent, False, {}, [], "step finetune failed", alone=True)
    assert client.get_run(lost).info.status == "KILLED"
    assert compare(name) == 0
    printed = capsys.readouterr()
    assert printed.err == f"missing: scop finetune (run {lost}): step finetune failed\n"
    assert "cost:    at least 10 s on a CPU, energy n/a, 1 run\n" in printed.out
    failed = client.create_run(experiment, run_name="l1 finetune", tags=tags).info.run_id
    client.set_tag(failed, "scop.error", "the loss is nan")
    client.set_terminated(failed, "FAILED")
    assert compare(name) == 0
    assert set(capsys.readouterr().err.splitlines()) == {
        f"missing: scop finetune (run {lost}): it was killed",  # not the error of the other step
        f"missing: l1 finetune (run {failed}): the loss is nan",
    }
    lost = client.create_run(experiment, run_name="scop finetune", tags=tags).info.run_id
    assert start_parent(uri(), name, "run", {"scop.run": "run"}, resumed=True) == parent
    assert client.get_run(lost).info.status == "KILLED"  # the whole run was killed
    assert "scop.error" not in client.get_run(parent).data.tags
    silent = client.create_run(experiment, run_name="scop finetune", tags=tags).info.run_id
    end_parent(client, parent, True, {}, [], alone=True)
    assert client.get_run(silent).info.status == "FINISHED"  # it succeeded but could not reach MLflow at its end


def test_lists_what_the_page_lacks(client, sweep: str, tmp_path: Path, capsys) -> None:
    assert compare(sweep, "--html", str(tmp_path / "page.html")) == 0  # synthetic results have no artifacts
    printed = capsys.readouterr().err.splitlines()
    assert printed[0].startswith("left out: curves and layers of ")
    assert (tmp_path / "page.html").is_file()


def test_does_not_create_a_missing_database(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/typo.db")
    with pytest.raises(UserError, match="there is no database at MLFLOW_TRACKING_URI"):
        Mlflow(source())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("served", [True, False])
def test_nan_is_a_missing_value(client, request, tmp_path: Path, monkeypatch, capsys, served: bool) -> None:
    if not served:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment(request.node.name)
    log(client, experiment, diverged := result("scop", 0.9, metrics=result().metrics | {"pruned_loss": float("nan")}))
    log(client, experiment, result("l1", 0.9, metrics=result().metrics | {"pruned_loss": 0.5}))
    found = Mlflow(source()).read([request.node.name]).results
    assert "pruned_loss" in diverged.metrics
    assert [("pruned_loss" in row.metrics, len(row.metrics)) for row in found] == [
        (True, len(diverged.metrics)),
        (False, len(diverged.metrics) - 1),
    ]
    assert compare(request.node.name, "--metric", "pruned_loss", "--html", str(tmp_path / "page.html")) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:4]] == ["0.5", "-"]
    assert "NaN" not in (tmp_path / "page.html").read_text().partition('id="data">')[2].partition("</script>")[0]


def test_reads_runs_page_by_page(client, sweep: str, monkeypatch) -> None:
    monkeypatch.setattr(experiments, "_PAGE", 2)
    assert len(Mlflow(source()).read([sweep]).results) == 6


def test_ignores_a_failure_after_a_successful_retry(client, request) -> None:
    name = request.node.name
    parent = start_parent(uri(), name, "run", {})
    experiment = client.get_experiment_by_name(name).experiment_id
    log(client, experiment, result(), parent, status="FAILED")
    log(client, experiment, result(), parent)
    found = Mlflow(source()).read([name])
    assert (len(found.results), found.failures) == (1, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such"], "'no-such' is no run, and no experiment of MLflow at http"),
        (["s3://none/run"], "bucket 'none' does not exist at"),
        (["{sweep}", "--where", "method is scop"], "--where 'method is scop' is not in MLflow's filter language"),
        (["{sweep}", "--where", "params.method = 'nets'"], "there is nothing to compare"),
        (["{sweep}", "--where", "params.metod = 'scop'"], "no result has a param 'metod' (did you mean 'method'?)"),
        (["{sweep}", "--where", "metrics.top1_dorp < 0.1"], "a metric 'top1_dorp' (did you mean 'top1_drop'?)"),
        (["{sweep}", "--metric", "top1"], "--metric 'top1' is not in these results"),
        (
            ["{sweep}", "--where", "params.prune_rate > 0.3"],
            "parameters are text: compare them by = or != with a quot",
        ),
        (["a/name/like/a/path"], "'a/name/like/a/path' is no run, and no experiment of MLflow"),
    ],
)
def test_reports_invalid_arguments_in_one_line(client, sweep: str, capsys, bucket, arguments, message: str) -> None:
    assert compare(*(argument.format(sweep=sweep) for argument in arguments)) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_rejects_a_mix_of_runs_and_experiments(client, sweep: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "config.yaml").touch()
    assert compare(str(tmp_path), sweep) == 2
    assert f"{str(tmp_path)!r} is a run and {sweep!r} is not; compare runs with runs" in capsys.readouterr().err
    assert compare(str(tmp_path), "--where", "metrics.pruned_top1 > 0.5") == 2
    assert f"--where selects from experiments in MLflow, and {str(tmp_path)!r} is a run" in capsys.readouterr().err


def test_without_mlflow_and_runs_the_error_says_what_to_set(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI is not set, and \S+ has no runs; set it, or set another"):
        Mlflow(Source(str(tmp_path)))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A server that answers every request with the status in the yielded dict, or never if it is 0."""
    plan, released = {"status": 500}, threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            if not plan["status"]:
                released.wait(30)
            body = b"injected by the test"
            self.send_response(plan["status"] or 500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = answer  # noqa: N815
        do_POST = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    running.handle_error = lambda *_: None  # the client has given up
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{running.server_address[1]}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    yield plan
    released.set()
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "refuses access (.*401.*); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, "refuses access (.*403.*); set MLFLOW_TRACKING_USERNAME"),
        (500, "cannot be read (.*); check MLFLOW_TRACKING_URI"),
        (
            0,
            "cannot be read (no answer in time); check MLFLOW_TRACKING_URI, or set MLFLOW_HTTP_REQUEST_TIMEOUT above 1",
        ),
    ],
)
@pytest.mark.parametrize("command", [["compare"], ["promote", "a-model/1"]])
def test_reports_a_failing_server_in_one_line(
    failing: dict[str, int], command: list[str], status: int, message: str, capsys
) -> None:
    failing["status"] = status
    assert main(command) == 2
    printed = capsys.readouterr().err
    before, _, after = message.partition(".*")
    assert before in printed
    assert after.rpartition(".*")[2] in printed
    assert printed.count("\n") == 1


def test_reports_that_it_waits_for_mlflow(failing: dict[str, int], monkeypatch, capsys) -> None:
    monkeypatch.setattr("pipelines.compare.experiments._SILENT_SECONDS", 0.5)
    failing["status"] = 0
    assert compare() == 2
    assert capsys.readouterr().err.startswith("scop: waiting for MLflow at http://127.0.0.1:")


@pytest.mark.parametrize("uri", ["nonsense", "file:///tmp/mlruns", "./mlruns"])
@pytest.mark.parametrize("command", [["compare"], ["promote", "a-model/1"]])
def test_rejects_an_invalid_tracking_uri(command: list[str], uri: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main(command) == 2
    assert f"MLFLOW_TRACKING_URI {uri!r} is neither a server nor a database, such as" in capsys.readouterr().err


def test_reports_an_unreachable_server_in_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{services.free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    assert compare() == 2
    printed = capsys.readouterr().err
    assert "cannot be read (connection refused); check MLFLOW_TRACKING_URI" in printed
    assert printed.count("\n") == 1
