"""Who may ask for what: tenants, the classes that they may name, and how much a minute they may have.

A tenant is a name that the proxy in front gives, or that stands for an API key; never what a client writes about
itself. Tenants that the class file does not name share one rule and one budget, so that inventing names gains nothing
and state stays bounded by the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

from slos_serve.core.errors import InvalidFieldError, SlosServeError

MAX_TENANTS = 1000
MAX_PER_MINUTE = 1_000_000_000
OTHERS = ""
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@:-]{0,62}")
TENANT_ALLOWED = "1 to 63 letters, digits, '_', '.', '@', ':', '-'"


class Denied(StrEnum):
    """Why a request may not have what it asks for."""

    CLASS = "class"
    """The class is not one of the tenant's."""
    NUMBERS = "numbers"
    """Numbers of its own, where the tenant may only name classes."""
    PROMISES = "promises"
    """The tenant has asked for as many promises as it may a minute."""
    TOKENS = "tokens"
    """The tenant has used as many tokens as it may a minute."""


class WhenDenied(StrEnum):
    """What becomes of a request that asks for what it may not have."""

    REJECT = "reject"
    """403, or 429 where waiting helps."""
    BEST_EFFORT = "best_effort"
    """It is served without a promise, and the answer says so."""


class DeniedError(SlosServeError):
    """A request asks for what its tenant may not have.

    Args:
        why: which limit.
        param: field to name in the answer.
        retry_after_s: when to ask again, for a limit a minute; ``None`` where waiting does not help.
    """

    def __init__(self, why: Denied, param: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.why = why
        self.param = param
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class TenantRule:
    """What a tenant may have.

    Attributes:
        classes: names it may ask for; ``None`` for every class.
        custom_numbers: it may bring TTFT and TPOT of its own.
        promises_per_minute: requests that ask for a promise, a minute; ``None`` without a limit.
        tokens_per_minute: prompt and answer tokens of such requests, a minute; ``None`` without a limit.
    """

    classes: frozenset[str] | None = None
    custom_numbers: bool = True
    promises_per_minute: float | None = None
    tokens_per_minute: float | None = None

    def denies(self, slo_class: str | None, has_numbers: bool) -> Denied | None:
        """Why a request with this class by name, and with numbers of its own, is denied; ``None`` if it is not."""
        if has_numbers and not self.custom_numbers:
            return Denied.NUMBERS
        if slo_class is not None and self.classes is not None and slo_class not in self.classes:
            return Denied.CLASS
        return None


NOTHING = TenantRule(classes=frozenset(), custom_numbers=False)


@dataclass(frozen=True)
class Trust:
    """The section ``trust:`` of a class file; by default everybody may ask for everything.

    Attributes:
        given: the class file has the section.
        custom_numbers: requests may bring numbers of their own, where their tenant's rule does not say otherwise.
        tenant_header: header in which the proxy names the tenant, in lower case; ``None`` for none.
        api_keys: tenants by SHA-256 of their API key, in lower-case hex.
        tenants: rules by name.
        others: rule of everybody else.
        when_denied: what becomes of a request that asks for more.
    """

    given: bool = False
    custom_numbers: bool = True
    tenant_header: str | None = None
    api_keys: Mapping[str, str] = field(default_factory=dict)
    tenants: Mapping[str, TenantRule] = field(default_factory=dict)
    others: TenantRule = field(default_factory=TenantRule)
    when_denied: WhenDenied = WhenDenied.REJECT

    def __post_init__(self) -> None:
        if len(self.tenants) > MAX_TENANTS:
            raise InvalidFieldError("trust.tenants", len(self.tenants), f"at most {MAX_TENANTS} tenants")

    def allowing(self, custom_numbers: bool) -> Trust:
        """The same where the server allows numbers of a request's own; else with those forbidden to everybody."""
        if custom_numbers:
            return self
        rules = {name: replace(rule, custom_numbers=False) for name, rule in self.tenants.items()}
        return replace(self, custom_numbers=False, tenants=rules, others=replace(self.others, custom_numbers=False))

    @property
    def knows_tenants(self) -> bool:
        """Whether it matters who asks."""
        return bool(self.tenants)

    def known(self, tenant: str | None) -> str:
        """The tenant whose rule and budget count: itself, or :data:`OTHERS`."""
        return tenant if tenant is not None and tenant in self.tenants else OTHERS

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(sorted(self.tenants), start=1)}

    def place(self, tenant: str | None) -> int:
        """Number of a tenant among those that the file names, from 1; 0 for everybody else, together."""
        return 0 if tenant is None else self._places.get(tenant, 0)

    def rule(self, tenant: str | None) -> TenantRule:
        """What a tenant may have."""
        return self.tenants.get(self.known(tenant), self.others)

    def check(self, tenant: str | None, slo_class: str | None, has_numbers: bool) -> None:
        """Raise :class:`DeniedError` when a tenant may not ask for a class by name, or bring its own numbers."""
        rule = self.rule(tenant)
        why = rule.denies(slo_class, has_numbers)
        if why is Denied.NUMBERS:
            raise DeniedError(why, "slo_ttft_ms", "numbers of its own: allowed: the name of a class only")
        if why is Denied.CLASS:
            allowed = sorted(rule.classes or ())
            raise DeniedError(why, "slo_class", f"class {slo_class!r} is not this tenant's; allowed: {allowed}")


