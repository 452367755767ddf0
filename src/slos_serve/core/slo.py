"""What a request is promised: SLOs, the stages they apply to, and the classes that name them.

A promise is per stage. The first stage begins with the prompt and carries the time to first token and the time of the
complete answer; each stage carries a time per output token. Times are in milliseconds where people write them and in
seconds everywhere else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from slos_serve.core.errors import InvalidFieldError

MAX_LATENCY_MS = 86_400_000.0
MAX_WEIGHT = 1000.0
MAX_CLASSES = 32
MAX_OTHERWISE = 4
# What a kept weaker promise is worth, of the first one: those who can have their first promise come first.
WEAKER_WEIGHT = 0.1
DEFAULT_TTFT_FLOOR_MS = 200.0
DEFAULT_MAX_STALL_MS = 2000.0
NO_SLO_CLASS = "none"
_CLASS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True, slots=True)
class SLO:
    """Latency promises of one stage. All ``None`` means best effort.

    Attributes:
        ttft_ms: first token of the stage within this many milliseconds of its start.
        ttft_slowdown: first token within this multiple of the prompt's zero-load time (one batch that holds the whole
            prompt). Used when ``ttft_ms`` is not given.
        ttft_floor_ms: least TTFT that a slowdown can ask for; a ten-token prompt cannot beat a running batch.
        tpot_ms: mean time per output token after the first.
        e2e_ms: the last token of the answer within this many milliseconds of the request's arrival.
    """

    ttft_ms: float | None = None
    ttft_slowdown: float | None = None
    ttft_floor_ms: float = DEFAULT_TTFT_FLOOR_MS
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms", "ttft_floor_ms", "e2e_ms"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, low=0.0, high=MAX_LATENCY_MS)
        if self.ttft_slowdown is not None:
            check_number("ttft_slowdown", self.ttft_slowdown, low=1.0, high=10_000.0, low_included=True)

    def implies(self, other: SLO) -> bool:
        """Whether whoever keeps this promise keeps ``other``, whatever the prompt and the answer."""
        ttft = other.ttft_ms is None and other.ttft_slowdown is None
        ttft = ttft or _at_most(self.ttft_ms, other.ttft_ms)
        ttft = ttft or (_at_most(self.ttft_slowdown, other.ttft_slowdown) and self.ttft_floor_ms <= other.ttft_floor_ms)
        tpot = other.tpot_ms is None or _at_most(self.tpot_ms, other.tpot_ms)
        return ttft and tpot and (other.e2e_ms is None or _at_most(self.e2e_ms, other.e2e_ms))

    @property
    def best_effort(self) -> bool:
        """True when nothing is promised."""
        given = (self.ttft_ms, self.ttft_slowdown, self.tpot_ms, self.e2e_ms)
        return all(value is None for value in given)

    def ttft_s(self, zero_load_s: float) -> float:
        """Promised time to first token in seconds (``inf`` when none), given the prompt's zero-load time."""
        if self.ttft_ms is not None:
            return self.ttft_ms / 1000.0
        if self.ttft_slowdown is not None:
            return max(self.ttft_slowdown * zero_load_s, self.ttft_floor_ms / 1000.0)
        return math.inf

    @property
    def tpot_s(self) -> float:
        """Promised time per output token in seconds, ``inf`` when none."""
        return math.inf if self.tpot_ms is None else self.tpot_ms / 1000.0

    @property
    def e2e_s(self) -> float:
        """Promised seconds from arrival to the last token, ``inf`` when none."""
        return math.inf if self.e2e_ms is None else self.e2e_ms / 1000.0


def _at_most(value: float | None, bound: float | None) -> bool:
    return value is not None and bound is not None and value <= bound


