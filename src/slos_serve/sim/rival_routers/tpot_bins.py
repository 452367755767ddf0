"""PolyServe's bins: each pace has replicas of its own, and a call goes to the fullest of them that still attains.

Replicas are shared out by the work of the last calls: seconds of prefill and the pace over the largest batch that it
allows, for every answer token. A replica attains when the first token, the second and the steady pace would be in time.
Where none of its own bin does, a call may use a replica of a tighter bin that attains (lazy promotion); where none does
at all, the emptiest of its own bin gets it, so that bins stay apart under overload. Source: Zhu et al. 2025 (arXiv
2507.17769), sections 4.2 to 4.7. Simplified: no scaling of the fleet, so its ladder of loads has only the effect of
packing; replicas that change bins keep what they run; no pool for calls without a pace, which form the loosest bin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.rival_routers.load import Call, Load, call_of, class_means, decode_s, first_token_s, load_of

CALLS_KEPT = 200
LARGEST_BATCH = 256


class TpotBins:
    """See :class:`slos_serve.sim.routers.LoadRouter`."""

    def __init__(self, recording: Recording, model: BatchTimeModel) -> None:
        self._recording, self._model = recording, model
        self._means = class_means(recording)
        self._recent: deque[tuple[float, float]] = deque(maxlen=CALLS_KEPT)  # pace, seconds of work

    def choose(self, now_s: float, call: int, session: int, replicas: Sequence[Replica]) -> Replica:
        """The fullest that attains of its own bin, then of tighter ones; else the emptiest of its own."""
        loads = [load_of(replica) for replica in replicas]
        asked = [call_of(self._recording, call, replica, self._means) for replica in replicas]
        pace_s = asked[0].tpot_s
        self._recent.append(
            (pace_s, self._work_s(int(self._recording.workload.calls["prompt_tokens"][call]), asked[0]))
        )
        bins = self.shares(len(replicas))
        paces = sorted(bins)
        for pace in reversed(paces[: paces.index(pace_s) + 1]):  # its own, then ever tighter ones
            able = [i for i in bins[pace] if self._attains(loads[i], asked[i])]
            if able:
                return replicas[max(able, key=lambda i: (loads[i].count, -i))]
        return replicas[min(bins[pace_s], key=lambda i: (loads[i].count, i))]

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """Nothing to know."""

    def shares(self, replicas: int) -> dict[float, list[int]]:
        """Places of the replicas of each pace, by the work of the last calls; tightest first, at least one each.

        With fewer replicas than paces the loosest paces share the last one.
        """
        work: dict[float, float] = {}
        for pace_s, work_s in self._recent:
            work[pace_s] = work.get(pace_s, 0.0) + work_s
        paces = sorted(work)
        if len(paces) >= replicas:
            return {pace: [min(i, replicas - 1)] for i, pace in enumerate(paces)}
        counts = dict.fromkeys(paces, 1)
        for _ in range(replicas - len(paces)):
            neediest = max(paces, key=lambda pace: work[pace] / counts[pace])
            counts[neediest] += 1
        ends = np.cumsum([counts[pace] for pace in paces])
        return {pace: list(range(end - counts[pace], end)) for pace, end in zip(paces, ends.tolist(), strict=True)}

    def _work_s(self, prompt_tokens: int, call: Call) -> float:
        """Seconds of a replica that a call of its pace takes."""
        prefill_s = self._model.zero_load_s(max(prompt_tokens, 1))
        if not np.isfinite(call.tpot_s):
            return prefill_s
        context = prompt_tokens + call.answer_tokens / 2

        def fits(batch: int) -> bool:
            return self._model.step_s(BatchShape(batch, round(batch * context), 0, batch)) <= call.tpot_s

        batch = max((size for size in (1, 2, 4, 8, 16, 32, 64, 128, LARGEST_BATCH) if fits(size)), default=1)
        return prefill_s + call.answer_tokens * call.tpot_s / batch

    def _attains(self, load: Load, call: Call) -> bool:
        first_s, steady_s = first_token_s(self._model, load, call), decode_s(self._model, load, call)
        pace_s = min(float(load.tpots_s.min(initial=call.tpot_s)), call.tpot_s)
        return first_s <= call.ttft_s and first_s + steady_s <= call.ttft_s + call.tpot_s and steady_s <= pace_s
