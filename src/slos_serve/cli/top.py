"""``slos-serve top``: the live page in the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from slos_serve.cli.printed import FILE_WIDTH, failure
from slos_serve.core.errors import SlosServeError
from slos_serve.core.verdict import Verdict

STATE_PATH = "/slo/state"
FORMAT = "slos-serve-live/1"
TIMEOUT_S = 5.0
MOST_ROWS = 10
GOOD_SHARE = 0.9
# Newest parts of the history that a line of bars shows.
BARS = " ▁▂▃▄▅▆▇█"
MOST_BARS = 30


class NoStateError(SlosServeError):
    """The server does not show its state; the message says what to do."""


def top(
    url: Annotated[str, typer.Argument(help="The server, such as http://localhost:8000.")] = "http://localhost:8000",
    every: Annotated[float, typer.Option(min=0.2, max=3600.0, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look and end, as when the output is a file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one look as JSON and end.")] = False,
) -> None:
    """Show what a running server does: promises kept by class, queues, streams with their slack, steps, verdicts.

    The key of a server that wants one is read from VLLM_API_KEY or OPENAI_API_KEY. Ctrl-C ends it.
    Exit status 0, or 1 when the server does not answer.
    """
    key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    try:
        if as_json:
            typer.echo(json.dumps(state_of(url, key), indent=2))
        elif once or not sys.stdout.isatty():
            state_of(url, key)  # tells the engine that somebody looks; steps and streams come with the next look
            time.sleep(every)
            Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(shown(state_of(url, key)))
        else:
            _follow(url, key, every)
    except NoStateError as error:
        raise failure(error) from None


def _follow(url: str, key: str | None, every_s: float) -> None:
    """Look again and again; a server that stops to answer is said so until it is back."""
    state = state_of(url, key)
    with Live(shown(state), screen=True, auto_refresh=False) as live:
        while True:
            try:
                time.sleep(every_s)
                state = state_of(url, key)
                live.update(shown(state), refresh=True)
            except NoStateError as error:
                live.update(Group(Text(str(error), style="bold red"), shown(state)), refresh=True)
            except KeyboardInterrupt:
                return


def state_of(url: str, key: str | None = None) -> dict[str, Any]:
    """The document of a server.

    Raises:
        NoStateError: it does not answer, wants a key, has no page, or speaks another version.
    """
    root = url.rstrip("/").removesuffix("/v1")
    if not root.startswith(("http://", "https://")):
        raise NoStateError(f"{url!r} is no address: write it as http://HOST:PORT")
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        request = urllib.request.Request(root + STATE_PATH, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        error.close()
        said = {
            401: "the server wants a key: set VLLM_API_KEY",
            404: "the server has no live page (it is off, or nothing is planned)",
        }.get(error.code, f"HTTP {error.code}")
        raise NoStateError(f"{root}{STATE_PATH}: {said}") from None
    except (OSError, ValueError) as error:
        raise NoStateError(f"{root}{STATE_PATH} does not answer: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise NoStateError(f"{root}{STATE_PATH} is not of this version (wanted: {FORMAT})")
    return found


def shown(state: dict[str, Any]) -> Group:
    """The document for a terminal."""
    parts: list[Any] = [_headline(state), _classes(state)]
    if state["replicas"]:
        parts.append(_replicas(state["replicas"]))
    if state["steps"]:
        parts.append(_steps(state["steps"]))
    if state["streams"]:
        parts.append(_streams(state["streams"]))
    return Group(*parts, _verdicts(state))


def _headline(state: dict[str, Any]) -> Text:
    queue, kv = state["queue"] or {"running": [], "waiting": []}, state["kv_blocks"]
    used = f", KV {kv['used'] / kv['total']:.0%} used" if kv and kv["total"] else ""
    line = Text(
        f"{state['model']}: {sum(queue['running'])} running, {sum(queue['waiting'])} waiting{used}", style="bold"
    )
    if state["armed"] is False:
        line.append("  disarmed: every step is stock", style="bold red")
    elif state["heard_s_ago"] is None and not state["replicas"]:
        line.append("  waiting for the engine", style="yellow")
    return line


def _table(title: str, *columns: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def _classes(state: dict[str, Any]) -> Table:
    weaker = any(Verdict.SECOND_BEST in each["requests"] for each in state["classes"])
    columns = ("class", "promised", "kept", "kept, %", *(("weaker",) if weaker else ()), "best effort", "refused")
    table = _table("Attainment", *columns, "room for", "last 10 minutes", left=("class", "last 10 minutes"))
    for each in state["classes"]:
        given, kept = each["requests"].get("admitted", 0), each["attained"].get("admitted", 0)
        style = "" if not given else "green" if kept >= GOOD_SHARE * given else "bold red"
        table.add_row(
            each["name"],
            str(given),
            str(kept),
            Text(f"{kept / given:.1%}" if given else "-", style=style),
            *((_weaker(each),) if weaker else ()),
            str(each["requests"].get("best-effort", 0)),
            str(each["told"].get("rejected", 0)),
            "-" if each["headroom"] is None else str(each["headroom"]),
            bars(state["history"]["classes"].get(each["name"])),
        )
    return table


def _weaker(row: dict[str, Any]) -> str:
    """Kept of a class's weaker promises that were given."""
    given = row["requests"].get(Verdict.SECOND_BEST, 0)
    return f"{row['attained'].get(Verdict.SECOND_BEST, 0)} of {given}" if given else "-"


