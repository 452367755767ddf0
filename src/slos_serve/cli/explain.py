"""``slos-serve explain``: what a request would be promised under a load, and what binds."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from slos_serve.cli.printed import USAGE_ERROR, failure, output_file, stdout_console
from slos_serve.core.errors import InvalidFieldError, SlosServeError
from slos_serve.files.profile_file import profile_path

if TYPE_CHECKING:
    from slos_serve.vllm_plugin.front.explain import Explained

TIMEOUT_S = 10.0
MOST_REQUESTS = 4096

Counts = Annotated[list[str] | None, typer.Option(metavar="CLASS=N", help="Requests of a class; may be repeated.")]


class QuestionError(SlosServeError):
    """The question cannot be asked as it is given; the message says what to give."""


class ServerAnswerError(SlosServeError):
    """The server did not answer the question."""


def explain(
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens of the request.")],
    slo_class: Annotated[str | None, typer.Option("--class", help="Its class; default: the default class.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Its max_tokens.")] = 256,
    expected_tokens: Annotated[
        int | None, typer.Option(min=1, help="Answer tokens to expect (slo_expected_tokens); default: the forecast.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Ask this running server, such as http://localhost:8000, under its load.")
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Class file, for a load that you describe.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Batch-time profile: a file, or a shipped one such as opt-13b-a100.")
    ] = None,
    running: Counts = None,
    waiting: Counts = None,
    load_prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens of each request of the load.")] = 512,
    load_answer_tokens: Annotated[int, typer.Option(min=1, help="Answer tokens of each request of the load.")] = 256,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most requests that run at a time.")] = 256,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here; - prints it alone.", callback=output_file)
    ] = None,
) -> None:
    """Say what a request would be promised now, and what binds.

    With --url the running server is asked: it judges the request as it judges real ones, and counts it nowhere.
    Without it, describe the load: running requests have half of their answer and are on time, waiting ones came
    just now. Exit status 0: promised, or it asks for nothing. 1: not promised. 2: the question cannot be answered.
    """
    from slos_serve.vllm_plugin.front.explain import Load

    of_a_load = {"--classes": classes, "--profile": profile, "--running": running, "--waiting": waiting}
    try:
        if url is not None:
            _refuse_beside_url([option for option, value in of_a_load.items() if value])
            found = ask(url, slo_class, prompt_tokens, max_tokens, expected_tokens)
        else:
            load = Load(
                running=counts("--running", running),
                waiting=counts("--waiting", waiting),
                prompt_tokens=load_prompt_tokens,
                answer_tokens=load_answer_tokens,
                max_num_seqs=max_num_seqs,
            )
            with Console(stderr=True).status("asking the planner (the first run compiles it, which takes minutes)"):
                found = described(load, classes, profile, slo_class, prompt_tokens, max_tokens, expected_tokens)
    except SlosServeError as error:
        failure(error)
        raise typer.Exit(USAGE_ERROR) from None
    text = json.dumps(asdict(found), indent=2)
    if json_file is not None and str(json_file) == "-":
        typer.echo(text)
    else:
        for line in told(found):
            stdout_console().print(line, markup=False, highlight=False, soft_wrap=True)
        if json_file is not None:
            json_file.write_text(text + "\n", encoding="utf-8")
    raise typer.Exit(0 if found.verdict in ("admitted", "second-best", "no-slo") else 1)


def _refuse_beside_url(given: Sequence[str]) -> None:
    if given:
        raise QuestionError(f"{', '.join(given)}: not with --url; the server has its own classes, profile and load")


def counts(option: str, given: Sequence[str] | None) -> dict[str, int]:
    """``CLASS=N`` options as numbers by class.

    Raises:
        InvalidFieldError: one is not of that form.
    """
    found: dict[str, int] = {}
    for text in given or ():
        name, _, number = text.partition("=")
        if not name or not (number.isascii() and number.isdigit() and int(number) <= MOST_REQUESTS):
            raise InvalidFieldError(option, text, f"CLASS=N with N from 0 to {MOST_REQUESTS}, such as chat=20")
        found[name] = found.get(name, 0) + int(number)
    return found


def described(
    load: object,
    classes: Path | None,
    profile: str | None,
    slo_class: str | None,
    prompt_tokens: int,
    max_tokens: int,
    expected_tokens: int | None,
) -> Explained:
    """The answer under a load that is described; see :func:`explain`.

    Raises:
        QuestionError: a file is missing.
        InvalidFieldError: a file, a class or the load cannot be used.
    """
    from slos_serve.vllm_plugin.config import PluginConfig
    from slos_serve.vllm_plugin.front import explain as asked
    from slos_serve.vllm_plugin.slo_args import SloArgs

    if classes is None or profile is None:
        missing = [option for option, value in (("--classes", classes), ("--profile", profile)) if value is None]
        wanted = "give --url of a running server, or --classes and --profile to describe one"
        raise QuestionError(f"{' and '.join(missing)} missing: {wanted}")
    assert isinstance(load, asked.Load)
    config = PluginConfig.of({"classes_path": classes, "profile_path": profile_path(profile)})
    desk = asked.loaded_desk(config, load, prompt_tokens + max_tokens)
    return asked.explain(desk, SloArgs(slo_class=slo_class, expected_tokens=expected_tokens), prompt_tokens, max_tokens)


def ask(url: str, slo_class: str | None, prompt_tokens: int, max_tokens: int, expected_tokens: int | None) -> Explained:
    """A running server's answer.

    Raises:
        ServerAnswerError: it does not answer, or refuses the question; the message says why.
    """
    from slos_serve.vllm_plugin.front.explain import Explained
    from slos_serve.vllm_plugin.middleware import EXPLAIN_PATH

    asked = {"class": slo_class, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens}
    asked["expected_tokens"] = expected_tokens
    query = urllib.parse.urlencode({name: value for name, value in asked.items() if value is not None})
    root = url.rstrip("/").removesuffix("/v1")
    if not root.startswith(("http://", "https://")):
        raise InvalidFieldError("--url", url, "an address that begins with http:// or https://")
    try:
        with urllib.request.urlopen(asked_of(f"{root}{EXPLAIN_PATH}?{query}"), timeout=TIMEOUT_S) as answer:
            return Explained.of_dict(json.load(answer))
    except urllib.error.HTTPError as fault:
        raise ServerAnswerError(_why(root, fault)) from None
    except (OSError, ValueError) as fault:
        raise ServerAnswerError(f"{root} does not answer: {fault}") from None


def asked_of(address: str) -> urllib.request.Request:
    """A request with the API key of the environment, where there is one."""
    key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})


def _why(root: str, fault: urllib.error.HTTPError) -> str:
    try:
        said = str(json.load(fault)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = ""
    if fault.code == 404:
        return (
            f"{root} has no /slo/explain: it does not run the plug-in, plans nothing (no profile: `slos-serve doctor "
            f"--url {root}`), has several replicas (--replicas), or SLOS_SERVE_FRONT_END is 0"
        )
    return said or f"{root} answers {fault.code}"


def told(found: Explained) -> Iterator[str]:
    """The answer in lines."""
    yield f"{found.verdict} ({found.reason}): {found.text}"
    if found.status is not None:
        yield f"It would be refused with {found.status}."
    yield from _promises(found)
    if found.predicted_start_ms is not None:
        yield f"begins        in about {found.predicted_start_ms / 1e3:.1f} s, without a promise"
    if found.verdict == "no-slo":
        return
    if found.predicted_ttft_ms is None and found.reason == "ttft_too_late":
        yield f"first token   later than the {found.target_ttft_ms or 0.0:.0f} ms promised, even alone on the engine"
        return
    yield f"first token   {_of(found.predicted_ttft_ms, found.target_ttft_ms)}"
    yield f"output tokens {_of(found.predicted_tpot_ms, found.target_tpot_ms)} each"
    if found.ahead_tokens is None:
        return
    yield f"prompts       work of {found.ahead_tokens:g} tokens until then, its own and attention counted"
    rate = found.prefill_rate or 0.0
    left = (
        f"{rate:g} prompt tokens/s are left" if rate >= 0.0 else "no time for prompts is left; tokens would come late"
    )
    yield f"decodes       beside the promised ones and this one {left}"
    yield f"KV blocks     {found.kv_blocks:g} needed, {found.kv_blocks_left:g} left beside all promises"
    more = f"{found.room} like this one fit now"
    yield f"room          {more}" + (f"; then {found.next_obstacle} binds" if found.next_obstacle else " (at least)")


def _promises(found: Explained) -> Iterator[str]:
    """The promises of a class that has weaker ones, and which of them is given."""
    promised = found.verdict in ("admitted", "second-best")
    words = {"ttft_ms": "first token {:g} ms", "tpot_ms": "{:g} ms per token", "e2e_ms": "answer {:g} ms"}
    for rank, promise in enumerate(found.promises):
        said = ", ".join(text.format(promise[name]) for name, text in words.items() if name in promise)
        kept_out = not promised or rank < found.rank
        mark = "does not fit" if kept_out else "given" if rank == found.rank else "not asked for"
        yield f"{'promises' if rank == 0 else '':<13} {rank + 1}. {said}: {mark}"


def _of(predicted_ms: float | None, target_ms: float | None) -> str:
    said = "no prediction" if predicted_ms is None else f"{predicted_ms:.0f} ms predicted"
    return said + (", nothing promised" if target_ms is None else f", {target_ms:.0f} ms promised")
