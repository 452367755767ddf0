"""Bursts through the front end and vLLM's real scheduler, in virtual time: what was told, what was done."""

from __future__ import annotations

import heapq
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from slos_serve.bench.requests import BenchRequest
from slos_serve.core.verdict import Verdict
from slos_serve.routing.publication import Publication
from slos_serve.testing.dry_engine import DryEngine
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.front.client import with_said
from slos_serve.vllm_plugin.front.desk import FrontDesk
from slos_serve.vllm_plugin.front.judged import Judged
from slos_serve.vllm_plugin.front.link import PROMISED_KEY
from slos_serve.vllm_plugin.front.open_promises import MOST_HELD_S
from slos_serve.vllm_plugin.metrics import EngineLabels
from slos_serve.vllm_plugin.publish import TICKETS_KEY, FrontPublisher
from tests.vllm.dry_load import prompt

# From the hand-over in the API process to the scheduler's queue.
TRANSIT_S = 0.01


class DryPublisher(FrontPublisher):
    """Hands publications to a front end in the same process; they take no time."""

    front: FrontDesk

    def deliver(self, publication: Publication) -> None:
        named = {TICKETS_KEY: [ticket for _, ticket in self._tickets]}
        self.front.heard(json.dumps(publication.as_dict() | named).encode(), is_state=True)

    def _is_heard(self) -> bool:
        return True


@dataclass
class ToldLoad:
    """A front end before a dry engine.

    Attributes:
        told: verdict of each request with a promise, by its id; of one that came again the second.
        waits: seconds that refused clients waited before they came again.
        starts: when requests without a promise were told that their answer begins, in seconds from their arrival.
        began: when these answers began.
    """

    engine: DryEngine
    folder: Path
    told: dict[str, Verdict] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        control = self.engine.scheduler._slo
        config = PluginConfig.from_environment(os.environ)
        self._arrived_s = self._asked_s = 0.0
        self._by_ticket: dict[int, tuple[str, Judged]] = {}
        self.front = FrontDesk(config, EngineLabels("m"), 8192, clock_s=lambda: self._asked_s)
        self.front.ready = True
        self.engine.scheduler.slo_clock_s = lambda: self.engine.now_s
        control.publisher = DryPublisher(self.folder / "state", control.policy)
        control.publisher.front = self.front
        control.publish_idle()
        self.engine.scheduler._slo_desk._front = os.getpid()
        control.front = SimpleNamespace(write=lambda fields: self._promised(fields[PROMISED_KEY]), close=lambda: None)
        self.engine.scheduler._slo_desk._arrival_s = lambda _stamped: self._arrived_s

    def run(
        self, requests: Iterable[BenchRequest], tokens_per_word: Mapping[str | None, float], *, again: bool = False
    ) -> None:
        """Serve requests to their end; with ``again`` those that are refused come back once, when they are told to."""
        rng, engine, number = np.random.default_rng(1), self.engine, itertools.count()
        coming = [(one.arrival_s, next(number), one) for one in requests]
        heapq.heapify(coming)
        arrivals = {one.request_id: one.arrival_s for _, _, one in coming}
        handed: list[tuple[float, int, Any]] = []
        while coming or handed or engine.scheduler.has_unfinished_requests():
            while coming and coming[0][0] <= engine.now_s:
                _, _, one = heapq.heappop(coming)
                tokens = prompt(rng, int(33 + tokens_per_word[one.slo_class] * len(one.prompt.split())))
                judged, extra_args = self._judge(one, tokens)
                if judged.refusal is None:
                    heapq.heappush(handed, (one.arrival_s + TRANSIT_S, next(number), (one, tokens, extra_args)))
                elif again and one.request_id not in self.waits:
                    self.waits[one.request_id] = judged.refusal[1]
                    back = replace(one, arrival_s=one.arrival_s + judged.refusal[1])
                    heapq.heappush(coming, (back.arrival_s, next(number), back))
            while handed and handed[0][0] <= engine.now_s:
                at_s, _, (one, tokens, extra_args) = heapq.heappop(handed)
                self._arrived_s = at_s - TRANSIT_S
                engine.add(one.request_id, tokens, one.max_tokens, extra_args)
            if engine.scheduler.has_unfinished_requests():
                engine.step()
                self._note_begun(arrivals)
            elif coming or handed:
                engine.now_s = max(engine.now_s, min(one[0] for one in (*coming, *handed)))

    def fields(self, one: BenchRequest) -> dict[str, Any] | None:
        """What a request asks for."""
        return {"slo_class": one.slo_class} if one.slo_class else None

    def _promised(self, made: Iterable[tuple[int, int]]) -> None:
        """The engine made promises to requests whose clients were told none: heads that still wait say so."""
        for ticket, rank in made:
            key, judged = self._by_ticket[ticket]
            if self.engine.now_s < judged.arrival_s + min(max(judged.targets_s), MOST_HELD_S):
                self.front.heard(json.dumps({PROMISED_KEY: [(ticket, rank)]}).encode(), is_state=False)
                assert judged.answer is not None
                self.told[key] = judged.answer.verdict

    def _note_begun(self, arrivals: Mapping[str, float]) -> None:
        for key in self.starts.keys() - self.began.keys():
            if self.engine.answers.get(key):
                self.began[key] = self.engine.now_s - arrivals[key]

    def _judge(self, one: BenchRequest, tokens: list[int]) -> tuple[Judged, Mapping[str, Any] | None]:
        """Ask the front end; returns what it said, and what the engine gets beside the prompt."""
        slo_class = None if one.slo_class is None else self.front.version.classes.classes[one.slo_class]
        self._asked_s = one.arrival_s
        judged = self.front.begin(slo_class, self.front.version)
        extra_args = self.fields(one)
        params = SimpleNamespace(max_tokens=one.max_tokens, n=1, extra_args=extra_args)
        handed = self.front.entered(judged, {"prompt_token_ids": tokens}, params, one.request_id)
        assert judged.answer is not None
        self._by_ticket |= dict.fromkeys(judged.open, (one.request_id, judged))
        if judged.answer.start_s is not None:
            self.starts[one.request_id] = judged.answer.start_s
        if slo_class is not None:
            self.told[one.request_id] = judged.answer.verdict
        return judged, with_said(params, self.front.version, handed).extra_args

    def compared(self, events: list[dict[str, Any]]) -> Counter[tuple[str, str, bool]]:
        """How many of those that were served were told what, got what, and whether their promise was kept."""
        found = {event["request_id"]: event for event in events}
        return Counter(
            (str(told), found[key]["verdict"], bool(found[key]["ttft_ok"] and found[key]["tpot_ok"]))
            for key, told in self.told.items()
            if told is not Verdict.REJECTED
        )
