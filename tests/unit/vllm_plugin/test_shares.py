"""Whose part of best effort a request takes."""

from __future__ import annotations

import numpy as np

from slos_serve.core.request import NUM_SHARES
from slos_serve.vllm_plugin.request_book import share_of
from slos_serve.vllm_plugin.tracked import Promise


def promise(class_index: int, tenant: str | None) -> Promise:
    return Promise(None, class_index, 0.0, np.inf, np.inf, np.inf, np.inf, 0, 100, tenant)


def test_without_tenants_a_class_is_a_share() -> None:
    assert [share_of(promise(index, None)) for index in range(4)] == [0, 1, 2, 3]


def test_tenants_of_a_class_have_shares_of_their_own() -> None:
    found = {share_of(promise(0, f"team-{number}")) for number in range(20)}
    assert len(found) > 15
    assert all(0 <= share < NUM_SHARES for share in found)
    assert share_of(promise(0, "team-1")) == share_of(promise(0, "team-1")) != share_of(promise(1, "team-1"))
