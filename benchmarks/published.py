"""The workloads that others publish, with every rival in one table: what is kept, by whom, and at what goodput.

    python -m benchmarks.published [--workload compound] [--engine opt-13b-a100] [--policy qoserve] [--seeds 22 23]

- ``answers``, ``compound``: JITServe's promises (NSDI 26), without and with tasks: a chat of 2 s and 100 ms, a complete
  answer within 8 s times 1 to 4, tasks of 2 to 6 calls within 8 s a call.
- ``tiers``: QoServe's (ASPLOS 26): 6 s and 50 ms a token, 600 s, 1,800 s.
- ``users``: AA-AgentPerf's: agents whose every answer begins within 15 s and brings 30 or 100 tokens a second.
- ``agents``: longer tasks, within 60 and 150 s.

Prompts and answers are this project's (docs/workloads.md), as served. Requests arrive at an easy, a full and a hopeless
load, chosen on tuning seeds by how much stock vLLM and QoServe keep. Every policy is told when each call of a task is
due, by the same book of tasks. Rivals run with their tuned parameters (``policies/registry.py``); those with true
lengths know what no engine can. A request is a chat, an answer, a user or a task; it is kept when all of its promises
are. Goodput counts the tokens of requests that were kept, work all tokens over stock vLLM's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._sim_commands import RESULTS
from slos_serve.metrics.bulk import requests_attained
from slos_serve.policies.registry import POLICIES
from slos_serve.sim.conditions import AS_SERVED
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.outcome import score, summarize_run
from slos_serve.sim.profiles import find_profile, kv_bytes_per_token, limits_of
from slos_serve.sim.question import measured_part
from slos_serve.sim.recording import Recording
from slos_serve.sim.seeds import check_test
from slos_serve.sim.sweep import worker_pool
from slos_serve.workload.scenarios import make_workload

LOADS = {
    "answers": {"opt-13b-a100": (1.5, 2.25, 3.5), "llama-2-7b-h100": (9.0, 14.0, 20.0)},
    "compound": {"opt-13b-a100": (0.8, 1.2, 1.8), "llama-2-7b-h100": (4.0, 6.0, 9.0)},
    "tiers": {"opt-13b-a100": (1.5, 3.0, 4.5), "llama-2-7b-h100": (10.0, 20.0, 30.0)},
    "users": {"llama-2-7b-h100": (0.05, 0.15, 0.5), "llama-3.1-8b-h100": (0.3, 1.0, 2.0)},
    "agents": {"opt-13b-a100": (0.5, 0.8, 1.2), "llama-2-7b-h100": (2.0, 3.0, 4.0)},
}
SPAN_S = 300.0  # how long requests arrive
OURS, STOCK = "slos-serve", "vllm"
# What ours is compared with the best rival by: what tables call it, and the field of :class:`Found`.
COMPARED = {"kept": "kept", "every token": "strict", "goodput": "goodput_tokens_per_s"}
WITH_DECODE = [name for name, entry in POLICIES.items() if entry.make_decode is not None]


@dataclass(frozen=True)
class Case:
    """A policy on one engine under one load; ``oracle``: it is told the true lengths of answers."""

    workload: str
    engine: str
    rate_rps: float
    policy: str
    oracle: bool
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the policy, for people."""
        return f"{self.policy}, true lengths" if self.oracle else self.policy


@dataclass(frozen=True)
class Found:
    """Means over the seeds.

    Attributes:
        kept, strict: shares of the requests, by the mean of each stage and with every token in time.
        by_kind: share kept of each kind of class.
        goodput_tokens_per_s, tokens_per_s: of requests that were kept, and of all.
        recomputed: share of the computed tokens that were computed again.
    """

    kept: float
    strict: float
    by_kind: dict[str, float]
    goodput_tokens_per_s: float
    tokens_per_s: float
    recomputed: float


def run(case: Case) -> Found:
    """Simulate a case on each of its seeds."""
    profile, found = find_profile(case.engine), []
    for seed in case.seeds:
        load = make_workload(case.workload, case.rate_rps, round(case.rate_rps * SPAN_S), seed)
        settings = SimSettings(
            policy=case.policy,
            oracle_lengths=case.oracle or POLICIES[case.policy].true_lengths,
            kv_bytes_per_token=kv_bytes_per_token(profile),
            seed=seed,
        )
        recording = simulate(load, profile.model, limits_of(profile), AS_SERVED.on(settings))
        outcome = summarize_run(recording, measured_part(load.num_requests))
        found.append(
            Found(
                outcome.attainment,
                outcome.strict,
                kept_by_kind(recording),
                outcome.goodput_tokens_per_s,
                outcome.output_tokens_per_s,
                outcome.recomputed,
            )
        )
    kinds = {kind: float(np.mean([one.by_kind[kind] for one in found])) for kind in found[0].by_kind}
    columns = ("kept", "strict", "goodput_tokens_per_s", "tokens_per_s", "recomputed")
    return Found(by_kind=kinds, **{name: float(np.mean([getattr(one, name) for one in found])) for name in columns})


