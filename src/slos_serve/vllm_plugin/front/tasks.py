"""The tasks of one server as its API process knows them: the engine core's book of tasks, kept a second time.

The event loop asks when calls are due, as they come. That calls ended is heard of in another thread and noted at the
next question. The engine core's own book decides and counts; this one tells clients and asks the mirror.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from slos_serve.core.slo import SLOClass
from slos_serve.core.tasks import task_of
from slos_serve.perf.tasks import CallAsked, CallDue, TaskBook, TaskKey
from slos_serve.routing.router import RoutingRequest
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.slo_args import SloArgs

MOST_CALLS = 100_000
# The engine's word on a call that it had comes sooner after the end of its answer.
WORD_WITHIN_S = 5.0
# Ends with a whole answer.
_FINISHED = ("stop", "length", "repetition")


class FrontTasks:
    """See the module.

    Args:
        config: margin and profile; without a profile no call is given a time.
    """

    def __init__(self, config: PluginConfig) -> None:
        self._model = None if config.profile is None else config.profile.model
        self._margin_s = config.planner.ttft_margin_s
        self._book = self._new_book()
        self._calls: OrderedDict[str, tuple[CallDue, bool]] = OrderedDict()
        self._left: deque[tuple[str, Mapping[str, Any], float]] = deque(maxlen=MOST_CALLS)
        self._over: deque[tuple[str, float]] = deque(maxlen=MOST_CALLS)

    def _new_book(self) -> TaskBook:
        return TaskBook(self._zero_load_s)

    def _zero_load_s(self, tokens: int) -> float:
        return 0.0 if self._model is None else self._model.zero_load_s(tokens)

    def with_task(
        self, slo_class: SLOClass | None, args: SloArgs, asked: RoutingRequest, *, begins: bool = False
    ) -> tuple[RoutingRequest, CallDue | None]:
        """The request with what it is due as a call of its task, and that call.

        One that ``begins`` is noted. Any other is the first call of the first task that there is.
        """
        task = task_of(slo_class)
        if task is None or self._model is None:
            return asked, None
        key = TaskKey(args.tenant or "", args.session_id or "")
        wanted = CallAsked(
            task,
            asked.class_index,
            asked.arrival_s,
            asked.prompt_tokens,
            asked.max_tokens,
            asked.hint_tokens,
            args.last_round,
        )
        if begins:
            while self._left:
                self._ended(*self._left.popleft())
            while self._over and self._over[0][1] < asked.arrival_s - WORD_WITHIN_S:
                self._withdraw(self._over.popleft()[0])
            call, _ = self._book.begin(key, wanted)
        else:
            call = self._new_book().due(key, wanted)
        due_s = min(asked.answer_due_s, call.due_s - self._margin_s)
        return replace(asked, answer_due_s=due_s, weight=asked.weight * call.weight), call

    def refused(self, call: CallDue | None) -> None:
        """A call that began was refused."""
        if call is not None:
            self._book.withdraw(call)

    def sent(self, request_id: str, call: CallDue | None, *, last: bool) -> None:
        """A call that began goes to the engine under this id; ``last``: its client says that no other follows."""
        if call is not None:
            self._calls[request_id] = call, last
            if len(self._calls) > MOST_CALLS:
                self._calls.popitem(last=False)

    def left(self, request_id: str, outcome: Mapping[str, Any], now_s: float) -> None:
        """A request left the engine at ``now_s``. May be called from any thread."""
        self._left.append((request_id, outcome, now_s))

    def over(self, request_ids: Iterable[str], now_s: float) -> None:
        """An answer ended at ``now_s``. Of a call that vLLM did not take, as one with a bad field, no engine tells."""
        self._over.extend((request_id, now_s) for request_id in request_ids if request_id in self._calls)

    def _withdraw(self, request_id: str) -> None:
        found = self._calls.pop(request_id, None)
        if found is not None:
            self._book.withdraw(found[0])

    def _ended(self, request_id: str, outcome: Mapping[str, Any], now_s: float) -> None:
        found = self._calls.pop(request_id, None)
        if found is None:
            return
        call, last = found
        self._book.call_ended(
            call,
            now_s,
            int(outcome["output_tokens"]),
            finished=outcome["finished"] in _FINISHED,
            promised=outcome["rank"] is not None,
            last=last,
        )
