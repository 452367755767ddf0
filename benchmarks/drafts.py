"""The demo's burst with prompts that answers repeat: SLOs-Serve without drafts beside n-gram drafts, real engine.

python -m benchmarks.drafts [--seeds 2] [--num-drafts 4] [--burst-load 1.7] [--output benchmarks/results]

Both servers are up and one works while the other idles; which goes first alternates with the seeds. Exits 1 when drafts
keep fewer promises. Needs the profile that ``make demo`` measures, and the machine for itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks._sim_commands import RESULTS
from slos_serve.bench.client import ClientSettings, LoadClient
from slos_serve.bench.demo import all_ready
from slos_serve.bench.demo_events import read_events
from slos_serve.bench.demo_plan import DemoPlan, DemoSettings, classes_yaml, plan_demo
from slos_serve.bench.demo_report import phase_json, side_run
from slos_serve.bench.requests import BenchRequest, LoadResult
from slos_serve.files.profile_file import Profile, find_profile
from slos_serve.launch.cpu_engine import CPU_ENVIRONMENT, cpu_engine_args, set_cpu_environment
from slos_serve.launch.cpu_model import resolve_model
from slos_serve.launch.server import ServerProcess
from slos_serve.profiling.run import engine_identity
from slos_serve.vllm_plugin.config import PluginConfig

PLAIN, DRAFTING = "without drafts", "n-gram drafts"
# What vLLM counts of speculation.
COUNTED = ("draft_tokens", "accepted_tokens")
ROW = "{:16}{:>6}{:>10}{:>10}{:>19}{:>16}{:>11}"


def main() -> int:
    """A row a burst and side; 1 when drafts lose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num-drafts", type=int, default=4)
    parser.add_argument("--burst-load", type=float, default=1.7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    set_cpu_environment()
    model = str(resolve_model("smollm2"))
    kept = find_profile(engine_identity(model, cpu_engine_args()))
    if kept is None:
        print("there is no profile of the demo's model on this machine yet: run make demo first", file=sys.stderr)
        return 2
    path, profile = kept
    settings = [DemoSettings(seed=s, burst_load=given.burst_load, editing=True) for s in range(given.seeds)]
    plans = [plan_demo(profile.model, one) for one in settings]
    with tempfile.TemporaryDirectory(prefix="slos-serve-drafts-") as folder:
        rows = _run(model, path, profile, plans, given.num_drafts, Path(folder))
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "drafts.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(ROW.format("", "seed", "attained", "admitted", "admitted, attained", "tokens drafted", "accepted"))
    for row in rows:
        attained = f"{row['attained']}/{row['requests']}"
        accepted = f"{row['accepted_tokens'] / row['draft_tokens']:.0%}" if row["draft_tokens"] else "-"
        figures = (attained, row["admitted"], row["admitted_attained"], row["draft_tokens"], accepted)
        print(ROW.format(row["side"], row["seed"], *figures))
    attained = {side: sum(row["attained"] for row in rows if row["side"] == side) for side in (PLAIN, DRAFTING)}
    print(f"attained: {attained[DRAFTING]} with drafts, {attained[PLAIN]} without")
    return 0 if attained[DRAFTING] >= attained[PLAIN] else 1


def _run(
    model: str, path: Path, profile: Profile, plans: Sequence[DemoPlan], num_drafts: int, folder: Path
) -> list[dict[str, Any]]:
    classes = folder / "classes.yaml"
    classes.write_text(classes_yaml(plans[0].classes), encoding="utf-8")
    drafter = {"method": "ngram", "num_speculative_tokens": num_drafts, "prompt_lookup_max": 3}
    more: Mapping[str, list[str]] = {PLAIN: [], DRAFTING: ["--speculative-config", json.dumps(drafter)]}
    rows = []
    servers = {
        side: ServerProcess(
            model,
            [*cpu_engine_args(), *arguments],
            plugin=PluginConfig(classes_path=classes, profile_path=path, events_path=folder / f"{side}.jsonl"),
            environment=CPU_ENVIRONMENT,
            output=folder / f"{side}.log",
        )
        for side, arguments in more.items()
    }
    with all_ready(servers):
        for number, plan in enumerate(plans):
            for side in (PLAIN, DRAFTING) if number % 2 == 0 else (DRAFTING, PLAIN):
                rows.append(_burst(servers[side], plan, profile, folder / f"{side}.jsonl"))
                rows[-1] |= {"side": side, "seed": plan.settings.seed, "num_drafts": num_drafts}
                print(f"{side}, seed {plan.settings.seed}: {rows[-1]['attained']} attained", file=sys.stderr)
    return rows


def _burst(server: ServerProcess, plan: DemoPlan, profile: Profile, events_path: Path) -> dict[str, Any]:
    """Warm up, send the burst, score it; counts of drafts are of the burst alone."""
    asyncio.run(_send(server.base_url, plan.warm_up))
    size, before = events_path.stat().st_size, _counted(server.base_url)
    load = asyncio.run(_send(server.base_url, plan.burst))
    after = _counted(server.base_url)
    events = read_events(events_path, [("earlier", size), ("burst", events_path.stat().st_size)])
    found = phase_json(side_run({"burst": load}, plan, profile.model, events), "burst")
    wanted = ("requests", "attained", "admitted", "admitted_attained", "errors", "ttft_ms", "tpot_ms")
    return {name: found[name] for name in wanted} | {name: after[name] - before[name] for name in COUNTED}


async def _send(url: str, requests: Sequence[BenchRequest]) -> LoadResult:
    async with LoadClient(ClientSettings(url, slo_in="headers", timeout_s=300.0)) as client:
        return await client.run(requests, lambda _response: None)


def _counted(url: str) -> dict[str, int]:
    """vLLM's counts of speculation, 0 where it does not speculate."""
    found = dict.fromkeys(COUNTED, 0)
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30.0).text):
        for sample in family.samples:
            for name in COUNTED:
                found[name] += int(sample.value) if sample.name == f"vllm:spec_decode_num_{name}_total" else 0
    return found


if __name__ == "__main__":
    sys.exit(main())
