"""``slos-serve size``: how many replicas a recorded trace needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from slos_serve.cli.printed import failure, progress_bar
from slos_serve.cli.sim_options import (
    Exact,
    JsonFile,
    ProfileName,
    Router,
    conditions_of,
    console,
    policy_of,
    write_json,
)
from slos_serve.core.errors import SlosServeError


def size(
    trace: Annotated[Path, typer.Option(help="Trace file: Azure or BurstGPT CSV, Mooncake JSONL.")],
    attain: Annotated[float, typer.Option(min=0.01, max=0.999, help="Share of requests that must attain.")] = 0.95,
    classes: Annotated[
        Path | None, typer.Option(help="Class file; without it every request is promised chat's SLO.")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Policy; may be repeated.")] = None,
    profile: ProfileName = "opt-13b-a100",
    router: Router = "least-loaded",
    requests: Annotated[int, typer.Option(min=1, help="Read at most this many requests.")] = 20_000,
    speed: Annotated[float, typer.Option(help="Replay the trace this many times faster.")] = 1.0,
    most: Annotated[int, typer.Option(min=1, help="Give up above this many replicas.")] = 256,
    exact: Exact = False,
    json_file: JsonFile = None,
) -> None:
    """Find the fewest replicas that serve a trace with the share of requests attaining."""
    from slos_serve.files.class_file import load_classes
    from slos_serve.sim.engine import SimSettings
    from slos_serve.sim.profiles import find_profile
    from slos_serve.sim.sizing import fewest_replicas
    from slos_serve.workload.scenarios import trace_workload

    try:
        chosen = [policy_of(text) for text in policy or ["slos-serve", "vllm"]]
        measured = find_profile(profile)
        workload = trace_workload(trace, load_classes(classes) if classes else None, speed, requests)
        rows = []
        with progress_bar() as bar:
            task = bar.add_task("replicas", total=None)
            for name, parameters in chosen:

                def tried(count: int, attainment: float, name: str = name) -> None:
                    bar.update(task, description=f"{name}: {100 * attainment:.1f} % on {count} replicas")

                fleet = conditions_of(exact).on(SimSettings(policy=name, parameters=parameters or None, router=router))
                found = fewest_replicas(workload, measured, fleet, attain, most, tried)
                rows.append({"policy": name, "parameters": parameters, **found})
    except SlosServeError as fault:
        raise failure(fault) from fault
    table = Table(title=f"replicas of {profile} for {workload.num_requests} requests of {trace.name}")
    for column in ("policy", "replicas", "attained", "one fewer"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        fewer = row["attainment_with_one_fewer"]
        table.add_row(
            str(row["policy"]),
            str(row["replicas"]) if row["replicas"] else f"more than {most}",
            f"{100 * row['attainment']:.1f} %",
            f"{100 * fewer:.1f} %" if fewer is not None else "",
        )
    console.print(table)
    write_json(json_file, {"trace": trace.name, "attain": attain, "profile": profile, "results": rows})
