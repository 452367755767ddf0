"""What a request is given of what it asks for: headers over body, tiers of others, and what its tenant may have.

The middleware asks :class:`Gate`, which sees headers. The scheduler and the ingress of a fleet ask
:func:`allowed_class` again with what reached them, so that a way around the middleware gains nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import NO_SLO_CLASS, ClassSet, SLOClass
from slos_serve.core.tiers import BODY_FIELDS, ORDINARY, TierMap
from slos_serve.core.trust import TENANT_ALLOWED, Denied, DeniedError, Quotas, Trust, WhenDenied, check_tenant
from slos_serve.vllm_plugin.api_keys import bearer_key
from slos_serve.vllm_plugin.asgi import RawHeaders
from slos_serve.vllm_plugin.body_fields import BodyFields
from slos_serve.vllm_plugin.config import PluginConfig
from slos_serve.vllm_plugin.seal import Seal, seal_of
from slos_serve.vllm_plugin.slo_args import (
    INNER_KEYS,
    KEY_PREFIX,
    SESSION_KEY,
    TENANT_KEY,
    SloArgs,
    from_extra_args,
    header_args,
)

MOST_WARNINGS = 16
NUMBER_KEYS = ("slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms", "slo_due_at", "slo_task_ms")
_logger = logging.getLogger(__name__)


def allowed_class(trust: Trust, classes: ClassSet, asked: SloArgs, tenant: str | None) -> SLOClass | None:
    """The class that a request of ``tenant`` gets; ``None`` without a promise.

    A tenant that may not have the default class is served without a promise, since it asked for none. Classes that
    promise nothing are free to everybody.

    Raises:
        InvalidFieldError: the class is unknown.
        DeniedError: the tenant may not have what it asks for.
    """
    applied = asked.applied(classes)
    name = asked.slo_class
    if applied is None or applied.best_effort:
        return applied
    named = None if name in (None, NO_SLO_CLASS) else name
    trust.check(tenant, named, asked.has_numbers)
    if named is None and name is None and classes.default is not None:
        allowed = trust.rule(tenant).classes
        return applied if allowed is None or classes.default in allowed else None
    return applied


@dataclass(frozen=True, slots=True)
class Granted:
    """What a request is given.

    Attributes:
        slo_class: its class; ``None`` without a promise.
        added: what goes into its ``vllm_xargs``.
        dropped: what leaves them.
        denied: why it is served without the promise it asked for; ``None`` when it is not.
        charged: the tenant whose budget it was counted in; ``None`` when in nobody's.
    """

    slo_class: SLOClass | None
    added: Mapping[str, str | float] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    denied: Denied | None = None
    charged: str | None = None


class Gate:
    """See the module.

    Args:
        config: trust and tiers.
        clock_s: for budgets a minute.
        seal: of this server; by default found when tenants are known.
    """

    def __init__(self, config: PluginConfig, clock_s: Callable[[], float], seal: Seal | None = None) -> None:
        self._trust, self._tiers = config.trust, config.tiers
        self._custom_numbers = config.custom_numbers
        self._clock_s = clock_s
        self.quotas = Quotas(self._trust)
        self._seal = seal_of(os.environ) if seal is None and self._trust.knows_tenants else seal
        self._warned: set[tuple[str, str]] = set()

    def follow(self, trust: Trust, tiers: TierMap) -> None:
        """Go by these sections of the class file from now on.

        Raises:
            InvalidFieldError: they name tenants and no seal can be had.
        """
        if trust is self._trust and tiers is self._tiers:
            return
        if self._seal is None and trust.knows_tenants:
            self._seal = seal_of(os.environ)
        self._trust, self._tiers = trust, tiers
        self.quotas.follow(trust)

    @property
    def reads_all(self) -> bool:
        """Whether a body that is not looked into might bring what nobody may have."""
        return self._trust.given or not self._custom_numbers

    def wants_body(self, headers: Mapping[str, str | float], data: bytes, classes: ClassSet) -> bool:
        r"""Whether the body has to be looked into.

        ``\u00`` might spell an ASCII letter of a key, so it is a hint like the letters themselves.
        """
        if any(key != SESSION_KEY for key in headers) or (headers and classes.default is not None):
            return True
        if self._trust.knows_tenants and classes.default is not None:
            return True
        hints = [KEY_PREFIX.encode(), b"\\u00", *(f'"{name}"'.encode() for name in self._watched_fields())]
        return any(hint in data for hint in hints)

    def _watched_fields(self) -> list[str]:
        full = len(self._warned) >= MOST_WARNINGS
        return [name for name in BODY_FIELDS if name in self._tiers.fields or not full]

    def granted(self, raw: RawHeaders, fields: BodyFields | None, classes: ClassSet) -> Granted:
        """Decide on one request.

        Args:
            raw: its headers.
            fields: its body's SLO fields; ``None`` where it was not looked into.
            classes: those served now.

        Raises:
            InvalidFieldError: a field cannot be used.
            DeniedError: it asks for what its tenant may not have, and such requests are refused.
        """
        headers = self.headers(raw)
        in_body = fields.xargs if fields is not None and isinstance(fields.xargs, dict) else {}
        for key in INNER_KEYS:
            if key in in_body:
                raise InvalidFieldError(f"vllm_xargs.{key}", in_body[key], "no such key from a client")
        by_body = self._body_tier(fields) if "slo_class" not in headers and "slo_class" not in in_body else {}
        own = from_extra_args(in_body)  # checked even where a header counts over it
        asked = from_extra_args({**in_body, **by_body, **headers})
        self._check_numbers(own, asked)
        tenant = self._tenant(raw)
        added = {**by_body, **headers}
        try:
            if self._trust.given and "slo_class" in headers and own.has_numbers:
                text = "numbers in the body beside a header that names the class; allowed: none"
                raise DeniedError(Denied.NUMBERS, next(key for key in NUMBER_KEYS if key in in_body), text)
            applied = self._allowed(asked, tenant, raw, classes)
            charged = self._charge(applied, tenant)
        except DeniedError as denied:
            if self._trust.when_denied is WhenDenied.REJECT:
                raise
            dropped = frozenset(NUMBER_KEYS)
            kept = {key: value for key, value in added.items() if key not in dropped}
            return Granted(None, {**kept, "slo_class": NO_SLO_CLASS}, dropped, denied.why)
        if applied is None and not any(key != SESSION_KEY for key in added):
            added = {}  # a session alone matters only to a request that has an SLO, be it by default
        promised = applied is not None and not applied.best_effort
        if self._seal is not None and tenant is not None and (promised or classes.default is not None):
            added[TENANT_KEY] = self._seal.sealed(tenant)
        return Granted(applied, added, charged=charged)

    def headers(self, raw: RawHeaders) -> dict[str, str | float]:
        """The ``vllm_xargs`` that headers stand for, tiers of others included.

        Raises:
            InvalidFieldError: a value cannot be used.
        """
        found = header_args(raw)
        if "slo_class" not in found:
            mapped = self._header_tier(raw)
            if mapped is not None:
                found["slo_class"] = mapped
        return found

    def refund(self, granted: Granted) -> None:
        """The server refused the request: its budget is given back."""
        if granted.charged is not None:
            self.quotas.give_back(self._clock_s(), granted.charged)

    def _charge(self, applied: SLOClass | None, tenant: str | None) -> str | None:
        if not self._trust.given or applied is None or applied.best_effort:
            return None
        self.quotas.take(self._clock_s(), tenant)
        return self._trust.known(tenant)

    def _check_numbers(self, own: SloArgs, asked: SloArgs) -> None:
        """The server's own switch is off: numbers are an error, wherever they stand."""
        for args in (own, asked):
            numbers = {
                "slo_ttft_ms": args.ttft_ms,
                "slo_tpot_ms": args.tpot_ms,
                "slo_e2e_ms": args.e2e_ms,
                "slo_task_ms": args.task_ms,
            }
            for name, value in numbers.items():
                if value is not None and not self._custom_numbers:
                    raise InvalidFieldError(name, value, "the name of a class only; this server takes no other numbers")

    def _allowed(self, asked: SloArgs, tenant: str | None, raw: RawHeaders, classes: ClassSet) -> SLOClass | None:
        try:
            return allowed_class(self._trust, classes, asked, tenant)
        except InvalidFieldError as error:
            if error.field == "slo_class" and any(name.lower() == b"x-slo-class" for name, _ in raw):
                raise InvalidFieldError("x-slo-class", error.given, error.allowed) from None
            raise

    # Who asks --------------------------------------------------------------------------------------------------

    def _tenant(self, raw: RawHeaders) -> str | None:
        """The tenant that the proxy names, else the one whose API key comes; two that differ are an error."""
        trust = self._trust
        if not trust.knows_tenants:
            return None
        if trust.tenant_header is not None:
            given = {value.decode("latin-1").strip() for value in _values(raw, trust.tenant_header)}
            if len(given) > 1:
                raise InvalidFieldError(trust.tenant_header, f"{len(given)} values", f"one value, {TENANT_ALLOWED}")
            for name in given:
                return check_tenant(name, trust.tenant_header)
        key = bearer_key({"headers": raw})
        return trust.api_keys.get(hashlib.sha256(key.encode("latin-1")).hexdigest())

    # Tiers of others -------------------------------------------------------------------------------------------

    def _header_tier(self, raw: RawHeaders) -> str | None:
        for name in self._tiers.headers:
            for value in _values(raw, name):
                found = self._mapped(name, value.decode("latin-1").strip())
                if found is not None:
                    return found
        return None

    def _body_tier(self, fields: BodyFields | None) -> dict[str, str | float]:
        for name, value in fields.tiers.items() if fields is not None else ():
            found = self._mapped(name, value)
            if found is not None:
                return {"slo_class": found}
        return {}

    def _mapped(self, name: str, value: str) -> str | None:
        found = self._tiers.class_of(name, value)
        known = (name, value) in ORDINARY or name == self._trust.tenant_header
        seen = (name, value[:64])
        if found is None and not known and seen not in self._warned and len(self._warned) < MOST_WARNINGS:
            self._warned.add(seen)
            text = "slos-serve: %s %r stands for no class (section 'map' of the class file); said once."
            _logger.warning(text, name, value[:64])
        return found


def _values(raw: RawHeaders, name: str) -> list[bytes]:
    wanted = name.encode("ascii")
    return [value for given, value in raw if given.lower() == wanted]
