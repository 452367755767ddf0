"""SIGHUP: read again without a terminal, left alone with one and under nohup."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from slos_serve.vllm_plugin.hangup import on_hangup

WAITING = """
import os, signal, sys, threading
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
if sys.argv[1].startswith("/dev"):
    os.open(sys.argv[1], os.O_RDWR)  # becomes the terminal of the session
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from slos_serve.vllm_plugin.hangup import on_hangup
read_again = threading.Event()
print(on_hangup(read_again.set), flush=True)
sys.stdin.readline()
print(read_again.wait(5.0 if sys.argv[1] == "" else 0.1), flush=True)
"""


def waiting(how: str = "") -> subprocess.Popen[str]:
    """A process in a session of its own that says whether it listens, and after a line whether it was asked."""
    command = [sys.executable, "-c", WAITING, how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_a_server_without_a_terminal_reads_again() -> None:
    with waiting() as process:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        os.kill(process.pid, signal.SIGHUP)
        assert process.communicate("go\n")[0] == "True\n"
    assert process.returncode == 0


def test_nohup_stays_nohup() -> None:
    with waiting("ignored") as process:
        assert process.stdout is not None and process.stdout.readline() == "False\n"
        os.kill(process.pid, signal.SIGHUP)
        assert process.communicate("go\n")[0] == "False\n"
    assert process.returncode == 0


def test_a_server_whose_terminal_is_closed_ends() -> None:
    ours, theirs = os.openpty()

    with waiting(os.ttyname(theirs)) as process:
        assert process.stdout is not None and process.stdout.readline() == "False\n"
        os.close(theirs)
        os.close(ours)
        assert process.wait(10.0) == -signal.SIGHUP


def test_the_handler_of_somebody_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slos_serve.vllm_plugin.hangup.has_terminal", lambda: False)
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        assert not on_hangup(lambda: None)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert on_hangup(lambda: None)
    finally:
        signal.signal(signal.SIGHUP, before)
