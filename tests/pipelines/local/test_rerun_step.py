"""`scop rerun` of the steps of a run whose artifacts are in S3."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.local.container_variables import passed_on_variables
from pipelines.local.containers import Sandbox
from pipelines.local.rerun_step import Rerun, rerun
from pipelines.runs import find_record
from scop import UserError, load_model
from scop.environment import StepEnvironment
from scop.runtime.record import StepRecord
from scop.storage import s3
from scop.storage.cache import Cache
from scop.storage.fetch import uri_exists
from scop.storage.files import delete_files, list_files, read_bytes
from scop.storage.folders import fetch_folder
from scop.storage.manifest import read_folder
from tests.fakes import services
from tests.helpers import ROOT

SMALL = {"dense.epochs": 3, "knockoff.epochs": 1, "finetune.epochs": 2, "evaluate.repeats": 3}


def scop(*arguments: str, cwd: Path, env: dict[str, str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    environment = env | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, input=stdin, timeout=1500)


@pytest.fixture(scope="module")
def surroundings(s3_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables of an S3 server, and of an MLflow server that stores its artifacts there."""
    folder = tmp_path_factory.mktemp("mlflow")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SCOP_", "AWS_"))}
    environment = clean | services.environment(s3_address) | {"SCOP_CACHE": str(folder / "cache")}
    for key, value in services.environment(s3_address).items():
        os.environ[key] = value
    s3.forget_client()
    s3.client().create_bucket(Bucket="pipeline")
    with services.mlflow_server(folder, "s3://pipeline/mlflow", environment) as address:
        yield environment | {"MLFLOW_TRACKING_URI": address}
    for key in services.environment(s3_address):
        os.environ.pop(key, None)
    s3.forget_client()


