"""The sections ``trust:`` and ``map:`` of a class file.

trust:
  tenant_header: x-tenant          # set by the proxy; what a client sends there it must replace
  api_keys: {team-b: 9f86d0...}    # SHA-256 of an API key, in hex; or a list of them
  custom_numbers: false            # as if not given
  when_denied: reject              # or best_effort
  tenants:
    team-a: {classes: [gold, chat], promises_per_minute: 600, tokens_per_minute: 200000}
    team-b: {classes: [chat], custom_numbers: true}
  others: {classes: [chat], promises_per_minute: 60}   # if not given: none but best effort
map:
  service_tier: {priority: gold, flex: batch}
  priority: {0: chat, 10: batch}
  x-llm-d-inference-objective: {critical: gold}
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import yaml

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.tiers import BODY_FIELDS, MAX_MAPPED, PRIORITY, TierMap
from slos_serve.core.trust import (
    MAX_PER_MINUTE,
    MAX_TENANTS,
    NOTHING,
    TenantRule,
    Trust,
    WhenDenied,
    check_tenant,
)
from slos_serve.files.yaml_nodes import NodeReader, shown

TRUST_KEYS = ("tenant_header", "api_keys", "custom_numbers", "when_denied", "tenants", "others")
RULE_KEYS = ("classes", "custom_numbers", "promises_per_minute", "tokens_per_minute")
HEADER_PATTERN = "^[Xx]-[A-Za-z0-9-]{1,62}$"
DIGEST_PATTERN = "^[0-9a-fA-F]{64}$"
MAX_VALUE_CHARS = 128


class TrustReader(NodeReader):
    """Reads both sections.

    Args:
        name: what errors call the file.
        classes: names of its classes.
    """

    def __init__(self, name: str, classes: frozenset[str]) -> None:
        super().__init__(name)
        self._classes = classes

    def trust(self, node: yaml.Node) -> Trust:
        """The section ``trust:``."""
        keys = self._mapping(node, "trust", TRUST_KEYS)
        custom_numbers = self._flag(keys, "trust", "custom_numbers", default=False)
        named = self._mapping(keys["tenants"], "trust.tenants", None) if "tenants" in keys else {}
        if len(named) > MAX_TENANTS:
            raise InvalidFieldError(
                "trust.tenants", len(named), f"at most {MAX_TENANTS} tenants", self._where(keys["tenants"])
            )
        tenants = {
            check_tenant(name, "trust.tenants", self._where(rule)): self._rule(
                rule, f"trust.tenants.{name}", custom_numbers
            )
            for name, rule in named.items()
        }
        header = self._header(keys["tenant_header"], "trust.tenant_header") if "tenant_header" in keys else None
        api_keys = self._api_keys(keys["api_keys"], tenants) if "api_keys" in keys else {}
        if tenants and header is None and not api_keys:
            allowed = "tenant_header or api_keys beside them, or nobody is one of them"
            raise InvalidFieldError("trust.tenants", next(iter(tenants)), allowed, self._where(keys["tenants"]))
        everything = NOTHING if tenants else TenantRule(custom_numbers=custom_numbers)
        others = self._rule(keys["others"], "trust.others", custom_numbers) if "others" in keys else everything
        denied = self._when_denied(keys)
        return Trust(True, custom_numbers, header, api_keys, tenants, others, denied)

    def _rule(self, node: yaml.Node, field: str, custom_numbers: bool) -> TenantRule:
        keys = self._mapping(node, field, RULE_KEYS)
        return TenantRule(
            classes=self._class_names(keys["classes"], f"{field}.classes") if "classes" in keys else None,
            custom_numbers=self._flag(keys, field, "custom_numbers", default=custom_numbers),
            promises_per_minute=self._number(keys, field, "promises_per_minute", MAX_PER_MINUTE, 1.0, True),
            tokens_per_minute=self._number(keys, field, "tokens_per_minute", MAX_PER_MINUTE, 1.0, True),
        )

    def _class_names(self, node: yaml.Node, field: str) -> frozenset[str]:
        if not isinstance(node, yaml.SequenceNode):
            raise InvalidFieldError(field, shown(node), "a list of classes", self._where(node))
        return frozenset(self._class_name(item, field) for item in node.value)

    def _class_name(self, node: yaml.Node, field: str) -> str:
        name = self._name_of(node, field)
        if name not in self._classes:
            raise InvalidFieldError(field, name, f"one of {sorted(self._classes)}", self._where(node))
        return name

    def _flag(self, keys: Mapping[str, yaml.Node], field: str, key: str, *, default: bool) -> bool:
        if key not in keys:
            return default
        value = self._scalar(keys[key])
        if not isinstance(value, bool):
            raise InvalidFieldError(f"{field}.{key}", value, "true or false", self._where(keys[key]))
        return value

    def _header(self, node: yaml.Node, field: str) -> str:
        name = self._name_of(node, field)
        if not re.fullmatch(HEADER_PATTERN, name) or name.lower().startswith("x-slo-"):
            allowed = "a header that begins with 'x-' and not with 'x-slo-'"
            raise InvalidFieldError(field, name, allowed, self._where(node))
        return name.lower()

    def _api_keys(self, node: yaml.Node, tenants: Mapping[str, TenantRule]) -> dict[str, str]:
        found: dict[str, str] = {}
        for tenant, value in self._mapping(node, "trust.api_keys", None).items():
            if tenant not in tenants:
                raise InvalidFieldError("trust.api_keys", tenant, f"one of {sorted(tenants)}", self._where(value))
            several = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for item in several:
                digest = self._name_of(item, f"trust.api_keys.{tenant}")
                if not re.fullmatch(DIGEST_PATTERN, digest):
                    # The text may be a key that somebody took for its digest: it is not repeated.
                    allowed = "SHA-256 of the key: 64 hex digits (printf %s KEY | sha256sum)"
                    raise InvalidFieldError(f"trust.api_keys.{tenant}", "no digest", allowed, self._where(item))
                found[digest.lower()] = tenant
        return found

    def _when_denied(self, keys: Mapping[str, yaml.Node]) -> WhenDenied:
        if "when_denied" not in keys:
            return WhenDenied.REJECT
        text = self._name_of(keys["when_denied"], "trust.when_denied")
        if text not in list(WhenDenied):
            allowed = f"one of {[kind.value for kind in WhenDenied]}"
            raise InvalidFieldError("trust.when_denied", text, allowed, self._where(keys["when_denied"]))
        return WhenDenied(text)

    def tiers(self, node: yaml.Node) -> TierMap:
        """The section ``map:``."""
        fields: dict[str, dict[str, str]] = {}
        for key, values in self._mapping(node, "map", None).items():
            name = key if key in BODY_FIELDS else self._mapped_header(key, values)
            mapped = self._mapping(values, f"map.{key}", None)
            if name in fields:
                raise InvalidFieldError(f"map.{key}", "given twice", "once", self._where(values))
            if not 1 <= len(mapped) <= MAX_MAPPED:
                raise InvalidFieldError(f"map.{key}", len(mapped), f"1 to {MAX_MAPPED} values", self._where(values))
            for value, target in mapped.items():
                self._check_value(name, value, f"map.{key}", target)
            fields[name] = {value: self._class_name(item, f"map.{key}.{value}") for value, item in mapped.items()}
        return TierMap(fields)

    def _mapped_header(self, key: str, node: yaml.Node) -> str:
        if not re.fullmatch(HEADER_PATTERN, key) or key.lower().startswith("x-slo-"):
            allowed = f"one of {list(BODY_FIELDS)}, or a header that begins with 'x-' and not with 'x-slo-'"
            raise InvalidFieldError("key of map", key, allowed, self._where(node))
        return key.lower()

    def _check_value(self, name: str, value: str, field: str, node: yaml.Node) -> None:
        if name == PRIORITY and not re.fullmatch(r"-?(0|[1-9][0-9]{0,8})", value):
            raise InvalidFieldError(field, value, "a whole number as the key", self._where(node))
        if not 1 <= len(value) <= MAX_VALUE_CHARS:
            raise InvalidFieldError(field, value, f"values of 1 to {MAX_VALUE_CHARS} characters", self._where(node))
