"""``python -m benchmarks.overload``: a run beside stock's run of the same requests, on times worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.overload import compare, ideal_share, least_class, line, question_of, tokens_by
from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, single_stage
from slos_serve.sim.recording import Recording
from slos_serve.sim.seeds import check_test
from slos_serve.sim.step import COMPLETED
from tests.sim_builders import PLAIN, workload

FAST, SLOW = single_stage("fast", SLO(ttft_ms=1000.0, tpot_ms=100.0)), single_stage("slow", SLO(ttft_ms=9000.0))


def _recording(first_s: list[float], admitted: list[bool]) -> Recording:
    """Four requests at 0, 1, 2 and 3 s, two tokens each; the second 50 ms after the first."""
    load = workload([0.0, 1.0, 2.0, 3.0], [10] * 4, [2] * 4, (FAST, SLOW), [0, 0, 1, 1])
    recording = Recording.of(load.bound(PLAIN))
    calls = recording.calls
    calls["arrival_s"] = load.calls["arrival_s"]
    recording.token_s[:] = np.repeat(first_s, 2) + np.tile([0.0, 0.05], 4)
    calls["done_s"] = calls["arrival_s"] + np.array(first_s) + 0.05
    calls["outcome"], calls["admitted"] = COMPLETED, admitted
    calls["output_tokens"] = 2
    recording.end_s = float(calls["done_s"].max())
    return recording


def test_columns_of_a_run_beside_stock() -> None:
    question = question_of("chat", 1.6, 1.0, "opt-13b-a100", 30, exact=True)
    ours = _recording([0.5, 0.5, 0.5, 12.0], [True, True, True, False])
    stock = _recording([0.5, 2.0, 3.0, 4.0], [False] * 4)
    row = compare(question, 1.6, ours, stock, possible=0.9)
    assert (row.attained, row.promised, row.promised_kept) == (0.75, 0.75, 1.0)
    assert row.by_class == {"fast": 1.0, "slow": 0.5}
    assert row.least_class == pytest.approx(0.5 / 0.75)
    assert row.last_over_stock == pytest.approx(12.05 / 4.05)
    assert row.drained == pytest.approx(7.05 / 15.05)
    assert row.tokens == pytest.approx(6 / 3)  # by the last arrival, at 3 s
    assert row.stock_first_p99_ms == pytest.approx(4000.0, rel=0.02) and row.first_p50_ms == pytest.approx(12_000.0)
    assert line(row)[2:7] == ["vllm", "75.0 %", "0.83", "75.0 %", "75.0, 100.0 %"]


def test_tokens_that_have_come_and_classes_that_nobody_is_admitted_of() -> None:
    recording = _recording([0.5, 0.5, 0.5, 12.0], [False] * 4)
    assert [tokens_by(recording, at) for at in (0.5, 0.56, 3.0, 99.0)] == [1, 2, 6, 8]
    assert least_class(recording) is None


def test_an_ideal_engine_promises_less_the_more_comes_and_knows_no_rounds() -> None:
    shares = [ideal_share(question_of("chat", load, 1.0, "opt-13b-a100", 30, exact=True)) for load in (0.5, 4.0)]
    assert shares[0] == 1.0 and shares[1] is not None and 0.1 < shares[1] < 0.9
    assert ideal_share(question_of("tool", 1.0, 1.0, "opt-13b-a100", 30, exact=True)) is None


def test_load_is_in_multiples_of_the_fluid_bound() -> None:
    one, two = (question_of("chat", load, 10.0, "opt-13b-a100", 30, exact=False) for load in (1.0, 2.0))
    assert two.rate_rps == pytest.approx(2.0 * one.rate_rps)
    assert one.num_requests == round(600.0 * one.rate_rps)
    with pytest.raises(InvalidFieldError, match="22 or more"):
        check_test([3])
