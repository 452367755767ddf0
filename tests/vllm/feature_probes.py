"""What each feature of vLLM asks of a scheduler: short scenes, played on stock and on ours over the dry engine.

A scene runs a few promised streams, then brings the feature, and watches when first tokens come. The same scene on
both schedulers has to give the same answers, without an exception, without a fault on the device, and with first
tokens at most two steps later than stock's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slos_serve.core.errors import UnsupportedEngineError
from slos_serve.testing.dry_engine import DryEngine
from slos_serve.testing.request import PLAIN, RequestFeatures
from slos_serve.testing.scheduler import Setup, make_scheduler, stock_class
from slos_serve.vllm_plugin.scheduler import SLOScheduler
from tests.builders import OPT_13B_A100

MOST_STEPS_LATER = 2
# Steps that a plan leaves to vLLM by design, and plans over their time on a busy machine: no faults.
SOFT_KINDS = frozenset({"empty_plan", "unserved", "overrun", "resting"})
CHAT_TTFT_S, CHAT_TPOT_S = 1.0, 0.1
CHAT: Mapping[str, Any] = {"slo_class": "chat"}


@dataclass
class Play:
    """One scene on one scheduler."""

    engine: DryEngine
    entered: dict[str, tuple[int, float]] = field(default_factory=dict)
    promised: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def prompt(self, tokens: int) -> list[int]:
        return [int(token) for token in self.rng.integers(5, 30_000, tokens)]

    def streams(self, count: int = 4, *, prompt: int = 100, answer: int = 300, slo: Mapping[str, Any] = CHAT) -> None:
        """Promised streams that are decoding when this returns."""
        names = [f"stream{number}" for number in range(count)]
        for name in names:
            self.engine.add(name, self.prompt(prompt), answer, slo)
        while any(len(self.engine.answers[name]) < 3 for name in names):
            self.engine.step()

    def watch(
        self,
        name: str,
        prompt: list[int],
        answer: int = 20,
        slo: Mapping[str, Any] | None = CHAT,
        features: RequestFeatures = PLAIN,
    ) -> None:
        """Enter a request whose first token is waited for."""
        self.entered[name] = (self.engine.all_steps, self.engine.now_s)
        if slo is not None:
            self.promised.add(name)
        self.engine.add(name, prompt, answer, slo, features)

    def abort(self, name: str) -> None:
        """The client has gone; how much of the answer it got depends on the schedule."""
        self.aborted.add(name)
        self.engine.abort(name)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    def until_first(self, *names: str, limit: int = 2000) -> None:
        for _ in range(limit):
            if all(self.engine.answers[name] for name in names):
                return
            self.engine.step()

    def first_token(self, name: str) -> tuple[int, float] | None:
        """Steps and seconds from entry to the first token; ``None`` when none came."""
        if not self.engine.token_steps[name]:
            return None
        steps, seconds = self.entered[name]
        return self.engine.token_steps[name][0] - steps, self.engine.token_times_s[name][0] - seconds

    def kept(self, name: str) -> bool:
        """Whether the promise of class ``chat`` was kept; False for a request without one."""
        times = self.engine.token_times_s[name]
        if name not in self.promised or not times:
            return False
        pace_s = (times[-1] - times[0]) / max(len(times) - 1, 1)
        return times[0] - self.entered[name][1] <= CHAT_TTFT_S and pace_s <= CHAT_TPOT_S


@dataclass(frozen=True)
class Scene:
    """A feature, the configuration it needs, and what happens.

    Attributes:
        may_refuse: the plug-in may refuse this configuration at start, in one sentence.
        counted: requests compete, so the order may differ: the worst first token of a promised request and the mean of
            all are compared, not each.
        most_steps_later: a first token may come so many steps after stock's.
        scarce: there is too little time, KV or adapters for all, so who waits is a choice: promises kept are compared.
    """

    name: str
    play: Callable[[Play], None]
    setup: Setup = field(default_factory=Setup)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    may_refuse: bool = False
    counted: bool = False
    most_steps_later: int = MOST_STEPS_LATER
    scarce: bool = False


@dataclass
class Outcome:
    """What a scene came to on one scheduler."""

    first: dict[str, tuple[int, float] | None] = field(default_factory=dict)
    promised: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)
    kept: int = 0
    answers: dict[str, list[int]] = field(default_factory=dict)
    finished: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    fallbacks: dict[str, int] = field(default_factory=dict)
    error: str = ""
    refused: str = ""

    def worst(self, names: Collection[str] | None = None) -> tuple[int, float] | None:
        """Largest steps and seconds to a first token, of ``names`` or of all; ``None`` when one never came."""
        chosen = [one for name, one in self.first.items() if names is None or name in names]
        if any(one is None for one in chosen) or not chosen:
            return None
        return max(one[0] for one in chosen if one), max(one[1] for one in chosen if one)

    def mean_steps(self) -> float:
        """Mean steps to a first token."""
        return sum(one[0] for one in self.first.values() if one) / max(len(self.first), 1)


def play(scene: Scene, folder: Path, cls: type[Any] | None = None) -> Outcome:
    """Play a scene to its end on a scheduler class, stock when none is given; ours reads the environment."""
    outcome = Outcome()
    if cls is None:
        cls = stock_class(async_scheduling=scene.arguments.get("async_scheduling", True))
    try:
        scheduler = make_scheduler(cls, folder, setup=scene.setup, **scene.arguments)
    except UnsupportedEngineError as error:
        outcome.refused = str(error)
        return outcome
    engine = DryEngine(scheduler, OPT_13B_A100, depth=None)
    scheduler.slo_clock_s = lambda: engine.now_s
    scene_play = Play(engine)
    try:
        scene.play(scene_play)
        engine.run(20_000)
        outcome.error = _left_behind(engine)
    except Exception as error:  # whatever the scheduler does belongs to the outcome
        outcome.error = f"{type(error).__name__}: {error}"[:200] or type(error).__name__
    watched = [name for name in scene_play.entered if name not in scene_play.aborted]
    outcome.first = {name: scene_play.first_token(name) for name in watched}
    outcome.promised, outcome.aborted = scene_play.promised, scene_play.aborted
    outcome.kept = sum(scene_play.kept(name) for name in watched)
    outcome.answers, outcome.finished, outcome.faults = engine.answers, engine.finished, engine.faults
    outcome.fallbacks = {kind: count for kind, count in counts_of(scheduler).items() if kind not in SOFT_KINDS}
    scheduler.shutdown()
    return outcome


def _left_behind(engine: DryEngine) -> str:
    if engine.scheduler.has_unfinished_requests():
        return "requests never finished"
    if engine.scheduler.kv_cache_manager.usage > 0.0:
        return "KV blocks were not freed"
    return ""


def counts_of(scheduler: Any) -> dict[str, int]:
    """Steps that the plug-in made in stock order, faults and overruns, by kind; empty for stock."""
    control = getattr(scheduler, "_slo", None)
    return dict(control.guard.counts) if control is not None else {}


def complaint(scene: Scene, stock: Outcome, ours: Outcome) -> str:
    """Why ours is worse than stock, empty when it is not."""
    if stock.error or stock.faults or stock.refused:
        return f"stock itself fails: {stock.error or stock.refused or stock.faults[0]}"
    if ours.refused:
        return "" if scene.may_refuse else f"refused: {ours.refused}"
    if ours.error or ours.faults:
        return ours.error or ours.faults[0]
    wrong = [
        name for name, answer in stock.answers.items() if not _same(answer, ours.answers[name], name in ours.aborted)
    ]
    if wrong:
        return f"answers differ: {wrong}"
    if ours.fallbacks:
        return f"fell back: {ours.fallbacks}"
    return _late(scene, stock, ours)


def _same(stock: list[int], ours: list[int], aborted: bool) -> bool:
    both = min(len(stock), len(ours)) if aborted else None
    return stock[:both] == ours[:both]


def _late(scene: Scene, stock: Outcome, ours: Outcome) -> str:
    if scene.scarce:
        return f"{ours.kept} promises kept, stock {stock.kept}" if ours.kept < stock.kept else ""
    if scene.counted:
        if stock.first and (stock.worst() is None) is not (ours.worst() is None):
            return "a first token never came"
        worst, limit = ours.worst(ours.promised), stock.worst(stock.promised)
        if worst is not None and limit is not None and worst[0] > limit[0] + scene.most_steps_later:
            return f"worst promised first token after {worst[0]} steps, stock {limit[0]}"
        if ours.mean_steps() > stock.mean_steps() + scene.most_steps_later:
            return f"first tokens after {ours.mean_steps():.1f} steps on average, stock {stock.mean_steps():.1f}"
        return ""
    for name, theirs in stock.first.items():
        mine = ours.first[name]
        if mine is None or (theirs is not None and mine[0] > theirs[0] + scene.most_steps_later):
            return f"{name}: first token after {mine and mine[0]} steps, stock {theirs and theirs[0]}"
    return ""


def compare(scene: Scene, folder: Path) -> str:
    """Play a scene on both and return :func:`complaint`."""
    return complaint(scene, play(scene, folder), play(scene, folder, SLOScheduler))
