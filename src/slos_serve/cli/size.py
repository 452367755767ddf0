"""``slos-serve size``: how many servers a mix of classes needs through a day, and what that costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from slos_serve.cli.printed import failure, output_file, progress_bar
from slos_serve.cli.sim_options import Exact, JsonFile, ProfileName, conditions_of, console, policy_of, write_json
from slos_serve.core.errors import InvalidFieldError, SlosServeError
from slos_serve.core.slo import check_number

if TYPE_CHECKING:
    from slos_serve.sim.fleet_size import Asked, Sized
    from slos_serve.sim.power import Power
    from slos_serve.sim.sizing import Trial
    from slos_serve.sim.traffic import Traffic

DEFAULT_VIOLATIONS = (0.01, 0.05)


def size(
    trace: Annotated[Path | None, typer.Option(help="Trace file: Azure or BurstGPT CSV, Mooncake JSONL.")] = None,
    mix: Annotated[Path | None, typer.Option(help="Mix file: shares and lengths of classes.")] = None,
    classes: Annotated[Path | None, typer.Option(help="Class file: what the classes are promised.")] = None,
    peak: Annotated[float | None, typer.Option(help="Requests a second at the busiest time.")] = None,
    violations: Annotated[
        list[float] | None, typer.Option(help="Allowed share of each class's requests; may be repeated.")
    ] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Policy; may be repeated.")] = None,
    profile: ProfileName = "opt-13b-a100",
    requests: Annotated[int, typer.Option(min=1, help="Read at most this many requests of a trace.")] = 200_000,
    seconds: Annotated[float, typer.Option(help="Traffic in one simulation.")] = 120.0,
    most: Annotated[int, typer.Option(min=1, help="Give up above this many servers.")] = 256,
    watts: Annotated[float | None, typer.Option(help="Of one device while it computes.")] = None,
    idle_watts: Annotated[float | None, typer.Option(help="Of one device while it does not.")] = None,
    exact: Exact = False,
    plot: Annotated[Path | None, typer.Option(help="Draw a chart here (PNG or SVG).", callback=output_file)] = None,
    json_file: JsonFile = None,
) -> None:
    """Find the fewest servers for a mix of classes, and what they take over a day."""
    from slos_serve.sim.fleet_size import Asked, size_fleet
    from slos_serve.sim.power import power_of
    from slos_serve.sim.profiles import find_profile

    try:
        chosen = [policy_of(text) for text in policy or ["slos-serve", "vllm"]]
        measured = find_profile(profile)
        for name, value in (("seconds", seconds), *((("peak", peak),) if peak is not None else ())):
            check_number(name, value, low=0.0, high=1e6)
        allowed = violations or list(DEFAULT_VIOLATIONS)
        for value in allowed:
            check_number("violations", value, low=0.0, high=1.0, low_included=True)
        power = power_of(measured, watts, idle_watts)
        traffic = _traffic(trace, mix, classes, requests, peak)
        asked = Asked(traffic, measured, conditions_of(exact), tuple(allowed), most, seconds)
        with progress_bar(counted=False) as bar:
            task = bar.add_task("servers", total=None)

            def tried(way: str, rate: float, trial: Trial) -> None:
                found = f"{trial.servers:.1f} servers, worst class {100 * trial.worst:.1f} %"
                bar.update(task, description=f"{way}, {rate:.1f}/s: {found}")

            sized = size_fleet(asked, chosen, tried)
    except SlosServeError as fault:
        raise failure(fault) from fault
    result = _result(asked, sized, profile, power)
    _print(result)
    write_json(json_file, result)
    if plot is not None:
        from slos_serve.bench.size_plot import plot_size

        plot_size(result, plot)
        console.print(f"wrote {plot}")


def _traffic(trace: Path | None, mix: Path | None, classes: Path | None, limit: int, peak: float | None) -> Traffic:
    from slos_serve.files.class_file import load_classes
    from slos_serve.files.mix_file import load_mix
    from slos_serve.sim.traffic import MixTraffic, TraceTraffic

    if (trace is None) == (mix is None):
        raise InvalidFieldError("--trace, --mix", "both" if trace else "neither", "one of the two")
    known = load_classes(classes) if classes else None
    if trace is not None:
        return TraceTraffic(trace, known, limit, peak)
    assert mix is not None
    return MixTraffic(load_mix(mix), known, mix.name, peak)


def _result(asked: Asked, sized: Sized, profile: str, power: Power | None) -> dict[str, Any]:
    """For JSON."""
    from slos_serve.sim.fleet_size import day_use, servers_through

    course, rates = asked.traffic.course, sized.rates
    rows = []
    for each in sized.sizes:
        follows = day_use(each, rates, course, power, all_day=False)
        stays = day_use(each, rates, course, power, all_day=True) if each.all_day is not None else None
        rows.append(
            {
                "by": each.by,
                "policy": each.policy,
                "allowed": each.allowed,
                "servers_at_peak": each.peak.servers,
                "servers_at_rates": [trial.servers for trial in each.at_rates],
                "violations": each.peak.violations,
                "worst_class_violations": each.peak.worst,
                "worst_class_violations_at_rates": [trial.worst for trial in each.at_rates],
                "server_hours": follows.server_hours,
                "server_hours_all_day": None if stays is None else stays.server_hours,
                "kwh": _known(follows.kwh),
                "kwh_all_day": None if stays is None else _known(stays.kwh),
                "servers_through_day": servers_through(each, rates, course).tolist(),
            }
        )
    return {
        "traffic": asked.traffic.name,
        "profile": profile,
        "device": asked.profile.device,
        "devices_per_server": asked.profile.tensor_parallel,
        "peak_rps": float(rates[-1]),
        "rates_rps": rates.tolist(),
        "day": {"hours": course.hours, "rate_rps": (course.relative * rates[-1]).tolist()},
        "mean_load_rps_per_server": sized.mean_rps,
        "offline_rps_per_server": sized.offline_rps,
        "watts": None if power is None else {"busy": power.busy, "idle": power.idle},
        "sizes": rows,
        "not_enough": [{"policy": policy, "allowed": allowed, "tried": asked.most} for policy, allowed in sized.failed],
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _print(result: dict[str, Any]) -> None:
    hours = result["day"]["hours"]
    table = Table(title=f"servers of {result['profile']} for {result['traffic']}, {result['peak_rps']:g} requests/s")
    hours_and_energy = ("server-h, all day", "following", "kWh, all day", "kWh, following")
    ways = ("sized by", "servers", "violations", "worst class", *hours_and_energy)
    for column in ways:
        table.add_column(column, justify="left" if column == "sized by" else "right")
    for row in result["sizes"]:
        table.add_row(
            row["by"],
            f"{row['servers_at_peak']:.3g}",
            f"{100 * row['violations']:.1f} %",
            f"{100 * row['worst_class_violations']:.1f} %",
            _number(row["server_hours_all_day"]),
            _number(row["server_hours"]),
            _number(row["kwh_all_day"]),
            _number(row["kwh"]),
        )
    for row in result["not_enough"]:
        table.add_row(f"{row['policy']}, {100 * row['allowed']:g} %", f"more than {row['tried']}", *[""] * 6)
    console.print(table)
    console.print(
        f"Servers and violations at the busiest time, of all requests and of the class that has most; server-hours and"
        f" energy over {hours:g} h. One server carries {result['mean_load_rps_per_server']:.2f} requests/s by the mean,"
        f" {result['offline_rps_per_server']:.2f} in vLLM's throughput run."
    )
    if result["watts"] is None:
        console.print(f"The power of {result['device']} is not known: give --watts for energy.")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
