"""Run as a program: greedy answers of one engine, as JSON.

``python -m tests.vllm.greedy_run MODEL OUT stock|ours|drafts|draft-model``: the last two are ours with n-grams and
with the model as its own draft model.

An engine of its own process leaves nothing in the one that runs the tests.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import vllm

TOPICS = (
    "rivers",
    "bread",
    "winter",
    "trains",
    "glass",
    "chess",
    "bees",
    "maps",
    "salt",
    "moons",
)
CLASSES = (None, "near", "far")
STEPS_BEFORE_PROMISES = 16


def prompts() -> list[str]:
    """50 prompts from a dozen to about 400 tokens."""
    return [f"Tell me about {TOPICS[n % 10]} and {TOPICS[n // 10]}. " * (1 + (n * 7) % 43) for n in range(50)]


NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2}


def main(model: str, out: Path, side: str) -> None:
    """Answer every prompt; but for ``stock`` every third request carries no promise."""
    ours = side != "stock"
    plugin: dict[str, Any] = {"scheduler_cls": "slos_serve.vllm_plugin.SLOScheduler"} if ours else {}
    if side == "drafts":
        plugin["speculative_config"] = NGRAM
    elif side == "draft-model":
        plugin["speculative_config"] = {"method": "draft_model", "model": model, "num_speculative_tokens": 3}
    engine = vllm.LLM(
        model,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=24,
        max_num_batched_tokens=256,
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=100 if side == "drafts" else 150,
        **plugin,
    )
    sampling = [
        vllm.SamplingParams(
            temperature=0.0,
            max_tokens=24 + n % 17,
            ignore_eos=True,
            extra_args={"slo_class": CLASSES[n % 3]} if ours and CLASSES[n % 3] else None,
        )
        for n in range(50)
    ]
    out.write_text(json.dumps(served(engine.llm_engine, sampling)), encoding="utf-8")


def served(engine: Any, sampling: list[vllm.SamplingParams]) -> list[list[int]]:
    """Answers in the order of the prompts.

    Those that are promised nothing come first and fill the KV cache, so that the others have to take it from them.
    """
    asked = prompts()
    first = [n for n in range(len(asked)) if CLASSES[n % 3] is None]
    later = [n for n in range(len(asked)) if CLASSES[n % 3] is not None]
    answers: dict[str, list[int]] = {}
    for n in first:
        engine.add_request(str(n), asked[n], sampling[n])
    steps = 0
    while engine.has_unfinished_requests():
        if steps == STEPS_BEFORE_PROMISES:
            for n in later:
                engine.add_request(str(n), asked[n], sampling[n])
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
    return [answers[str(n)] for n in range(len(asked))]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
