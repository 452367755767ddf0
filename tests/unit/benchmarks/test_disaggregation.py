"""``python -m benchmarks.disaggregation``: the same requests on the same number of GPUs, split and together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.disaggregation import COLUMNS, LONG_SPAN_S, SPAN_S, Case, rate_of, run, split_cases, workload_of
from slos_serve.sim.seeds import check_tuning

CASE = Case("chat", "fixed", 0.5, 1, 22, 2, "opt-13b-a100", 50.0)


def test_every_column_gets_the_same_requests() -> None:
    loads = [
        workload_of(replace(CASE, column=column, prefill=split)) for column, split in (("together", 0), ("vllm", 1))
    ]
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert np.array_equal(loads[0].calls[name], loads[1].calls[name])
    rate = loads[0].num_requests / SPAN_S
    assert np.isclose(rate, 0.5 * rate_of("chat", CASE.profile, 2), rtol=0.01)


def test_a_mix_that_changes_is_one_scenario_after_the_other() -> None:
    load = workload_of(replace(CASE, scenario="shifting"))
    assert [slo_class.name for slo_class in load.classes] == ["summarization", "reasoning"]
    arrivals, kinds = load.calls["arrival_s"], load.calls["class_index"]
    assert arrivals[kinds == 0].max() <= arrivals[kinds == 1].min()
    assert SPAN_S + 0.5 * LONG_SPAN_S < arrivals.max() < 1.5 * (SPAN_S + LONG_SPAN_S)
    assert np.array_equal(load.calls["session"], np.arange(load.num_requests))


def test_splits_are_compared_on_tuning_seeds() -> None:
    cases = split_cases(replace(CASE, replicas=4))
    assert [case.prefill for case in cases] == [1, 2, 3]
    check_tuning([case.seed for case in cases])


def test_a_case_runs_apart_and_together() -> None:
    small = replace(CASE, scenario="summarization", load=0.2)
    apart, together = run(small), run(replace(small, column="together", prefill=0))
    assert together.attained >= apart.attained > 0.3
    assert apart.kept is not None and apart.kept > 0.9
    assert set(COLUMNS) >= {"together", "fixed", "moving", "distserve"}
