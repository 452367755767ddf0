"""What must hold in every simulation, whatever arrives and whoever schedules."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from slos_serve.core.slo import SLO, single_stage
from slos_serve.policies.registry import POLICIES
from slos_serve.sim.limits import EngineLimits
from slos_serve.sim.model_error import ModelError
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.recording import Recording
from slos_serve.workload.calls import Workload
from slos_serve.workload.scenarios import make_workload
from tests.sim_builders import GPU, run, workload

TIGHT = single_stage("tight", SLO(ttft_ms=400.0, tpot_ms=50.0))
LOOSE = single_stage("loose", SLO(ttft_ms=2000.0, tpot_ms=100.0))
FREE = single_stage("free", SLO())
BLOCKS, BLOCK = 200, 16
LIMITS = EngineLimits(kv_capacity_tokens=BLOCKS * BLOCK, max_num_seqs=12, max_num_batched_tokens=4096)
# No shrinking: a simulation is long, and a failing one is found again by its seed.
QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def loads(draw: st.DrawFn) -> Workload:
    count = draw(st.integers(1, 40))
    gaps = draw(st.lists(st.floats(0.0, 0.5), min_size=count, max_size=count))
    prompts = draw(st.lists(st.integers(1, 1500), min_size=count, max_size=count))
    outputs = draw(st.lists(st.integers(1, 150), min_size=count, max_size=count))
    kinds = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    return workload(np.cumsum(gaps).tolist(), prompts, outputs, (TIGHT, LOOSE, FREE), kinds)


DRAFTER = dataclasses.replace(GPU, k_s_s=1e-3)
FIXED_DRAFTS = [name for name, entry in POLICIES.items() if entry.fixed_drafts and entry.make_decode is None]


def with_acceptance(load: Workload, acceptances: list[float]) -> Workload:
    """The same calls, each with the acceptance of its own drafts."""
    calls = load.calls.copy()
    calls["acceptance"] = np.resize(acceptances, len(calls))
    return dataclasses.replace(load, calls=calls)


def _check(recording: Recording, replicas: int) -> None:
    """No token from nowhere, KV within bounds, steps one after the other and within their budget."""
    calls = recording.workload.calls
    done = recording.completed
    assert np.all(done | recording.rejected)
    assert np.all(recording.calls["output_tokens"][done] == calls["output_tokens"][done])
    for call in np.flatnonzero(done):
        first = recording.token_start[call]
        times = recording.token_s[first : first + calls["output_tokens"][call]]
        assert not np.isnan(times).any() and times[0] > 0.0 and np.all(np.diff(times) >= 0.0)
    steps = recording.steps.rows
    assert np.all((steps["used_blocks"] >= 0) & (steps["used_blocks"] <= BLOCKS))
    assert np.all((steps["new_tokens"] >= 1) & (steps["new_tokens"] <= LIMITS.max_num_batched_tokens))
    assert np.all((steps["running"] >= steps["num_seqs"]) & (steps["running"] <= LIMITS.max_num_seqs))
    for replica in range(replicas):
        own = steps[steps["replica"] == replica]
        assert np.all(own["start_s"][1:] >= (own["start_s"] + own["duration_s"])[:-1] - 1e-4)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "distserve"])
@given(load=loads())
@QUICK
def test_every_request_ends_with_exactly_its_tokens(policy: str, load: Workload) -> None:
    _check(run(load, policy, GPU, LIMITS), 1)


@given(load=loads(), acceptances=st.lists(st.sampled_from([0.0, 0.11, 0.5, 0.7, 0.9]), min_size=1, max_size=5))
@QUICK
def test_drafts_keep_the_rules_whatever_is_accepted(load: Workload, acceptances: list[float]) -> None:
    load = with_acceptance(load, acceptances)
    _check(run(load, "slos-serve", DRAFTER, LIMITS, drafter="opt-125m"), 1)
    recording = run(load, "slos-serve", GPU, LIMITS, drafter="ngram")
    _check(recording, 1)
    assert recording.num_drafted > 0 or len(load.calls) < 5 or load.calls["output_tokens"].max() < 3


@pytest.mark.parametrize("policy", FIXED_DRAFTS)
@given(load=loads(), draft_tokens=st.integers(1, 10), acceptance=st.sampled_from([0.0, 0.5, 0.9]))
@QUICK
def test_fixed_drafts_keep_the_rules(policy: str, load: Workload, draft_tokens: int, acceptance: float) -> None:
    load = with_acceptance(load, [acceptance])
    _check(run(load, policy, DRAFTER, LIMITS, parameters={"draft_tokens": draft_tokens}), 1)


@given(load=loads(), draft_tokens=st.integers(1, 10))
@QUICK
def test_apart_prefill_and_decode_keep_the_rules_with_drafts(load: Workload, draft_tokens: int) -> None:
    parameters = {"draft_tokens": draft_tokens}
    load = with_acceptance(load, [0.7])
    _check(run(load, "distserve", DRAFTER, LIMITS, replicas=2, parameters=parameters, kv_bytes_per_token=8e5), 2)


@given(load=loads(), prefill=st.integers(1, 2))
@QUICK
def test_apart_prefill_and_decode_keep_the_rules(load: Workload, prefill: int) -> None:
    recording = run(load, "distserve", GPU, LIMITS, replicas=3, prefill_replicas=prefill, kv_bytes_per_token=8e5)
    _check(recording, 3)


@pytest.mark.parametrize("policy", ["slos-serve", "vllm", "scorpio"])
@given(load=loads(), seed=st.integers(0, 3))
@QUICK
def test_same_seed_same_bytes(policy: str, load: Workload, seed: int) -> None:
    error = ModelError(noise=0.2, straggler_probability=0.05)
    first = run(load, policy, GPU, LIMITS, replicas=2, error=error, seed=seed)
    again = run(load, policy, GPU, LIMITS, replicas=2, error=error, seed=seed)
    assert first.digest() == again.digest()


@pytest.mark.parametrize("policy", ["slos-serve", "vllm-v0"])
@given(load=loads(), at_s=st.floats(0.0, 5.0))
@QUICK
def test_a_dying_replica_loses_only_what_streams(policy: str, load: Workload, at_s: float) -> None:
    recording = run(load, policy, GPU, LIMITS, replicas=2, deaths=[(at_s, 0)])
    lost = ~recording.completed & ~recording.rejected
    first = recording.token_s[recording.token_start]
    assert np.all(~np.isnan(first[lost]))
    assert np.all(recording.calls["arrival_s"][lost] + first[lost] <= at_s + 1e-3)
    assert np.all(recording.calls["replica"][lost] == 0)


@pytest.mark.parametrize("scenario", ["chat", "coding", "summarization", "mixed"])
def test_admitted_requests_attain_when_model_and_lengths_are_known(scenario: str) -> None:
    admitted, kept = 0, 0
    for seed in (1, 2, 3):
        load = make_workload(scenario, 2.0, 400, seed=seed, arrivals="poisson")
        limits = EngineLimits(kv_capacity_tokens=66_144)
        outcome = summarize_run(run(load, "slos-serve", GPU, limits, oracle_lengths=True))
        admitted, kept = admitted + outcome.admitted, kept + outcome.admitted_attained
    assert admitted > 300
    assert kept >= 0.99 * admitted


@pytest.mark.parametrize("scenario", ["chat", "coding", "summarization", "mixed"])
def test_admitted_requests_attain_when_acceptance_is_known(scenario: str) -> None:
    load = make_workload(scenario, 2.6, 400, seed=1, arrivals="poisson", acceptance=0.7)
    limits = EngineLimits(kv_capacity_tokens=63_000)
    recording = run(load, "slos-serve", DRAFTER, limits, oracle_lengths=True, drafter="opt-125m")
    outcome = summarize_run(recording)
    assert recording.num_drafted > 1000
    assert outcome.admitted > 100
    assert outcome.admitted_attained >= 0.99 * outcome.admitted


def test_acceptance_is_that_of_the_workload() -> None:
    load = make_workload("chat", 2.0, 300, seed=1, arrivals="poisson", acceptance=0.6)
    recording = run(load, "slos-serve", DRAFTER, EngineLimits(kv_capacity_tokens=63_000), drafter="opt-125m")
    # Drafts after a wrong one are not accepted whatever they are, so the share of right ones is below the acceptance.
    assert recording.num_drafted > 10_000
    assert 0.25 < recording.num_accepted / recording.num_drafted < 0.6


def test_best_effort_finishes_after_load_ends() -> None:
    load = make_workload("mixed", 6.0, 400, seed=2, arrivals="azure-code")
    recording = run(load, "slos-serve", GPU, EngineLimits(kv_capacity_tokens=66_144))
    assert recording.completed.all()
    assert (recording.calls["admitted"] == 0).sum() > 20
