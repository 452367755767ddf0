"""A workload as arrays: every call of every request, and the promises it carries.

A *request* of the paper is a session here: one call, or several rounds of tool calls. Each round is a call of its own
with its own prompt and promises; it arrives ``tool_s`` after the round before it ended, and its prompt contains that
round's prompt and answer. A call has one decode stage or two (thinking, then answer); the second begins with the token
after the first ``first_stage_tokens`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.slo import SLOClass
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.perf.formula import features_s
from slos_serve.workload.prefixes import Prefixes, prefixes_of_sessions

CALL_DTYPE = np.dtype(
    [
        ("arrival_s", np.float64),  # inf when it follows another call
        ("tool_s", np.float64),  # seconds between the end of the call before it and its arrival
        ("prompt_tokens", np.int64),
        ("output_tokens", np.int64),  # the truth; policies never see it
        ("max_tokens", np.int64),  # cap the client asks for
        ("first_stage_tokens", np.int64),  # output tokens of the first stage; output_tokens when there is one stage
        ("class_index", np.int64),
        ("session", np.int64),  # the request this call is a part of
        ("next_call", np.int64),  # -1 for the last
        ("own_ttft_ms", np.float64),  # the call's own numbers, nan when its class decides
        ("own_tpot_ms", np.float64),
        ("own_e2e_ms", np.float64),
        ("ttft_s", np.float64),  # promises in seconds, filled by Workload.bound
        ("tpot_s", np.float64),
        ("next_tpot_s", np.float64),  # of the second stage
        ("e2e_s", np.float64),  # of the complete answer
        ("acceptance", np.float64),  # probability that a draft token is right
    ]
)
CallArray = NDArray[np.void]


@dataclass(frozen=True)
class Workload:
    """Calls and the classes they refer to.

    Attributes:
        name: scenario or trace, for reports.
        classes: ``class_index`` counts into it.
        calls: :data:`CALL_DTYPE`; first calls in order of arrival. Rounds of a session are linked by ``next_call``.
        shared: which prompts begin alike, where that is more than rounds of a session.
    """

    name: str
    classes: tuple[SLOClass, ...]
    calls: CallArray
    shared: Prefixes | None = None

    @property
    def prefixes(self) -> Prefixes:
        """Which prompts begin alike."""
        return self.shared if self.shared is not None else prefixes_of_sessions(self.calls)

    @property
    def num_requests(self) -> int:
        """Sessions."""
        return int(self.calls["session"].max()) + 1 if len(self.calls) else 0

    @property
    def request_arrivals_s(self) -> NDArray[np.float64]:
        """float64 [num_requests], when each session's first call arrives."""
        arrivals = self.calls["arrival_s"]
        return np.asarray(arrivals[np.isfinite(arrivals)])

    def bound(self, batch_time: BatchTimeModel) -> Workload:
        """The same workload with promises in seconds: slowdowns need the zero-load time of each prompt."""
        calls = self.calls.copy()
        zero_load_s = zero_load_seconds(calls["prompt_tokens"], batch_time)
        for index, slo_class in enumerate(self.classes):
            rows = calls["class_index"] == index
            slo = slo_class.slo
            if slo.ttft_ms is not None:
                calls["ttft_s"][rows] = slo.ttft_ms / 1000.0
            elif slo.ttft_slowdown is not None:
                floor_s = slo.ttft_floor_ms / 1000.0
                calls["ttft_s"][rows] = np.maximum(slo.ttft_slowdown * zero_load_s[rows], floor_s)
            else:
                calls["ttft_s"][rows] = np.inf
            calls["tpot_s"][rows] = slo.tpot_s
            calls["next_tpot_s"][rows] = slo_class.stages[-1].slo.tpot_s
            calls["e2e_s"][rows] = slo_class.slo.e2e_s
        own_tpot = calls["own_tpot_ms"]
        for name in ("ttft", "e2e"):
            own = calls[f"own_{name}_ms"]
            calls[f"{name}_s"] = np.where(np.isnan(own), calls[f"{name}_s"], own / 1000.0)
        for name in ("tpot_s", "next_tpot_s"):
            calls[name] = np.where(np.isnan(own_tpot), calls[name], own_tpot / 1000.0)
        return replace(self, calls=calls)


def zero_load_seconds(prompt_tokens: NDArray[np.int64], batch_time: BatchTimeModel) -> NDArray[np.float64]:
    """float64 [n]: each prompt alone on the engine, in one batch; the array form of ``zero_load_s``."""
    tokens = prompt_tokens.astype(np.float64)
    return np.asarray(features_s(batch_time.coefficients, tokens, 0.0, tokens * tokens, 1.0, 0.0))


def empty_calls(count: int) -> CallArray:
    """``count`` calls with neutral values: one stage, no link, the class's promises."""
    calls = np.zeros(count, dtype=CALL_DTYPE)
    calls["next_call"] = -1
    calls["session"] = np.arange(count)
    for name in ("own_ttft_ms", "own_tpot_ms", "own_e2e_ms", "ttft_s", "tpot_s", "next_tpot_s", "e2e_s"):
        calls[name] = np.nan
    return calls
