"""What verdicts, metrics and the live page cost: tokens/s of the demo's burst with all of it, over the same without.

Both servers plan with the same scheduler. One has the middleware, headers both ways, metrics and the live page, which
a client looks at each second. The other has none of it, and gets its SLOs in the body. ``/metrics`` of both, which has
vLLM's own, is scraped every five seconds. They get the same bursts by turns, another seed each round; the order changes
from round to round. Prints the ratio of tokens/s with its bootstrap interval, and the promises kept, the steps and the
milliseconds a step of both. Exits 1 when the ratio is under 0.99. Wants a machine that does nothing else, and the
demo's model and profile in the cache (``slos-serve demo`` makes both).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import httpx
import numpy as np

LEAST_RATIO = 0.99
WITH, WITHOUT = "with", "without"
STEPS_METRIC = "vllm:iteration_tokens_total_count"
QUIET_CLS = "benchmarks._quiet.QuietScheduler"
LOOK_EVERY_S, SCRAPE_EVERY = 1.0, 5
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        rounds: bursts that each side gets.
        burst_s: how long the requests of one arrive.
        seed: of the first burst.
        model: what vLLM loads.
    """

    rounds: int
    burst_s: float
    seed: int
    model: str


@dataclass(frozen=True)
class Done:
    """One burst on one side.

    Attributes:
        tokens_per_s: output tokens over the time until the last answer ended.
        kept: promises that were kept.
        steps: of the engine.
        wall_s: seconds.
    """

    tokens_per_s: float
    kept: int
    steps: int
    wall_s: float

    def __str__(self) -> str:
        each_ms = 1000.0 * self.wall_s / max(self.steps, 1)
        return f"{self.tokens_per_s:.1f} tokens/s, {self.kept} kept, {self.steps} steps of {each_ms:.1f} ms"


def steps_of(url: str) -> int:
    """Steps that a server's engine has made."""
    text = httpx.get(f"{url}/metrics", timeout=60.0).text
    lines = [line for line in text.splitlines() if line.startswith(STEPS_METRIC)]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


def interval(ratios: Sequence[float], draws: int = 5000) -> tuple[float, float, float]:
    """Mean of the rounds' ratios, and the bootstrap's 95 % interval of it."""
    found = np.random.default_rng(0).choice(np.asarray(ratios), (draws, len(ratios))).mean(axis=1)
    low, high = np.quantile(found, (0.025, 0.975))
    return float(np.mean(ratios)), float(low), float(high)


@contextmanager
def looked_at(urls: dict[str, str]) -> Iterator[None]:
    """Somebody watches the page of one side meanwhile, and Prometheus scrapes both."""
    ended = threading.Event()

    def look() -> None:
        with httpx.Client(timeout=10.0) as client:
            for number in count():
                with suppress(httpx.TransportError):
                    client.get(f"{urls[WITH]}/slo/state")
                    for url in urls.values() if number % SCRAPE_EVERY == 0 else ():
                        client.get(f"{url}/metrics")
                if ended.wait(LOOK_EVERY_S):
                    return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


async def alternate(urls: dict[str, str], settings: Settings) -> list[float]:
    """Ratios of tokens/s, one a round."""
    from slos_serve.bench.client import ClientSettings, LoadClient
    from slos_serve.bench.demo_plan import DemoSettings, plan_demo
    from slos_serve.bench.scoring import score_responses
    from slos_serve.files.profile_file import load_profile

    model = load_profile(_profile(settings.model)).model
    ratios = []
    async with AsyncExitStack() as stack:
        clients = {
            side: await stack.enter_async_context(LoadClient(ClientSettings(url, slo_in=slo_in, timeout_s=300.0)))
            for (side, url), slo_in in zip(urls.items(), ("headers", "body"), strict=True)
        }
        for number in range(settings.rounds):
            plan = plan_demo(model, DemoSettings(seed=settings.seed + number, burst_s=settings.burst_s))
            order = (WITH, WITHOUT) if number % 2 == 0 else (WITHOUT, WITH)
            done: dict[str, Done] = {}
            for side in order:
                if number == 0:
                    await clients[side].run(plan.warm_up)
                before = steps_of(urls[side])
                load = await clients[side].run(plan.burst)
                failed = [response for response in load.responses if response.status != 200]
                if failed:
                    raise SystemExit(f"{side}: {len(failed)} requests failed, the first with {failed[0].error!r}")
                if side == WITH and any(response.verdict is None for response in load.responses):
                    raise SystemExit("with: an answer had no verdict")
                tokens = sum(response.output_tokens for response in load.responses)
                scored = score_responses(load.responses, plan.classes, model)
                kept = sum(score.has_slo and score.attained for score in scored)
                steps = steps_of(urls[side]) - before
                done[side] = Done(tokens / load.wall_s, kept, steps, load.wall_s)
            ratios.append(done[WITH].tokens_per_s / done[WITHOUT].tokens_per_s)
            print(f"round {number + 1}, {len(plan.burst)} requests: ratio {ratios[-1]:.3f}", flush=True)
            for side in (WITH, WITHOUT):
                print(f"  {side}: {done[side]}", flush=True)
    return ratios