def bars(history: dict[str, list[int]] | None) -> Text:
    """A bar for each part: as high as the share that was kept; nothing was promised where there is none."""
    line = Text()
    if history is None:
        return line
    for promised, kept in list(zip(history["promised"], history["kept"], strict=True))[-MOST_BARS:]:
        share = kept / promised if promised else 0.0
        mark = BARS[max(round(share * (len(BARS) - 1)), 1)] if promised else BARS[0]
        line.append(mark, style="green" if share >= GOOD_SHARE else "red")
    return line


def _replicas(replicas: list[dict[str, Any]]) -> Table:
    columns = ("replica", "requests", "no promise", "prompts owed", "tokens owed", "KV used, %", "correction")
    table = _table("Replicas", *columns, left=("replica",))
    for each in replicas:
        numbers = ("requests", "unpromised", "owed_prompts", "owed_tokens", "kv_used_percent", "correction")
        table.add_row(each["name"], *("-" if each[name] is None else f"{each[name]:g}" for name in numbers))
    return table


def _steps(steps: list[dict[str, Any]]) -> Table:
    columns = ("prefill tokens", "decodes", "held", "drafts", "predicted, ms", "measured, ms", "order")
    table = _table("Last steps, the newest first", *columns, left=("order",))
    for step in reversed(steps[-MOST_ROWS:]):
        measured = "-" if step["measured_ms"] is None else f"{step['measured_ms']:.1f}"
        counts = (str(step[name]) for name in ("prefill_tokens", "decodes", "held", "drafts"))
        table.add_row(*counts, f"{step['predicted_ms']:.1f}", measured, step["stock"] or "planned")
    return table


def _streams(streams: list[dict[str, Any]]) -> Table:
    columns = ("class", "verdict", "phase", "slack, ms", "age, s", "prompt", "output")
    table = _table("Streams with the least slack", *columns, left=columns[:3])
    for each in streams[:MOST_ROWS]:
        slack = each["slack_ms"]
        told = Text("-") if slack is None else Text(f"{slack:.0f}", style="bold red" if slack < 0 else "")
        numbers = (f"{each['age_s']:.1f}", str(each["prompt_tokens"]), str(each["output_tokens"]))
        table.add_row(each["slo_class"], each["verdict"], each["phase"], told, *numbers)
    return table


def _verdicts(state: dict[str, Any]) -> Table:
    columns = ("ago, s", "class", "verdict", "predicted, ms", "target, ms", "why")
    table = _table("Recent verdicts", *columns, left=("class", "verdict", "why"))
    for each in state["verdicts"][:MOST_ROWS]:
        times = ("-" if each[name] is None else f"{each[name]:.0f}" for name in ("predicted_ttft_ms", "target_ttft_ms"))
        ago = f"{state['time_s'] - each['time_s']:.1f}"
        table.add_row(ago, each["slo_class"], each["verdict"], *times, f"{each['reason']}: {each['text']}")
    return table