def kept_by_kind(recording: Recording) -> dict[str, float]:
    """Share of the measured requests kept, by the name of their first call's class less its number at the end."""
    load, calls = recording.workload, recording.workload.calls
    kept = requests_attained(score(recording).attained, np.ascontiguousarray(calls["session"]), load.num_requests)
    kinds = [re.sub(r"-\d+$", "", one.name) if "user" not in one.name else one.name for one in load.classes]
    first = calls[np.isfinite(calls["arrival_s"])]
    of_request = np.empty(load.num_requests, dtype=np.int64)
    of_request[first["session"]] = first["class_index"]
    measured, shares = measured_part(load.num_requests), {}
    for kind in dict.fromkeys(kinds):
        own = measured & np.isin(of_request, [index for index, one in enumerate(kinds) if one == kind])
        shares[kind] = float(kept[own].mean()) if own.any() else float("nan")
    return shares


def cases_of(given: argparse.Namespace) -> Iterator[Case]:
    """Every policy under every load, those that know true lengths last."""
    policies = sorted(given.policy, key=lambda name: (POLICIES[name].true_lengths, name == OURS))
    for workload in given.workload:
        for engine in given.engine or LOADS[workload]:
            for rate_rps in LOADS[workload].get(engine, ()):
                told = [(name, False) for name in policies] + [(OURS, True)] * (OURS in policies)
                for policy, oracle in told:
                    yield Case(workload, engine, rate_rps, policy, oracle, tuple(given.seeds))


def tables(rows: Sequence[tuple[Case, Found]]) -> str:
    """Markdown, a table a workload, and how ours compares with the best rival that knows no more than it."""
    lines: list[str] = []
    for workload in dict.fromkeys(case.workload for case, _ in rows):
        own = [(case, found) for case, found in rows if case.workload == workload]
        kinds = list(own[0][1].by_kind)
        head = ["engine", "requests/s", "policy", "kept", "every token", *kinds, "goodput, tokens/s", "work", "again"]
        lines += [f"\n`{workload}`:\n", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for case, found in own:
            stock = [other.tokens_per_s for one, other in own if _place(one) == _place(case) and one.policy == STOCK]
            shares = [found.kept, found.strict, *(found.by_kind[kind] for kind in kinds)]
            cells = [case.engine, f"{case.rate_rps:g}", case.name, *(f"{100.0 * share:.1f} %" for share in shares)]
            cells += [f"{found.goodput_tokens_per_s:.0f}", f"{found.tokens_per_s / stock[0]:.2f}" if stock else "-"]
            lines.append("| " + " | ".join([*cells, f"{100.0 * found.recomputed:.1f} %"]) + " |")
        lines += ["", *compared(own)]
    return "\n".join(lines)


def _place(case: Case) -> tuple[str, float]:
    return case.engine, case.rate_rps


def over_best(rows: Sequence[tuple[Case, Found]], column: str) -> tuple[float, str]:
    """Ours over the best of the rivals that know no true lengths either, and that rival's name."""
    blind = [(getattr(found, column), case.policy) for case, found in rows if case.policy != OURS]
    best, rival = max(one for one in blind if not POLICIES[one[1]].true_lengths)
    (ours,) = (getattr(found, column) for case, found in rows if case.policy == OURS and not case.oracle)
    return ours / max(best, 1e-9), rival


def compared(rows: Sequence[tuple[Case, Found]]) -> list[str]:
    """One line a load: ours over the best rival by requests kept, by every token in time and by goodput."""
    lines = []
    for place in dict.fromkeys(_place(case) for case, _ in rows):
        here = [(case, found) for case, found in rows if _place(case) == place]
        told = [found for case, found in here if case.policy == OURS and case.oracle]
        own = [found for case, found in here if case.policy == OURS and not case.oracle]
        if not own or len(here) < 2 + len(told):
            continue
        parts = []
        for label, column in COMPARED.items():
            over, rival = over_best(here, column)
            parts.append(f"{label} {over:.2f} times {rival}'s")
        if told:
            parts.append(f"{own[0].kept / max(told[0].kept, 1e-9):.2f} of what true lengths would keep")
        lines.append(f"- {place[0]}, {place[1]:g} requests/s: {', '.join(parts)}")
    return lines


def rows_of(kept: Sequence[dict[str, Any]]) -> list[tuple[Case, Found]]:
    """What :func:`keep` wrote."""

    def part(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        return {name: row[name] for name in names}

    of_case, of_found = ([one.name for one in fields(kind)] for kind in (Case, Found))
    return [(Case(**part(row, of_case)), Found(**part(row, of_found))) for row in kept]


def keep(folder: Path, rows: Sequence[tuple[Case, Found]]) -> None:
    """Write what is found so far."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [{**asdict(case), **asdict(one)} for case, one in rows]
    (folder / "published.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every case, keep what is found in ``published.json``, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=list(LOADS), help="default: all")
    engines = sorted({engine for loads in LOADS.values() for engine in loads})
    parser.add_argument("--engine", action="append", choices=engines, help="profile; default: two for each workload")
    parser.add_argument("--policy", action="append", choices=list(POLICIES), help="default: all that serve on one GPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[22, 23])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    given.seeds = check_test(given.seeds)
    given.workload = given.workload or list(LOADS)
    given.policy = given.policy or [name for name in POLICIES if name not in WITH_DECODE]
    cases = list(cases_of(given))
    rows: list[tuple[Case, Found]] = []
    with worker_pool(given.processes) as pool:
        for case, found in zip(cases, pool.map(run, cases), strict=True):
            rows.append((case, found))
            keep(given.output, rows)
            print(f"{len(rows)} of {len(cases)}: {case.workload} {case.engine} {case.rate_rps:g}/s {case.name}: "
                  f"{100.0 * found.kept:.1f} %", file=sys.stderr, flush=True)  # fmt: skip
    print(tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