def _profile(model: str) -> Path:
    """The kept profile of the demo's engine on this machine."""
    from slos_serve.files.profile_file import find_profile
    from slos_serve.launch.cpu_engine import cpu_engine_args
    from slos_serve.launch.cpu_model import resolve_model
    from slos_serve.profiling.run import engine_identity

    found = find_profile(engine_identity(str(resolve_model(model)), cpu_engine_args()))
    if found is None:
        raise SystemExit("no profile of this model on this machine yet: run `slos-serve demo` or `slos-serve profile`")
    return found[0]


def run(settings: Settings, folder: Path) -> list[float]:
    """Start both servers, let them work by turns, stop them; the ratios."""
    from slos_serve.bench.demo import all_ready
    from slos_serve.bench.demo_plan import DemoSettings, classes_yaml, plan_demo
    from slos_serve.files.profile_file import load_profile
    from slos_serve.launch.cpu_engine import CPU_ENVIRONMENT, cpu_engine_args, set_cpu_environment
    from slos_serve.launch.cpu_model import resolve_model
    from slos_serve.launch.endpoint import Endpoint, free_port
    from slos_serve.launch.server import ServerProcess, server_command
    from slos_serve.vllm_plugin.config import PluginConfig

    set_cpu_environment()
    profile_path, classes_path = _profile(settings.model), folder / "classes.yaml"
    plan = plan_demo(load_profile(profile_path).model, DemoSettings())
    classes_path.write_text(classes_yaml(plan.classes), encoding="utf-8")
    plugin = PluginConfig(classes_path=classes_path, profile_path=profile_path)
    quiet = PluginConfig(classes_path=classes_path, profile_path=profile_path, front_end=False, live_page=False)
    model, args = str(resolve_model(settings.model)), cpu_engine_args()
    environment = {**CPU_ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    endpoint = Endpoint(host="127.0.0.1", port=free_port())
    words = server_command(model, args, endpoint=endpoint)
    command = [*words, "--scheduler-cls", QUIET_CLS]
    servers = {
        WITH: ServerProcess(model, args, plugin=plugin, environment=environment, output=folder / "with.log"),
        WITHOUT: ServerProcess(
            model,
            args,
            plugin=quiet,
            environment=environment,
            endpoint=endpoint,
            output=folder / "without.log",
            command=command,
        ),
    }
    with all_ready(servers):
        urls = {side: server.base_url for side, server in servers.items()}
        wait_for_verdicts(urls[WITH])
        with looked_at(urls):
            return asyncio.run(alternate(urls, settings))


def wait_for_verdicts(url: str, most_s: int = 180) -> None:
    """Return when the front end judges requests: its kernels are loaded then."""
    with httpx.Client(base_url=url, timeout=60.0) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        body = {"model": model, "prompt": "x", "max_tokens": 1}
        for _ in range(most_s):
            answer = client.post("/v1/completions", json=body, headers={"x-slo-class": "chat"})
            if "x-slo-verdict" in answer.headers:
                return
            threading.Event().wait(1.0)
    raise SystemExit(f"answers of {url} have no verdict after {most_s} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the ratio; 1 when it is under its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.telling", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="bursts that each side gets")
    parser.add_argument("--burst-seconds", type=float, default=16.0, help="how long the requests of one arrive")
    parser.add_argument("--seed", type=int, default=100, help="of the first burst")
    parser.add_argument("--model", default="smollm2", help="what vLLM loads")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end with it
    settings = Settings(given.rounds, given.burst_seconds, given.seed, given.model)
    with tempfile.TemporaryDirectory(prefix="slos-serve-telling-") as folder:
        ratios = run(settings, Path(folder))
    mean, low, high = interval(ratios)
    print(f"tokens/s with verdicts, metrics and page / without: {mean:.3f} (95 %: {low:.3f} to {high:.3f})")
    return 1 if mean < LEAST_RATIO else 0


if __name__ == "__main__":
    sys.exit(main())
