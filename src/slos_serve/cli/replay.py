"""``slos-serve replay``: how far the simulator is off on a run that really happened."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from slos_serve.cli.printed import failure
from slos_serve.cli.sim_options import JsonFile, console, policy_of, write_json
from slos_serve.core.errors import InvalidFieldError, SlosServeError

if TYPE_CHECKING:
    from slos_serve.sim.recording import Recording


def replay(
    record: Annotated[Path, typer.Argument(help="Record of a run, from slos-serve bench --record FILE.")],
    profile: Annotated[str, typer.Option(help="Profile of the engine that served it.")],
    policy: Annotated[str, typer.Option(help="What scheduled it: vllm or slos-serve, with parameters.")] = "vllm",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="The engine's --max-num-seqs.")] = 256,
    plan_ahead: Annotated[bool, typer.Option(help="The engine schedules asynchronously (vLLM's default).")] = True,
    overhead_ms: Annotated[float, typer.Option(help="HTTP and tokenising, added to every first token.")] = 0.0,
    speed: Annotated[
        str,
        typer.Option(help="Multiple of the profile's step times; auto: from the first third of the requests."),
    ] = "1",
    stolen: Annotated[
        bool, typer.Option(help="Lose the time that, by the record, was stolen from the machine.")
    ] = True,
    json_file: JsonFile = None,
) -> None:
    """Simulate the recorded requests and print the error at p50, p90 and p99 and in attainment."""
    from slos_serve.sim.engine import SimSettings, simulate
    from slos_serve.sim.model_error import ModelError
    from slos_serve.sim.profiles import find_profile, limits_of
    from slos_serve.sim.replay import compare, fit_speed, fitted_on, read_interruptions, read_record, replay_workload

    try:
        name, parameters = policy_of(policy)
        measured = find_profile(profile)
        rows = read_record(record)
        limits = limits_of(measured, max_num_seqs)
        requests = replay_workload(rows)
        gaps = read_interruptions(record, rows) if stolen else None

        def simulate_at(factor: float) -> Recording:
            error = ModelError(bias=factor, interruptions=gaps)
            settings = SimSettings(policy=name, parameters=parameters or None, plan_ahead=plan_ahead, error=error)
            return simulate(requests, measured.model, limits, settings)

        factor = fit_speed(rows, simulate_at) if speed == "auto" else _factor(speed)
        found = compare(simulate_at(factor), rows, overhead_ms / 1000.0, skip=fitted_on(rows) if speed == "auto" else 0)
    except SlosServeError as fault:
        raise failure(fault) from fault
    table = Table(title=f"{found.requests} requests of {record.name}, {policy}, step times x {factor:.2f}")
    for column in ("", "measured", "simulated", "error"):
        table.add_column(column, justify="right" if column else "left")
    for label, errors in (("TTFT", found.ttft_ms), ("TPOT", found.tpot_ms)):
        for quantile, (real, virtual, error) in errors.items():
            table.add_row(f"{label} {quantile}", f"{real:.1f} ms", f"{virtual:.1f} ms", f"{100 * error:+.1f} %")
    real, virtual = found.attainment
    table.add_row("attained", f"{100 * real:.1f} %", f"{100 * virtual:.1f} %", f"{100 * (virtual - real):+.1f} points")
    console.print(table)
    if gaps is not None:
        console.print(f"{gaps.lost_s:.1f} s were stolen from the machine meanwhile (--no-stolen leaves that out)")
    write_json(json_file, {"record": record.name, "policy": policy, "speed": factor, **asdict(found)})


def _factor(text: str) -> float:
    try:
        return float(text)
    except ValueError as fault:
        raise InvalidFieldError("speed", text, "a number above 0, or auto") from fault
