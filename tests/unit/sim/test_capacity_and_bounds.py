"""Capacity search on a made-up attainment curve, and bounds against what a simulation reaches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.sim import sweep
from slos_serve.sim.bisection import Bisection
from slos_serve.sim.bounds import cheapest_share_bound, clairvoyant_attainment, fluid_bound, work_of
from slos_serve.sim.early_stop import METRICS, EarlyStop
from slos_serve.sim.outcome import summarize_run
from slos_serve.sim.profiles import find_profile, limits_of, profile_names
from slos_serve.sim.question import Answer, Question, answer
from slos_serve.sim.rate_bounds import enough_for, fewest_requests
from slos_serve.sim.recording import Recording
from slos_serve.sim.search import Capacity, Screened, screen, search_capacity
from slos_serve.sim.seeds import FIRST_TEST_SEED
from slos_serve.sim.sweep import AnswerFile, run_searches
from slos_serve.workload.scenarios import SCENARIOS, make_workload
from tests.sim_builders import run

PROFILE = find_profile("opt-13b-a100")
BASE = Question("chat", "vllm", {}, "opt-13b-a100", "poisson", 1.0, 60, 0)


def _drive(question: Question, knee_rps: float) -> Capacity:
    """Feed a search from a curve that falls through 90 % at the knee, later for larger budgets and by seed."""
    search = search_capacity(question, seeds=[30, 31, 32])
    asked = next(search)
    try:
        while True:
            found = []
            for one in asked:
                knee = knee_rps * (1.2 if one.parameters.get("token_budget") == 8192 else 1.0)
                knee *= 1.0 + 0.02 * max(one.seed - 30, 0)
                shares = [
                    float(np.clip(0.9 + 0.3 * (own - one.rate_rps) / own, 0.0, 1.0)) for own in (knee, 0.5 * knee)
                ]
                found.append(Answer(shares[0], shares[1], 1.0, tuple(shares[:1] * 4), tuple(shares[1:] * 4)))
            asked = search.send(found)
    except StopIteration as end:
        result: Capacity = end.value
        return result


@pytest.mark.parametrize("knee_rps", [0.02, 1.0, 30.0])
def test_search_finds_the_crossing_of_the_best_parameters(knee_rps: float) -> None:
    found = _drive(BASE, knee_rps)
    assert found.capacity_rps_per_gpu == pytest.approx(1.2 * 1.02 * knee_rps, rel=0.01)
    assert found.by_seed == pytest.approx([1.2 * knee_rps * (1.0 + 0.02 * i) for i in range(3)], rel=0.011)
    assert found.strict_rps_per_gpu == pytest.approx(0.5 * 1.2 * 1.02 * knee_rps, rel=0.01)
    assert found.fluid_bound_dropping_rps_per_gpu > found.fluid_bound_rps_per_gpu
    assert found.parameters == {"token_budget": 8192}
    assert found.ci[0] < found.capacity_rps_per_gpu < found.ci[1]
    assert found.attainment == pytest.approx(0.9, abs=0.01)
    assert [row["parameters"]["token_budget"] for row in found.tried] == [2048, 4096, 8192]


def test_a_bisection_ends_between_two_rates_that_it_tried() -> None:
    search = Bisection(start=1.0, tolerance=0.02)
    tried = []
    while (rate := search.next_rate()) is not None:
        tried.append(rate)
        search.tell(rate, rate <= 7.0)
    assert search.low <= 7.0 < search.high <= 1.02 * search.low
    assert search.low in tried and search.high in tried
    search.tell(20.0, good=True)  # contradicts what is known already
    assert search.high < 8.0


def test_distserve_tries_every_split() -> None:
    question = Question("chat", "distserve", {}, "opt-13b-a100", "poisson", 1.0, 60, 0, replicas=4)
    assert [row["parameters"]["prefill_replicas"] for row in _drive(question, 2.0).tried] == [1, 2, 3]


def test_a_worse_parameter_set_takes_one_simulation() -> None:
    """And so does each of a policy that does not reach the rate that is to be beaten."""
    asked: list[Question] = []

    def drive(beat_rps: float) -> Screened:
        asked.clear()
        search = screen(replace(BASE, policy="edf"), beat_rps=beat_rps)
        try:
            questions = next(search)
            while True:
                asked.extend(questions)
                knees = [3.0 if one.parameters["token_budget"] == 512 else 1.0 for one in questions]
                shares = [0.95 if one.rate_rps <= knee else 0.5 for one, knee in zip(questions, knees, strict=True)]
                questions = search.send([Answer(share, share) for share in shares])
        except StopIteration as end:
            found: Screened = end.value
            return found

    found = drive(0.0)
    assert found.best.parameters["token_budget"] == 512 and not found.at_most
    assert found.rate_rps == pytest.approx(3.0, rel=0.05)
    assert [one.at_most for one in found.tried] == [False, True, True, True]
    assert Counter(one.parameters["token_budget"] for one in asked)[256] == 1
    assert drive(10.0).at_most and len(asked) == 4
    assert not drive(2.0).at_most


def test_answers_of_rivals_outlive_a_change_of_our_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: sweep.source_digest(name) for name in ("slos-serve", "qoserve", "edf")}
    files = sweep._file_digests()
    assert {"planning/form.py", "policies/qoserve.py", "sim/step.py", "profiles/opt-13b-a100.json"} <= set(files)

    def changed(name: str) -> list[str]:
        """Policies whose digest changes with a file."""
        sweep.source_digest.cache_clear()
        monkeypatch.setattr(sweep, "_file_digests", lambda: {**files, name: b"other"})
        return [policy for policy, was in before.items() if sweep.source_digest(policy) != was]

    assert changed("planning/form.py") == ["slos-serve"]
    assert changed("policies/qoserve.py") == ["slos-serve", "qoserve"]
    assert changed("sim/step.py") == ["slos-serve", "qoserve", "edf"]
    for asking in ("search", "rate_bounds"):
        assert changed(f"sim/{asking}.py") == []
    sweep.source_digest.cache_clear()


def test_answers_are_remembered_on_disk(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    question = Question("chat", "vllm", {"token_budget": 2048}, "opt-13b-a100", "poisson", 0.5, 40, 0)
    first = AnswerFile(file)
    assert first.get(question) is None
    first.put(question, answer(question))
    with file.open("a") as half:
        half.write('{"code": "')
    assert AnswerFile(file).get(question) == first.get(question)


def test_a_sweep_runs_in_this_process() -> None:
    question = Question("coding", "vllm", {"token_budget": 8192}, "opt-13b-a100", "poisson", 1.0, 60, 0)
    asked: list[str] = []
    (found,) = run_searches(
        [("one", search_capacity(question, [30], variants=False))],
        AnswerFile(None),
        1,
        lambda name, _question, _answer: asked.append(name),
        lambda name, _capacity: asked.append(name),
    )
    assert 0.0 < found.capacity_rps_per_gpu < 2.0 * found.fluid_bound_rps_per_gpu
    assert len(asked) > 2


def test_early_stop_only_when_out_of_reach() -> None:
    load = make_workload("chat", 20.0, 150, arrivals="poisson").bound(PROFILE.model)
    measured = np.ones(150, dtype=np.bool_)
    stop = EarlyStop(measured, 0.8)
    recording = Recording.of(load)
    recording.calls["arrival_s"] = load.calls["arrival_s"]
    assert not stop(recording, float(load.calls["ttft_s"].min()) / 2)
    assert stop(recording, 1e6) and stop.attainment == 0.0


@pytest.mark.parametrize(
    ("scenario", "policy", "rate_rps"),
    [
        ("chat", "vllm", 2.0),
        ("reasoning", "edf", 0.5),
        ("tool", "scorpio", 0.6),
        ("answers", "vllm", 2.0),
        ("agents", "edf", 0.2),
    ],
)
@pytest.mark.parametrize("metric", METRICS)
def test_a_run_that_ended_early_had_missed_too_much(scenario: str, policy: str, rate_rps: float, metric: str) -> None:
    """At every level it says of the level what the whole run says, and takes fewer steps where it is missed."""
    whole = Question(scenario, policy, {}, "opt-13b-a100", "poisson", rate_rps, 60, 0)
    full = answer(whole)
    for level in (0.05, getattr(full, metric), min(getattr(full, metric) + 0.02, 1.0), 0.95):
        cut = answer(whole.at(rate_rps, 0, level, metric))
        assert (getattr(cut, metric) >= level) == (getattr(full, metric) >= level)
        assert cut.attainment >= full.attainment and cut.strict >= full.strict
        assert not cut.stopped_early or cut.steps < full.steps


def test_no_capacity_is_searched_where_a_promise_cannot_be_kept_at_all() -> None:
    """A token every 10 ms is more than this engine makes for one request alone."""
    base = Question("users", "vllm", {}, "opt-13b-a100", "poisson", 1.0, 20, 0)
    with pytest.raises(InvalidFieldError, match=r"scenario: got 'users'.*opt-13b-a100 can keep"):
        next(search_capacity(base, [FIRST_TEST_SEED]))


@pytest.mark.parametrize("scenario", sorted(set(SCENARIOS) - {"users"}))
def test_bounds_are_above_what_a_baseline_reaches(scenario: str) -> None:
    work = work_of(make_workload(scenario, 1.0, 5000).bound(PROFILE.model))
    limits = limits_of(PROFILE)
    fluid = fluid_bound(work, PROFILE.model, limits)
    assert fluid_bound(work, PROFILE.model, limits, acceptance=0.7) >= fluid
    assert fluid_bound(work, PROFILE.model, limits, acceptance=0.0) == pytest.approx(fluid)
    assert cheapest_share_bound(work, PROFILE.model, limits) > fluid
    load = make_workload(scenario, 2.0 * fluid, 200, arrivals="poisson")
    outcome = summarize_run(run(load, "vllm", PROFILE.model, limits))
    assert outcome.attainment < 0.9


def test_clairvoyant_bound_falls_with_the_rate_and_is_a_bound() -> None:
    limits = limits_of(PROFILE)
    shares = []
    for rate in (2.0, 6.0, 15.0):
        load = make_workload("chat", rate, 500, arrivals="poisson").bound(PROFILE.model)
        shares.append(clairvoyant_attainment(load, PROFILE.model, limits))
        outcome = summarize_run(run(load, "sarathi", PROFILE.model, limits))
        assert outcome.attainment <= shares[-1] + 1e-6
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.8


def test_every_shipped_profile_loads() -> None:
    names = profile_names()
    assert {"opt-13b-a100", "opt-66b-a100-tp4", "llama-2-7b-a100", "llama-2-7b-h100"} <= set(names)
    for name in names:
        profile = find_profile(name)
        assert profile.kv_capacity_tokens > 16_000 and profile.source
    with pytest.raises(InvalidFieldError, match="opt-13b-a100"):
        find_profile("opt-13b")


def test_a_run_that_no_rate_is_too_high_for_is_refused_with_the_requests_it_takes() -> None:
    """And with that many requests even the best order is late at some rate."""
    base = replace(BASE, scenario="answers", num_requests=40, replicas=2)
    search = search_capacity(base, seeds=[30])
    rates: list[float] = []

    def drive() -> None:
        asked = next(search)
        while True:
            rates.extend(one.rate_rps for one in asked)
            asked = search.send([Answer(1.0, 1.0, 1.0, (1.0,) * 4, (1.0,) * 4) for _ in asked])

    with pytest.raises(InvalidFieldError, match=r"--requests: got 20; allowed: (\d+) or more.*answers") as fault:
        drive()
    assert 100.0 < max(rates) < 1e4 and f"{max(rates):,.0f} requests/s" in str(fault.value)
    enough = enough_for(base, 0.9)
    assert enough is not None and f"allowed: {enough} or more" in str(fault.value)
    assert answer(replace(base, policy="edf", rate_rps=1e5, num_requests=2 * enough)).attainment < 0.9


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "users"])
def test_fewer_requests_are_enough_where_deadlines_are_close(scenario: str) -> None:
    fewest = fewest_requests(scenario, "opt-13b-a100", 2.0, 0.9)
    assert fewest is not None and 1 <= fewest <= 300
    assert fewest <= (fewest_requests(scenario, "opt-13b-a100", 4.0, 0.9) or 0) <= 2.3 * fewest
    assert fewest_requests("agents", "opt-13b-a100", 2.0, 0.1) is None
