"""The image and the steps in its containers: `make test-docker`, which needs a Docker engine."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from components.image import IMAGE
from pipelines.local.containers import Sandbox
from scop import load_model
from scop.runtime.registry import STEPS
from scop.storage.manifest import read_folder
from tests.fakes import services
from tests.helpers import ROOT, reproducible_files

pytestmark = pytest.mark.docker
SMALL = {"dense.epochs": 3, "knockoff.epochs": 1, "finetune.epochs": 2, "evaluate.repeats": 3}
PLANTED = "planted-secret-5f0c"


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True)


def clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SCOP_", "AWS_"))}


def scop(*arguments: str, cwd: Path, more: Mapping[str, str] = MappingProxyType({}), **keys):
    environment = clean() | more
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    options = {"capture_output": True, "text": True, "timeout": 900} | keys
    return subprocess.run(command, cwd=cwd, env=environment | {"PYTHONPATH": str(ROOT)}, **options)


def unavailable(reason: str) -> None:
    # .ci/run requires an engine: there, a skipped test counts as a failure.
    (pytest.fail if os.environ.get("SCOP_DOCKER_REQUIRED") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def image() -> str:
    """The project's image, built from this tree on SCOP_TEST_BASE, or on a base image built by debootstrap."""
    if shutil.which("docker") is None or docker("version").returncode:
        unavailable("no Docker engine answers")
    base = os.environ.get("SCOP_TEST_BASE")
    if base is None:
        if shutil.which("debootstrap") is None or os.getuid():
            unavailable("building the base image needs debootstrap and root; or set SCOP_TEST_BASE")
        base = subprocess.check_output(["docker/base.sh"], cwd=ROOT, text=True).strip()
    planted = {"AWS_SECRET_ACCESS_KEY": PLANTED, "MLFLOW_TRACKING_PASSWORD": PLANTED}
    subprocess.run(["docker/build.sh", base, IMAGE], cwd=ROOT, check=True, env=os.environ | planted)
    return IMAGE


