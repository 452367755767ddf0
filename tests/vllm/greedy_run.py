"""Run as a program: greedy answers of one engine, as JSON.

``python -m tests.vllm.greedy_run MODEL OUT stock|ours|drafts``; ``drafts`` is ours with n-gram speculation.

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
    engine = vllm.LLM(
        model,
        dtype="float32",
        max_model_len=2048,
        max_num_seqs=24,
        max_num_batched_tokens=256,
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=150,
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
    answers = engine.generate(prompts(), sampling, use_tqdm=False)
    out.write_text(
        json.dumps([list(answer.outputs[0].token_ids) for answer in answers]),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
