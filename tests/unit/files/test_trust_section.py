"""The sections ``trust:`` and ``map:`` of a class file: what is read, and what an error says."""

from __future__ import annotations

import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.trust import Denied, DeniedError, Quotas, TenantRule, Trust, WhenDenied
from slos_serve.files.class_file import parse_class_file

CLASSES = "classes: {gold: {tpot_ms: 5}, chat: {tpot_ms: 9}}\n"
DIGEST = "ab" * 32


def read(text: str) -> Trust:
    return parse_class_file(CLASSES + text, "c.yaml").trust


def test_reads_every_key() -> None:
    trust = read(
        f"""trust:
  tenant_header: X-Tenant
  api_keys: {{a: {DIGEST.upper()}, b: [{"cd" * 32}, {"ef" * 32}]}}
  custom_numbers: true
  when_denied: best_effort
  tenants:
    a: {{classes: [gold], promises_per_minute: 60, tokens_per_minute: 1000}}
    b: {{custom_numbers: false}}
  others: {{classes: []}}
"""
    )
    assert (trust.given, trust.tenant_header, trust.when_denied) == (True, "x-tenant", WhenDenied.BEST_EFFORT)
    assert trust.api_keys == {DIGEST: "a", "cd" * 32: "b", "ef" * 32: "b"}
    assert trust.rule("a") == TenantRule(frozenset({"gold"}), True, 60.0, 1000.0)
    assert trust.rule("b") == TenantRule(None, False)
    assert trust.rule("c") == trust.rule(None) == TenantRule(frozenset(), True)


def test_others_have_nothing_where_tenants_are_named_and_everything_where_not() -> None:
    assert read("trust: {tenant_header: x-t, tenants: {a: {}}}").rule("b") == TenantRule(frozenset(), False)
    assert read("trust: {}").rule("b") == TenantRule(None, False)
    assert read("trust: {custom_numbers: true}").rule("b") == TenantRule(None, True)


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("trust: {tenant: x}", 2, "key of trust"),
        ("trust:\n  tenants:\n    a: {classes: [silver]}", 4, "trust.tenants.a.classes"),
        ("trust:\n  tenants:\n    a b: {}", 4, "trust.tenants"),
        ("trust: {tenants: {a: {}}}", 2, "trust.tenants"),
        ("trust: {tenant_header: tenant}", 2, "trust.tenant_header"),
        ("trust: {tenant_header: x-slo-class}", 2, "trust.tenant_header"),
        ("trust:\n  api_keys: {a: secret}\n  tenants: {a: {}}", 3, "trust.api_keys.a"),
        (f"trust:\n  api_keys: {{z: {DIGEST}}}", 3, "trust.api_keys"),
        ("trust: {custom_numbers: 1}", 2, "trust.custom_numbers"),
        ("trust: {when_denied: drop}", 2, "trust.when_denied"),
        ("trust:\n  others: {promises_per_minute: 0}", 3, "trust.others.promises_per_minute"),
        ("map: {tier: {a: chat}}", 2, "key of map"),
        ("map: {X-Slo-Class: {a: chat}}", 2, "key of map"),
        ("map:\n  service_tier: {flex: cheap}", 3, "map.service_tier.flex"),
        ("map: {priority: {high: chat}}", 2, "map.priority"),
        ("map: {service_tier: {}}", 2, "map.service_tier"),
        ("map:\n  x-a: {b: chat}\n  X-A: {b: chat}", 4, "map.X-A"),
    ],
)
def test_an_error_names_line_and_field(text: str, line: int, field: str) -> None:
    with pytest.raises(InvalidFieldError) as caught:
        read(text)
    assert (caught.value.where, caught.value.field) == (f"c.yaml:{line}", field)


def test_a_key_written_in_place_of_its_digest_is_not_repeated() -> None:
    with pytest.raises(InvalidFieldError) as caught:
        read("trust:\n  api_keys: {a: sk-secret}\n  tenants: {a: {}}")
    assert "sk-secret" not in str(caught.value)


def test_a_budget_fills_again_within_a_minute() -> None:
    quotas = Quotas(read("trust: {others: {promises_per_minute: 6}}"))
    waits: list[float | None] = []
    for tick in range(1200):  # two minutes, ten times a second
        try:
            quotas.take(tick / 10, None)
        except DeniedError as denied:
            waits.append(denied.retry_after_s)
    assert 1200 - len(waits) == 6 + 11, "a minute's worth at once, then one every ten seconds"
    assert all(wait_s is not None and 0.0 < wait_s <= 10.0 for wait_s in waits)


def test_tokens_may_be_overdrawn_by_one_request() -> None:
    quotas = Quotas(read("trust: {others: {tokens_per_minute: 60}}"))
    quotas.take(0.0, None)
    quotas.used(0.0, None, 100)
    with pytest.raises(DeniedError) as caught:
        quotas.take(10.0, None)
    assert caught.value.why is Denied.TOKENS
    assert caught.value.retry_after_s == pytest.approx(31.0)
    quotas.take(41.1, None)
