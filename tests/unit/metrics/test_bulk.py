"""The vectorised scores equal those of one request at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from slos_serve.metrics.attainment import StageTarget, score_request
from slos_serve.metrics.bulk import CallTargets, attained_by_quartile, requests_attained, score_calls


@given(data=st.data(), count=st.integers(1, 12))
def test_same_as_one_at_a_time(data: st.DataObject, count: int) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    outputs = random.integers(1, 12, count)
    split = np.minimum(random.integers(1, 12, count), outputs)
    ttft, tpot, following = (
        random.uniform(0.05, 0.4, count),
        random.uniform(0.02, 0.1, count),
        random.uniform(0.02, 0.1, count),
    )
    tpot[random.random(count) < 0.2] = np.inf
    times = [np.cumsum(random.uniform(0.0, 0.1, n)).astype(np.float32) for n in outputs]
    starts = np.concatenate(([0], np.cumsum(outputs)[:-1]))
    answer = np.where(random.random(count) < 0.5, np.inf, random.uniform(0.1, 0.6, count))
    targets = CallTargets(ttft, tpot, following, answer, split)
    scores = score_calls(np.concatenate(times), starts, outputs, np.ones(count, dtype=np.bool_), targets)
    for i in range(count):
        stages = (StageTarget(ttft[i], tpot[i]), StageTarget(tpot_s=following[i]))
        two = (0, int(split[i])) if split[i] < outputs[i] else (0,)
        one = score_request(0.0, times[i], stages, two, float(answer[i]))
        assert scores.attained[i] == one.attained
        assert scores.strict[i] == one.strict
        np.testing.assert_allclose(scores.ttft_s[i], one.ttft_s, rtol=1e-6)
        np.testing.assert_allclose(scores.tpot_s[i], one.tpot_s, rtol=1e-5)
        np.testing.assert_allclose(scores.longest_stall_s[i], one.longest_stall_s, rtol=1e-5)


def test_calls_without_all_tokens_miss() -> None:
    nothing, never = np.full(3, np.nan, dtype=np.float32), np.full(1, np.inf)
    targets = CallTargets(never, never, never, never, np.full(1, 3))
    scores = score_calls(nothing, np.zeros(1, dtype=np.int64), np.full(1, 3), np.zeros(1, dtype=np.bool_), targets)
    assert not scores.attained[0] and not scores.strict[0]


def test_a_request_needs_all_its_calls() -> None:
    attained = requests_attained(np.array([True, False, True]), np.array([0, 0, 1]), 2)
    assert attained.tolist() == [False, True]


def test_quartiles_go_from_short_to_long() -> None:
    prompts = np.arange(8)
    assert attained_by_quartile(prompts < 4, prompts) == [1.0, 1.0, 0.0, 0.0]
