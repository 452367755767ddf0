"""What the plug-in is configured with, read from the environment of the engine-core process at start.

``SLOS_SERVE_CLASSES`` names the class file, ``SLOS_SERVE_PROFILE`` the batch-time profile, ``SLOS_SERVE_EVENTS`` an
optional JSONL file for what happened to each request and step, ``SLOS_SERVE_PUBLISH`` where a router's mirror of this
engine is fed from. vLLM starts its engine core with the server's
environment, so one ``export`` reaches both processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import ClassSet
from slos_serve.files.class_file import ClassFile, load_class_file
from slos_serve.files.profile_file import Profile, load_profile
from slos_serve.planning.settings import PlannerSettings
from slos_serve.routing.settings import PUBLISH_EVERY_S

CLASSES_VARIABLE = "SLOS_SERVE_CLASSES"
PROFILE_VARIABLE = "SLOS_SERVE_PROFILE"
EVENTS_VARIABLE = "SLOS_SERVE_EVENTS"
PLAN_LIMIT_VARIABLE = "SLOS_SERVE_PLAN_LIMIT_MS"
MARGIN_VARIABLE = "SLOS_SERVE_TTFT_MARGIN_MS"
PUBLISH_VARIABLE = "SLOS_SERVE_PUBLISH"
PUBLISH_EVERY_VARIABLE = "SLOS_SERVE_PUBLISH_EVERY_MS"
DEFAULT_PLAN_LIMIT_S = 0.010


@dataclass(frozen=True)
class PluginSettings:
    """Configuration of one scheduler.

    Attributes:
        classes: promises by name; empty without a class file.
        profile: measured batch times; ``None`` leaves only stock order.
        events_path: where to append events, ``None`` for nowhere.
        plan_limit_s: processor time a plan may take before its step falls back to stock order.
        planner: the planner's knobs.
        publish_to: ZeroMQ address that the planner's state is published to, ``None`` for nowhere.
        publish_every_s: age that a publication may reach.
    """

    classes: ClassSet = field(default_factory=ClassSet)
    profile: Profile | None = None
    events_path: Path | None = None
    plan_limit_s: float = DEFAULT_PLAN_LIMIT_S
    planner: PlannerSettings = field(default_factory=PlannerSettings)
    publish_to: str | None = None
    publish_every_s: float = PUBLISH_EVERY_S

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> PluginSettings:
        """Read the files that the environment names.

        Raises:
            InvalidFieldError: a variable or a file cannot be used.
        """
        classes_path = environment.get(CLASSES_VARIABLE)
        profile_path = environment.get(PROFILE_VARIABLE)
        events_path = environment.get(EVENTS_VARIABLE)
        written = load_class_file(Path(classes_path)) if classes_path else ClassFile(ClassSet())
        margin_ms = _milliseconds(environment, MARGIN_VARIABLE, written.scheduler.ttft_margin_s * 1000.0)
        return cls(
            classes=written.classes,
            profile=load_profile(Path(profile_path)) if profile_path else None,
            events_path=Path(events_path) if events_path else None,
            plan_limit_s=_milliseconds(environment, PLAN_LIMIT_VARIABLE, DEFAULT_PLAN_LIMIT_S * 1000.0) / 1000.0,
            planner=replace(written.scheduler, ttft_margin_s=margin_ms / 1000.0),
            publish_to=environment.get(PUBLISH_VARIABLE) or None,
            publish_every_s=_milliseconds(environment, PUBLISH_EVERY_VARIABLE, PUBLISH_EVERY_S * 1000.0) / 1000.0,
        )


def _milliseconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 60_000.0:
        raise InvalidFieldError(name, text, "milliseconds, 0 to 60000")
    return value
