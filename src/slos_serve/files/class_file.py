"""Read the class file: the YAML in which an operator writes what each class of requests is promised.

    default_class: chat
    classes:
      chat:   {ttft_slowdown: 5, tpot_ms: 100}
      code:   {ttft_ms: 1500, tpot_ms: 50, weight: 2}
      reason:
        ttft_slowdown: 3
        stages:
          - {tpot_ms: 50, end_token_id: 151668}   # thinking, up to the think-end token
          - {tpot_ms: 100}                        # the answer

A class without promises (``batch: {}``) is a name for best effort. ``tpot_ms`` of a class holds for each of its stages
that gives none; ``e2e_ms`` is the time of the complete answer, ``task_ms`` that of a whole task of several calls.
``when_full: reject`` refuses a request that cannot be promised now with 429, ``reject_503`` with 503 (``best_effort``,
the default, serves it all the same); ``last_round: chat`` gives the call that a client marks as its session's last the
promises of another class. The section
``scheduler:`` sets the planner's settings (docs/settings.md), ``trust:`` says who may ask for what and ``map:`` which
class a field of others stands for (docs/promises.md).
Nothing is guessed: an unknown key, a key given twice or a number out of range is an error that names the file, the
line, the field, what was given and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import (
    DEFAULT_MAX_STALL_MS,
    DEFAULT_TTFT_FLOOR_MS,
    MAX_LATENCY_MS,
    MAX_OTHERWISE,
    MAX_WEIGHT,
    NO_SLO_CLASS,
    SLO,
    ClassSet,
    SLOClass,
    Stage,
    WhenFull,
    check_number,
)
from slos_serve.core.tasks import TaskPromise, check_calls, with_task
from slos_serve.core.tiers import TierMap
from slos_serve.core.trust import Trust
from slos_serve.files.trust_section import TrustReader
from slos_serve.files.yaml_nodes import MOST_WHOLE, NodeReader, shown
from slos_serve.planning.settings import RANGES, WHOLE, PlannerSettings

CUSTOM_CLASS = "custom"
MAX_STAGES = 16
# What time between the calls of a task does: the first counts it.
PAUSES = ("count", "free")
MAX_STAGE_TOKENS = MOST_WHOLE
_TOP_KEYS = ("classes", "default_class", "map", "max_stall_ms", "scheduler", "trust")
_CLASS_KEYS = (
    "ttft_ms",
    "ttft_slowdown",
    "ttft_floor_ms",
    "tpot_ms",
    "e2e_ms",
    "task_ms",
    "task_calls",
    "task_pauses",
    "weight",
    "max_stall_ms",
    "stages",
    "when_full",
    "last_round",
    "otherwise",
)
_PROMISE_KEYS = ("ttft_ms", "ttft_slowdown", "ttft_floor_ms", "tpot_ms", "e2e_ms")
_STAGE_KEYS = ("tpot_ms", "end_token_id", "max_tokens")
_RESERVED = (NO_SLO_CLASS, CUSTOM_CLASS)


@dataclass(frozen=True, slots=True)
class ClassFile:
    """What a class file says.

    Attributes:
        classes: promises by name.
        scheduler: the planner's settings, defaults where the file has none.
        trust: who may ask for what; everybody for everything where the file has no such section.
        tiers: the classes that fields and headers of others stand for.
    """

    classes: ClassSet
    scheduler: PlannerSettings = field(default_factory=PlannerSettings)
    trust: Trust = field(default_factory=Trust)
    tiers: TierMap = field(default_factory=TierMap)


def load_classes(path: str | Path) -> ClassSet:
    """The classes of a class file; see :func:`load_class_file`."""
    return load_class_file(path).classes


def load_class_file(path: str | Path) -> ClassFile:
    """Read a class file.

    Raises:
        InvalidFieldError: the file cannot be read, is no YAML, or holds a field that cannot be used; ``where`` is
            ``file:line``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFieldError("class file", str(path), f"a readable UTF-8 file ({error})") from error
    return parse_class_file(text, str(path))


def parse_classes(text: str, name: str) -> ClassSet:
    """The classes of a class file's text; ``name`` is what errors call it."""
    return parse_class_file(text, name).classes


