"""Prefill on one server and decode on another: the prompt is due earlier by what the hand-over takes.

PREFILL_URL=http://127.0.0.1:8100 DECODE_URL=http://127.0.0.1:8200 MODEL=smollm2 python examples/prefill_decode.py

Both servers need a KV connector, see docs/vllm.md. The first is asked for one token, which is thrown away: the second
loads the prompt's KV and begins the answer itself.
"""

from __future__ import annotations

import os
import time

from openai import OpenAI

PREFILL_URL = os.environ.get("PREFILL_URL", "http://127.0.0.1:8100")
DECODE_URL = os.environ.get("DECODE_URL", "http://127.0.0.1:8200")
MODEL = os.environ.get("MODEL", "smollm2")
TTFT_MS = float(os.environ.get("TTFT_MS", "20000"))
TPOT_MS = float(os.environ.get("TPOT_MS", "2000"))
# The transfer of the KV and the decode server's first steps.
HAND_OVER_MS = float(os.environ.get("HAND_OVER_MS", "2000"))
PROMPT = "The harbour, the mill and the long road to the hills: " + "a boat came in with salt and wool. " * 30


def main() -> None:
    """Send a request through both and print what each promised, and the answer."""
    began_s = time.monotonic()
    prefill = OpenAI(base_url=f"{PREFILL_URL}/v1", api_key="none", max_retries=0)
    decode = OpenAI(base_url=f"{DECODE_URL}/v1", api_key="none", max_retries=0)

    computed = prefill.completions.with_raw_response.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=1,
        temperature=0.0,
        extra_headers={"x-slo-ttft-ms": f"{TTFT_MS - HAND_OVER_MS:.0f}"},
    )
    print("prefill:", computed.headers["x-slo-verdict"])

    left_ms = TTFT_MS - 1000.0 * (time.monotonic() - began_s)
    answered = decode.completions.with_raw_response.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=32,
        temperature=0.0,
        extra_headers={"x-slo-ttft-ms": f"{max(left_ms, 1.0):.0f}", "x-slo-tpot-ms": f"{TPOT_MS:.0f}"},
    )
    print("decode:", answered.headers["x-slo-verdict"])
    print("answer:", answered.parse().choices[0].text)


if __name__ == "__main__":
    main()
