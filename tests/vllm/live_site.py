"""A server's live page in one process: vLLM's scheduler on the dry engine in real time, the front end, and the routes.

Everything between the scheduler and the browser is what serves: telemetry thread, sockets, document, page. Only vLLM's
HTTP side is left out, and the device is imaginary.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn
from prometheus_client import generate_latest

from slos_serve.launch.endpoint import free_port
from slos_serve.vllm_plugin import scheduler as scheduler_module
from slos_serve.vllm_plugin.asgi import Receive, Scope, Send
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.live.routes import LiveRoutes
from slos_serve.vllm_plugin.metrics import EngineLabels
from slos_serve.vllm_plugin.middleware import SLOMiddleware
from tests.vllm.dry_load import Start, prompt

RATE = 8.0
READY_S = 120.0
CLASSES = ("chat", "code", "think", None)


class LiveSite:
    """A run that goes on until it is told to end.

    Args:
        start: starts dry engines.
        monkeypatch: has the engine take this process for its API process.
    """

    def __init__(self, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scheduler_module, "front_process", lambda _: os.getpid())
        self.engine = start(max_num_seqs=64)
        self.front = FrontDesk(
            PluginConfig.from_environment(os.environ),
            EngineLabels("a-model", "0"),
            8192,
            clock_s=lambda: self.engine.now_s,
        )
        assert self.front.live is not None
        self.port = free_port()
        self._middleware = SLOMiddleware(self._app)
        self._middleware._live = LiveRoutes(self.front.live, self.front.watch)
        config = uvicorn.Config(self._middleware, port=self.port, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._ended = threading.Event()
        self.arrive = threading.Event()
        self.faults: list[BaseException] = []

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``/metrics``, of the engine and of the front end."""
        recorder = self.engine.scheduler._slo.recorder
        body = generate_latest(recorder.metrics.registry) + generate_latest(self.front.metrics.registry)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    def _drive(self) -> None:
        """Requests arrive and steps are made; a step takes as long as the model of the device says."""
        rng, number, due_s = np.random.default_rng(1), 0, 0.0
        try:
            while not self._ended.is_set():
                began_s, real_s = self.engine.now_s, time.monotonic()
                if self.arrive.is_set() and self.engine.now_s >= due_s:
                    self._ask(f"cmpl-{number}", CLASSES[number % len(CLASSES)], rng)
                    number, due_s = number + 1, self.engine.now_s + float(rng.exponential(1.0 / RATE))
                if self.engine.step() == 0 and self.engine.now_s == began_s:
                    self.engine.now_s += 0.02
                time.sleep(max(self.engine.now_s - began_s - (time.monotonic() - real_s), 0.0))
        except BaseException as fault:
            self.faults.append(fault)

    def _ask(self, name: str, slo_class: str | None, rng: np.random.Generator) -> None:
        slo: dict[str, Any] = {} if slo_class is None else {"slo_class": slo_class}
        tokens, length = prompt(rng, min(int(rng.lognormal(6.5, 1.0)) + 1, 4000)), int(rng.lognormal(4.0, 0.6)) + 1
        params = SimpleNamespace(extra_args=slo, max_tokens=length, n=1)
        applied = None if slo_class is None else self.front._config.classes.classes[slo_class]
        self.front.entered(self.front.begin(applied), {"prompt_token_ids": tokens}, params, name)
        self.engine.add(name, tokens, length, slo)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve and answer; ends with the run."""
        self.front.start()
        until_s = time.monotonic() + READY_S
        while not self.front.ready:
            assert time.monotonic() < until_s, "the routing kernels were not loaded"
            time.sleep(0.05)
        self.arrive.set()
        threads = [threading.Thread(target=each, daemon=True) for each in (self._drive, self._server.run)]
        for thread in threads:
            thread.start()
        while not self._server.started:
            time.sleep(0.02)
        try:
            yield
        finally:
            self._ended.set()
            self._server.should_exit = True
            for thread in threads:
                thread.join(timeout=10.0)
            self.front.close()
        assert not self.faults
