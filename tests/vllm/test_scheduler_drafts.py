"""The plug-in with n-gram drafts on vLLM's real scheduler and KV-cache manager, the device imaginary, time virtual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.vllm.dry_load import Start, assert_all_served, assert_answers, events, mixed_load

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [250, 4000])
def test_answers_stay_those_of_the_stock_scheduler_with_drafts(
    start: Start, tmp_path: Path, depth: int, num_blocks: int
) -> None:
    engine = start(depth=depth, num_blocks=num_blocks, speculative_config=NGRAM)
    mixed_load(engine)
    assert_all_served(engine, tmp_path, preempts=num_blocks < 4000)
    assert engine.num_drafted > 500


@pytest.mark.parametrize("depth", [1, 2])
def test_each_request_verifies_what_was_planned(start: Start, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    engine = start(depth=depth, speculative_config=NGRAM)
    scheduler = engine.scheduler
    plan_of, seen = scheduler._slo.policy.plan, []

    def noted(start_s: float, view: Any) -> Any:
        seen.append(plan_of(start_s, view))
        return seen[-1]

    monkeypatch.setattr(scheduler._slo.policy, "plan", noted)
    schedule, compared = scheduler.schedule, 0

    def checked() -> Any:
        nonlocal compared
        seen.clear()
        output = schedule()
        if seen and len(seen[0].slots):
            plan, ids = seen[0], {slot: one.request.request_id for slot, one in scheduler._slo.book.by_slot.items()}
            planned = {
                ids[slot]: int(draft) for slot, draft in zip(plan.slots.tolist(), plan.draft_tokens, strict=True)
            }
            drafts = {key: len(tokens) for key, tokens in output.scheduled_spec_decode_tokens.items()}
            assert drafts == {key: planned[key] for key in drafts}
            assert set(drafts) == {
                key for key, draft in planned.items() if draft and key in output.num_scheduled_tokens
            }
            assert output.total_num_scheduled_tokens <= plan.num_tokens
            compared += len(drafts)
        return output

    monkeypatch.setattr(scheduler, "schedule", checked)
    mixed_load(engine, count=40)
    assert compared > 200


@pytest.mark.parametrize("depth", [1, 2])
def test_acceptance_is_learnt_from_what_vllm_verified(start: Start, depth: int) -> None:
    engine = start(depth=depth, speculative_config=NGRAM)
    engine.device.acceptance = 0.5
    mixed_load(engine, count=60)
    mean = engine.scheduler._slo.policy.planner.acceptance.mean()
    assert mean[0] == pytest.approx(0.5, abs=0.06)  # chat
    assert mean[1] == pytest.approx(0.5, abs=0.06)  # code


def test_drafts_that_are_never_there_count_as_wrong(start: Start) -> None:
    engine = start(depth=1, speculative_config=NGRAM)
    engine.device.hit_share = 0.0
    mixed_load(engine, count=40)
    assert_answers(engine)
    assert engine.num_drafted == 0
    assert engine.scheduler._slo.policy.planner.acceptance.mean()[0] < 0.3


def test_drafts_keep_more_promises(start: Start, tmp_path: Path) -> None:
    kept = []
    for config in (None, NGRAM):
        (tmp_path / "events.jsonl").unlink(missing_ok=True)
        engine = start(**({"speculative_config": config} if config else {}))
        mixed_load(engine, rate=11.0, count=150)
        engine.scheduler.shutdown()
        ended = [event for event in events(tmp_path, "request") if event["slo_class"] in ("chat", "code")]
        kept.append(sum(event["ttft_ok"] and event["tpot_ok"] for event in ended))
    assert kept[1] >= kept[0], kept
