"""KV that a connector brings: how long loads take, and requests in the plan while theirs is on its way.

A load takes no tokens, so vLLM begins it as soon as its blocks are free. Until its KV is there a request cannot run,
but its promise is to be kept all the same. :class:`KVLoads` learns seconds of a load by its tokens and shows such a
request to the plan as a waiting one that cannot run (``blocked``), due earlier by what is left of its load: whoever is
admitted meanwhile leaves room for it. A request that by its forecast would be late is left out until its KV is there,
so that a wrong forecast breaks no promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from slos_serve.core.request import RequestArray, SlotArray, Status
from slos_serve.vllm_plugin import compat
from slos_serve.vllm_plugin.request_book import RequestBook
from slos_serve.vllm_plugin.tracked import Tracked

# Weight that the loads before keep when another one is learnt.
_KEPT = 0.95
# Spread of the loads' sizes, as a share of their mean, from which on a fixed part can be told from the rest.
_LEAST_SPREAD = 0.05


class LoadTime:
    """Seconds that loading KV takes: a fixed part and one for each token, fitted to recent loads."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)  # of 1, tokens, seconds, tokens squared, tokens * seconds

    def observe(self, tokens: int, seconds: float) -> None:
        """A load of so many tokens took so long."""
        self._sums = _KEPT * self._sums + (1.0, tokens, seconds, tokens * tokens, tokens * seconds)

    def predicted_s(self, tokens: int) -> float:
        """Seconds that a load will take; 0 until one was seen."""
        count, sum_tokens, sum_s, squares, products = self._sums.tolist()
        if sum_tokens <= 0.0:
            return 0.0
        spread = squares / count - (sum_tokens / count) ** 2
        if spread > (_LEAST_SPREAD * sum_tokens / count) ** 2:
            each_s = (products / count - sum_tokens * sum_s / count**2) / spread
            fixed_s = (sum_s - each_s * sum_tokens) / count
            if each_s >= 0.0 and fixed_s >= 0.0:
                return float(fixed_s + each_s * tokens)
        return float(tokens * sum_s / sum_tokens)


@dataclass(slots=True)
class _Load:
    tracked: Tracked
    tokens: int
    begun_s: float
    computed_tokens: int
    is_timed: bool


class KVLoads:
    """Loads between the steps of one scheduler.

    Args:
        book: its requests.
        alone_s: seconds that a batch of ``tokens`` after ``done`` computed ones takes alone, as the plan reckons it.

    Attributes:
        time: what loads have taken.
    """

    def __init__(self, book: RequestBook, alone_s: Callable[[float, float], float]) -> None:
        self.time = LoadTime()
        self._book = book
        self._alone_s = alone_s
        self._loads: dict[int, _Load] = {}
        self._shown: list[Tracked] = []

    def begun(self, several: Iterable[Tracked], now_s: float, *, is_timed: bool = True) -> None:
        """vLLM has begun to load the KV of requests; ``is_timed`` when that was in the step just scheduled."""
        for tracked in several:
            tokens, tracked.external_tokens = tracked.external_tokens, 0
            computed = int(tracked.request.num_computed_tokens)
            self._loads[tracked.slot] = _Load(tracked, tokens, now_s, computed, is_timed and tokens > 0)

    def forget(self, tracked: Tracked) -> None:
        """The request has left."""
        self._loads.pop(tracked.slot, None)

    def withdraw(self) -> None:
        """Take back from the rows what the last plan was shown of loads."""
        rows = self._book.table.rows
        for tracked in self._shown:
            if self._book.by_slot.get(tracked.slot) is tracked:
                rows["ttft_due_s"][tracked.slot] = tracked.promise.planned_due_s
                rows["promised_ttft_due_s"][tracked.slot] = tracked.promise.planned_due_s
                rows["blocked"][tracked.slot] = 0
        self._shown.clear()

    def learn(self, blocked: Iterable[Tracked], now_s: float) -> None:
        """Learn from the loads that have arrived, and find those that vLLM began in a step of its own.

        Args:
            blocked: waiting requests that cannot start.
            now_s: when the next step is scheduled.
        """
        found = [one for one in blocked if one.slot not in self._loads and compat.loads_kv(one.request)]
        self.begun(found, now_s, is_timed=False)
        for slot, load in list(self._loads.items()):
            request = load.tracked.request
            if compat.loads_kv(request):
                continue
            del self._loads[slot]
            # Of a whole prompt vLLM computes the last token anew; a load that failed brought less and teaches nothing.
            if load.is_timed and request.num_computed_tokens >= load.computed_tokens - 1:
                self.time.observe(load.tokens, max(now_s - load.begun_s, 0.0))

    def show(
        self, to_load: Iterable[Tracked], within: Iterable[Tracked], each_s: float, start_s: float, now_s: float
    ) -> SlotArray:
        """Waiting requests for a plan beside those that may start: their KV comes, or may come, between steps.

        Args:
            to_load: requests whose load could begin in the next step.
            within: requests that may start and whose KV is loaded within the step that starts them.
            each_s: seconds that loading a token of those takes.
            start_s: when the step that is planned starts.
            now_s: when it is scheduled.
        """
        shown = []
        for load in self._loads.values():
            left_s = load.begun_s + self.time.predicted_s(load.tokens) - now_s
            if self._enter(load.tracked, max(left_s, 0.0), start_s):
                self._book.table.rows["blocked"][load.tracked.slot] = 1
                shown.append(load.tracked.slot)
        forecast_s = self.time.predicted_s
        shown += [one.slot for one in to_load if self._enter(one, forecast_s(one.external_tokens), start_s)]
        for tracked in within:
            self._enter(tracked, each_s * tracked.external_tokens, start_s)
        return np.array(shown, dtype=np.int64)

    def _enter(self, tracked: Tracked, load_s: float, start_s: float) -> bool:
        """Bring a request's due time forward by its load; False when nothing is promised or it would be late."""
        rows: RequestArray = self._book.table.rows
        row = rows[tracked.slot]
        if row["status"] == Status.BEST_EFFORT:
            return False
        self._shown.append(tracked)
        if row["output_tokens"]:
            return True  # its first token has come
        done = int(row["computed_tokens"] + row["cached_tokens"])
        left = max(int(row["prompt_tokens"]) - done, 1)
        most_s = tracked.promise.planned_due_s - start_s - self._alone_s(float(left), float(done))
        if load_s > most_s and row["status"] == Status.UNDECIDED:
            return False
        row["ttft_due_s"] = tracked.promise.planned_due_s - min(load_s, max(most_s, 0.0))
        row["promised_ttft_due_s"] = row["ttft_due_s"]
        return True
