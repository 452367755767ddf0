"""vLLM's real scheduler and KV-cache manager on an imaginary device, in virtual time.

For tests of what the plug-in does to vLLM (thousands of steps a second, holding, preemption and async scheduling
included) and for benchmarks of what it adds to a step. The device samples token ``k`` of a request as a fixed function
of its prompt and ``k``, so that whatever the schedule, the answer must be the same. It can draft: a given share of its
drafts is right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.testing.device import DryDevice, token_at
from slos_serve.testing.request import PLAIN, RequestFeatures, make_request
from slos_serve.testing.scheduler import VOCABULARY, Setup, make_scheduler

__all__ = ["VOCABULARY", "DryEngine", "Setup", "make_scheduler", "token_at"]

EMPTY_STEP_S = 0.001


@dataclass
class DryEngine:
    """Drives a scheduler step by step as vLLM's engine core does; ``now_s`` is virtual.

    Attributes:
        depth: batches in flight, 2 as under async scheduling, 1 as without, ``None`` for what vLLM would have.
        load_s_each: seconds that a step takes longer for each token whose KV a connector loads within it.
        device: the imaginary workers; ``acceptance`` and ``hit_share`` of its drafts are set there.
        answers: tokens delivered to each request.
        token_times_s: when each came.
        token_steps: engine steps, empty ones included, that had been made when each came.
        finished: how each finished request ended.
        num_steps: non-empty steps made.
        all_steps: steps made, empty ones included.
    """

    scheduler: Any
    model: BatchTimeModel
    depth: int | None = 2
    now_s: float = 0.0
    load_s_each: float = 0.0
    answers: dict[str, list[int]] = field(default_factory=dict)
    token_times_s: dict[str, list[float]] = field(default_factory=dict)
    token_steps: dict[str, list[int]] = field(default_factory=dict)
    finished: dict[str, str] = field(default_factory=dict)
    num_steps: int = 0
    all_steps: int = 0
    _flying: deque[tuple[Any, ModelRunnerOutput, float]] = field(default_factory=deque)
    _device_free_s: float = 0.0

    def __post_init__(self) -> None:
        init_none_hash(sha256)
        config = self.scheduler.vllm_config
        if self.depth is None:
            self.depth = int(config.max_concurrent_batches)
        self._hasher = get_request_block_hasher(self.scheduler.block_size, sha256)
        self._drafts_ahead = self.depth > 1 and bool(config.scheduler_config.async_scheduling)
        self.device = DryDevice(self.scheduler, self.model, self._drafts_ahead)
        self._cut_after: dict[str, int] = {}
        self._cut: list[str] = []
        self._grammars: Any = None
        self._transfers: Any = None
        if config.kv_transfer_config is not None:
            from slos_serve.testing.connector import DryTransfers  # noqa: PLC0415 - not in old versions

            self._transfers = DryTransfers()

    @property
    def faults(self) -> list[str]:
        """What some hardware would have failed on."""
        blind = [f"{self.device.num_blind} tokens from unknown inputs"] if self.device.num_blind else []
        return self.device.faults + blind

    @property
    def num_drafted(self) -> int:
        """Drafts verified so far."""
        return self.device.num_drafted

    @property
    def num_accepted(self) -> int:
        """Drafts that were right."""
        return self.device.num_accepted

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        slo: Mapping[str, Any] | None = None,
        features: RequestFeatures = PLAIN,
    ) -> None:
        """Enter a request now; ``slo`` goes where ``vllm_xargs`` goes."""
        request = self._request(request_id, prompt, max_tokens, slo, features)
        self.answers[request_id], self.token_times_s[request_id] = [], []
        self.token_steps[request_id] = []
        if features.stop_after is not None:
            self._cut_after[request_id] = features.stop_after
        if features.grammar_steps is not None:
            self._compile(request, features.grammar_steps)
        self.scheduler.add_request(request)

    def add_turn(
        self, request_id: str, chunk: Sequence[int], max_tokens: int, slo: Mapping[str, Any] | None = None
    ) -> None:
        """Bring the next turn of a streaming-input session."""
        features = RequestFeatures(resumable=True)
        self.scheduler.add_request(self._request(request_id, chunk, max_tokens, slo, features))

    def close(self, request_id: str) -> None:
        """End a streaming-input session: no further turn comes."""
        self.scheduler.add_request(self._request(request_id, [0], 1, None, PLAIN))

    def abort(self, request_id: str) -> None:
        """The client has gone."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self, *, throttle_prefills: bool = False) -> int:
        """Schedule one batch and take in the oldest one in flight if need be; returns tokens scheduled."""
        output = self.scheduler.schedule(throttle_prefills=True) if throttle_prefills else self.scheduler.schedule()
        total = int(output.total_num_scheduled_tokens)
        self.all_steps += 1
        self.num_steps += total > 0
        if self._grammars is not None:
            self._grammars.step()
        seconds, result = self.device.execute(output)
        if self._transfers is not None:
            result.kv_connector_output = self._transfers.step(output.kv_connector_metadata)
            seconds += self.load_s_each * getattr(output.kv_connector_metadata, "tokens_within", 0)
        waits_for_token = getattr(output, "pending_structured_output_tokens", False)
        if not waits_for_token:
            self.scheduler.get_grammar_bitmask(output)
        start_s = max(self.now_s, self._device_free_s)
        self._device_free_s = start_s + (seconds if total or self._flying else EMPTY_STEP_S)
        self._flying.append((output, result, self._device_free_s))
        assert self.depth is not None
        while len(self._flying) >= self.depth or (not total and self._flying):
            self._take_in()
        if waits_for_token:
            self.scheduler.get_grammar_bitmask(output)
        return total

    def run(self, max_steps: int = 100_000) -> None:
        """Step until nothing is left to do, transfers of finished requests included."""
        for _ in range(max_steps):
            sending = self._transfers is not None and self.scheduler.has_requests()
            if not sending and not self.scheduler.has_unfinished_requests():
                break
            self.step()
        self.drain()

    def drain(self) -> None:
        """Take in every batch in flight."""
        while self._flying:
            self._take_in()

    def _request(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        slo: Mapping[str, Any] | None,
        features: RequestFeatures,
    ) -> Request:
        return make_request(request_id, prompt, max_tokens, slo=slo, features=features, block_hasher=self._hasher)

    def _compile(self, request: Request, steps: int) -> None:
        if self._grammars is None:
            from slos_serve.testing.grammar import GrammarCompiler  # noqa: PLC0415 - few engines have grammars

            self._grammars = GrammarCompiler(self.scheduler.structured_output_manager)
        self._grammars.submit(request, steps)

    def _take_in(self) -> None:
        output, result, done_s = self._flying.popleft()
        self.now_s = max(self.now_s, done_s)
        if self._cut:
            self.scheduler.finish_requests(self._cut, RequestStatus.FINISHED_ABORTED)
            self._cut = []
        drafting = bool(self.scheduler.num_spec_tokens) and not self._drafts_ahead
        ids = list(result.req_ids)
        drafts = self.device.drafts_of(ids) if drafting else []
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                self._deliver(one)
        if drafting:
            self.scheduler.update_draft_token_ids(DraftTokenIds(ids, drafts))

    def _deliver(self, one: Any) -> None:
        """What the front end does with new tokens of a request: it may find a stop string."""
        key, tokens = one.request_id, one.new_token_ids
        limit = self._cut_after.get(key)
        if limit is not None:
            tokens = tokens[: max(limit - len(self.answers[key]), 0)]
            if tokens and len(self.answers[key]) + len(tokens) >= limit:
                self._cut.append(key)
                self.finished[key] = "stop string"
        self.answers[key].extend(tokens)
        self.token_times_s[key].extend([self.now_s] * len(tokens))
        self.token_steps[key].extend([self.all_steps] * len(tokens))
        if one.finish_reason is not None and key not in self.finished:
            self.finished[key] = str(one.finish_reason)
