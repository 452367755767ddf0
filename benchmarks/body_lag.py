"""How long a request body blocks the event loop of the front end, in which every stream of the server lives.

python -m benchmarks.body_lag

A clock ticks every millisecond on the loop while the middleware serves one request whose body comes in parts of 64 KiB,
as uvicorn hands them out. Printed is the longest gap between two ticks, the best of five runs, since a machine may be
shared.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slos_serve.vllm_plugin.asgi import Message, Receive, Scope, Send
from slos_serve.vllm_plugin.config import CLASSES_ENV
from slos_serve.vllm_plugin.middleware import SLOMiddleware

PART, MIB, RUNS = 65_536, 2**20, 5
CLASSES = "classes: {chat: {tpot_ms: 100}}\n"
TRUST = CLASSES + "trust: {others: {classes: [chat]}}\n"
# Many small values are the most work for a parser.
WORST = b'{"vllm_xargs": {"slo_class": "chat"}, "prompt": [%s[]]}'
CASES: list[tuple[str, str, int, dict[str, str]]] = [
    ("32 MiB, trust: refused unread", TRUST, 32, {"x-slo-class": "chat"}),
    ("32 MiB, no SLO: passed unread", CLASSES, 32, {}),
    ("4 MiB of '[],' with SLO fields", CLASSES, 4, {}),
    ("1 MiB of '[],' with SLO fields", CLASSES, 1, {}),
]


async def _server(_scope: Scope, receive: Receive, send: Send) -> None:
    """Stands for vLLM: takes the body part by part and answers."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def _ticks(gaps: list[float]) -> None:
    last_s = time.perf_counter()
    while True:
        await asyncio.sleep(0.001)
        now_s = time.perf_counter()
        gaps.append(now_s - last_s)
        last_s = now_s


async def longest_gap(body: bytes, headers: dict[str, str]) -> tuple[float, int]:
    """Seconds of the longest gap, and the answer's status."""
    parts = [body[at : at + PART] for at in range(0, len(body), PART)]
    left = iter(parts)
    status = 0

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        part = next(left, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None and part is not parts[-1]}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    middleware, gaps = SLOMiddleware(_server), list[float]()
    ticking = asyncio.create_task(_ticks(gaps))
    await asyncio.sleep(0.01)
    gaps.clear()
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": raw}
    await middleware(scope, receive, send)
    await asyncio.sleep(0.01)
    ticking.cancel()
    with suppress(asyncio.CancelledError):
        await ticking
    return max(gaps), status


def main() -> None:
    """Print a line for each case."""
    print(f"{'body':34}{'status':>8}{'longest gap, ms':>18}")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "classes.yaml"
        os.environ[CLASSES_ENV] = str(path)
        for name, classes, mib, headers in CASES:
            path.write_text(classes, encoding="utf-8")
            body = WORST % (b"[]," * ((mib * MIB - len(WORST)) // 3))
            if not headers and mib > 4:
                body = b'{"prompt": "' + b"x" * (mib * MIB) + b'"}'
            found = [asyncio.run(longest_gap(body, headers)) for _ in range(RUNS)]
            print(f"{name:34}{found[0][1]:>8}{min(gap for gap, _ in found) * 1e3:>18.1f}")


if __name__ == "__main__":
    main()