def inside(image: str, script: str, *options: str) -> str:
    """Return what a shell script prints in a container with the restrictions of a step's."""
    command = Sandbox(image).command(["sh", "-c", script])
    position = command.index(image)
    result = subprocess.run([*command[:position], *options, *command[position:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_image_has_no_root_user_compilers_or_caches(image: str) -> None:
    user = json.loads(docker("image", "inspect", image).stdout)[0]["Config"]["User"]
    assert user == "10001:0"
    assert inside(image, "id -u; id -g").split() == ([str(os.getuid())] if os.getuid() else ["10001"]) + ["0"]
    assert inside(image, "grep CapEff /proc/self/status").split()[1] == "0000000000000000"
    assert inside(image, "grep NoNewPrivs /proc/self/status").split()[1] == "1"
    plain = docker("run", "--rm", image, "sh", "-c", "id -u; id -g; scop --help").stdout
    assert plain.startswith("10001\n0\nusage: scop")
    assert inside(image, "touch /opt/scop/x 2>&1 || true").endswith("Read-only file system")
    assert inside(image, "touch /tmp/x && echo fine") == "fine"
    for program in ("gcc", "cc", "g++", "pip", "uv", "make"):
        assert inside(image, f"command -v {program} || echo none") == "none", program
    search = r"find / -xdev \( -name '*.whl' -o -path '*/.cache/*' -o -path '*/apt/lists/*' \) -type f"
    found = docker("run", "--rm", "--user", "0", image, "sh", "-c", search)
    assert (found.returncode, found.stdout) == (0, "")


def test_image_labels_have_version_and_commit(image: str) -> None:
    labels = json.loads(docker("image", "inspect", image).stdout)[0]["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == IMAGE.partition(":")[2]
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert labels["org.opencontainers.image.revision"].rstrip("+") == head.stdout.strip()
    history = docker("image", "history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout
    assert not [word for word in ("SECRET", "TOKEN", "PASSWORD", "index-url") if word in history]


def test_image_contains_no_secret_of_its_builder(image: str) -> None:
    assert PLANTED not in docker("image", "inspect", image).stdout
    assert PLANTED not in docker("image", "history", "--no-trunc", image).stdout
    # The second pattern is in the image: it shows that the search works.
    patterns = f"-e {PLANTED} -e 'a recorded step again'"
    search = f"grep -rlF --exclude-dir=proc --exclude-dir=sys --exclude-dir=torch {patterns} / 2>/dev/null"
    found = docker("run", "--rm", "--user", "0", image, "sh", "-c", search).stdout.split()
    assert found
    assert all("/pipelines/" in path and "rerun" in path for path in found), found
    # Only the packages are copied from this repository.
    content = inside(image, "ls -A /opt/scop/lib/python3*/site-packages/scop /opt/scop/lib/python3*/site-packages")
    assert "tests" not in content.split()
    assert ".git" not in content.split()


def test_runs_a_step(image: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    sandbox = Sandbox(image, writable=(tmp_path / "out",), network="none")
    sandbox.open_to_user()
    command = ["scop", "step", "prepare_data", "--output", f"dataset={tmp_path / 'out' / 'data'}"]
    subprocess.run(sandbox.command(command), check=True, capture_output=True)
    assert read_folder(tmp_path / "out" / "data").kind == "dataset"
    owner = (tmp_path / "out" / "data" / "manifest.json").stat().st_uid
    assert owner == (os.getuid() or 10001)
    # Mistakes are reported as without a container.
    refused = subprocess.run(sandbox.command(["scop", "step", "finetune"]), capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


@pytest.fixture(scope="session")
def run(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits, with its steps in containers."""
    here = tmp_path_factory.mktemp("run")
    settings = [f"--set={key}={value}" for key, value in SMALL.items()]
    result = scop("run", "--docker", *settings, cwd=here)
    assert result.returncode == 0, result.stdout + result.stderr
    (summary,) = (here / "runs").glob("*/summary.json")
    return summary.parent


def test_a_run_in_containers_is_complete(run: Path, image: str) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["variants"][0]["pruned"]["params"] < 0.5 * summary["variants"][0]["dense"]["params"]
    assert load_model(summary["variants"][0]["model"]) is not None
    records = [json.loads(path.read_text()) for path in run.rglob("step.json")]
    assert sorted(record["step"] for record in records) == sorted(STEPS)
    assert {(record["status"], record["software"]["image"]) for record in records} == {("done", image)}


def test_containers_write_the_same_bytes_as_one_process(run: Path, tmp_path: Path) -> None:
    settings = [f"--set={key}={value}" for key, value in SMALL.items()]
    result = scop("run", *settings, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/summary.json"))
    assert reproducible_files(folder) == reproducible_files(run)


@pytest.mark.parametrize("step", list(STEPS))
def test_reruns_of_each_step_are_byte_equal(step: str, run: Path, tmp_path: Path) -> None:
    result = scop("rerun", f"{run}/{step}", "--docker", "--verify", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "files are byte-equal" in result.stdout


def test_verify_fails_after_a_change_of_settings(run: Path, tmp_path: Path) -> None:
    change = ["--set", "variant.prune_rate=0.2"]
    result = scop("rerun", f"{run}/select_channels", "--docker", *change, "--verify", cwd=tmp_path)
    assert result.returncode == 1
    assert "verify: plan/plan.json differs" in result.stdout


def test_reruns_a_killed_step(image: str, run: Path, tmp_path: Path) -> None:
    (record,) = (p for p in run.rglob("step.json") if json.loads(p.read_text())["step"] == "train_dense")
    dataset = json.loads(record.read_text())["inputs"]["dataset"]["uri"]
    (tmp_path / "out").mkdir()
    sandbox = Sandbox(image, writable=(tmp_path / "out",), readable=(Path(dataset),), network="none")
    sandbox.open_to_user()
    output = tmp_path / "out" / "model"
    step = ["scop", "step", "train_dense", "--set", "dense.epochs=400", "--input", f"dataset={dataset}"]
    command = sandbox.command([*step, "--output", f"model={output}"])
    name = f"scop-test-{os.getpid()}"
    with subprocess.Popen([*command[:2], "--name", name, *command[2:]], stdout=subprocess.DEVNULL):
        while not list(output.glob("checkpoints/*/*.json")):
            assert docker("ps", "-a").returncode == 0
        docker("kill", name)
    assert json.loads((output / "step.json").read_text())["status"] == "running"
    result = scop("rerun", str(output), "--docker", image, "--set", "dense.epochs=1", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (model,) = (tmp_path / "reruns").glob("*/model")
    assert load_model(model) is not None


@pytest.fixture(scope="session")
def remote(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """URI of a run in containers with its artifacts in S3, and the environment variables to access it."""
    folder = tmp_path_factory.mktemp("remote")
    with services.s3_server(folder) as address:
        environment = services.environment(address)
        (folder / "store" / "docker").mkdir()
        with services.mlflow_server(folder, str(folder / "artifacts"), dict(os.environ)) as tracking:
            environment |= {"MLFLOW_TRACKING_URI": tracking, "SCOP_CACHE": str(folder / "cache")}
            settings = [f"--set={key}={value}" for key, value in SMALL.items()]
            result = scop("run", "--docker", "--out", "s3://docker/runs", *settings, cwd=folder, more=environment)
            assert result.returncode == 0, result.stdout + result.stderr
            assert not (folder / "runs").exists()
            (run,) = (p.name for p in (folder / "store" / "docker" / "runs").iterdir() if p.name != "checkpoints")
            yield f"s3://docker/runs/{run}", environment


def test_reruns_a_step_from_its_uri_in_s3(remote, tmp_path: Path) -> None:
    uri, environment = remote
    more = environment | {"SCOP_CACHE": str(tmp_path / "cache")}  # an empty cache
    result = scop("rerun", f"{uri}/finetune", "--docker", "--verify", cwd=tmp_path, more=more)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "verify: all 5 files are byte-equal" in result.stdout
    assert len(list((tmp_path / "cache" / "artifacts").iterdir())) == 3  # dataset, dense, plan


def test_resumes_with_the_credentials_of_an_aws_profile(remote, tmp_path: Path) -> None:
    uri, environment = remote
    (tmp_path / "aws").write_text(
        f"[profile dev]\nregion = us-east-1\nendpoint_url = {environment['AWS_ENDPOINT_URL_S3']}\n"
        f"aws_access_key_id = {services.KEY}\naws_secret_access_key = {services.SECRET}\n"
    )
    more = {"MLFLOW_TRACKING_URI": environment["MLFLOW_TRACKING_URI"], "AWS_PROFILE": "dev"}
    more |= {
        "SCOP_CACHE": environment["SCOP_CACHE"],
        "AWS_CONFIG_FILE": str(tmp_path / "aws"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    change = ["--set", "evaluate.repeats=2"]
    result = scop("run", "--docker", "--resume", uri, *change, cwd=tmp_path, more=more)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("  kept: ") == 5
    assert "runs again: its configuration has changed (evaluate.repeats)" in result.stdout


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_resumes_a_stopped_run(sign: signal.Signals, code: int, image: str, tmp_path: Path) -> None:
    small = [f"--set={key}={value}" for key, value in (SMALL | {"dense.epochs": 60}).items()]
    command = [sys.executable, "-m", "pipelines.cli", "run", "--docker", image, *small]
    environment = clean() | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as run:
        while not list(tmp_path.glob("runs/checkpoints/train_dense-*/*.json")):
            assert run.poll() is None
        (name,) = (path.parent.name for path in tmp_path.glob("runs/*/config.yaml"))
        (container,) = docker("ps", "--quiet", "--filter", f"label=scop.run={name}").stdout.split()
        assert_restricted(container)
        run.send_signal(sign)
        assert run.wait(timeout=120) == code
    docker("wait", container)  # the container ends without further signals
    assert docker("ps", "--quiet", "--filter", f"label=scop.run={name}").stdout == ""
    record = tmp_path / "runs" / name / "train_dense" / "model" / "step.json"
    assert json.loads(record.read_text())["status"] == "stopped"
    if sign == signal.SIGTERM:
        again = scop("run", "--docker", image, "--resume", name, cwd=tmp_path)
        assert again.returncode == 0, again.stdout + again.stderr
        assert again.stdout.count("  kept: ") == 1
        assert "runs again: it did not finish (stopped)" in again.stdout
        assert "resumes after epoch" in again.stdout


def assert_restricted(container: str) -> None:
    """Containers that KFP starts have the same restrictions as those of `scop rerun`."""
    (state,) = json.loads(docker("inspect", container).stdout)
    assert state["HostConfig"]["ReadonlyRootfs"]
    assert state["HostConfig"]["CapDrop"] == ["ALL"]
    assert state["HostConfig"]["SecurityOpt"] == ["no-new-privileges"]
    assert state["Config"]["User"] == f"{os.getuid() or 10001}:0"


def test_shell_has_the_inputs_of_the_step(image: str, run: Path, tmp_path: Path) -> None:
    # The printed command works in a shell with the folder that the first call created.
    first = scop("rerun", f"{run}/select_channels", "--docker", "--shell", cwd=tmp_path, input="scop --version\n")
    assert first.returncode == 0, first.stderr
    assert first.stdout.rstrip().endswith(f"scop {IMAGE.partition(':')[2]}")
    command = next(line.strip() for line in first.stdout.splitlines() if "scop step select_channels --config" in line)
    (folder,) = (tmp_path / "reruns").iterdir()
    sandbox = Sandbox(image, (folder,), tuple(Path(p.partition("=")[2]) for p in command.split() if "=/" in p)[:-1])
    subprocess.run(sandbox.command(["bash"], interactive=True), input=command, text=True, check=True)
    assert read_folder(folder / "plan").kind == "plan"
    dry = scop("rerun", f"{run}/finetune", "--docker", "--dry-run", cwd=tmp_path)
    assert dry.stdout.startswith("docker run --rm ")
    assert "--network none --read-only" in dry.stdout
