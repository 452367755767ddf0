"""What :mod:`benchmarks.chaos` does to two replicas under Ray Serve, and the server that it is done to."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slos_serve.launch.cpu_engine import cpu_engine_args
from slos_serve.launch.cpu_model import resolve_model
from slos_serve.launch.endpoint import Endpoint, free_port
from slos_serve.launch.serve_config import ServeConfig
from slos_serve.launch.server import ServerProcess
from slos_serve.routing.settings import Order
from slos_serve.vllm_plugin.config import PluginConfig
from tests.cpu_profile import save_rough_profile
from tests.ray.processes import below, titled

ENGINES = "ServeReplica:slos-serve:SLOServer"
RUN = "slos_serve.ray_serve.run"
HOOK = Path(__file__).parent / "_chaos_hook"
FAULT_S = 5.0
UPDATED_WITHIN_S = 600.0
# A replica's name is in the name of the file that its engine core writes events to.
_EVENTS_NAME = re.compile(r"events-([0-9a-z]+)\.jsonl")


@dataclass(slots=True)
class Fleet:
    """A server with two replicas.

    Attributes:
        server: its process.
        config: what it serves.
        folder: of its files; the hook looks there.
        environment: variables over those of this process.
        harmed: name of a replica, from when, until when.
        updates: how often the application was updated.
    """

    server: ServerProcess
    config: ServeConfig
    folder: Path
    environment: Mapping[str, str]
    harmed: list[tuple[str, float, float]] = field(default_factory=list)
    updates: int = 0

    @classmethod
    @contextmanager
    def started(cls, folder: Path, model: str, classes: str) -> Iterator[Fleet]:
        """Start it; entered when it answers."""
        source = resolve_model("smollm2")
        save_rough_profile(source, folder)
        (folder / "classes.yaml").write_text(classes, encoding="utf-8")
        config = ServeConfig(
            model=source,
            replicas=2,
            endpoint=Endpoint(host="127.0.0.1", port=free_port()),
            vllm_args=(*cpu_engine_args(), "--served-model-name", model),
            plugin=PluginConfig(
                classes_path=folder / "classes.yaml",
                profile_path=folder / "profile.json",
                events_path=folder / "events.jsonl",
            ),
            order=Order.SPREAD,
        )
        paths = [str(HOOK), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_TMPDIR": str(folder),
            "SLOS_SERVE_CHAOS": str(folder),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        log = folder / "server.log"
        command = command_of(config, folder / "config.json")
        with ServerProcess(
            source, endpoint=config.endpoint, environment=environment, command=command, output=log
        ) as server:
            yield cls(server, config, folder, environment)

    @property
    def url(self) -> str:
        """Of the endpoint."""
        return self.server.base_url

    def replicas(self) -> list[int]:
        """Processes of the replicas that there are."""
        return titled(self.server.pid, ENGINES)

    def named(self, pid: int) -> str:
        """The replica's name, as answers tell it; empty when it cannot be found."""
        for one in below(pid):
            for link in Path(f"/proc/{one}/fd").iterdir():
                with suppress(OSError):
                    found = _EVENTS_NAME.search(str(link.readlink()))
                    if found:
                        return found[1]
        return ""

    @contextmanager
    def harming(self, pid: int, *, for_good: bool = False) -> Iterator[None]:
        """What is done within harms this replica's requests."""
        name, from_s = self.named(pid), time.monotonic()
        assert name, "no name of the replica"
        yield
        self.harmed.append((name, from_s, float("inf") if for_good else time.monotonic()))

    def disturb(self, how: str, pid: int, text: str = "") -> None:
        """Have the hook cut or skew what a replica publishes for a while."""
        flag, did = (self.folder / f"{name}-{pid}" for name in (how, "did"))
        made = flag.with_suffix(".new")
        made.write_text(text, encoding="ascii")
        made.rename(flag)
        time.sleep(FAULT_S)
        flag.unlink()
        assert did.exists(), "nothing was published meanwhile"
        did.unlink()

    def was_harmed(self, request: Any) -> bool:
        """Whether its replica was harmed while it ran."""
        return any(
            name == request.replica and request.begun_s < until_s and request.ended_s > from_s
            for name, from_s, until_s in self.harmed
        )

    def unfinished(self) -> list[str]:
        """What the server's log says of faults in our own code."""
        text = (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")
        found = re.findall(r"slos-serve: (?:failed to [^\n]{0,80}|[^\n]{0,80} failed[^\n]{0,40})", text)
        return sorted(set(found))[:10]


def command_of(config: ServeConfig, path: Path) -> list[str]:
    """What serves the configuration, written to ``path``."""
    config.write(path)
    return ServerProcess.python_command(RUN, str(path))


def kill(fleet: Fleet, rng: random.Random) -> str:
    """SIGKILL to a replica or to a process that it started."""
    pid = rng.choice(fleet.replicas())
    children = [child for child in below(pid) if child != pid]
    with fleet.harming(pid, for_good=True):
        killed = rng.choice([pid, *children])
        os.kill(killed, signal.SIGKILL)
    return "the replica" if killed == pid else "a process of the replica"


def stop(fleet: Fleet, rng: random.Random) -> str:
    """A replica and its engine stand still for a while."""
    pid = rng.choice(fleet.replicas())
    tree = below(pid)
    with fleet.harming(pid):
        for one in tree:
            _send(one, signal.SIGSTOP)
        time.sleep(FAULT_S)
        for one in reversed(tree):
            _send(one, signal.SIGCONT)
        time.sleep(FAULT_S)  # what it owes is late still
    return f"{len(tree)} processes"


def cut(fleet: Fleet, rng: random.Random) -> str:
    """A replica's publications reach nobody."""
    fleet.disturb("cut", rng.choice(fleet.replicas()))
    return "one replica's"


def skew(fleet: Fleet, rng: random.Random) -> str:
    """A replica's clock jumps ahead or back, and later returns."""
    skew_s = rng.choice((-1.0, 1.0)) * rng.uniform(0.5, 60.0)
    fleet.disturb("skew", rng.choice(fleet.replicas()), str(skew_s))
    return f"{skew_s:+.1f} s"


def garbage(fleet: Fleet, rng: random.Random) -> str:
    """Bytes of no meaning to every port that the server, Ray and the engines listen on."""
    until_s, reached = time.monotonic() + FAULT_S, set()
    while time.monotonic() < until_s:
        for port in listening(below(fleet.server.pid)):
            for payload in (
                rng.randbytes(2000),
                b"\xff" + bytes(8) + b"\x7f" + rng.randbytes(54),
                b"GET /" + b"x" * 70000,
            ):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5) as link:
                    reached.add(port)
                    link.settimeout(0.2)
                    link.sendall(payload)
    assert len(reached) > 2, reached
    return f"{len(reached)} ports"


