"""A server in miniature: an engine client, an application that hands requests to it, and the middleware before both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from slos_serve.core.verdict import Verdict
from slos_serve.files.profile_file import Profile, save_profile
from slos_serve.vllm_plugin.asgi import Message, RawHeaders, Scope, Send
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.front.client import CURRENT, attach
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.exchange import judged_exchange
from slos_serve.vllm_plugin.front.link import PROMISED_KEY
from slos_serve.vllm_plugin.metrics import EngineLabels
from slos_serve.vllm_plugin.slo_args import TICKET_KEY, TOLD_KEY
from tests.builders import OPT_13B_A100, EngineBuilder
from tests.unit.routing.fleet import NOW_S, published

CLASSES = """
classes:
  chat: {ttft_ms: 1000, tpot_ms: 100}
  strict: {ttft_ms: 1000, tpot_ms: 100, when_full: reject}
  spare: {ttft_ms: 1000, tpot_ms: 100, when_full: reject_503}
  patient: {ttft_ms: 1000, tpot_ms: 100, otherwise: [{ttft_ms: 9000, tpot_ms: 150}]}
  slow: {ttft_ms: 6000, tpot_ms: 100}
  batch: {}
"""


def config_in(folder: Path) -> PluginConfig:
    """The plug-in's configuration with classes and a profile."""
    (folder / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    profile = Profile(
        model_name="m",
        device="d",
        engine="vllm",
        engine_version="1",
        created="2026-01-01T00:00:00+00:00",
        dtype="float32",
        tensor_parallel=1,
        kv_capacity_tokens=100_000,
        block_size=16,
        max_num_batched_tokens=2048,
        model=OPT_13B_A100,
    )
    save_profile(profile, folder / "profile.json")
    return PluginConfig(classes_path=folder / "classes.yaml", profile_path=folder / "profile.json")


def desk(folder: Path, engine: EngineBuilder | None = None) -> FrontDesk:
    """A front desk whose engine has published its state, or not."""
    front = FrontDesk(
        config_in(folder), EngineLabels("m", "0"), 4096, clock_s=lambda: NOW_S, uniform=lambda least, _most: least
    )
    front.ready = True
    if engine is not None:
        front.heard(json.dumps(published(engine).as_dict()).encode(), is_state=True)
    return front


TURNS = 20  # of the event loop
Told = tuple[int, dict[str, str], bytes]


class Client:
    """Stands for vLLM's engine client, and for an engine that makes the promises that the mirror hoped for, or none."""

    def __init__(self, front: FrontDesk, promises: bool) -> None:
        self._front = front
        self._promises = promises
        self.taken: list[str] = []
        self.extra_args: dict[str, dict[str, object]] = {}
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    def generate(self, prompt: object, sampling_params: Any, request_id: str) -> AsyncIterator[int]:
        self.taken.append(request_id)
        told = self.extra_args[request_id] = dict(sampling_params.extra_args or {})
        judged = CURRENT.get()
        hoped = None if judged is None else judged.hoped
        if self._promises and TOLD_KEY not in told and hoped is not None and hoped.verdict is Verdict.ADMITTED:
            made = json.dumps({PROMISED_KEY: [(told[TICKET_KEY], hoped.rank)]}).encode()
            asyncio.get_running_loop().call_soon(self._turn, TURNS, made)
        return self._tokens()

    def _turn(self, left: int, made: bytes) -> None:
        """The engine's word takes a while: the first tokens overtake it."""
        if left:
            asyncio.get_running_loop().call_soon(self._turn, left - 1, made)
        else:
            self._front.heard(made, is_state=False)

    async def _tokens(self) -> AsyncIterator[int]:
        await self.goes_on.wait()
        for token in range(3):
            yield token


class Server:
    """The application and what a client of it sees; ``promises`` as of :class:`Client`.

    ``headers`` are those of each request, ``scopes`` what each was served with.
    """

    def __init__(self, front: FrontDesk, *, promises: bool = True) -> None:
        self.front = front
        self.client = Client(front, promises)
        self.headers: RawHeaders = []
        self.scopes: list[Scope] = []
        self._sent = 0
        attach(self.client, front)

    async def ask(self, slo_class: str | None, prompt_tokens: int = 200, max_tokens: int = 100, **given: Any) -> Told:
        """Status, headers and body of a streamed answer."""
        applied = None if slo_class is None else self.front.version.classes.classes[slo_class]
        self._sent += 1
        messages: list[Message] = []

        async def send(message: Message) -> None:
            messages.append(message)

        xargs = {} if slo_class is None else {"slo_class": slo_class}
        params = SimpleNamespace(**{"extra_args": xargs, "max_tokens": max_tokens, "n": 1, **given})
        prompt = {"type": "token", "prompt_token_ids": [1] * prompt_tokens}
        name = f"cmpl-{self._sent}-0"
        judged = self.front.begin(applied)
        with self.front.traced(judged, {"type": "http", "headers": self.headers}) as scope:
            self.scopes.append(scope)
            await judged_exchange(self.front, judged, [], lambda out: self._serve(out, prompt, params, name), send)
        headers = {key.decode(): value.decode() for key, value in messages[0]["headers"]}
        return int(messages[0]["status"]), headers, b"".join(part.get("body", b"") for part in messages[1:])

    async def ask_at_once(self, count: int, slo_class: str | None, **given: Any) -> list[Told]:
        """As :meth:`ask`, ``count`` times; no answer begins before all have been judged."""
        self.client.goes_on.clear()
        asked = [asyncio.ensure_future(self.ask(slo_class, **given)) for _ in range(count)]
        await asyncio.sleep(0.0)
        self.client.goes_on.set()
        return list(await asyncio.gather(*asked))

    async def _serve(self, send: Send, prompt: object, params: object, name: str) -> None:
        """As vLLM does it: the engine is called before the head is sent, errors of it are answered."""
        try:
            tokens = self.client.generate(prompt, params, name)
        except ValueError as error:
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": str(error).encode()})
            return
        head = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        count = 0
        async for token in tokens:
            count += 1
            await send({"type": "http.response.body", "body": f'data: {{"t":{token}}}\n\n'.encode(), "more_body": True})
        usage = f'data: {{"id":"x","choices":[],"usage":{{"prompt_tokens":1,"completion_tokens":{count}}}}}\n\n'
        await send({"type": "http.response.body", "body": usage.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
