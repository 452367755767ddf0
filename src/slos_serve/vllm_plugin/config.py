"""The plug-in's configuration: the one description of its files and numbers, and the environment that carries it.

The launcher, the Ray application and the command line build a :class:`PluginConfig`; :meth:`PluginConfig.environment`
hands it to the server's processes; scheduler, middleware and ingress read it back with
:meth:`PluginConfig.from_environment`. vLLM starts its engine core with the server's environment, so one ``export``
reaches both processes. Files are opened when they are first asked for, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import ClassSet
from slos_serve.core.tiers import TierMap
from slos_serve.core.trust import Trust
from slos_serve.files.class_file import ClassFile, load_class_file
from slos_serve.files.profile_file import Profile, load_profile
from slos_serve.planning.settings import PlannerSettings
from slos_serve.routing.settings import PUBLISH_EVERY_S

CLASSES_ENV = "SLOS_SERVE_CLASSES"
PROFILE_ENV = "SLOS_SERVE_PROFILE"
EVENTS_ENV = "SLOS_SERVE_EVENTS"
PUBLISH_ENV = "SLOS_SERVE_PUBLISH"
PUBLISH_EVERY_ENV = "SLOS_SERVE_PUBLISH_EVERY_MS"
PLAN_LIMIT_ENV = "SLOS_SERVE_PLAN_LIMIT_MS"
TTFT_MARGIN_ENV = "SLOS_SERVE_TTFT_MARGIN_MS"
FAULT_LIMIT_ENV = "SLOS_SERVE_FAULT_LIMIT"
ALLOW_MISMATCH_ENV = "SLOS_SERVE_ALLOW_PROFILE_MISMATCH"
MAX_BODY_ENV = "SLOS_SERVE_MAX_BODY_MIB"
CUSTOM_NUMBERS_ENV = "SLOS_SERVE_CUSTOM_NUMBERS"
FRONT_END_ENV = "SLOS_SERVE_FRONT_END"
LIVE_PAGE_ENV = "SLOS_SERVE_LIVE_PAGE"
ENV_OF_FIELD: Mapping[str, str] = {
    "classes_path": CLASSES_ENV,
    "profile_path": PROFILE_ENV,
    "events_path": EVENTS_ENV,
    "publish_to": PUBLISH_ENV,
    "publish_every_ms": PUBLISH_EVERY_ENV,
    "plan_limit_ms": PLAN_LIMIT_ENV,
    "ttft_margin_ms": TTFT_MARGIN_ENV,
    "fault_limit": FAULT_LIMIT_ENV,
    "allow_profile_mismatch": ALLOW_MISMATCH_ENV,
    "max_body_mib": MAX_BODY_ENV,
    "custom_numbers": CUSTOM_NUMBERS_ENV,
    "front_end": FRONT_END_ENV,
    "live_page": LIVE_PAGE_ENV,
}
# Field of the plug-in's configuration -> its key in a Serve YAML.
PLUGIN_KEYS: Mapping[str, str] = {
    "classes_path": "classes",
    "profile_path": "profile",
    "events_path": "events",
    "publish_every_ms": "publish_every_ms",
    "plan_limit_ms": "plan_limit_ms",
    "ttft_margin_ms": "ttft_margin_ms",
    "fault_limit": "fault_limit",
    "allow_profile_mismatch": "allow_profile_mismatch",
    "max_body_mib": "max_body_mib",
    "custom_numbers": "custom_numbers",
    "live_page": "live_page",
}
_MILLISECONDS = "milliseconds, 0 to 60000"


class PluginConfig(BaseModel):
    """Configuration of the scheduler and the middleware of one server.

    Attributes:
        classes_path: class file; ``None`` leaves only the numbers that requests bring.
        profile_path: batch-time profile; ``None`` leaves stock order.
        events_path: file that events are appended to, ``None`` for nowhere.
        publish_to: ZeroMQ address that the planner's state is published to, ``None`` for nowhere.
        publish_every_ms: age that a publication may reach.
        plan_limit_ms: processor time a plan may take, or a tenth of its step where that is more; see ``guard``.
        ttft_margin_ms: subtracted from every TTFT deadline; 0 leaves what the class file says.
        fault_limit: faults in a row after which the scheduler stays in stock order until restart.
        allow_profile_mismatch: warn instead of refusing when the profile was measured on something else.
        max_body_mib: largest request body that the middleware looks into, in MiB.
        custom_numbers: requests may bring TTFT and TPOT of their own; else they may only name a class.
        front_end: a single server's API process judges requests, says the verdict and refuses what is full.
        live_page: the server shows what it does at ``/slo``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    classes_path: Path | None = Field(default=None, description="the path of a class file")
    profile_path: Path | None = Field(default=None, description="the path of a batch-time profile")
    events_path: Path | None = Field(default=None, description="the path of a file to append to")
    publish_to: str | None = Field(default=None, description="a ZeroMQ address")
    publish_every_ms: float = Field(default=PUBLISH_EVERY_S * 1000.0, ge=0.0, le=60_000.0, description=_MILLISECONDS)
    plan_limit_ms: float = Field(default=10.0, ge=0.0, le=60_000.0, description=_MILLISECONDS)
    ttft_margin_ms: float = Field(default=0.0, ge=0.0, le=60_000.0, description=_MILLISECONDS)
    fault_limit: int = Field(default=20, ge=1, le=1_000_000, description="a whole number, 1 to 1000000")
    allow_profile_mismatch: bool = Field(default=False, description="0 or 1")
    max_body_mib: float = Field(default=4.0, gt=0.0, le=1024.0, description="MiB, above 0, at most 1024")
    custom_numbers: bool = Field(default=True, description="0 or 1")
    front_end: bool = Field(default=True, description="0 or 1")
    live_page: bool = Field(default=True, description="0 or 1")

    @classmethod
    def of(cls, fields: Mapping[str, Any], names: Mapping[str, str] | None = None) -> Self:
        """Validate ``fields``.

        Args:
            fields: values by field name; ``None`` and empty text count as not given.
            names: field -> the name that its giver knows it by (a variable, a key of a file).

        Raises:
            InvalidFieldError: names the variable or key, the value and what is allowed.
        """
        try:
            return cls(**{name: value for name, value in fields.items() if value not in (None, "")})
        except ValidationError as fault:
            raise invalid_field(fault, cls, names) from None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the variables of :data:`ENV_OF_FIELD` and open the files that they name.

        Raises:
            InvalidFieldError: a variable or a file cannot be used.
        """
        found = cls.of({field: environment.get(name) for field, name in ENV_OF_FIELD.items()}, ENV_OF_FIELD)
        _ = found.classes, found.profile  # opened now, so that a file that cannot be used is refused here
        return found

    @classmethod
    def of_middleware(cls, environment: Mapping[str, str]) -> Self:
        """As :meth:`from_environment`, for the front end, which reads the classes and what requests may bring.

        Raises:
            InvalidFieldError: a variable or the class file cannot be used.
        """
        read = ("classes_path", "max_body_mib", "custom_numbers")
        found = cls.of({field: environment.get(ENV_OF_FIELD[field]) for field in read}, ENV_OF_FIELD)
        _ = found.classes
        return found

    def environment(self) -> dict[str, str]:
        """The variables that say this; fields at their default are left out, paths are absolute."""
        told = {}
        for field in self.model_fields_set:
            value = getattr(self, field)
            if value != type(self).model_fields[field].default:
                told[ENV_OF_FIELD[field]] = _text(value)
        return dict(sorted(told.items()))

    def with_profile(self, path: Path) -> Self:
        """The same with another profile."""
        return type(self)(**{**self.model_dump(exclude_unset=True), "profile_path": path})

    @cached_property
    def class_file(self) -> ClassFile:
        """Classes and planner settings as the class file has them."""
        return ClassFile(ClassSet()) if self.classes_path is None else load_class_file(self.classes_path)

    @property
    def classes(self) -> ClassSet:
        """Promises by name; empty without a class file."""
        return self.class_file.classes

    @cached_property
    def trust(self) -> Trust:
        """Who may ask for what; ``custom_numbers`` off forbids numbers to everybody."""
        return self.class_file.trust.allowing(self.custom_numbers)

    @property
    def tiers(self) -> TierMap:
        """The classes that fields and headers of others stand for."""
        return self.class_file.tiers

    @cached_property
    def profile(self) -> Profile | None:
        """Measured batch times; ``None`` without a profile."""
        return None if self.profile_path is None else load_profile(self.profile_path)

    @property
    def planner(self) -> PlannerSettings:
        """The planner's settings: those of the class file; a TTFT margin in the environment counts over it."""
        written = self.class_file.scheduler
        return replace(written, ttft_margin_s=self.ttft_margin_ms / 1000.0) if self.ttft_margin_ms else written

    @property
    def plan_limit_s(self) -> float:
        """``plan_limit_ms`` in seconds."""
        return self.plan_limit_ms / 1000.0

    @property
    def publish_every_s(self) -> float:
        """``publish_every_ms`` in seconds."""
        return self.publish_every_ms / 1000.0

    @property
    def max_body_bytes(self) -> int:
        """``max_body_mib`` in bytes."""
        return int(self.max_body_mib * 1024 * 1024)


def invalid_field(
    fault: ValidationError, model: type[BaseModel], names: Mapping[str, str] | None = None, where: str | None = None
) -> InvalidFieldError:
    """The first error of ``fault`` as this package words it: which field, what was given, what is allowed."""
    error = fault.errors(include_url=False)[0]
    field = str(error["loc"][0]) if error["loc"] else model.__name__
    info = model.model_fields.get(field)
    allowed = error["msg"] if info is None or info.description is None else info.description
    if error["type"] == "extra_forbidden":
        allowed = f"one of {[(names or {}).get(name, name) for name in model.model_fields]}"
    return InvalidFieldError((names or {}).get(field, field), error["input"], allowed, where)


def without_file_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without the variables that name files, which another start may have left there; numbers stay."""
    files = {name for field, name in ENV_OF_FIELD.items() if field.endswith("_path")}
    return {name: value for name, value in environment.items() if name not in files}


def _text(value: object) -> str:
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, bool):
        return "1" if value else "0"
    return f"{value:g}" if isinstance(value, float) else str(value)
