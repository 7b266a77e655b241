"""`scop doctor`, with the servers of `make stack`."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cli.checks import _kfp
from pipelines.local.run import mlflow_command
from scop import UserError
from scop.errors import redact
from tests.fakes import services
from tests.helpers import ROOT


def stack(folder: Path, action: str) -> str:
    """Start or stop the servers; return what the script prints."""
    environment = os.environ | {"STACK": str(folder), "BIN": str(Path(sys.executable).parent)}
    command = [str(ROOT / "docker" / "stack.sh"), action]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables that `make stack` prints."""
    folder = tmp_path_factory.mktemp("stack")
    printed = stack(folder, "up")
    assert stack(folder, "up") == printed  # a second call finds the servers running
    exports = [line.split()[1] for line in printed.splitlines() if line.strip().startswith("export ")]
    variables = dict(export.split("=", 1) for export in exports)
    yield variables
    stack(folder, "down")
    for key in ("AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI"):
        host, _, port = variables[key].removeprefix("http://").partition(":")
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))), f"{key} still listens"


def doctor(*arguments: str, cwd: Path, **variables: str) -> tuple[int, dict[str, str]]:
    """Run `scop doctor`; return its exit code and its lines by subject."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SCOP_", "AWS_", "KF_"))}
    command = [sys.executable, "-m", "pipelines.cli", "doctor", *arguments]
    environment = clean | {"PYTHONPATH": str(ROOT), "AWS_EC2_METADATA_DISABLED": "true"} | variables
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.stderr == ""
    return result.returncode, {line[9:19].strip(): line for line in result.stdout.splitlines()}


def test_finds_no_problem_in_the_stack(servers: dict[str, str], tmp_path: Path) -> None:
    code, lines = doctor("--out", "s3://scop/runs", cwd=tmp_path, **servers)
    assert code == 0
    assert lines["S3"].startswith("ok ")
    assert "wrote, read, listed and deleted a test file" in lines["S3"]
    assert lines["MLflow"].startswith("ok ")
    assert "wrote and deleted a run and a file" in lines["MLflow"]
    assert list(tmp_path.iterdir()) == []


def test_names_each_problem_and_its_remedy(servers: dict[str, str], tmp_path: Path) -> None:
    unused = f"http://127.0.0.1:{services.free_port()}"
    code, lines = doctor(
        *("--out", "s3://no-such-bucket/runs", "--docker", "no/such:image", "--host", unused),
        *("--set", "dense.weights=missing.pt"),
        cwd=tmp_path,
        **servers | {"MLFLOW_TRACKING_URI": unused.replace("//", "//me:hidden-password@")},
    )
    assert code == 1
    missing = {subject for subject, line in lines.items() if line.startswith("MISSING")}
    assert missing == {"weights", "S3", "MLflow", "docker", "KFP"}
    assert "bucket 'no-such-bucket' does not exist" in lines["S3"]
    assert "check MLFLOW_TRACKING_URI" in lines["MLflow"]
    assert "hidden-password" not in str(lines)
    assert "missing.pt does not exist; correct it with --set dense.weights=PATH" in lines["weights"]
    assert "port-forward" in lines["KFP"]


def test_reports_an_invalid_address() -> None:
    for host in ("http://localhost:abc", "http://local host"):
        with pytest.raises(UserError, match=f"{host} does not answer"):
            _kfp(host)


def test_reports_wrong_credentials(servers: dict[str, str], tmp_path: Path) -> None:
    change = {"AWS_SECRET_ACCESS_KEY": "another"}
    code, lines = doctor("--out", "s3://scop/runs", cwd=tmp_path, **servers | change)
    assert code == 1
    assert lines["S3"].startswith("MISSING")
    assert "refuses the credentials" in lines["S3"]


def test_tracking_uris_are_shown_without_passwords() -> None:
    assert redact("https://me:secret@mlflow.example:8443/path") == "https://mlflow.example:8443/path"
    assert redact("https://me:p@ss@mlflow.example/path") == "https://mlflow.example/path"
    assert redact("sqlite:////runs/mlflow.db") == "sqlite:////runs/mlflow.db"
    # The command printed at the end of a run has no password either.
    assert mlflow_command("postgresql://scop:secret@db/mlflow") == "postgresql://db/mlflow"
