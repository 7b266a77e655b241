"""The command line: exit codes, one-line errors and imports."""

import os
import subprocess
import sys
from pathlib import Path

from pipelines.cli.main import main
from scop.storage.manifest import MANIFEST
from tests.helpers import ROOT


def test_runs_a_step_and_reports_mistakes_with_exit_code_2(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["step", "prepare_data", "--output", f"dataset={tmp_path / 'data'}"]) == 0
    assert (tmp_path / "data" / MANIFEST).exists()
    capsys.readouterr()
    for arguments, message in (
        (["step", "prepare_data"], "needs --output dataset=FOLDER"),
        (["step", "prepare_data", "--output", "dataset"], "must have the form NAME=DIR"),
        (["step", "prepare", "--output", "dataset=x"], "step 'prepare' is unknown"),
        (["step", "finetune", "--variant", "x"], "--variant 'x' is not in the configuration"),
        (["run", "-f", "nowhere.yaml"], "neither a file nor a preset"),
        (["run", "--set", "variants.0.prune_rate=2", "--out", str(tmp_path)], "'variants.0.prune_rate' is 2"),
        (["run", "--set", "dense.weights=no.pt", "--out", str(tmp_path)], "no.pt does not exist"),
        (["run", "--out", "/proc/runs"], "output folder /proc/runs cannot be created"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("scop: error: ")
        assert error.count("\n") == 1


def test_help_imports_no_large_packages() -> None:
    code = "import sys, pipelines.cli.main; pipelines.cli.main.make_parser().format_help(); print(*sys.modules)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert not {"torch", "mlflow", "kfp", "numpy", "pydantic"} & set(result.stdout.split())