def check_tenant(name: str, field_name: str, where: str | None = None) -> str:
    """Return ``name`` when it can be a tenant's, else raise :class:`InvalidFieldError`."""
    if not _TENANT.fullmatch(name):
        raise InvalidFieldError(field_name, name, TENANT_ALLOWED, where)
    return name


@dataclass(slots=True)
class _Bucket:
    """So much a minute, at most a minute's worth at once. It may go below zero: the next one waits longer."""

    per_minute: float
    level: float
    seen_s: float

    def fill(self, now_s: float) -> None:
        self.level = min(self.level + max(now_s - self.seen_s, 0.0) * self.per_minute / 60.0, self.per_minute)
        self.seen_s = max(now_s, self.seen_s)

    def wait_s(self, wanted: float) -> float:
        """Seconds until the level is ``wanted``, at most a minute's worth; 0 when it is."""
        missing = min(wanted, self.per_minute) - self.level
        return max(missing, 0.0) * 60.0 / self.per_minute


class Quotas:
    """What tenants have used of what they may have a minute.

    Args:
        trust: the rules.
    """

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._promises: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}

    def __len__(self) -> int:
        return len(self._promises) + len(self._tokens)

    def follow(self, trust: Trust) -> None:
        """The rules have changed; what was used counts on."""
        self._trust = trust

    def take(self, now_s: float, tenant: str | None) -> None:
        """Count a request that asks for a promise; raise :class:`DeniedError` when its tenant has had enough."""
        rule, key = self._trust.rule(tenant), self._trust.known(tenant)
        promises = _bucket(self._promises, key, rule.promises_per_minute, now_s)
        tokens = _bucket(self._tokens, key, rule.tokens_per_minute, now_s)
        if promises is not None and promises.level < 1.0:
            text = f"this tenant may ask for {rule.promises_per_minute:g} promises a minute"
            raise DeniedError(Denied.PROMISES, "slo_class", text, promises.wait_s(1.0))
        if tokens is not None and tokens.level <= 0.0:
            text = f"this tenant may use {rule.tokens_per_minute:g} promised tokens a minute"
            raise DeniedError(Denied.TOKENS, "slo_class", text, tokens.wait_s(1.0))
        if promises is not None:
            promises.level -= 1.0

    def give_back(self, now_s: float, tenant: str | None) -> None:
        """A request that was counted came to nothing."""
        promises = _bucket(
            self._promises, self._trust.known(tenant), self._trust.rule(tenant).promises_per_minute, now_s
        )
        if promises is not None:
            promises.level = min(promises.level + 1.0, promises.per_minute)

    def used(self, now_s: float, tenant: str | None, tokens: int) -> None:
        """Count tokens of a promised request: its prompt when it comes, its answer when it ends."""
        rule, key = self._trust.rule(tenant), self._trust.known(tenant)
        bucket = _bucket(self._tokens, key, rule.tokens_per_minute, now_s)
        if bucket is not None:
            bucket.level -= tokens


def _bucket(buckets: dict[str, _Bucket], key: str, per_minute: float | None, now_s: float) -> _Bucket | None:
    if per_minute is None:
        return None
    bucket = buckets.get(key)
    if bucket is None:
        bucket = buckets[key] = _Bucket(per_minute, per_minute, now_s)
    bucket.per_minute = per_minute
    bucket.fill(now_s)
    return bucket