@pytest.fixture(scope="module")
def run(surroundings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a short run of the default preset."""
    here = tmp_path_factory.mktemp("here")
    settings = [f"--set={key}={value}" for key, value in SMALL.items()]
    result = scop("run", "--out", "s3://pipeline/runs", *settings, cwd=here, env=surroundings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(here.iterdir()) == []
    (summary,) = (n for n in list_files("s3://pipeline/runs") if n.endswith("/summary.json") and n.count("/") == 1)
    return f"s3://pipeline/runs/{summary.partition('/')[0]}"


def test_a_run_in_s3_leaves_no_local_files(run: str, cache: Cache) -> None:
    summary = json.loads(read_bytes(f"{run}/summary.json"))
    names = list_files(run)
    assert {"config.yaml", "log.txt", "report.html", "summary.json"} <= set(names)
    assert sorted(name for name in names if name.endswith("/step.json")) == [
        "compare/report/step.json",
        "prepare_data/dataset/step.json",
        "scop-0.45/evaluate/evaluation/step.json",
        "scop-0.45/export/exported/step.json",
        "scop-0.45/finetune/model/step.json",
        "scop-0.45/select_channels/plan/step.json",
        "train_dense/model/step.json",
        "train_knockoff/scores/step.json",
    ]
    for variant in summary["variants"]:
        assert variant["model"].startswith(run)
        assert load_model(fetch_folder(variant["model"], cache)) is not None
        assert uri_exists(variant["onnx"])
    assert list_files("s3://pipeline/runs/checkpoints") == []
    assert any("report.html" in name for name in list_files("s3://pipeline/mlflow"))


def test_reruns_a_step_from_its_uri_byte_for_byte(run: str, surroundings, tmp_path: Path) -> None:
    environment = surroundings | {"SCOP_CACHE": str(tmp_path / "cache")}
    before = list_files(run)
    result = scop("rerun", f"{run}/finetune", "--verify", cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "verify: all 5 files are byte-equal" in result.stdout
    (folder,) = (tmp_path / "reruns").iterdir()
    assert load_model(folder / "model").conv1.out_channels == 16
    assert (folder / "mlflow.db").exists()  # without --track, the server is not used
    assert list_files(run) == before


@pytest.mark.slow
def test_verify_names_the_files_that_differ(run: str, surroundings, tmp_path: Path) -> None:
    change = ["--set", "variant.finetune.lr=0.001"]
    result = scop("rerun", f"{run}/scop-0.45/finetune", *change, "--verify", cwd=tmp_path, env=surroundings)
    assert result.returncode == 1
    assert "verify: model/model.safetensors differs" in result.stdout
    assert "the results differ" in result.stdout
    assert "model.json" not in result.stdout.partition("verify:")[2]


def test_dry_run_prints_a_command_that_works(run: str, surroundings, tmp_path: Path) -> None:
    result = scop("rerun", f"{run}/prepare_data", "--dry-run", cwd=tmp_path, env=surroundings)
    assert result.returncode == 0
    command = result.stdout.strip()
    assert command.startswith("env --unset=SCOP_CHECKPOINTS --unset=SCOP_PARENT_RUN_ID MLFLOW_TRACKING_URI=sqlite:///")
    (folder,) = (tmp_path / "reruns").iterdir()
    assert not (folder / "dataset").exists()
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=surroundings, capture_output=True)
    assert read_folder(folder / "dataset").kind == "dataset"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/train"], "has no step 'train' (did you mean 'train_dense'?)"),
        (["{run}/l1/finetune"], "has no step 'l1/finetune'"),
        (["nowhere/finetune"], "there is no step 'nowhere/finetune', neither at this path nor in runs"),
        (["{run}"], "is a run; add the step: prepare_data, train_dense"),
        (["{run}-missing/finetune"], "-missing/finetune', at this URI; name a step's record"),
        (
            ["{run}/train_dense", "--set", "finetune.lr=1"],
            "step 'train_dense' has no section 'finetune' (it has: dense)",
        ),
        (["{run}/train_dense", "--set", "dense.epoch=1"], "did you mean 'epochs'?"),
        (["{run}/train_dense", "--shell"], "--shell applies to containers; add --docker"),
    ],
)
def test_reports_mistakes_in_one_line(arguments, message: str, run: str, surroundings, tmp_path: Path) -> None:
    result = scop("rerun", *(a.format(run=run) for a in arguments), cwd=tmp_path, env=surroundings)
    assert result.returncode == 2
    assert message.format(run=run) in result.stderr
    assert result.stderr.startswith("scop: error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "reruns").exists()


@pytest.mark.slow  # another run; test_docker.py also resumes one
def test_resume_keeps_complete_and_unchanged_steps(run: str, surroundings, tmp_path: Path, cache: Cache) -> None:
    delete_files(f"{run}/train_knockoff/scores", ["scores.png"])  # still in the cache, but no longer in S3
    arguments = ["run", "--out", "s3://pipeline/runs", "--resume", run.rpartition("/")[2]]
    result = scop(*arguments, "--set", "evaluate.repeats=2", cwd=tmp_path, env=surroundings)
    assert result.returncode == 0, result.stdout + result.stderr
    shown = dict(re.findall(r"^(\w+)\n  (kept|runs again: .*)", result.stdout, re.MULTILINE))
    assert [step for step, what in shown.items() if what == "kept"] == [
        "prepare_data", "train_dense", "select_channels", "finetune"
    ]  # fmt: skip
    assert shown["train_knockoff"] == f"runs again: {run}/train_knockoff/scores is no longer complete"
    assert shown["evaluate"] == "runs again: its configuration has changed (evaluate.repeats)"
    assert shown["export"] == "runs again: its input 'evaluation' has changed"
    assert json.loads(read_bytes(f"{run}/summary.json"))["run_id"] == run.rpartition("/")[2]
    fetch_folder(f"{run}/scop-0.45/export/exported", cache, "model")
    assert scop("run", "--resume", "nowhere", cwd=tmp_path, env=surroundings).returncode == 2


def test_reruns_of_compare_report_the_recorded_uris(run: str, surroundings, tmp_path: Path) -> None:
    result = scop("rerun", f"{run}/compare", "--verify", cwd=tmp_path, env=surroundings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "files are byte-equal" in result.stdout


def test_rejects_an_output_folder_in_s3(run: str, surroundings, tmp_path: Path) -> None:
    result = scop("rerun", f"{run}/compare", "--out", "s3://pipeline/reruns", cwd=tmp_path, env=surroundings)
    assert result.returncode == 2
    assert "is not a folder; a rerun uploads nothing" in result.stderr


def test_asks_for_the_variant_if_there_are_several(tmp_path: Path) -> None:
    for name in ("a", "b"):
        output = tmp_path / "run" / name
        output.mkdir(parents=True)
        config = {"variant": {"name": name}}
        record = StepRecord.start("finetune", config, {}, {"model": str(output)}, StepEnvironment())
        (output / "step.json").write_text(record.model_dump_json())
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match="has several steps 'finetune'; choose one: .*run/a/finetune, .*run/b/finetune"):
        find_record("run/finetune", str(tmp_path))
    assert find_record("run/b/finetune", str(tmp_path)).variant == "b"
    with pytest.raises(UserError, match="there is no step 'rnu/finetune'"):  # other runs are not searched
        find_record("rnu/finetune", str(tmp_path))


def test_notes_that_a_rerun_uses_one_process(tmp_path: Path, capsys) -> None:
    for processes, noted in ((1, False), (2, True)):
        outputs = {"model": str(tmp_path)}
        record = StepRecord.start("train_dense", {}, {}, outputs, StepEnvironment(), processes)
        assert rerun(Rerun(record, tmp_path, {}, ()), image=None, gpus=False, dry_run=True, shell=False) == 0
        assert ("note: recorded with 2 processes, runs with one" in capsys.readouterr().err) == noted


def test_command_lines_contain_no_secret(run: str, surroundings, tmp_path: Path, monkeypatch) -> None:
    for key in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(key, services.SECRET)
    command = " ".join(Sandbox("image", passed_on=passed_on_variables(with_s3=True)).command(["scop"]))
    assert "--env AWS_SECRET_ACCESS_KEY" in command
    assert services.SECRET not in command
    shown = scop("rerun", f"{run}/prepare_data", "--dry-run", "--track", cwd=tmp_path, env=surroundings).stdout
    assert shown.startswith("env ")
    assert services.SECRET not in shown


@pytest.mark.slow
def test_rejects_a_changed_input(tmp_path: Path, surroundings, digits_folder: Path) -> None:
    shutil.copytree(digits_folder, tmp_path / "data")
    step = ["step", "train_dense", "--input", "dataset=data", "--output", "model=runs/one/model"]
    step += ["--set", "dense.epochs=1", "--set", "dense.model=tests.networks:Plain"]
    environment = {k: v for k, v in surroundings.items() if k != "MLFLOW_TRACKING_URI"}
    assert scop(*step, cwd=tmp_path, env=environment).returncode == 0
    (tmp_path / "runs" / "one" / "config.yaml").touch()
    again = scop("rerun", "one/train_dense", "--verify", cwd=tmp_path, env=environment)  # a local run, by name
    assert "verify: all 4 files are byte-equal" in again.stdout, again.stderr

    scop("step", "prepare_data", "--output", "dataset=data2", "--set", "data.seed=1", cwd=tmp_path, env=environment)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data2").rename(tmp_path / "data")
    result = scop("rerun", "runs/one/model/step.json", cwd=tmp_path, env=environment)
    assert result.returncode == 2
    assert "has changed since the step ran" in result.stderr


@pytest.mark.slow
def test_reruns_a_failed_step_without_verification(digits_folder: Path, surroundings, tmp_path: Path) -> None:
    environment = {k: v for k, v in surroundings.items() if k != "MLFLOW_TRACKING_URI"}
    step = ["step", "train_dense", "--input", f"dataset={digits_folder}", "--output", "model=model"]
    failed = scop(
        *step, "--set", "dense.model=tests.networks:Plain", "--set", "dense.lr=1e30", cwd=tmp_path, env=environment
    )
    assert failed.returncode == 2
    fixes = ["--set", "dense.lr=0.05", "--set", "dense.epochs=1"]
    result = scop("rerun", "model", *fixes, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert "model: " in result.stdout
    result = scop("rerun", "model", *fixes, "--verify", cwd=tmp_path, env=environment)
    assert result.returncode == 2
    assert "and the recorded one is failed" in result.stderr
