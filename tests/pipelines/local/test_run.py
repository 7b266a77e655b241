"""`scop run` on this machine: its outputs, its MLflow runs and its errors."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.cli.main import main
from pipelines.local.run import run_locally
from pipelines.local.workspace import workspace
from scop import UserError, load_model, make_model
from scop.config import Config
from scop.data.dataset import load_dataset
from scop.environment import UserEnvironment
from scop.report.correctness import unpacked
from scop.runtime.registry import STEPS
from tests.fakes import services
from tests.fakes.browser import browser_tab, opened
from tests.helpers import ROOT, reproducible_files


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "SCOP_"))}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)


SETTINGS = [
    "--set=dense.epochs=8",
    "--set=knockoff.epochs=2",
    "--set=finetune.epochs=4",
    "--set=variants=[{name: scop, prune_rate: 0.45}, {method: none, finetune: {epochs: 1}}]",
    "--set=evaluate.repeats=5",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run of the default preset with two variants: its folder and its standard output."""
    out = tmp_path_factory.mktemp("runs")
    result = run([sys.executable, "-m", "pipelines.cli", "run", "--out", str(out), *SETTINGS])
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = (path.parent for path in out.glob("*/summary.json"))
    return folder, result.stdout


def test_summary_compares_each_pruned_network_with_the_dense_one(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["run_id"] == folder.name
    assert summary["seconds"] > 0
    scop, none = summary["variants"]
    assert (scop["name"], scop["method"], scop["prune_rate"]) == ("scop", "scop", 0.45)
    assert (none["name"], none["method"], none["prune_rate"]) == ("none", "none", 0)
    assert scop["pruned"]["params"] / scop["dense"]["params"] == pytest.approx(1 - 0.563, abs=2e-3)
    assert none["pruned"]["params"] == none["dense"]["params"]
    assert scop["dense"]["top1"] == none["dense"]["top1"] > 0.8
    assert scop["pruned"]["top1"] > 0.8
    for variant in (scop, none):
        assert max(variant["exactness"].values()) <= 1e-4
        assert set(variant["pruned"]["latency_ms"]) == {"1", "64"}
        assert Path(variant["model"]) == folder / variant["name"] / "export" / "exported"
        assert load_model(variant["model"]) is not None
        assert Path(variant["onnx"]).stat().st_size > 0


def test_readme_example_classifies_with_the_exported_network(finished: tuple[Path, str], capsys) -> None:
    folder, _ = finished
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = (block for block in blocks if "onnxruntime" in block)
    dataset = load_dataset(folder / "prepare_data" / "dataset")
    pixels, labels = dataset["test"].images, dataset["test"].labels
    exec(code.replace("runs/RUN/VARIANT", str(folder / "scop")), {"pixels": pixels})
    predictions = ast.literal_eval(capsys.readouterr().out)
    right = [name == dataset.info.classes[label] for name, label in zip(predictions, labels, strict=True)]
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(right) / len(right) == pytest.approx(summary["variants"][0]["pruned"]["top1"], abs=0.003)


def test_prints_steps_results_and_the_mlflow_command(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    log = (folder / "log.txt").read_text()
    for name in STEPS:
        assert f"\n{name}\n" in printed
        assert f"\n{name}\n" in f"\n{log}"
    assert "dense: epoch 8/8" in log
    assert re.search(r"dense +\d+\.\d\d% +272 k", printed)
    assert f"mlflow server --backend-store-uri sqlite:///{folder.parent / 'mlflow.db'}" in printed
    mlflow = Path(re.search(r"MLflow: +(\S+) server", printed)[1])
    assert not mlflow.is_absolute() or mlflow.exists()


@pytest.mark.slow
def test_kfps_local_runner_writes_the_same_bytes(finished: tuple[Path, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "run", "--runner", "kfp", "--out", str(tmp_path)]
    result = run([*command, *SETTINGS])
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = (path.parent for path in tmp_path.glob("*/summary.json"))
    files = reproducible_files(folder)
    assert len(files) > 20
    assert files == reproducible_files(finished[0])
    assert "KFP Executor" not in result.stdout
    assert "executor_input" in (folder / "log.txt").read_text()
    (metrics, _) = (p for p in folder.rglob("executor_output.json") if "evaluate" in str(p))
    confusion = json.loads(metrics.read_text())["artifacts"]["confusion"]["artifacts"][0]["metadata"]
    assert len(confusion["confusionMatrix"]["rows"]) == 10


def test_every_step_has_a_record(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    records = [json.loads(path.read_text()) for path in folder.rglob("step.json")]
    assert sorted(record["step"] for record in records) == sorted([*STEPS, *list(STEPS)[3:7]])
    assert {record["status"] for record in records} == {"done"}
    assert {record["launch"]["run"] for record in records} == {folder.name}


def test_mlflow_has_one_child_run_per_step(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits-resnet20")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.tags["scop.step"] for run in children) == sorted([*STEPS, *list(STEPS)[3:7]])
    assert {run.info.status for run in runs} == {"FINISHED"}
    evaluate = next(run for run in children if run.info.run_name == "scop evaluate")
    # Comparisons read this run.
    params, metrics = evaluate.data.params, evaluate.data.metrics
    assert (params["network"], params["method"], params["prune_rate"]) == ("resnet20", "scop", "0.45")
    assert (params["dense_epochs"], params["knockoff_epochs"], params["finetune_epochs"]) == ("8", "2", "4")
    assert metrics["top1_drop"] == pytest.approx(metrics["dense_top1"] - metrics["pruned_top1"])
    sides = ("top1", "top5", "params", "macs", "bytes", "train_seconds")
    assert all(metrics[f"{network}_{what}"] > 0 for network in ("dense", "pruned") for what in sides)
    timed = [f"{network}_latency_ms_batch1_{p}" for network in ("dense", "pruned") for p in ("p50", "p95")]
    assert all(metrics[key] > 0 for key in timed)
    threads = torch.get_num_threads()
    assert evaluate.data.tags["scop.measured_on"] == f"{evaluate.data.tags['scop.device']} ({threads} threads)"
    assert unpacked(evaluate.data.tags["scop.right"]).mean() == pytest.approx(metrics["pruned_top1"])
    assert {f.path for f in client.list_artifacts(evaluate.info.run_id)} >= {"evaluation.json", "confusion.png"}
    assert evaluate.data.tags["scop.model"] == "models:/digits-resnet20-scop/1"
    assert len(evaluate.outputs.model_outputs) == 1
    layers = json.loads(Path(client.download_artifacts(evaluate.info.run_id, "layers.json")).read_text())
    assert (layers["columns"], len(layers["data"])) == (["layer", "channels", "kept"], 18)
    assert metrics["macs_removed"] == pytest.approx(0.56, abs=0.01)
    finetune = next(run for run in children if run.info.run_name == "scop finetune")
    assert [m.step for m in client.get_metric_history(finetune.info.run_id, "loss")] == [1, 2, 3, 4]
    plan = next(run for run in children if run.info.run_name == "scop select_channels")
    assert {f.path for f in client.list_artifacts(plan.info.run_id)} == {"plan.json", "plan.png"}
    spent = sum(run.data.metrics["device_seconds"] for run in children)
    assert parent.data.metrics["total_device_seconds"] == pytest.approx(spent)
    assert parent.data.tags["scop.dataset"] == evaluate.data.tags["scop.dataset"]
    assert {"scop.device", "scop.machine", "scop.torch", "mlflow.source.git.commit"} <= parent.data.tags.keys()
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} >= {"report.html", "summary.json", "config.yaml"}


def test_registered_model_is_a_candidate_and_computes_the_same_logits(
    finished: tuple[Path, str], digits, monkeypatch
) -> None:
    import mlflow
    import numpy as np
    import torch

    folder, _ = finished
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder.parent / 'mlflow.db'}")
    uri = os.environ["MLFLOW_TRACKING_URI"]
    MlflowClient(uri).set_model_version_tag("digits-resnet20-scop", "1", "max_top1_drop", "1")
    assert main(["promote", "digits-resnet20-scop@candidate"]) == 0
    registered = mlflow.pyfunc.load_model("models:/digits-resnet20-scop@champion")
    summary = json.loads((folder / "summary.json").read_text())
    images = torch.randn(5, *digits.info.shape)
    with torch.no_grad():
        expected = load_model(summary["variants"][0]["model"])(images).numpy()
    assert float(np.abs(registered.predict(images.numpy())["logits"] - expected).max()) < 1e-4
    signature = registered.metadata.signature
    assert [tuple(entry.shape) for entry in signature.inputs] == [(-1, *digits.info.shape)]
    assert signature.outputs.input_names() == ["logits"]
    assert registered.input_example[signature.inputs.input_names()[0]].shape == (2, *digits.info.shape)
    tags, scop = MlflowClient(uri).get_model_version("digits-resnet20-scop", "1").tags, summary["variants"][0]
    assert (tags["prune_rate"], tags["method"]) == ("0.45", "scop")
    assert float(tags["top1_drop"]) == pytest.approx(scop["dense"]["top1"] - scop["pruned"]["top1"], abs=1e-6)


@pytest.mark.parametrize("width", [360, 1440])
def test_report_opens_in_a_browser_without_network_or_errors(finished: tuple[Path, str], width: int) -> None:
    folder, _ = finished
    with browser_tab() as tab, opened(tab, folder / "report.html", width) as page:
        assert page.locator(".plot .main-svg").count() >= 5
        assert sorted(page.locator("#table .tabulator-cell.name").all_inner_texts()) == ["none", "scop"]
        steps = page.locator("section", has_text="Compute time and energy").locator("tbody th").all_inner_texts()
        assert {"train_dense", "scop/finetune", "none/export", "compare", "all steps, last attempts"} <= set(steps)
        assert page.locator("#pareto .point").count() == 3  # two variants and the dense network
        record = json.loads((folder / "scop" / "evaluate" / "evaluation" / "step.json").read_text())
        name = page.locator(".name", has_text=re.compile("^scop$"))
        row = page.locator("#table .tabulator-row").filter(has=name).inner_text()
        assert record["launch"]["mlflow_run"] in row
        assert f"scop rerun {folder}/scop/evaluate/evaluation" in row


def test_compares_and_promotes_through_a_server(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch, capsys
) -> None:
    """A real server serves a copy of the run's database."""
    folder, _ = finished
    shutil.copy(folder.parent / "mlflow.db", tmp_path / "server.db")
    with services.mlflow_server(tmp_path, str(tmp_path / "artifacts"), os.environ) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        page = ["--html", str(tmp_path / "page.html"), "--png", str(tmp_path / "png")]
        assert main(["compare", "digits-resnet20", *page, "--baseline", "dense"]) == 0
        printed = capsys.readouterr().out
        assert "scikit-learn digits" in printed
        assert re.search(r"cost:    \d+ s on .+, energy n/a, 1 run\n", printed)
        assert printed.count("cost:") == 1  # one device, whatever the number of threads of each step
        assert {"accuracy-macs.png", "kept-channels.png", "confusion-scop.png"} <= {
            path.name for path in (tmp_path / "png").iterdir()
        }
        with browser_tab() as tab, opened(tab, tmp_path / "page.html", 1440) as view:
            assert view.locator("#learning-curves .scatterlayer .trace").count() == 3

        assert main(["promote", "digits-resnet20-none/1", "--set", "export.tolerance=1e-12"]) == 1
        refused = capsys.readouterr()
        assert "FAILS: exported logits differ by" in refused.out
        assert "models:/digits-resnet20-none@champion stays none" in refused.err
        client = MlflowClient(address)
        # By default, the limits of the time of the export apply.
        client.set_model_version_tag("digits-resnet20-scop", "1", "max_top1_drop", "-1")
        assert main(["promote", "digits-resnet20-scop/1"]) == 1
        assert (
            main(["promote", "digits-resnet20-scop/1", "--set", "export.tolerance=1"]) == 1
        )  # the drop's limit is still that of the export
        client.set_model_version_tag("digits-resnet20-scop", "1", "max_top1_drop", "0.9")
        assert main(["promote", "digits-resnet20-scop@candidate"]) == 0
        assert "models:/digits-resnet20-scop@champion is now version 1" in capsys.readouterr().out
        assert main(["promote", "digits-resnet20-no/1"]) == 2
        assert "it has: digits-resnet20-none, digits-resnet20-scop" in capsys.readouterr().err
        client.delete_model_version_tag("digits-resnet20-scop", "1", "difference")
        assert main(["promote", "digits-resnet20-scop/1"]) == 2
        assert "has no measurements (tag 'difference')" in capsys.readouterr().err
        assert client.get_model_version_by_alias("digits-resnet20-scop", "champion").version == "1"


@pytest.mark.slow
def test_own_grey_images_and_pretrained_weights_for_other_classes(tmp_path: Path) -> None:
    images = load_digits()
    for label in (3, 8):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
        for number, image in enumerate(images.images[images.target == label]):
            Image.fromarray((image * 15).astype("uint8")).save(tmp_path / "photos" / str(label) / f"{number}.png")
    torch.manual_seed(0)
    torch.save(make_model("torchvision:resnet18", num_classes=1000).state_dict(), tmp_path / "resnet18.pth")
    settings = [f"data.path={tmp_path}/photos", f"dense.pretrained={tmp_path}/resnet18.pth", "data.image_size=32"]
    settings += ["dense.epochs=10", "finetune.epochs=5", "evaluate.repeats=3"]
    command = [sys.executable, "-m", "pipelines.cli", "run", "-f", "own-images", "--out", str(tmp_path / "runs")]
    result = run([*command, *(f"--set={setting}" for setting in settings)])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resnet18.pth, except fc, which had other classes" in result.stdout
    (summary,) = (tmp_path / "runs").glob("*/summary.json")
    variants = {variant["name"]: variant for variant in json.loads(summary.read_text())["variants"]}
    assert variants.keys() == {"pruned", "none"}
    assert variants["pruned"]["dense"]["top1"] > 0.9
    assert variants["pruned"]["pruned"]["top1"] > 0.9
    assert variants["none"]["pruned"]["top1"] > 0.9
    assert variants["pruned"]["pruned"]["macs"] <= 0.5 * variants["pruned"]["dense"]["macs"]


def test_a_users_mistake_ends_the_run_with_exit_code_2_and_how_to_resume(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "run", "--out", str(tmp_path), "--set", "dense.batch_size=5000"]
    result = run(command)
    assert result.returncode == 2
    error, remedy = result.stderr.splitlines()
    assert error.startswith("scop: error: train_dense: 1295 training images are fewer than a batch")
    assert remedy.startswith(f"scop: continue with: scop run --resume {tmp_path}/digits-resnet20-")
    assert "Traceback" not in result.stdout + result.stderr
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("digits-resnet20").experiment_id])
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FAILED"
    assert "fewer than a batch" in parent.data.tags["scop.error"]


def test_a_failed_resume_keeps_the_files_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{services.free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("summary.json", "report.html", "config.yaml"):
        (folder / name).write_text("unchanged")
    with pytest.raises(UserError, match="MLflow"):
        run_locally(Config(), str(tmp_path), "run", resume=str(folder), user=UserEnvironment.read())
    assert {path.read_text() for path in folder.iterdir() if path.is_file()} == {"unchanged"}
    assert len([path for path in folder.iterdir() if path.is_file()]) == 3


def test_rejects_an_invalid_output_folder_before_creating_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "file").write_text("")
    for out, message in (
        ("gs://bucket/runs", "--out gs://bucket/runs is neither a folder nor an s3:// URI"),
        (str(tmp_path / "50%20off"), "% and [?] have another meaning in its URI"),
        (str(tmp_path / "file"), "file.*cannot be created"),
    ):
        with pytest.raises(UserError, match=message):
            run_locally(Config(), out, "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_refuses_a_second_resume_of_a_running_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (
        workspace(str(folder), exists=False),
        pytest.raises(UserError, match=f"process {os.getpid()} is working on run run; wait for it"),
    ):
        run_locally(Config(), str(tmp_path), "run", resume=str(folder))
    with workspace(str(folder), exists=True):
        pass
