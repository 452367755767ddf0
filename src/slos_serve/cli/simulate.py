"""``slos-serve simulate``: one workload through one policy, in virtual time."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from slos_serve.cli.printed import failure, progress_bar
from slos_serve.cli.sim_options import (
    Acceptance,
    Arrivals,
    Drafter,
    Exact,
    JsonFile,
    Oracle,
    ProfileName,
    Router,
    Seed,
    conditions_of,
    console,
    policy_of,
    write_json,
)
from slos_serve.core.errors import InvalidFieldError, SlosServeError

if TYPE_CHECKING:
    from slos_serve.sim.outcome import Outcome
    from slos_serve.workload.calls import Workload


def simulate(
    scenario: Annotated[str | None, typer.Option(help="chat, coding, summarization, tool, reasoning or mixed.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Trace file instead: Azure or BurstGPT CSV, Mooncake JSONL.")
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Class file that the trace's slo_class refers to.")] = None,
    policy: Annotated[str, typer.Option(help="Policy, with parameters as in vllm:token_budget=8192.")] = "slos-serve",
    profile: ProfileName = "opt-13b-a100",
    rate: Annotated[float | None, typer.Option(help="Requests a second, all replicas together.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 2000,
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 1,
    prefill_replicas: Annotated[
        int, typer.Option(min=0, help="Of them for prefill, the others for decode; 0: together (distserve: 1).")
    ] = 0,
    moving_roles: Annotated[
        bool, typer.Option("--moving-roles", help="Replicas change between prefill and decode, under --router slo.")
    ] = False,
    link: Annotated[float, typer.Option(min=0.001, help="GB/s of each replica's link for KV, in and out.")] = 50.0,
    router: Router = "least-loaded",
    routers: Annotated[int, typer.Option(min=1, help="Routers that share the replicas, under --router slo.")] = 1,
    arrivals: Arrivals = "scenario",
    seed: Seed = 0,
    oracle_lengths: Oracle = False,
    acceptance: Acceptance = 0.7,
    drafter: Drafter = "none",
    exact: Exact = False,
    noise: Annotated[
        float | None, typer.Option(help="Coefficient of variation of step times; default 0.1, with --exact 0.")
    ] = None,
    bias: Annotated[float, typer.Option(help="Steps take this multiple of what the profile says.")] = 1.0,
    stragglers: Annotated[float, typer.Option(help="Share of steps that take four times as long.")] = 0.0,
    kill: Annotated[
        list[str] | None, typer.Option(help="SECONDS:REPLICA, a replica that dies; may be repeated.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Simulate and print what attained, how late tokens were, and how fast the simulator ran."""
    from slos_serve.policies.registry import policy_entry
    from slos_serve.sim.drafters import with_drafter
    from slos_serve.sim.engine import SimSettings
    from slos_serve.sim.engine import simulate as run
    from slos_serve.sim.model_error import ModelError
    from slos_serve.sim.outcome import summarize_run
    from slos_serve.sim.profiles import find_profile, kv_bytes_per_token, limits_of
    from slos_serve.sim.timeline import timeline

    try:
        name, parameters = policy_of(policy)
        if parameters == {}:
            parameters = dict(policy_entry(name).variants[0])
        measured = with_drafter(find_profile(profile), drafter)
        workload = _workload(scenario, trace, classes, rate, requests, seed, arrivals, acceptance)
        conditions = replace(conditions_of(exact), bias=bias)
        if noise is not None:
            conditions = replace(conditions, noise=noise)
        settings = SimSettings(
            policy=name,
            parameters=parameters,
            replicas=replicas,
            prefill_replicas=prefill_replicas,
            moving_roles=moving_roles,
            transfer_bytes_per_s=1e9 * link,
            router=router,
            routers=routers,
            oracle_lengths=oracle_lengths,
            error=ModelError(straggler_probability=stragglers),
            deaths=[_death(text) for text in kill or []],
            kv_bytes_per_token=kv_bytes_per_token(measured),
            seed=seed,
            drafter=drafter,
        )
        began = time.perf_counter()
        last_s = float(workload.request_arrivals_s.max())
        with progress_bar() as bar:
            task = bar.add_task("virtual seconds of arrivals", total=max(round(last_s), 1))
            limits = limits_of(measured)

            def advance(now_s: float) -> None:
                bar.update(task, completed=min(round(now_s), round(last_s)))

            recording = run(workload, measured.model, limits, conditions.on(settings), progress=advance)
        wall_s = time.perf_counter() - began
    except SlosServeError as fault:
        raise failure(fault) from fault
    outcome = summarize_run(recording)
    speed = {
        "wall_s": wall_s,
        "requests_per_s": workload.num_requests / wall_s,
        "steps_per_s": outcome.steps / wall_s,
        "drafted": recording.num_drafted,
        "accepted": recording.num_accepted,
    }
    _print(outcome, f"{workload.name}, {policy}, {replicas} x {profile}", speed)
    digest = recording.digest()
    record = {"workload": workload.name, "policy": policy, "profile": profile, "replicas": replicas, "seed": seed}
    if json_file is not None:
        more = {"speed": speed, "digest": digest, "timeline": timeline(recording)}
        write_json(json_file, {**record, **outcome.as_dict(), **more})


