"""Ends a simulation once too many requests have missed for its attainment to reach a level.

A request has missed when the first token of one of its calls is late, or a call of it was rejected or ended late.
Each call is judged once, by the definitions of :mod:`slos_serve.metrics.bulk`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slos_serve.metrics.bulk import CallTargets, score_calls
from slos_serve.sim.recording import Recording

METRICS = ("attainment", "strict")


class EarlyStop:
    """Told of a run now and then; see :class:`slos_serve.sim.cluster.Cluster`.

    Args:
        measured: bool [requests], those that count.
        level: share that must be in reach.
        metric: of which, one of ``METRICS``.

    Attributes:
        attainment, strict: shares of the measured requests that could still attain, and that could with every token in
            time, when last asked.
    """

    def __init__(self, measured: NDArray[np.bool_], level: float, metric: str = "attainment") -> None:
        self._measured = measured
        self._level = level
        self._metric = metric
        self._missed = {name: np.zeros(len(measured), dtype=np.bool_) for name in METRICS}
        self._judged: NDArray[np.bool_] | None = None
        self.attainment, self.strict = 1.0, 1.0

    def __call__(self, recording: Recording, now_s: float) -> bool:
        """Whether the level is out of reach at ``now_s``."""
        calls = recording.workload.calls
        if self._judged is None:
            self._judged = np.zeros(len(calls), dtype=np.bool_)
        first_s = recording.token_s[recording.token_start]
        with np.errstate(invalid="ignore"):
            waited_s = np.where(np.isnan(first_s), now_s - recording.calls["arrival_s"], first_s)
            late = (waited_s > calls["ttft_s"] * (1.0 + 1e-6) + 1e-6) | recording.rejected
        ended = np.flatnonzero(recording.completed & ~self._judged)
        self._judged[ended] = True
        late_by = {"attainment": late, "strict": late.copy()}
        if len(ended):
            outputs = np.ascontiguousarray(calls["output_tokens"][ended])
            begins = recording.token_start[ended]
            tokens_s = np.concatenate(
                [recording.token_s[first : first + count] for first, count in zip(begins, outputs, strict=True)]
            )
            promised = CallTargets(
                *(np.ascontiguousarray(calls[name][ended]) for name in CallTargets.__dataclass_fields__)
            )
            scores = score_calls(tokens_s, np.cumsum(outputs) - outputs, outputs, recording.completed[ended], promised)
            late_by["attainment"][ended] |= ~scores.attained
            late_by["strict"][ended] |= ~scores.strict
        for name, missed in self._missed.items():
            missed[calls["session"][late_by[name]]] = True
            setattr(self, name, 1.0 - float(missed[self._measured].mean()))
        return bool(getattr(self, self._metric) < self._level)
