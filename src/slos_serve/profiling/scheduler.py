"""A scheduler that makes the real engine run a grid of batches and notes how long each took.

Given to vLLM as ``scheduler_cls``. Before each step it picks the next grid point, leaves that many decodes in
``running`` (the others are held for the step and put back after it), sets the step's token budget and lets the stock
scheduler do the rest. What was really scheduled is read from its output, so a point that does not fit becomes a sample
of another shape, not a wrong one.

The duration of a step is the time from the previous step's end to its own, where a step ends when its output has been
processed. That is the period at which a busy engine delivers tokens, whether it schedules ahead or not. After an empty
step or an idle spell it starts at the step's own scheduling.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from slos_serve.perf.batch_time import BatchShape
from slos_serve.perf.grid import GridPoint, grid_points
from slos_serve.profiling.stolen_time import stolen_s

SAMPLES_ENV = "SLOS_SERVE_PROFILE_SAMPLES"
SEED_ENV = "SLOS_SERVE_PROFILE_SEED"
MAX_DECODES_ENV = "SLOS_SERVE_PROFILE_MAX_DECODES"
# The first steps pay for allocations and kernel set-up that no later step pays for.
WARM_UP_STEPS = 10


class ProfilingScheduler(AsyncScheduler):
    """Runs grid points instead of serving in order; writes one line a measured step to the file in ``SAMPLES_ENV``.

    The first line is a JSON object about the engine, every other one ``[new_tokens, context_tokens, quad_tokens2,
    num_seqs, prefill_tokens, duration_s, stolen_s]``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rng = np.random.default_rng(int(os.environ.get(SEED_ENV, "0")))
        max_decodes = min(int(os.environ.get(MAX_DECODES_ENV, "32")), self.max_num_running_reqs)
        self._token_limit: int = self.max_num_scheduled_tokens
        self._points: Iterator[GridPoint] = grid_points(max_decodes, self._token_limit, self._rng)
        self._in_flight: deque[tuple[SchedulerOutput, BatchShape, int, float]] = deque()
        self._last_end_s: float | None = None
        self._stolen_before_s = stolen_s()
        self._steps_done = 0
        self._samples: TextIO = _open_samples(Path(os.environ[SAMPLES_ENV]))
        self._samples.write(json.dumps(self._describe_engine()) + "\n")
        self._samples.flush()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule the next grid point instead of the next batch."""
        start_s = time.perf_counter()
        held = self._steer(next(self._points))
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.running.extend(held)
            self.max_num_scheduled_tokens = self._token_limit
        shape, prefill_tokens = self._shape_of(output)
        self._in_flight.append((output, shape, prefill_tokens, start_s))
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """Let vLLM process the step's output, then note how long the step took."""
        result = super().update_from_output(scheduler_output, model_runner_output)
        end_s, stolen_now_s = time.perf_counter(), stolen_s()
        stolen_meanwhile_s, self._stolen_before_s = stolen_now_s - self._stolen_before_s, stolen_now_s
        output, shape, prefill_tokens, start_s = self._in_flight.popleft()
        if output is not scheduler_output or shape.new_tokens == 0:
            self._last_end_s = None
            return result
        since_s = start_s if self._last_end_s is None else self._last_end_s
        measured = self._last_end_s is not None and self._steps_done >= WARM_UP_STEPS
        self._last_end_s = end_s
        self._steps_done += 1
        if measured:
            self._write(shape, prefill_tokens, end_s - since_s, stolen_meanwhile_s)
        return result

    def shutdown(self) -> None:
        """Close the file of samples with the engine."""
        self._samples.close()
        super().shutdown()

    def _steer(self, point: GridPoint) -> list[Request]:
        """Set up ``running`` and the token budget for the point; returns the requests held out."""
        decodes = [request for request in self.running if request.num_computed_tokens >= request.num_prompt_tokens]
        prefills = [request for request in self.running if request.num_computed_tokens < request.num_prompt_tokens]
        chosen = self._choose(decodes, point.decodes)
        # The model runner keeps a slot for every started request, so only as many may start as there are slots left.
        startable = itertools.islice(self.waiting, self.max_num_running_reqs - len(self.running))
        left = sum(request.num_prompt_tokens - request.num_computed_tokens for request in prefills)
        left += sum(request.num_prompt_tokens for request in startable)
        prefill_tokens = min(point.prefill_tokens, left)
        if not chosen and not prefill_tokens:
            chosen = decodes[: self._token_limit]
        held = [request for request in decodes if request not in chosen]
        self.running[:] = chosen + prefills
        budget = len(chosen) * (1 + self.num_spec_tokens) + prefill_tokens
        self.max_num_scheduled_tokens = max(1, min(budget, self._token_limit))
        return held

    def _choose(self, decodes: list[Request], count: int) -> list[Request]:
        """``count`` of the decodes, of least context, of most or any, by turns: so context varies at each size."""
        if count >= len(decodes):
            return list(decodes)
        mode = self._rng.integers(3)
        if mode == 2:
            return [decodes[i] for i in self._rng.permutation(len(decodes))[:count]]
        ordered = sorted(decodes, key=lambda request: request.num_computed_tokens, reverse=bool(mode))
        return ordered[:count]

    def _shape_of(self, output: SchedulerOutput) -> tuple[BatchShape, int]:
        """Shape of the scheduled step and the prefill tokens in it; computed tokens already count this step's."""
        context = quad = prefill = 0
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            done = request.num_computed_tokens - tokens
            context += done
            if done < request.num_prompt_tokens:
                prefill += tokens
                quad += tokens * (tokens + 2 * done)
        shape = BatchShape(
            new_tokens=output.total_num_scheduled_tokens,
            context_tokens=context,
            quad_tokens2=quad,
            num_seqs=len(output.num_scheduled_tokens),
        )
        return shape, prefill

    def _write(self, shape: BatchShape, prefill_tokens: int, duration_s: float, stolen: float) -> None:
        row = [
            shape.new_tokens,
            shape.context_tokens,
            shape.quad_tokens2,
            shape.num_seqs,
            prefill_tokens,
            duration_s,
            stolen,
        ]
        self._samples.write(json.dumps(row) + "\n")
        self._samples.flush()

    def _describe_engine(self) -> dict[str, Any]:
        groups = max(1, len(self.kv_cache_config.kv_cache_groups))
        return {
            "kv_capacity_tokens": self.kv_cache_config.num_blocks // groups * self.block_size,
            "block_size": self.block_size,
            "max_num_batched_tokens": self._token_limit,
            "max_num_seqs": self.max_num_running_reqs,
            "async_scheduling": bool(self.scheduler_config.async_scheduling),
        }


def _open_samples(path: Path) -> TextIO:
    """Left open for as long as the engine lives; each line is flushed."""
    return path.open("w", encoding="utf-8")
