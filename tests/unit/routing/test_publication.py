"""What replicas publish: sums that match the planner's own, across a transport, at the right moments."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import Status
from slos_serve.planning.planner import Planner
from slos_serve.routing.publication import Publication
from slos_serve.routing.publisher import Publisher, Snapshot, own_admission, publication_of, snapshot_of
from tests.builders import OPT_13B_A100, EngineBuilder
from tests.unit.routing.fleet import NOW_S, loaded, published


def _mixed() -> EngineBuilder:
    engine = loaded(10)
    engine.decode(tpot_s=0.05)
    engine.decode(status=Status.BEST_EFFORT)
    engine.prefilling(500, 100, due_in_s=0.8)
    engine.wait(300, due_in_s=0.5)
    engine.wait(12_000, due_in_s=0.6)
    engine.best_effort()
    return engine


def test_sums_are_those_of_the_requests() -> None:
    found = published(_mixed())
    assert found.pace_s == pytest.approx([0.05, 0.1])
    assert found.counts.tolist() == [1.0, 10.0]
    # One tight decode; ten loose ones and two prompts that fit. The third prompt is lost even alone.
    assert found.in_tier.tolist() == [1.0, 12.0]
    assert (found.due_s - NOW_S).tolist() == pytest.approx([0.5, 0.8])
    assert 300.0 < found.cost_tokens[0] < 350.0 and 400.0 < found.cost_tokens[1] < 450.0
    # Blocks of 16 tokens: eleven decodes and two prompts, best effort not; between what they hold and their peaks.
    peaks = [-(-(200 + 100) // 16)] * 11 + [-(-(500 + 100) // 16), -(-(300 + 100) // 16)]
    held = [-(-(200 + 10) // 16)] * 11 + [-(-500 // 16), -(-300 // 16)]
    assert len(found.memory_left) == 1
    assert 4000 - sum(peaks) < found.memory_left[0] <= 4000 - sum(held)
    assert (found.num_requests, found.num_unpromised) == (16, 3)
    found.check()


def test_what_is_queued_without_a_promise_is_told_by_share() -> None:
    engine = _mixed()
    late = engine.best_effort(prompt_tokens=700)
    engine.table.rows["share"][late], engine.table.rows["cached_tokens"][late] = 9, 160
    begun = engine.best_effort(prompt_tokens=400)
    engine.table.rows["share"][begun], engine.table.rows["computed_tokens"][begun] = 9, 100
    found = published(engine)
    shares = dict(zip(found.queued_shares.tolist(), found.queued_tokens.tolist(), strict=True))
    rows = engine.table.rows
    waiting = engine.view().waiting
    unpromised = [slot for slot in waiting if rows["status"][slot] == Status.BEST_EFFORT and rows["share"][slot] == 0]
    passed_over = 12_000
    assert shares == {0: float(passed_over + rows["prompt_tokens"][unpromised].sum()), 9: 540.0 + 300.0}
    assert len(published(EngineBuilder()).queued_shares) == 0


def test_an_idle_engine_publishes_that_all_is_free() -> None:
    found = published(EngineBuilder())
    assert found.memory_left.tolist() == [4000.0]
    assert found.counts.sum() == found.num_requests == len(found.due_s) == 0


def test_decodes_that_are_ahead_lend_though_nobody_asks_yet() -> None:
    engine = EngineBuilder()
    for _ in range(10):
        engine.decode(output_tokens=60)
    found = published(engine)
    assert len(found.due_s) == 0 and found.lent_tokens[-1] > 0.0


def test_owed_is_what_the_planner_takes() -> None:
    engine = _mixed()
    planner = Planner(OPT_13B_A100, 1)
    found = publication_of(planner, OPT_13B_A100, snapshot_of(engine.view(), NOW_S), replica="a")
    own = own_admission(planner, planner.coefficients, engine.view(), NOW_S)
    assert len(found.due_s) == own.admitted.taken.sum() == 2


def test_a_publication_survives_json() -> None:
    given = published(_mixed())
    engine = EngineBuilder()
    engine.wait(100, tpot_s=np.inf)
    boosted = replace(given, boosted=np.array([0, 7]), boost=np.array([2.0, 3.5]))
    for one in (given, boosted, published(engine)):
        found = Publication.of_dict(json.loads(json.dumps(one.as_dict(), allow_nan=False)))
        for field in fields(Publication):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(one, field.name), field.name)
            assert type(getattr(found, field.name)) is type(getattr(one, field.name)), field.name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "other"}, "format"),
        ({"due_s": [1.0]}, "cost_tokens"),
        ({"coefficients": [1.0]}, "coefficients"),
        ({"coefficients": "x"}, "publication"),
        ({"pace_s": []}, "periods_s"),
        ({"due_s": [2.0, 1.0]}, "due_s"),
        ({"tier": [0, 7]}, "tier"),
        ({"block_size": 0}, "block_size"),
        ({"time_s": "nan"}, "time_s"),
        ({"boosted": [0], "boost": [1.0, 2.0]}, "boosted"),
        ({"boosted": [256], "boost": [2.0]}, "boosted"),
        ({"boosted": [-1], "boost": [2.0]}, "boosted"),
        ({"boosted": [0], "boost": [0.0]}, "boost"),
        ({"forecast_tokens": []}, "forecast_tokens"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidFieldError, match=named):
        Publication.of_dict(published(_mixed()).as_dict() | change)


def test_missing_fields_are_named() -> None:
    given = published(_mixed()).as_dict()
    del given["counts"]
    with pytest.raises(InvalidFieldError, match="counts"):
        Publication.of_dict(given)


def test_publishes_before_the_last_one_is_too_old() -> None:
    publisher = Publisher("a", Planner(OPT_13B_A100, 1), OPT_13B_A100, every_s=0.1)
    view = loaded(3).view()

    def at(now_s: float, step_s: float) -> Publication | None:
        if not publisher.due(now_s + step_s):
            return None
        return publisher.publish(snapshot_of(view, now_s, StepPlan(predicted_s=step_s)))

    first = at(NOW_S, 0.04)
    assert first is not None and first.ready_s == NOW_S + 0.04
    # The next plan comes at 0.04, the one after at 0.08, and that step would end too late.
    assert at(NOW_S + 0.04, 0.04) is None
    second = at(NOW_S + 0.08, 0.04)
    assert second is not None and second.sequence == first.sequence + 1
    third = at(NOW_S + 0.12, 0.5)
    assert third is not None and third.seen_until_s == NOW_S + 0.12


def test_a_snapshot_keeps_what_was_then() -> None:
    engine = _mixed()
    view = engine.view()
    plan = Planner(OPT_13B_A100, 1).plan(NOW_S, view)

    def summed_up(snapshot: Snapshot) -> dict[str, object]:
        return publication_of(Planner(OPT_13B_A100, 1), OPT_13B_A100, snapshot, replica="a").as_dict()

    taken = snapshot_of(view, NOW_S, plan)
    at_once = summed_up(snapshot_of(view, NOW_S, plan))
    view.table.rows["output_tokens"] += 5  # what the steps after it do
    view.table.rows["status"] = 0
    assert summed_up(taken) == at_once != summed_up(snapshot_of(view, NOW_S, plan))


def test_the_correction_slows_what_is_published() -> None:
    planner = Planner(OPT_13B_A100, 1)
    view: EngineView = loaded(3).view()
    slow = publication_of(planner, OPT_13B_A100, snapshot_of(view, NOW_S, correction=2.0), replica="a")
    plain = publication_of(planner, OPT_13B_A100, snapshot_of(view, NOW_S), replica="a")
    np.testing.assert_allclose(slow.coefficients, 2.0 * plain.coefficients)
    assert slow.correction == 2.0
    assert replace(slow, correction=1.0).correction == 1.0
