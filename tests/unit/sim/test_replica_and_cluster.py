"""The engine's rules, worked out by hand on small cases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.slo import SLO, SLOClass, Stage
from slos_serve.metrics.attainment import stage_starts_of
from slos_serve.policies.base import StockPolicy
from slos_serve.sim.cluster import Cluster
from slos_serve.sim.faults import PlanFaultError, StuckError
from slos_serve.sim.limits import EngineLimits, ReplicaSettings
from slos_serve.sim.model_error import Interruptions, ModelError, StepFactors
from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.routers import make_router
from slos_serve.sim.step import uniform
from slos_serve.sim.timeline import timeline
from slos_serve.workload.calls import Workload
from slos_serve.workload.scenarios import make_workload
from tests.sim_builders import GPU, LIMITS, PLAIN, run, token_times, workload


@dataclass
class Scripted(StockPolicy):
    """Plays one plan over and over."""

    answer: StepPlan

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        return self.answer


def _plan(slots: list[int], tokens: list[int]) -> StepPlan:
    return StepPlan(slots=np.array(slots, dtype=np.int64), tokens=np.array(tokens, dtype=np.int64))


def _run_plan(plan: StepPlan, load: Workload, limits: EngineLimits = LIMITS) -> Recording:
    recording = Recording.of(load.bound(PLAIN))
    replica = Replica(0, Scripted(plan), PLAIN, limits, recording, ReplicaSettings())
    return Cluster(recording, [replica], make_router("round-robin")).run()


def test_prefill_then_decodes_take_what_the_model_says() -> None:
    recording = run(workload([5.0], [100], [3]))
    # 100 tokens: 10 + 10 ms; then steps of one token: 10.1 ms.
    assert token_times(recording, 0) == [0.02, 0.0301, 0.0402]
    assert recording.num_steps == 3


def test_budget_chunks_a_prompt() -> None:
    recording = run(workload([0.0], [5000], [1]), parameters={"token_budget": 2048})
    assert recording.steps.rows["new_tokens"].tolist() == [2048, 2048, 904]


def test_v0_runs_prompts_first_and_whole() -> None:
    recording = run(workload([0.0, 0.001], [1000, 3000], [5, 2]), "vllm-v0")
    assert recording.steps.rows["new_tokens"].tolist()[:3] == [1000, 3000, 2]


def test_sarathi_keeps_decodes_going_in_every_step() -> None:
    recording = run(workload([0.0, 0.001], [100, 1000], [10, 2]), "sarathi", parameters={"chunk_tokens": 256})
    assert recording.steps.rows["new_tokens"].tolist()[:4] == [100, 256, 256, 256]
    assert recording.steps.rows["num_seqs"].tolist()[1:4] == [2, 2, 2]


def test_memory_preempts_the_last_started_and_recomputes_it() -> None:
    limits = EngineLimits(kv_capacity_tokens=20 * 16, max_num_batched_tokens=8192)
    recording = run(workload([0.0, 0.0], [150, 140], [60, 60]), limits=limits)
    assert recording.completed.all()
    assert recording.calls["preemptions"].tolist() == [0, 1]
    assert recording.steps.rows["used_blocks"].max() <= 20


def test_a_call_that_never_fits_is_rejected() -> None:
    limits = EngineLimits(kv_capacity_tokens=10 * 16)
    recording = run(workload([0.0, 0.1], [200, 20], [5, 5]), limits=limits)
    assert recording.rejected.tolist() == [True, False]
    assert recording.completed.tolist() == [False, True]


@pytest.mark.parametrize(
    ("slots", "tokens", "message"),
    [
        ([0], [0], "without tokens"),
        ([0], [101], "left to compute"),
        ([0, 0], [1, 1], "twice"),
        ([7], [1], "holds no request"),
        ([-1], [1], "holds no request"),
    ],
)
def test_plans_that_no_engine_could_run_are_refused(slots: list[int], tokens: list[int], message: str) -> None:
    with pytest.raises(PlanFaultError, match=message):
        _run_plan(_plan(slots, tokens), workload([0.0], [100], [3]))


def test_budget_and_places_are_checked() -> None:
    small = EngineLimits(kv_capacity_tokens=16_000, max_num_batched_tokens=50)
    with pytest.raises(PlanFaultError, match="max_num_batched_tokens"):
        _run_plan(_plan([0], [51]), workload([0.0], [100], [3]), small)
    one = EngineLimits(kv_capacity_tokens=16_000, max_num_seqs=1)
    with pytest.raises(PlanFaultError, match="max_num_seqs"):
        _run_plan(_plan([0, 1], [5, 5]), workload([0.0, 0.0], [100, 100], [3, 3]), one)


def test_a_policy_that_never_plans_is_called_stuck() -> None:
    with pytest.raises(StuckError, match="planned nothing"):
        _run_plan(StepPlan(), workload([0.0], [100], [3]))


@pytest.mark.parametrize("ahead", [False, True])
def test_policies_see_whether_steps_are_planned_ahead(ahead: bool) -> None:
    settings, recording = ReplicaSettings(plan_ahead=ahead), Recording.of(workload([0.0], [100], [3]).bound(PLAIN))
    assert Replica(0, Scripted(StepPlan()), PLAIN, LIMITS, recording, settings).view.plan_ahead is ahead


def test_rejected_slots_leave() -> None:
    plan = StepPlan(rejected=np.array([0], dtype=np.int64))
    recording = _run_plan(plan, workload([0.0], [100], [3]))
    assert recording.rejected.all()


def test_second_stage_changes_the_promise() -> None:
    thinking = SLOClass("r", (Stage(SLO(ttft_ms=500.0, tpot_ms=50.0)), Stage(SLO(tpot_ms=100.0))))
    load = workload([0.0], [10], [6], (thinking,))
    load.calls["first_stage_tokens"] = 3
    seen: list[tuple[int, int, float]] = []
    recording = Recording.of(load.bound(PLAIN))

    class Watching(Scripted):
        def plan(self, now_s: float, view: EngineView) -> StepPlan:
            row = view.table.rows[0]
            seen.append((int(row["output_tokens"]), int(row["stage_tokens"]), float(row["tpot_s"])))
            return _plan([0], [10 if not seen[1:] else 1])

    replica = Replica(0, Watching(StepPlan()), PLAIN, LIMITS, recording, ReplicaSettings())
    Cluster(recording, [replica], make_router("round-robin")).run()
    # The third token ends the first stage and belongs to it, as the score has it.
    assert stage_starts_of((Stage(SLO(), max_tokens=3), Stage(SLO())), 6) == [0, 3]
    assert seen == [(0, 0, 0.05), (1, 1, 0.05), (2, 2, 0.05), (3, 0, 0.1), (4, 1, 0.1), (5, 2, 0.1)]


def test_rounds_follow_each_other_and_use_the_prefix() -> None:
    load = make_workload("tool", 1.0, 5, seed=0)
    recording = run(load, limits=EngineLimits(kv_capacity_tokens=66_000))
    assert recording.completed.all()
    calls = load.calls
    before = np.flatnonzero(calls["next_call"] >= 0)
    after = calls["next_call"][before]
    waited = recording.calls["arrival_s"][after] - recording.calls["done_s"][before]
    np.testing.assert_allclose(waited, calls["tool_s"][after])
    held = (calls["prompt_tokens"] + calls["output_tokens"] - 1)[before] // 16 * 16
    assert recording.calls["cached_tokens"][after].tolist() == held.tolist()
    without = run(load, limits=EngineLimits(kv_capacity_tokens=66_000, prefix_cache=False))
    assert without.calls["cached_tokens"].sum() == 0
    assert without.steps.rows["new_tokens"].sum() > recording.steps.rows["new_tokens"].sum()


def test_handover_takes_transfer_time() -> None:
    load = workload([0.0], [1000], [3])
    slow = run(load, "distserve", replicas=2, kv_bytes_per_token=1e6, transfer_bytes_per_s=1e9)
    first, second, third = token_times(slow, 0)
    assert first == 0.11
    assert second == pytest.approx(0.11 + 1.0 + 0.0101)
    assert third == pytest.approx(second + 0.0101)


def test_draft_tokens_are_accepted_with_the_probability_given() -> None:
    draws = [uniform(3, call, position) for call in range(200) for position in range(50)]
    assert min(draws) >= 0.0 and max(draws) < 1.0
    assert np.mean(np.array(draws) < 0.7) == pytest.approx(0.7, abs=0.02)
    assert uniform(3, 5, 7) == uniform(3, 5, 7)


def test_speculation_yields_several_tokens_a_step() -> None:
    load = workload([0.0], [16], [9])
    load.calls["acceptance"] = 1.0

    class Drafting(Scripted):
        def plan(self, now_s: float, view: EngineView) -> StepPlan:
            if view.table.rows["output_tokens"][0] == 0:
                return _plan([0], [16])
            plan = _plan([0], [4])
            plan.draft_tokens = np.array([3], dtype=np.int64)
            return plan

    recording = Recording.of(load.bound(PLAIN))
    replica = Replica(0, Drafting(StepPlan()), PLAIN, LIMITS, recording, ReplicaSettings())
    Cluster(recording, [replica], make_router("round-robin")).run()
    assert recording.num_steps == 3  # one prefill, then twice four tokens
    assert recording.completed.all()


def test_model_error_has_the_mean_and_spread_asked_for() -> None:
    factors = StepFactors(ModelError(bias=1.2, noise=0.3), 1, 0)
    drawn = np.array([factors.draw() for _ in range(20_000)])
    assert drawn.mean() == pytest.approx(1.2, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(0.3, rel=0.05)
    assert StepFactors(ModelError(), 1, 0).draw() == 1.0


def test_impossible_settings_are_named() -> None:
    load = workload([0.0], [10], [1])
    with pytest.raises(InvalidFieldError, match="replicas"):
        run(load, replicas=0)
    with pytest.raises(InvalidFieldError, match="prefill_replicas"):
        run(load, "distserve", replicas=1)
    with pytest.raises(InvalidFieldError, match="router"):
        run(load, router="random")
    with pytest.raises(InvalidFieldError, match="parameters of vllm"):
        run(load, parameters={"bugdet": 1})
    with pytest.raises(InvalidFieldError, match="deaths"):
        run(load, deaths=[(1.0, 5)])


def test_work_takes_longer_while_the_machine_is_elsewhere() -> None:
    gaps = Interruptions([1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 0.5, 1.5])
    assert gaps.duration_s(0.0, 1.0) == pytest.approx(1.0)
    assert gaps.duration_s(1.0, 0.25) == pytest.approx(0.5)  # half of this second is lost
    assert gaps.duration_s(1.5, 0.75) == pytest.approx(1.0)
    assert gaps.duration_s(3.0, 0.05) == pytest.approx(1.0)  # never all of it
    assert gaps.duration_s(9.0, 0.3) == pytest.approx(0.3)


def test_a_timeline_sets_what_was_promised_beside_its_target() -> None:
    load = make_workload("chat", 4.0, 150, arrivals="poisson")
    large = EngineLimits(kv_capacity_tokens=16 * 8000, max_num_batched_tokens=8192)
    series = timeline(run(load, "slos-serve", GPU, large, oracle_lengths=True), slices=6)
    ratios = series["ttft_of_target_p99"] + series["tpot_of_target_p99"]
    assert max(value for value in ratios if value is not None) <= 1.01
    width_s = 2.0 * series["t_s"][0]
    assert sum(series["promised_rps"]) < sum(series["arrivals_rps"])
    assert sum(series["arrivals_rps"]) == pytest.approx(150 / width_s, rel=1e-3)
    crowded = timeline(run(load, "vllm", GPU, large), slices=6)
    assert crowded["promised_rps"] == crowded["arrivals_rps"]  # it promises nothing, so all count
    assert max(value for value in crowded["ttft_of_target_p99"] if value is not None) > 1.5


@pytest.mark.parametrize("policy", ["vllm-v0", "scorpio"])
def test_what_is_computed_again_may_be_longer_than_any_batch(policy: str) -> None:
    """Two answers outgrow the cache; the one that is preempted comes back longer than a batch may be."""
    load = workload([0.0, 0.0], [200, 200], [420, 420])
    limits = EngineLimits(kv_capacity_tokens=16 * 60, max_num_batched_tokens=256)
    parameters = {"token_budget": 256} | ({"chunk_tokens": 0} if policy == "scorpio" else {})
    recording = run(load, policy, PLAIN, limits, parameters=parameters)
    assert recording.num_preemptions > 0
    assert recording.completed.all()
    assert recording.steps.rows["new_tokens"].max() <= 256


def test_a_prompt_longer_than_any_batch_is_prefilled_apart_too() -> None:
    limits = EngineLimits(kv_capacity_tokens=16 * 100, max_num_batched_tokens=256)
    recording = run(workload([0.0], [600], [5]), "distserve", PLAIN, limits, replicas=2)
    assert recording.completed.all()
    assert recording.steps.rows["new_tokens"][:3].tolist() == [256, 256, 88]