class WhenFull(StrEnum):
    """What becomes of a request that asks for a promise and cannot get it now."""

    BEST_EFFORT = "best_effort"
    """It is served without a promise, which it may still get."""
    REJECT = "reject"
    """It is refused at once with HTTP 429 and the time after which to ask again."""
    REJECT_503 = "reject_503"
    """As ``reject``, with HTTP 503: for balancers that send 503 elsewhere and give 429 back."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One decode stage of a request and what ends it.

    Attributes:
        slo: promises of the stage; TTFT and complete answer count only for the first stage of a call.
        end_token_id: token that ends the stage (a think-end token), ``None`` when it runs to the end.
        max_tokens: token count that ends the stage, ``None`` when unbounded.
    """

    slo: SLO
    end_token_id: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.end_token_id is not None and self.end_token_id < 0:
            raise InvalidFieldError("end_token_id", self.end_token_id, "a token id, 0 or more")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidFieldError("stage max_tokens", self.max_tokens, "a whole number, 1 or more")


@dataclass(frozen=True, slots=True)
class SLOClass:
    """A named promise that requests refer to.

    Attributes:
        name: letters, digits, ``_ . -``; bounded so that it can label a metric.
        stages: one or more stages in order; ``stages[0].slo`` holds the TTFT and the time of the complete answer.
        weight: what attaining one request is worth to admission, relative to others.
        max_stall_ms: longest gap the scheduler may cause between two tokens of a stream.
        when_full: what becomes of a request that cannot be promised now.
        last_round: class that a session's last call gets instead, when the client marks it; ``None`` for this one.
        otherwise: weaker promises, asked for in this order once the one before cannot be kept.
    """

    name: str
    stages: tuple[Stage, ...]
    weight: float = 1.0
    max_stall_ms: float = DEFAULT_MAX_STALL_MS
    when_full: WhenFull = WhenFull.BEST_EFFORT
    last_round: str | None = None
    otherwise: tuple[SLO, ...] = ()

    def __post_init__(self) -> None:
        if not _CLASS_NAME.fullmatch(self.name):
            raise InvalidFieldError("class name", self.name, "1 to 63 letters, digits, '_', '.', '-'")
        if not self.stages:
            raise InvalidFieldError(f"classes.{self.name}.stages", self.stages, "at least one stage")
        check_number("weight", self.weight, low=0.0, high=MAX_WEIGHT)
        check_number("max_stall_ms", self.max_stall_ms, low=0.0, high=MAX_LATENCY_MS)
        if len(self.otherwise) > MAX_OTHERWISE:
            allowed = f"at most {MAX_OTHERWISE} promises"
            raise InvalidFieldError(f"classes.{self.name}.otherwise", len(self.otherwise), allowed)
        if self.otherwise and (self.best_effort or any(slo.best_effort for slo in self.otherwise)):
            allowed = "promises, weaker than those of a class that promises something"
            raise InvalidFieldError(f"classes.{self.name}.otherwise", "no promise", allowed)
        for index, (weaker, before) in enumerate(zip(self.otherwise, (self.slo, *self.otherwise), strict=False)):
            if weaker.implies(before):
                field = f"classes.{self.name}.otherwise[{index}]"
                raise InvalidFieldError(field, "at least as strict", "a promise weaker than the one before it")

    @property
    def slo(self) -> SLO:
        """Promises of the first stage."""
        return self.stages[0].slo

    @property
    def best_effort(self) -> bool:
        """True when no stage promises anything."""
        return all(stage.slo.best_effort for stage in self.stages)

    @property
    def promises(self) -> tuple[SLOClass, ...]:
        """The class and its weaker forms, in the order in which they are asked for."""
        return (self, *(self._weakened(slo) for slo in self.otherwise))

    def _weakened(self, slo: SLO) -> SLOClass:
        """The same class with ``slo`` for its first stage, the pace of it for every stage, and less weight."""
        first, *later = self.stages
        stages = [replace(stage, slo=SLO(tpot_ms=slo.tpot_ms)) for stage in later]
        weight = WEAKER_WEIGHT * self.weight
        return replace(self, stages=(replace(first, slo=slo), *stages), weight=weight, otherwise=())

    def with_overrides(
        self, ttft_ms: float | None = None, tpot_ms: float | None = None, e2e_ms: float | None = None
    ) -> SLOClass:
        """The same class with a request's own absolute TTFT, TPOT for every stage, or time of the complete answer;
        nothing weaker instead."""
        stages = self.stages
        if e2e_ms is not None:
            stages = (replace(stages[0], slo=replace(stages[0].slo, e2e_ms=e2e_ms)), *stages[1:])
        if tpot_ms is not None:
            stages = tuple(replace(stage, slo=replace(stage.slo, tpot_ms=tpot_ms)) for stage in stages)
        if ttft_ms is not None:
            first = replace(stages[0], slo=replace(stages[0].slo, ttft_ms=ttft_ms, ttft_slowdown=None))
            stages = (first, *stages[1:])
        return replace(self, stages=stages, otherwise=())