def _workload(
    scenario: str | None,
    trace: Path | None,
    classes: Path | None,
    rate: float | None,
    requests: int,
    seed: int,
    arrivals: str,
    acceptance: float,
) -> Workload:
    from slos_serve.core.slo import check_number
    from slos_serve.files.class_file import load_classes
    from slos_serve.workload.arrivals import LEAST_RATE_RPS
    from slos_serve.workload.scenarios import MOST_RATE_SCALE, make_workload, trace_workload

    if (scenario is None) == (trace is None):
        raise InvalidFieldError("--scenario", scenario, "--scenario NAME or --trace FILE, one of them")
    if trace is not None:
        found = trace_workload(trace, load_classes(classes) if classes else None, limit=requests)
        if rate is None:
            return found
        span_s = float(found.request_arrivals_s.max())
        if span_s <= 0.0:
            raise InvalidFieldError("--rate", rate, f"none, because all requests of {trace} come at one time")
        recorded = found.num_requests / span_s
        check_number("--rate", rate, low=LEAST_RATE_RPS, high=MOST_RATE_SCALE * recorded, low_included=True)
        return trace_workload(trace, load_classes(classes) if classes else None, rate / recorded, requests)
    if rate is None:
        raise InvalidFieldError("--rate", rate, "requests a second, a number above 0")
    assert scenario is not None
    return make_workload(scenario, rate, requests, seed, arrivals, acceptance)


def _death(text: str) -> tuple[float, int]:
    seconds, _, replica = text.partition(":")
    try:
        return float(seconds), int(replica)
    except ValueError as fault:
        raise InvalidFieldError("--kill", text, "SECONDS:REPLICA, such as 30:1") from fault


def _print(outcome: Outcome, title: str, speed: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False)
    table.add_row("requests attained", f"{outcome.attained} of {outcome.requests} ({100 * outcome.attainment:.1f} %)")
    table.add_row("95 % interval", f"{100 * outcome.low:.1f} to {100 * outcome.high:.1f} %")
    table.add_row("every token in time", f"{100 * outcome.strict:.1f} %")
    if outcome.admitted:
        table.add_row("of the admitted", f"{outcome.admitted_attained} of {outcome.admitted}")
    if outcome.second_best:
        table.add_row("of the second best", f"{outcome.second_best_attained} of {outcome.second_best}")
    for name, share in outcome.by_class.items():
        strict = 100 * outcome.strict_by_class[name]
        table.add_row(f"class {name}", f"{100 * share:.1f} % of calls, every token in time {strict:.1f} %")
    quartiles = (outcome.by_prompt_quartile, outcome.strict_by_prompt_quartile)
    for title, values in zip(("by prompt quartile, short to long", "every token in time"), quartiles, strict=True):
        table.add_row(title, " ".join(f"{100 * share:.1f}" for share in values) + " %")
    for name, quantiles in (("TTFT", outcome.ttft_ms), ("TPOT", outcome.tpot_ms)):
        if quantiles.p50 is not None:
            table.add_row(f"{name} p50 / p99", f"{quantiles.p50:.0f} / {quantiles.p99:.0f} ms")
    free = outcome.unpromised
    if free.calls and free.ttft_ms.p50 is not None and free.last_token_ms.p50 is not None:
        table.add_row("calls without a promise", f"{free.calls}")
        table.add_row("their first token p50 / p99", f"{free.ttft_ms.p50:.0f} / {free.ttft_ms.p99:.0f} ms")
        table.add_row("their last token p50 / p99", f"{free.last_token_ms.p50:.0f} / {free.last_token_ms.p99:.0f} ms")
    table.add_row("rejected, unfinished", f"{outcome.rejected}, {outcome.unfinished}")
    recomputed = f"{100 * outcome.recomputed:.1f} % of the tokens computed again"
    table.add_row("preemptions", f"{outcome.preemptions}, {recomputed}")
    if speed["drafted"]:
        share = 100.0 * speed["accepted"] / speed["drafted"]
        table.add_row("drafts right", f"{share:.1f} % of {speed['drafted']:,.0f}")
    table.add_row("virtual time", f"{outcome.duration_s:.0f} s, {outcome.output_tokens_per_s:.0f} output tokens/s")
    table.add_row("tokens of requests that attained", f"{outcome.goodput_tokens_per_s:.0f} output tokens/s")
    rates = f"{speed['requests_per_s']:.0f} requests/s, {speed['steps_per_s']:.0f} steps/s"
    table.add_row("simulated in", f"{speed['wall_s']:.1f} s: {rates}")
    console.print(table)
