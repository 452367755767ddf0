"""vLLM's real scheduler and KV-cache manager on an imaginary device, in virtual time.

For tests of what the plug-in does to vLLM (thousands of steps a second, holding, preemption and async scheduling
included) and for benchmarks of what it adds to a step. The device samples token ``k`` of a request as a fixed function
of its prompt and ``k``, so that whatever the schedule, the answer must be the same. It can draft: a given share of its
drafts is right.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from slos_serve.perf.batch_time import BatchShape, BatchTimeModel

VOCABULARY = 32_000
_TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16384,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}


def make_scheduler(
    scheduler_cls: type[AsyncScheduler],
    folder: Path,
    *,
    num_blocks: int = 1000,
    block_size: int = 16,
    **engine_args: Any,
) -> AsyncScheduler:
    """A scheduler as vLLM would make it for a tiny model whose config is written to ``folder``."""
    (folder / "config.json").write_text(json.dumps(_TINY_LLAMA), encoding="utf-8")
    settings = {
        "max_model_len": 8192,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
    } | engine_args
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        block_size=block_size,
        **settings,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = num_blocks
    layer = FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
    return scheduler_cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
        log_stats=False,
    )


def token_at(prompt: Sequence[int], position: int) -> int:
    """What the imaginary device samples as output token ``position`` of a prompt; never an end token."""
    return 100 + zlib.crc32(f"{len(prompt)}:{prompt[-1]}:{position}".encode()) % (VOCABULARY - 200)


@dataclass(slots=True)
class _OnDevice:
    prompt: Sequence[int]
    sampled: int = 0
    drafts: list[int] = field(default_factory=list)


@dataclass
class DryEngine:
    """Drives a scheduler step by step; ``now_s`` is virtual.

    Attributes:
        depth: batches in flight, 2 as under async scheduling, 1 as without.
        acceptance: probability that a draft is right, where the scheduler asks for drafts.
        hit_share: share of tokens after which there are drafts at all (an n-gram that was found); without async only.
        num_drafted, num_accepted: drafts verified so far, and those that were right.
        answers: tokens delivered to each request.
        token_times_s: when each came.
        num_steps: non-empty steps made.
    """

    scheduler: AsyncScheduler
    model: BatchTimeModel
    depth: int = 2
    acceptance: float = 0.7
    hit_share: float = 1.0
    now_s: float = 0.0
    answers: dict[str, list[int]] = field(default_factory=dict)
    token_times_s: dict[str, list[float]] = field(default_factory=dict)
    finished: dict[str, str] = field(default_factory=dict)
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    _device: dict[str, _OnDevice] = field(default_factory=dict)
    _flying: deque[tuple[Any, ModelRunnerOutput, float]] = field(default_factory=deque)
    _device_free_s: float = 0.0

    def __post_init__(self) -> None:
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(self.scheduler.block_size, sha256)

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        slo: Mapping[str, Any] | None = None,
    ) -> None:
        """Enter a request now; ``slo`` goes where ``vllm_xargs`` goes."""
        sampling = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            extra_args=dict(slo) if slo else None,
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self.answers[request_id], self.token_times_s[request_id] = [], []
        self._device[request_id] = _OnDevice(list(prompt))
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        """The client has gone."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> int:
        """Schedule one batch and take in the oldest one in flight if need be; returns tokens scheduled."""
        output = self.scheduler.schedule()
        total = int(output.total_num_scheduled_tokens)
        if total:
            self.num_steps += 1
        seconds, result = self._execute(output)
        start_s = max(self.now_s, self._device_free_s)
        self._device_free_s = start_s + seconds
        self._flying.append((output, result, self._device_free_s))
        while len(self._flying) >= self.depth or (not total and self._flying):
            self._take_in()
        return total

    def run(self, max_steps: int = 100_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished_requests():
                break
            self.step()
        while self._flying:
            self._take_in()

    def _take_in(self) -> None:
        output, result, done_s = self._flying.popleft()
        self.now_s = max(self.now_s, done_s)
        if self.depth == 1 and self.scheduler.num_spec_tokens:
            ids = list(result.req_ids)
            proposed = DraftTokenIds(ids, [list(self._device[key].drafts) for key in ids])
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                self.answers[one.request_id].extend(one.new_token_ids)
                self.token_times_s[one.request_id].extend([self.now_s] * len(one.new_token_ids))
                if one.finish_reason is not None:
                    self.finished[one.request_id] = str(one.finish_reason)
        if self.depth == 1 and self.scheduler.num_spec_tokens:
            self.scheduler.update_draft_token_ids(proposed)

    def _execute(self, output: Any) -> tuple[float, ModelRunnerOutput]:
        done = {data.req_id: data.num_computed_tokens for data in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        done |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        ids = list(output.num_scheduled_tokens)
        drafts = output.scheduled_spec_decode_tokens
        sampled = [
            self._sample(key, done[key] + output.num_scheduled_tokens[key], len(drafts.get(key, ()))) for key in ids
        ]
        shape = BatchShape(
            new_tokens=int(output.total_num_scheduled_tokens),
            context_tokens=sum(done[key] for key in ids),
            quad_tokens2=sum(
                n * (n + 2 * done[key]) for key, n in output.num_scheduled_tokens.items() if n > 1 and key not in drafts
            ),
            num_seqs=len(ids),
            draft_tokens=sum(len(drafts.get(key, ())) for key in ids),
        )
        return self.model.step_s(shape), ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={key: index for index, key in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def _sample(self, request_id: str, computed: int, num_drafts: int) -> list[int]:
        """Tokens of a request after ``computed`` ones: its drafts as far as they are right, and one more."""
        state = self._device[request_id]
        if computed - num_drafts < len(state.prompt) + state.sampled:
            state.drafts = []
            return []
        tokens = []
        for draft in [*state.drafts[:num_drafts], None]:
            tokens.append(token_at(state.prompt, state.sampled))
            state.sampled += 1
            if draft != tokens[-1]:
                break
        self.num_drafted += num_drafts
        self.num_accepted += len(tokens) - 1
        state.drafts = self._draft(state)
        return tokens

    def _draft(self, state: _OnDevice) -> list[int]:
        """What the device proposes to come next; wrong tokens are next to the right ones."""
        if _share(state, state.sampled, "hit") >= self.hit_share and self.depth == 1:
            return []
        places = range(state.sampled, state.sampled + self.scheduler.num_spec_tokens)
        return [token_at(state.prompt, place) + (_share(state, place, "right") >= self.acceptance) for place in places]


def _share(state: _OnDevice, position: int, what: str) -> float:
    """A number in [0, 1) that depends on the request, the position and ``what`` only."""
    return (token_at(state.prompt, position) * 7919 + zlib.crc32(what.encode())) % 9973 / 9973.0
