"""The imaginary workers: they sample a fixed function of prompt and position, and check what they are sent.

Token ``k`` of a request depends on its prompt and ``k`` only, so that whatever the schedule, the answer must be the
same. A token that is sampled from an input that the workers cannot have (a decode scheduled before its last token is
known on the first pipeline stage) comes out wrong, as it would on hardware. What only some hardware would punish is
noted in ``faults``: more adapters in a batch than it holds, more requests than the workers have slots for.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput

from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.testing.scheduler import VOCABULARY

BLIND_TOKEN = 7
_TAIL = 6


def token_at(prompt: Sequence[int], position: int) -> int:
    """What the imaginary device samples as output token ``position`` of a prompt; never an end token.

    It depends on the prompt's last tokens: the earlier turns of a streaming session are no part of it.
    """
    return _token(str(list(prompt[-_TAIL:])), position)


def _token(key: str, position: int) -> int:
    return 100 + zlib.crc32(f"{key}:{position}".encode()) % (VOCABULARY - 200)


@dataclass(slots=True)
class _OnDevice:
    key: str
    prompt_tokens: int
    adapter: int
    sampled: int = 0
    sampled_in_step: int = -(10**9)
    drafts: list[int] = field(default_factory=list)


@dataclass
class DryDevice:
    """Executes scheduler outputs.

    Attributes:
        scheduler: for its configuration only.
        drafts_ahead: drafts stay on the device, as under async scheduling; else the engine hands them to the scheduler.
        acceptance: probability that a draft is right.
        hit_share: share of tokens after which there are drafts at all; only where drafts do not stay on the device.
        num_drafted, num_accepted: drafts verified so far, and those that were right.
        num_blind: tokens sampled from an input that the workers could not have.
        faults: what some hardware would have failed on.
    """

    scheduler: Any
    model: BatchTimeModel
    drafts_ahead: bool
    acceptance: float = 0.7
    hit_share: float = 1.0
    num_drafted: int = 0
    num_accepted: int = 0
    num_blind: int = 0
    faults: list[str] = field(default_factory=list)
    _states: dict[str, _OnDevice] = field(default_factory=dict)
    _steps: int = 0

    def __post_init__(self) -> None:
        config = self.scheduler.vllm_config
        stages = config.parallel_config.pipeline_parallel_size
        is_async = config.scheduler_config.async_scheduling
        self._sends_tokens = stages > 1 and not is_async
        # Under async scheduling a stage gets the last stage's token when its batch has left the pipeline.
        self._cadence = stages if is_async else 1
        self._most_unverified = self.scheduler.num_spec_tokens * (config.max_concurrent_batches - 1)
        lora = config.lora_config
        self._most_adapters = lora.max_loras if lora is not None else 0
        self._slots = config.scheduler_config.max_num_seqs

    def drafts_of(self, request_ids: Sequence[str]) -> list[list[int]]:
        """Drafts for the tokens after the last step's."""
        return [list(self._states[key].drafts) if key in self._states else [] for key in request_ids]

    def execute(self, output: Any) -> tuple[float, ModelRunnerOutput]:
        """Seconds that a batch takes, and what it samples."""
        self._steps += 1
        self._take_in_requests(output)
        done = {data.req_id: data.num_computed_tokens for data in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        done |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sent = dict(zip(cached.req_ids, cached.new_token_ids, strict=False)) if self._sends_tokens else {}
        scheduled, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
        ids = list(scheduled)
        self._check_batch(ids)
        sampled = [self._sample(key, done[key], scheduled[key], drafts.get(key, ()), sent.get(key)) for key in ids]
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={key: index for index, key in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        return self.model.step_s(_shape(output, done)) if ids else 0.0, result

    def _take_in_requests(self, output: Any) -> None:
        """Enter new and resumed requests, and forget those that left, as the workers do before they run a batch."""
        for key in (*output.finished_req_ids, *(getattr(output, "preempted_req_ids", None) or ())):
            self._states.pop(key, None)
        for data in output.scheduled_new_reqs:
            prompt = data.prompt_token_ids
            known = getattr(data, "prefill_token_ids", None) or prompt
            adapter = data.lora_request.lora_int_id if data.lora_request is not None else 0
            self._states[data.req_id] = _OnDevice(
                str(list(prompt[-_TAIL:])), len(prompt), adapter, sampled=len(known) - len(prompt)
            )
        cached = output.scheduled_cached_reqs
        for key, outputs in zip(cached.req_ids, cached.num_output_tokens, strict=True):
            if key in cached.resumed_req_ids:
                self._resume(key, outputs)

    def _resume(self, key: str, outputs: int) -> None:
        request = self.scheduler.requests[key]
        prompt = request.prompt_token_ids
        adapter = request.lora_request.lora_int_id if request.lora_request is not None else 0
        self._states[key] = _OnDevice(str(list(prompt[-_TAIL:])), len(prompt), adapter, sampled=outputs)

    def _check_batch(self, ids: Sequence[str]) -> None:
        if len(self._states) > self._slots:
            self.faults.append(f"step {self._steps}: {len(self._states)} requests in {self._slots} slots")
        adapters = {self._states[key].adapter for key in ids} - {0}
        if self._most_adapters and len(adapters) > self._most_adapters:
            self.faults.append(f"step {self._steps}: {len(adapters)} adapters of {self._most_adapters}")

    def _sample(self, key: str, done: int, count: int, drafts: Sequence[int], sent: Sequence[int] | None) -> list[int]:
        """Tokens of a request: its drafts as far as they are right, and one more; none within a prompt."""
        state = self._states[key]
        position = done + count - len(drafts) - state.prompt_tokens
        if position < state.sampled:
            state.drafts = []
            return []
        # Drafts in flight count as accepted until their step is taken in, so a position may be ahead of the truth.
        ahead = position > state.sampled + self._most_unverified
        if ahead or self._is_blind(state, done, count - len(drafts), sent):
            self.num_blind += 1
            state.sampled, state.sampled_in_step = position + 1, self._steps
            return [BLIND_TOKEN]
        tokens: list[int] = []
        own = state.drafts[: len(drafts)]
        for draft in [*own, None]:
            tokens.append(_token(state.key, state.sampled))
            state.sampled += 1
            if draft != tokens[-1]:
                break
        state.sampled_in_step = self._steps
        self.num_drafted += len(drafts)
        self.num_accepted += len(tokens) - 1
        state.drafts = self._draft(state)
        return tokens

    def _is_blind(self, state: _OnDevice, done: int, count: int, sent: Sequence[int] | None) -> bool:
        """Whether the first stage lacks the token that a decode continues from."""
        if done < state.prompt_tokens:
            return False
        if sent is not None:
            first = done - state.prompt_tokens
            return list(sent) != [_token(state.key, first + offset) for offset in range(count)]
        return self._steps - state.sampled_in_step < self._cadence

    def _draft(self, state: _OnDevice) -> list[int]:
        """What the device proposes to come next; wrong tokens are next to the right ones."""
        if not self.drafts_ahead and _share(state, state.sampled, "hit") >= self.hit_share:
            return []
        places = range(state.sampled, state.sampled + self.scheduler.num_spec_tokens)
        return [_token(state.key, place) + (_share(state, place, "right") >= self.acceptance) for place in places]


def _share(state: _OnDevice, position: int, what: str) -> float:
    """A number in [0, 1) that depends on the request, the position and ``what`` only."""
    return (_token(state.key, position) * 7919 + zlib.crc32(what.encode())) % 9973 / 9973.0


def _shape(output: Any, done: dict[str, int]) -> BatchShape:
    scheduled, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
    return BatchShape(
        new_tokens=int(output.total_num_scheduled_tokens),
        context_tokens=sum(done[key] for key in scheduled),
        quad_tokens2=sum(n * (n + 2 * done[key]) for key, n in scheduled.items() if n > 1 and key not in drafts),
        num_seqs=len(scheduled),
        draft_tokens=sum(len(drafts.get(key, ())) for key in scheduled),
    )
