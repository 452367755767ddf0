"""Use the official OpenAI client: the class goes in a header or in ``vllm_xargs``, and comes back in the headers.

BASE_URL=http://127.0.0.1:8000 MODEL=smollm2 python examples/openai_client.py
"""

from __future__ import annotations

import os

from openai import BadRequestError, OpenAI

BASE_URL = os.environ.get("BASE_URL", "http://127.0.0.1:8000")
MODEL = os.environ.get("MODEL", "smollm2")


def main() -> None:
    """Stream a chat answer, complete a prompt, and show what a typo leads to."""
    client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none", max_retries=0)

    answer = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Name three colours."}],
        max_tokens=16,
        stream=True,
        extra_headers={"x-slo-class": "chat"},
    )
    print("class applied:", answer.headers["x-slo-class"])
    for chunk in answer.parse():
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    completion = client.completions.create(
        model=MODEL,
        prompt="One, two, three,",
        max_tokens=8,
        extra_body={"vllm_xargs": {"slo_class": "code", "slo_ttft_ms": 3000, "slo_expected_tokens": 8}},
    )
    print(completion.choices[0].text)

    try:
        client.completions.create(model=MODEL, prompt="x", extra_body={"vllm_xargs": {"slo_tpot": 50}})
    except BadRequestError as error:
        print("refused:", error.message)


if __name__ == "__main__":
    main()