def parse_class_file(text: str, name: str) -> ClassFile:
    """Read the text of a class file; ``name`` is what errors call it."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _syntax_error(error, name) from error
    except RecursionError as error:
        raise InvalidFieldError("class file", "endless nesting", "a few levels", name) from error
    return _FileReader(name).class_file(root)


class _FileReader(NodeReader):
    """Turns composed YAML nodes into classes."""

    def class_file(self, root: yaml.Node | None) -> ClassFile:
        if root is None:
            raise InvalidFieldError("class file", "", "a mapping with the key 'classes'", f"{self._name}:1")
        top = self._mapping(root, "class file", _TOP_KEYS)
        classes = self._class_set(root, top)
        sections = TrustReader(self._name, frozenset(classes.classes))
        return ClassFile(
            classes,
            self._scheduler(top["scheduler"]) if "scheduler" in top else PlannerSettings(),
            sections.trust(top["trust"]) if "trust" in top else Trust(),
            sections.tiers(top["map"]) if "map" in top else TierMap(),
        )

    def _scheduler(self, node: yaml.Node) -> PlannerSettings:
        """The planner's settings; a fault names the line of its own key."""
        keys = self._mapping(node, "scheduler", tuple(RANGES))
        given: dict[str, float | int] = {}
        for key, (low, high, low_included) in RANGES.items():
            if key in keys and key in WHOLE:
                given[key] = self._whole_setting(keys[key], key, int(low), int(high))
            elif key in keys:
                value, where = self._scalar(keys[key]), self._where(keys[key])
                given[key] = check_number(
                    f"scheduler.{key}", value, low=low, high=high, low_included=low_included, where=where
                )
        return PlannerSettings(**given)  # type: ignore[arg-type]  # whole numbers where they must be

    def _whole_setting(self, node: yaml.Node, key: str, low: int, high: int) -> int:
        value = self._scalar(node)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidFieldError(f"scheduler.{key}", value, f"a whole number in [{low}, {high}]", self._where(node))
        return value

    def _class_set(self, root: yaml.Node, top: Mapping[str, yaml.Node]) -> ClassSet:
        if "classes" not in top:
            raise InvalidFieldError("classes", None, "at least one class", self._where(root))
        max_stall_ms = self._number(top, "", "max_stall_ms", MAX_LATENCY_MS) or DEFAULT_MAX_STALL_MS
        named = self._mapping(top["classes"], "classes", None)
        if not named:
            raise InvalidFieldError("classes", {}, "at least one class", self._where(top["classes"]))
        classes = {name: self._slo_class(name, node, max_stall_ms) for name, node in named.items()}
        node = top.get("default_class")
        default = None if node is None else self._name_of(node, "default_class")
        try:
            return ClassSet(classes, default)
        except InvalidFieldError as error:
            at = node if error.field == "default_class" else top["classes"]
            if error.field.endswith(".last_round"):
                at = named[error.field.split(".", 1)[1].removesuffix(".last_round")]
            raise self._placed(error, at) from None

    def _slo_class(self, name: str, node: yaml.Node, max_stall_ms: float) -> SLOClass:
        field = f"classes.{name}"
        if name in _RESERVED:
            raise InvalidFieldError("class name", name, f"any name but {list(_RESERVED)}", self._where(node))
        keys = self._mapping(node, field, _CLASS_KEYS)
        slo = self._slo(keys, field)
        stages = self._stages(keys["stages"], field, slo) if "stages" in keys else (Stage(slo=slo),)
        weight = self._number(keys, field, "weight", MAX_WEIGHT)
        stall_ms = self._number(keys, field, "max_stall_ms", MAX_LATENCY_MS)
        when_full = self._when_full(keys, field)
        otherwise = self._otherwise(keys["otherwise"], f"{field}.otherwise") if "otherwise" in keys else ()
        task = self._task(keys, field)
        try:
            found = SLOClass(
                name=name,
                stages=stages,
                weight=1.0 if weight is None else weight,
                max_stall_ms=max_stall_ms if stall_ms is None else stall_ms,
                when_full=when_full,
                last_round=self._name_of(keys["last_round"], f"{field}.last_round") if "last_round" in keys else None,
                otherwise=otherwise,
            )
            if task is None:
                return found
            if otherwise:
                raise InvalidFieldError(f"{field}.otherwise", "task_ms", "no weaker promises beside task_ms")
            return with_task(found, task)
        except InvalidFieldError as error:
            raise self._placed(error, node) from None

    def _task(self, keys: Mapping[str, yaml.Node], field: str) -> TaskPromise | None:
        task_ms = self._number(keys, field, "task_ms", MAX_LATENCY_MS)
        if task_ms is None:
            for key in ("task_calls", "task_pauses"):
                if key in keys:
                    raise InvalidFieldError(
                        f"{field}.{key}", "no task_ms", "only beside task_ms", self._where(keys[key])
                    )
            return None
        calls = self._scalar(keys["task_calls"]) if "task_calls" in keys else None
        known = (
            check_calls(f"{field}.task_calls", calls, self._where(keys["task_calls"])) if calls is not None else None
        )
        pauses = self._name_of(keys["task_pauses"], f"{field}.task_pauses") if "task_pauses" in keys else PAUSES[0]
        if pauses not in PAUSES:
            allowed = f"one of {list(PAUSES)}"
            raise InvalidFieldError(f"{field}.task_pauses", pauses, allowed, self._where(keys["task_pauses"]))
        return TaskPromise(task_ms, known, pauses == PAUSES[0])

    def _otherwise(self, node: yaml.Node, field: str) -> tuple[SLO, ...]:
        """Weaker promises, in the order in which they are asked for."""
        if not isinstance(node, yaml.SequenceNode) or not 1 <= len(node.value) <= MAX_OTHERWISE:
            raise InvalidFieldError(field, shown(node), f"a list of 1 to {MAX_OTHERWISE} promises", self._where(node))
        found = []
        for index, item in enumerate(node.value):
            place = f"{field}[{index}]"
            slo = self._slo(self._mapping(item, place, _PROMISE_KEYS), place)
            if slo.best_effort:
                allowed = f"a promise: one of {list(_PROMISE_KEYS)}; best effort comes last by itself"
                raise InvalidFieldError(place, "no promise", allowed, self._where(item))
            found.append(slo)
        return tuple(found)

    def _when_full(self, keys: Mapping[str, yaml.Node], field: str) -> WhenFull:
        if "when_full" not in keys:
            return WhenFull.BEST_EFFORT
        text = self._name_of(keys["when_full"], f"{field}.when_full")
        if text not in list(WhenFull):
            allowed = f"one of {[kind.value for kind in WhenFull]}"
            raise InvalidFieldError(f"{field}.when_full", text, allowed, self._where(keys["when_full"]))
        return WhenFull(text)

    def _slo(self, keys: Mapping[str, yaml.Node], field: str) -> SLO:
        if "ttft_ms" in keys and "ttft_slowdown" in keys:
            where = self._where(keys["ttft_slowdown"])
            raise InvalidFieldError(f"{field}.ttft_slowdown", "both", "ttft_ms or ttft_slowdown, not both", where)
        if "ttft_floor_ms" in keys and "ttft_slowdown" not in keys:
            where = self._where(keys["ttft_floor_ms"])
            raise InvalidFieldError(f"{field}.ttft_floor_ms", "no ttft_slowdown", "only beside ttft_slowdown", where)
        floor_ms = self._number(keys, field, "ttft_floor_ms", MAX_LATENCY_MS)
        return SLO(
            ttft_ms=self._number(keys, field, "ttft_ms", MAX_LATENCY_MS),
            ttft_slowdown=self._number(keys, field, "ttft_slowdown", 10_000.0, low=1.0, low_included=True),
            ttft_floor_ms=DEFAULT_TTFT_FLOOR_MS if floor_ms is None else floor_ms,
            tpot_ms=self._number(keys, field, "tpot_ms", MAX_LATENCY_MS),
            e2e_ms=self._number(keys, field, "e2e_ms", MAX_LATENCY_MS),
        )

    def _stages(self, node: yaml.Node, field: str, first: SLO) -> tuple[Stage, ...]:
        field = f"{field}.stages"
        if not isinstance(node, yaml.SequenceNode) or not 1 <= len(node.value) <= MAX_STAGES:
            raise InvalidFieldError(field, shown(node), f"a list of 1 to {MAX_STAGES} stages", self._where(node))
        last = len(node.value) - 1
        return tuple(
            self._stage(item, f"{field}[{index}]", first, is_first=index == 0, is_last=index == last)
            for index, item in enumerate(node.value)
        )

    def _stage(self, node: yaml.Node, field: str, first: SLO, *, is_first: bool, is_last: bool) -> Stage:
        keys = self._mapping(node, field, _STAGE_KEYS)
        ends = [key for key in ("end_token_id", "max_tokens") if key in keys]
        if is_last and ends:
            allowed = "nothing on the last stage, which runs to the end of the request"
            raise InvalidFieldError(f"{field}.{ends[0]}", shown(keys[ends[0]]), allowed, self._where(keys[ends[0]]))
        if not is_last and not ends:
            allowed = "end_token_id or max_tokens, or the next stage would never begin"
            raise InvalidFieldError(field, "no end", allowed, self._where(node))
        own_tpot_ms = self._number(keys, field, "tpot_ms", MAX_LATENCY_MS)
        tpot_ms = first.tpot_ms if own_tpot_ms is None else own_tpot_ms
        return Stage(
            slo=replace(first, tpot_ms=tpot_ms) if is_first else SLO(tpot_ms=tpot_ms),
            end_token_id=self._whole(keys, field, "end_token_id", 0),
            max_tokens=self._whole(keys, field, "max_tokens", 1),
        )


def _syntax_error(error: yaml.YAMLError, name: str) -> InvalidFieldError:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark is not None else 1
    problem = getattr(error, "problem", None) or str(error)
    return InvalidFieldError("class file", problem, "YAML", f"{name}:{line}")
