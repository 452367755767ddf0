"""Prefill and decode on different replicas: transfer times, who gives the first token, deaths, roles that move."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, single_stage
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.limits import EngineLimits
from slos_serve.sim.outcome import score, summarize_run
from slos_serve.sim.pair_router import PairRouter
from slos_serve.sim.recording import Recording
from slos_serve.sim.split import Links
from slos_serve.workload.calls import Workload
from slos_serve.workload.scenarios import make_workload
from tests.sim_builders import GPU, PLAIN, run, token_times, workload

LIMITS = EngineLimits(kv_capacity_tokens=66_000)


def _apart(load: Workload, prefill: int = 1, replicas: int = 2, **settings: object) -> Recording:
    given: dict[str, object] = {"router": "slo", "kv_bytes_per_token": 8e5, **settings}
    return run(load, "slos-serve", GPU, LIMITS, replicas=replicas, prefill_replicas=prefill, **given)


def test_transfers_on_a_link_follow_each_other() -> None:
    links = Links(1e-3)
    assert links.move(1.0, 0, 2, 500) == 1.5
    assert links.move(1.2, 0, 3, 100) == 1.6  # waits for the way out
    assert links.move(1.2, 1, 2, 100) == 1.6  # waits for the way in
    assert links.move(1.2, 1, 1, 100) == 1.2  # nothing to move


def test_the_decode_side_gives_the_first_token_after_the_transfer() -> None:
    load = workload([0.0], [1000], [3])
    recording = run(load, "vllm", replicas=2, prefill_replicas=1, kv_bytes_per_token=1e6, transfer_bytes_per_s=1e9)
    # 110 ms for the prompt, 1 s for its KV, then steps of one token.
    assert token_times(recording, 0) == pytest.approx([1.1201, 1.1302, 1.1403])
    assert recording.calls["replica"].tolist() == [1] and recording.completed.all()


def test_an_answer_of_one_token_comes_from_the_decode_side_too() -> None:
    recording = _apart(workload([0.0], [1000], [1]))
    assert recording.completed.all() and recording.calls["replica"].tolist() == [1]
    assert token_times(recording, 0)[0] > GPU.zero_load_s(1000)


@pytest.mark.parametrize("router", ["slo", "slo-pack", "least-loaded"])
@pytest.mark.parametrize("ahead", [False, True])
def test_every_call_ends_and_prompts_stay_with_the_prefill_replicas(router: str, ahead: bool) -> None:
    load = make_workload("mixed", 3.0, 80, seed=1, arrivals="poisson")
    first, second = (_apart(load, 1, 3, router=router, plan_ahead=ahead) for _ in range(2))
    assert first.completed.all() and first.digest() == second.digest()
    steps = first.steps.rows
    assert set(first.calls["replica"].tolist()) == {1, 2}
    prompts = steps["new_tokens"][steps["replica"] == 0].sum()
    assert prompts >= load.calls["prompt_tokens"].sum()
    decodes = steps["new_tokens"][steps["replica"] > 0].sum()
    assert decodes < load.calls["output_tokens"].sum() + 20_000  # and what is computed again after a preemption


def test_a_slow_link_costs_promises_before_they_are_made_not_after() -> None:
    load = make_workload("chat", 3.0, 120, seed=1, arrivals="poisson")
    fast, slow = (_apart(load, 1, 3, transfer_bytes_per_s=rate) for rate in (50e9, 6e9))
    kept, lost = summarize_run(fast), summarize_run(slow)
    assert lost.attained < kept.attained
    for outcome in (kept, lost):
        assert outcome.admitted_attained >= 0.9 * outcome.admitted  # what waits for a link is not foreseen


def test_a_prompt_only_part_promises_no_pace_and_holds_no_room_for_the_answer() -> None:
    """Two answers of 500 tokens fit the decode replica only; the prefill replica has room for the prompts alone."""
    slo = single_stage("chat", SLO(ttft_ms=2000.0, tpot_ms=100.0))
    load = workload([0.0, 0.01], [400, 400], [500, 500], (slo,))
    small, large = EngineLimits(kv_capacity_tokens=16 * 60), EngineLimits(kv_capacity_tokens=16 * 200)
    settings = SimSettings(router="slo", replicas=2, prefill_replicas=1, kv_bytes_per_token=8e5)
    assert score(simulate(load, GPU, large, settings)).attained.all()
    # A decode replica that holds one whole answer promises one.
    assert summarize_run(simulate(load, GPU, small, settings)).admitted <= 1


@pytest.mark.parametrize("dies", [0, 1, 3])
def test_calls_of_a_replica_that_dies_go_on_elsewhere_unless_they_had_begun(dies: int) -> None:
    load = make_workload("chat", 6.0, 60, seed=2, arrivals="poisson")
    recording = _apart(load, 2, 4, deaths=[(4.0, dies)], transfer_bytes_per_s=2e9)
    outcome = summarize_run(recording)
    lost = load.num_requests - int(recording.completed.sum())
    assert outcome.unfinished == lost
    if dies == 0:
        assert lost == 0  # nobody had a token from there
    else:
        begun = ~np.isnan(recording.token_s[recording.token_start])
        assert begun[~recording.completed].all() and lost < 20


def test_moving_roles_follow_the_mix_and_drop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts first, then long answers: a split that is fixed suits one half, roles that move suit both."""
    slo = single_stage("chat", SLO(ttft_ms=4000.0, tpot_ms=60.0))
    prompts = ([0.11 * k for k in range(160)], [3000] * 160, [5] * 160)
    answers = ([20.0 + 0.09 * k for k in range(280)], [60] * 280, [500] * 280)
    load = workload(prompts[0] + answers[0], prompts[1] + answers[1], prompts[2] + answers[2], (slo,))
    made: list[PairRouter] = []
    begin = PairRouter.__init__

    def keep(self: PairRouter, *given: object, **named: object) -> None:
        begin(self, *given, **named)  # type: ignore[arg-type]  # passed on
        made.append(self)

    monkeypatch.setattr(PairRouter, "__init__", keep)
    moving = _apart(load, 2, 4, moving_roles=True)
    assert moving.completed.all()
    assert made[0].roles.moves >= 1
    attained = score(moving).attained.sum()
    fixed = [score(_apart(load, prefill, 4)).attained.sum() for prefill in (1, 2, 3)]
    assert attained > max(fixed)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"prefill_replicas": 2}, "prefill_replicas"),
        ({"prefill_replicas": 1, "router": "lmetric"}, "router"),
        ({"prefill_replicas": 0, "moving_roles": True}, "moving_roles"),
        ({"prefill_replicas": 1, "router": "least-loaded", "moving_roles": True}, "moving_roles"),
        ({"prefill_replicas": 1, "routers": 2}, "routers"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings: dict[str, object], name: str) -> None:
    asked = SimSettings(**{"router": "slo", "replicas": 2, **settings})  # type: ignore[arg-type]  # by name
    with pytest.raises(InvalidFieldError, match=name):
        simulate(workload([0.0], [10], [2]), PLAIN, LIMITS, asked)