def single_stage(name: str, slo: SLO, weight: float = 1.0, max_stall_ms: float = DEFAULT_MAX_STALL_MS) -> SLOClass:
    """A class whose requests have one decode stage."""
    return SLOClass(name=name, stages=(Stage(slo=slo),), weight=weight, max_stall_ms=max_stall_ms)


@dataclass(frozen=True)
class ClassSet:
    """The classes an engine serves.

    Attributes:
        classes: by name, in file order.
        default: class of requests that name none; ``None`` leaves them without an SLO, as in stock vLLM.
    """

    classes: Mapping[str, SLOClass] = field(default_factory=dict)
    default: str | None = None

    def __post_init__(self) -> None:
        if len(self.classes) > MAX_CLASSES:
            raise InvalidFieldError("classes", len(self.classes), f"at most {MAX_CLASSES} classes")
        if self.default is not None and self.default not in self.classes:
            raise InvalidFieldError("default_class", self.default, f"one of {sorted(self.classes)}")
        for slo_class in self.classes.values():
            if slo_class.last_round is not None and slo_class.last_round not in self.classes:
                field_name = f"classes.{slo_class.name}.last_round"
                raise InvalidFieldError(field_name, slo_class.last_round, f"one of {sorted(self.classes)}")

    def __iter__(self) -> Iterator[SLOClass]:
        return iter(self.classes.values())

    def __len__(self) -> int:
        return len(self.classes)

    def resolve(
        self,
        name: str | None,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        *,
        e2e_ms: float | None = None,
        last_round: bool = False,
    ) -> SLOClass | None:
        """The class a request gets, its own numbers applied; ``None`` when it asked for nothing.

        The last call of a session gets the class that its class names for it.

        Raises:
            InvalidFieldError: the class is unknown or a number is out of range.
        """
        chosen = self.default if name is None else name
        if chosen is None or (chosen == NO_SLO_CLASS and chosen not in self.classes):
            own = SLO(ttft_ms=ttft_ms, tpot_ms=tpot_ms, e2e_ms=e2e_ms)
            return None if own.best_effort else single_stage("custom", own)
        found = self.classes.get(chosen)
        if found is None:
            known = sorted({*self.classes, NO_SLO_CLASS})
            raise InvalidFieldError("slo_class", chosen, f"one of {known}")
        if last_round and found.last_round is not None:
            found = self.classes[found.last_round]
        if ttft_ms is None and tpot_ms is None and e2e_ms is None:
            return found
        return found.with_overrides(ttft_ms, tpot_ms, e2e_ms)


def check_number(
    name: str, value: object, *, low: float, high: float, low_included: bool = False, where: str | None = None
) -> float:
    """Return ``value`` as a float when it is a real number in range, else raise :class:`InvalidFieldError`."""
    opening = "[" if low_included else "("
    allowed = f"a number in {opening}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidFieldError(name, value, allowed, where)
    # Compared before it is converted: a whole number may be too large for a float. A nan fails the first comparison.
    if not low <= value <= high or (value == low and not low_included):
        raise InvalidFieldError(name, value, allowed, where)
    return float(value)
