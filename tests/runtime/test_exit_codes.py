"""Signals that stop a step."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_a_second_signal_does_not_cut_off_what_the_first_one_ends(tmp_path: Path) -> None:
    """Ctrl-C reaches a step twice: from the terminal, and handed on by `scop run`."""
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


@pytest.mark.parametrize(("by_nohup", "said"), [(False, "terminated"), (True, "went on")])
def test_a_closed_terminal_ends_a_step_unless_nohup_ran_it(by_nohup: bool, said: str) -> None:
    code = f"""
import os, signal
from scop.runtime.exit_codes import Terminated, stop_signals_raise
signal.signal(signal.SIGHUP, signal.{"SIG_IGN" if by_nohup else "SIG_DFL"})
try:
    with stop_signals_raise():
        os.kill(os.getpid(), signal.SIGHUP)
        print("went on")
except Terminated as end:
    print(end)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == f"{said}\n"
