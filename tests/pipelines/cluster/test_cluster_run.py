"""Tests of the pipeline compiled for a cluster, executed from its YAML by kfp.local."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pipelines.compare.comparison import compare
from pipelines.compare.experiments import Source
from pipelines.presets import find_config
from pipelines.runs import records_of
from scop.config import load_config
from scop.runtime.registry import STEPS
from scop.storage import s3
from scop.storage.cache import Cache
from tests.fakes import services
from tests.helpers import ROOT
from tests.pipelines.cluster.test_compilation import EXAMPLE

pytestmark = pytest.mark.slow
SMALL = ["dense.epochs=3", "knockoff.epochs=1", "finetune.epochs=2", "evaluate.repeats=3"]
# Variables that Kubernetes secrets would set; the first one is the secret of the S3 server.
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": services.SECRET,
    "AWS_SESSION_TOKEN": "planted-session-token",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
    "MLFLOW_TRACKING_TOKEN": "planted-mlflow-token",
    "KF_PIPELINES_TOKEN": "planted-kfp-token",
}
RUN = """
import json, sys
from kfp import components, local
file, root, cache, sections = sys.argv[1:]
runner = local.SubprocessRunner(use_venv=False)
local.init(runner, pipeline_root=root, workspace_root=cache + "-workspace", enable_caching=True, cache_root=cache)
components.load_component_from_file(file)(**json.loads(sections))
"""


PRESET = find_config("digits-resnet20", Cache(ROOT / "none"))
FIRST = load_config(PRESET).variants[0].model_dump(mode="json", exclude_none=True)
FAILING, FIXED = (
    f"variants={json.dumps([FIRST, {'name': 'other', 'method': 'l1', 'finetune': changes}])}"
    for changes in ({"batch_size": 100_000}, {})
)


@dataclass
class Submitted:
    """Four runs of one file with caching, and the steps that each of them executed.

    The second run changes section `finetune`. The third has the first one's settings and a second variant, which fails.
    The fourth fixes this variant.
    """

    folder: Path
    store: Path
    codes: list[int]
    executed: list[set[str]]


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submitted]:
    folder = tmp_path_factory.mktemp("cluster")
    values = yaml.safe_load(EXAMPLE.read_text()) | {"pipeline_root": "s3://cluster/scop"}
    retries = {"count": 1, "backoff": "1s"}
    values["classes"]["gpu"] = {"requests": {"cpu": 2, "memory": "4Gi"}, "retries": retries}  # there is no GPU here
    (folder / "cluster.yaml").write_text(yaml.safe_dump(values))
    with services.s3_server(folder) as address:
        variables = services.environment(address) | PLANTED
        variables |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "MLFLOW_TRACKING_USERNAME": "me"}
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SCOP_", "AWS_", "KF"))}
        (folder / "store" / "cluster").mkdir()
        codes, executed = [], []
        for number, change in enumerate(([], ["finetune.epochs=1"], [FAILING], [FIXED])):
            environment = clean | variables | {"KFP_RUN_ID": f"kfp-run-{number}", "PYTHONPATH": str(ROOT)}
            compile_ = [sys.executable, "-m", "pipelines.cli", "compile", "--cluster", str(folder / "cluster.yaml")]
            subprocess.run([*compile_, "-o", str(folder / "pipeline.yaml")], env=environment, check=True, cwd=folder)
            config = load_config(PRESET, [*SMALL, *change])
            sections = json.dumps(config.model_dump(mode="json", exclude={"run"}, exclude_none=True))
            (folder / f"root{number}").mkdir()
            (folder / f"root{number}" / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
            paths = [str(folder / "pipeline.yaml"), str(folder / f"root{number}"), str(folder / "cache"), sections]
            with (folder / f"log{number}.txt").open("w") as log:
                command = [sys.executable, "-c", RUN, *paths]
                result = subprocess.run(command, env=environment, cwd=folder, stdout=log, stderr=log, timeout=500)
            codes.append(result.returncode)
            records = (folder / f"root{number}").rglob("step.json")
            executed.append({json.loads(path.read_text())["step"] for path in records})
        yield Submitted(folder, folder / "store" / "cluster", codes, executed)
    s3.forget_client()


def test_reruns_only_steps_that_depend_on_the_changed_section(submitted: Submitted) -> None:
    assert submitted.codes[:2] == [0, 0], (submitted.folder / "log0.txt").read_text()[-3000:]
    assert submitted.executed[0] == set(STEPS)
    assert submitted.executed[1] == {"finetune", "evaluate", "export", "compare"}


def test_reports_a_failed_variant_and_keeps_the_others(submitted: Submitted) -> None:
    assert submitted.codes[2] != 0
    assert submitted.executed[2] == {"select_channels", "finetune"}  # the first variant came from the cache
    found = compare(
        [str(submitted.folder / "root0"), str(submitted.folder / "root2")],
        Source("runs"),
        Cache(submitted.folder / "cache"),
    )
    assert [result.name for result in found.results] == ["scop-0.45"]
    why = "finetune failed: 1295 training images are fewer than a batch: batch_size is 100000"
    assert found.missing == {"other": why}


def test_resubmission_runs_only_missing_steps(submitted: Submitted) -> None:
    assert submitted.codes[3] == 0, (submitted.folder / "log3.txt").read_text()[-3000:]
    records = records_of(str(submitted.folder / "root3"))
    executed = {record.title for record in records}
    assert executed == {*(f"other/{step}" for step in ("select_channels", "finetune", "evaluate", "export")), "compare"}
    # The page has both variants: the cache passed the first run's results to the last step.
    found = compare([str(submitted.folder / "root3")], Source("runs"), Cache(submitted.folder / "cache"))
    assert [result.name for result in found.results] == ["scop-0.45", "other"]
    assert found.missing == {}


def test_each_run_is_one_mlflow_run_closed_by_its_last_step(submitted: Submitted, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{submitted.folder}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("digits-resnet20").experiment_id])
    parents = {run.data.tags["kfp.run_id"]: run for run in found if "kfp.run_id" in run.data.tags}
    assert [parents[f"kfp-run-{n}"].info.status for n in range(4)] == ["FINISHED", "FINISHED", "FAILED", "FINISHED"]
    assert "fewer than a batch" in parents["kfp-run-2"].data.tags["scop.error"]
    assert parents["kfp-run-0"].data.metrics["scop-0.45/top1"] > 0.3
    steps = {
        key: sorted(
            run.data.tags["scop.step"] for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
        )
        for key, parent in parents.items()
    }
    assert len(steps["kfp-run-0"]) == 8
    kept = {entry.path for entry in client.list_artifacts(parents["kfp-run-0"].info.run_id, "configuration")}
    assert {"configuration/prepare_data.yaml", "configuration/scop-0.45"} <= kept
    finetune = client.download_artifacts(
        parents["kfp-run-1"].info.run_id, "configuration/scop-0.45/finetune.yaml", str(tmp_path)
    )
    assert yaml.safe_load(Path(finetune).read_text())["finetune"]["epochs"] == 1
    assert steps["kfp-run-1"] == ["compare", "evaluate", "export", "finetune"]


def test_files_of_the_runs_contain_no_secrets(submitted: Submitted) -> None:
    files = [path for path in submitted.folder.rglob("*") if path.is_file()]
    assert any(path.name == "pipeline.yaml" for path in files)
    assert any(path.name == "step.json" for path in files)
    assert any(path.name == "mlflow.db" for path in files)
    for path in files:
        if path.name.startswith("rclone"):  # the server's own log
            continue
        content = path.read_bytes()
        assert not [name for name, secret in PLANTED.items() if secret.encode() in content], path


def test_checkpoints_in_s3_are_removed_after_success(submitted: Submitted) -> None:
    assert [path for path in submitted.store.rglob("*") if path.is_file()] == []
