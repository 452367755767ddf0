"""The sockets between engine core and API process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from slos_serve.vllm_plugin.front.link import FrontSockets, OutcomeLink, front_process, socket_path


@pytest.fixture(autouse=True)
def temporary_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_an_outcome_arrives_and_one_that_nobody_takes_is_dropped() -> None:
    link = OutcomeLink(os.getpid())
    link.write({"request_id": "early"})
    sockets = FrontSockets(os.getpid())
    try:
        until_s = time.monotonic() + 10.0
        while not sockets.outcomes.poll(50) and time.monotonic() < until_s:
            link.write({"request_id": "late"})
        assert json.loads(sockets.outcomes.recv()) == {"request_id": "late"}
    finally:
        link.close()
        sockets.close()
    assert socket_path("state", os.getpid()) is not None
    assert not Path(str(socket_path("state", os.getpid()))).exists()


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / f"slos-serve-front-{os.getuid()}"
    folder.mkdir(mode=0o700)
    assert socket_path("state", 7) == folder / "7.state"
    folder.chmod(0o755)
    assert socket_path("state", 7) is None
    with pytest.raises(OSError, match="private folder"):
        FrontSockets(7)


def test_sockets_of_killed_processes_are_removed() -> None:
    mine = socket_path("state", os.getpid())
    assert mine is not None
    dead, alive = mine.with_name("999999999.state"), mine.with_name("1.state")
    dead.touch()
    alive.touch()
    FrontSockets(os.getpid()).close()
    assert not dead.exists() and alive.exists()


def test_a_process_without_a_parent_of_ours_has_no_front_end() -> None:
    one = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))
    assert front_process(one) is None
