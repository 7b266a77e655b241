"""Signals that stop a step."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_a_second_signal_does_not_interrupt_the_handling_of_the_first(tmp_path: Path) -> None:
    """After Ctrl-C, a step receives the signal twice: from the terminal and from `scop run`."""
    code = """
import os, signal
from scop.runtime.exit_codes import Terminated, stop_signals_raise
with stop_signals_raise():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except Terminated:
        os.kill(os.getpid(), signal.SIGTERM)
        print("recorded")
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "recorded\n"


@pytest.mark.parametrize(("nohup", "printed"), [(False, "terminated"), (True, "continued")])
def test_a_closed_terminal_stops_a_step_unless_it_runs_under_nohup(nohup: bool, printed: str) -> None:
    code = f"""
import os, signal
from scop.runtime.exit_codes import Terminated, stop_signals_raise
signal.signal(signal.SIGHUP, signal.{"SIG_IGN" if nohup else "SIG_DFL"})
try:
    with stop_signals_raise():
        os.kill(os.getpid(), signal.SIGHUP)
        print("continued")
except Terminated as end:
    print(end)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == f"{printed}\n"