def update(fleet: Fleet, _: random.Random) -> str:
    """Another class file: Ray replaces one replica after the other."""
    fleet.updates += 1
    classes = fleet.folder / f"classes-{fleet.updates}.yaml"
    text = (fleet.folder / "classes.yaml").read_text(encoding="utf-8")
    classes.write_text(f"{text}  new{fleet.updates}: {{ttft_ms: 30000, tpot_ms: 3000}}\n", encoding="utf-8")
    old = set(fleet.replicas())
    plugin = fleet.config.plugin.model_copy(update={"classes_path": classes})
    changed = fleet.config.model_copy(update={"plugin": plugin})
    command = command_of(changed, fleet.folder / f"config-{fleet.updates}.json")
    environment = {**os.environ, **fleet.environment, "RAY_ADDRESS": "auto"}
    until_s = time.monotonic() + UPDATED_WITHIN_S
    with (fleet.folder / "update.log").open("wb") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        while old & set(fleet.replicas()):
            assert time.monotonic() < until_s, (fleet.folder / "update.log").read_text(errors="replace")[-2000:]
            time.sleep(0.5)
    finally:
        running.kill()  # a signal that it could handle would end the application
        running.wait()
    return f"{len(old)} replicas replaced"


def full(fleet: Fleet, rng: random.Random) -> str:
    """Every write to a file fails in a replica and its engine, as on a full disk."""
    pid = rng.choice(fleet.replicas())
    events = fleet.folder / f"events-{fleet.named(pid)}.jsonl"
    before = {}
    for one in below(pid):
        with suppress(ProcessLookupError):
            before[one] = resource.prlimit(one, resource.RLIMIT_FSIZE)
            resource.prlimit(one, resource.RLIMIT_FSIZE, (0, before[one][1]))
    size = events.stat().st_size
    time.sleep(FAULT_S)
    assert events.stat().st_size == size, "the disk was not full"
    for one, limits in before.items():
        with suppress(ProcessLookupError):
            resource.prlimit(one, resource.RLIMIT_FSIZE, limits)
    return f"{len(before)} processes"


FAULTS: dict[str, Callable[[Fleet, random.Random], str]] = {
    "kill": kill,
    "stop": stop,
    "cut": cut,
    "garbage": garbage,
    "skew": skew,
    "update": update,
    "disk full": full,
}


def listening(pids: list[int]) -> list[int]:
    """TCP ports that these processes listen on."""
    inodes = set()
    for pid in pids:
        with suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    inodes.add(str(link.readlink()).removeprefix("socket:[").rstrip("]"))
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                ports.add(int(words[1].rpartition(":")[2], 16))
    return sorted(ports)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
