"""Options that the simulation commands share, and how their values are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slos_serve.cli.printed import failure, output_file, stdout_console
from slos_serve.core.errors import InvalidFieldError, SlosServeError
from slos_serve.policies.registry import POLICIES, policy_entry
from slos_serve.workload.scenarios import SCENARIOS, scenario_named

if TYPE_CHECKING:
    from slos_serve.sim.conditions import Conditions

ProfileName = Annotated[str, typer.Option("--profile", help="Shipped profile (opt-13b-a100, ...) or a profile file.")]
Arrivals = Annotated[
    str, typer.Option(help="scenario (the scenario's own), poisson, azure-conv, azure-code, gamma:CV or burst:FACTOR.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of lengths and arrivals.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result here.", callback=output_file)]
Oracle = Annotated[
    bool, typer.Option("--oracle-lengths", help="Tell policies the true output lengths, to see what that would add.")
]
Router = Annotated[
    str,
    typer.Option(
        help="round-robin, least-loaded, lmetric, class-preferring, tpot-bins, or slo: asks mirrors of the planners "
        "(slo-pack, slo-spread)."
    ),
]
Acceptance = Annotated[float, typer.Option(min=0.0, max=0.999, help="Probability that a draft token is right.")]

Drafter = Annotated[
    str, typer.Option(help="What drafts tokens in the engine: none, ngram (costs nothing), opt-125m (a draft model).")
]

Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Steps take exactly what the profile says, are planned when they begin, and scheduling costs nothing.",
    ),
]

console = stdout_console()


def conditions_of(exact: bool) -> Conditions:
    """The conditions of a command: those of a server unless ``--exact`` was given."""
    from slos_serve.sim.conditions import AS_SERVED, EXACT

    return EXACT if exact else AS_SERVED


def scenarios_of(names: Sequence[str]) -> list[str]:
    """Scenario names, ``all`` spelled out.

    Raises:
        InvalidFieldError: unknown name.
    """
    chosen = list(SCENARIOS) if "all" in names else list(names)
    for name in chosen:
        scenario_named(name)
    return list(dict.fromkeys(chosen))


def policy_of(text: str) -> tuple[str, dict[str, Any]]:
    """``name`` or ``name:key=value,key=value``.

    Raises:
        InvalidFieldError: unknown policy, or a parameter without a value.
    """
    name, _, given = text.partition(":")
    policy_entry(name)
    parameters: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        key, found, value = part.partition("=")
        if not found:
            raise InvalidFieldError("policy", text, "NAME or NAME:key=value,key=value")
        try:
            parameters[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            parameters[key.strip()] = value
    return name, parameters


def policy_names() -> list[str]:
    """Every policy."""
    return list(POLICIES)


def write_json(path: Path | None, value: object) -> None:
    """Write a result, when asked for."""
    if path is not None:
        try:
            path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        except OSError as fault:
            raise failure(SlosServeError(f"{path} cannot be written: {fault.strerror}")) from fault
        console.print(f"wrote {path}")
