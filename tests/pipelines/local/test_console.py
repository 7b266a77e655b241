"""What a run shows in the terminal and writes to its log."""

import io

from pipelines.local.console import KfpView, View


def test_view_shows_steps_and_logs_all_lines() -> None:
    log, terminal = io.StringIO(), io.StringIO()
    view = View(log, terminal)
    view.start("train_dense")
    view.write("train: epoch 1/2")
    view.write(", loss 1\n\n")
    view.finish(succeeded=False)
    shown = terminal.getvalue().splitlines()
    assert shown[:2] == ["train_dense", "  train: epoch 1/2, loss 1"]
    assert shown[2].startswith("  FAILED in ")
    assert log.getvalue().splitlines()[:2] == ["train_dense", "train: epoch 1/2, loss 1"]


def test_kfp_view_shows_steps_and_logs_all_lines() -> None:
    log, terminal = io.StringIO(), io.StringIO()
    view = KfpView(log, terminal)
    view.write("12:00:00.000 - INFO - Executing task \x1b[96m'train-dense'\x1b[0m\n")
    view.write("    [KFP Executor 2026-01-01 12:00:00,000 INFO]: Got executor_input:\n    {\n")
    view.write('        "inputs": {}\n    }\n    dense: epoch 1/2')
    view.write(", loss 1\n    scop: error: train_dense: no such thing\n")
    view.write("12:00:01.000 - INFO - Task \x1b[96m'train-dense'\x1b[0m finished with status \x1b[91mFAILURE\x1b[0m\n")
    shown = terminal.getvalue().splitlines()
    assert shown[:2] == ["train_dense", "  dense: epoch 1/2, loss 1"]
    assert shown[2].startswith("  FAILED in ")
    assert view.task == "train_dense"
    assert '"inputs": {}' in log.getvalue()
