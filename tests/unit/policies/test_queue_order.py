"""The three ways to fill a batch, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.plan import EngineView
from slos_serve.policies.queue_order import (
    Room,
    batch_plan,
    checked_draft_tokens,
    checked_tokens,
    checked_watermark,
    chunked,
    decodes_then,
    draft_all,
    rest_of_prompt,
    room_for,
    room_of,
    whole_prompts,
)
from tests.builders import EngineBuilder


def entries(view: EngineView, kernel: str, room: Room, draft_tokens: int = 0) -> list[tuple[int, int, int]]:
    """(slot, tokens, drafts) of a batch in queue order."""
    rows, out = view.table.rows, room_for(view)
    if kernel == "chunked":
        count = chunked(rows, view.running, view.waiting, room, draft_tokens, out)
    elif kernel == "whole":
        count = whole_prompts(rows, view.waiting, len(view.running), room, view.max_num_batched_tokens, out)
    else:
        everyone = np.concatenate((view.running, view.waiting))
        count = decodes_then(rows, view.running, everyone, room, draft_tokens, out)
    return [(int(slot), int(tokens), int(drafts)) for slot, tokens, drafts in out[:, :count].T]


def test_room_is_the_smaller_budget_and_keeps_the_watermark_only_while_something_runs() -> None:
    engine = EngineBuilder(total_blocks=1000)
    assert room_of(engine.view(), 5000, 0.1) == Room(2048, 256, 1000, 16, 0)
    engine.decode(prompt_tokens=160)
    assert room_of(engine.view(), 512, 0.1) == Room(512, 256, 1000 - 11, 16, 100)


def test_chunked_gives_running_ones_their_tokens_then_fills_up_with_prompts() -> None:
    engine = EngineBuilder()
    first = engine.decode()
    under_way = engine.prefilling(900, 500)
    new = engine.wait(300)
    view = engine.view()
    assert entries(view, "chunked", room_of(view, 512)) == [(first, 1, 0), (under_way, 400, 0), (new, 111, 0)]


@pytest.mark.parametrize("kernel", ["chunked", "whole", "decodes"])
def test_blocks_that_others_hold_already_cost_a_prompt_nothing(kernel: str) -> None:
    """Two prompts of 25 blocks in room for 30; 20 blocks of the second are cached and in use."""
    engine = EngineBuilder(total_blocks=30)
    first, second = engine.wait(400), engine.wait(400)
    view = engine.view()
    assert [slot for slot, _, _ in entries(view, kernel, room_of(view, 2048))] == [first]
    view.table.rows["cached_tokens"][second], view.table.rows["fixed_blocks"][second] = 320, -20
    assert entries(view, kernel, room_of(view, 2048)) == [(first, 400, 0), (second, 80, 0)]


def test_chunked_lets_nothing_pass_a_prompt_that_does_not_fit() -> None:
    engine = EngineBuilder(total_blocks=20)
    engine.wait(400)
    engine.wait(10)
    view = engine.view()
    assert entries(view, "chunked", room_of(view, 512)) == []


def test_whole_prompts_never_cut_one_that_fits_a_batch() -> None:
    engine = EngineBuilder()
    first, second = engine.wait(700), engine.wait(700)
    view = engine.view()
    assert entries(view, "whole", room_of(view, 1000)) == [(first, 700, 0)]
    assert entries(view, "whole", room_of(view, 1400)) == [(first, 700, 0), (second, 700, 0)]


def test_a_prompt_longer_than_the_budget_runs_alone_and_its_rest_next() -> None:
    engine = EngineBuilder()
    long = engine.wait(3000)
    engine.wait(10)
    view = engine.view()
    assert entries(view, "whole", room_of(view, 1000)) == [(long, 2048, 0)]
    assert rest_of_prompt(view) is None
    engine = EngineBuilder()
    long = engine.prefilling(3000, 2048)
    rest = rest_of_prompt(engine.view())
    assert rest is not None
    assert (rest.slots.tolist(), rest.tokens.tolist()) == ([long], [952])


def test_decodes_then_prompts_keeps_the_given_order_and_puts_running_ones_first() -> None:
    engine = EngineBuilder()
    new = engine.wait(300)
    under_way = engine.prefilling(900, 500)
    decode = engine.decode()
    view = engine.view()
    rows, out = view.table.rows, room_for(view)
    ordered = np.array([new, under_way])
    count = decodes_then(rows, view.running, ordered, room_of(view, 512), 0, out)
    assert out[:2, :count].T.tolist() == [[decode, 1], [under_way, 211], [new, 300]]


def test_a_prompt_starts_only_beside_what_those_under_way_still_need() -> None:
    engine = EngineBuilder(total_blocks=100)
    engine.prefilling(800, 16)  # holds 1 block, needs 49 more
    fits, too_long = engine.wait(50 * 16), engine.wait(51 * 16)
    view = engine.view()
    rows, out = view.table.rows, room_for(view)
    for slot, starts in ((fits, True), (too_long, False)):
        count = decodes_then(rows, view.running, np.array([slot]), room_of(view, 512), 0, out)
        assert (count == 1) == starts
    view.free_blocks -= 1
    assert decodes_then(rows, view.running, np.array([fits]), room_of(view, 512), 0, out) == 0


def test_the_watermark_holds_a_prompt_back() -> None:
    engine = EngineBuilder(total_blocks=100)
    engine.decode(prompt_tokens=16 * 40, output_tokens=1)  # its next token needs a block more
    slot = engine.wait(16 * 55)
    view = engine.view()
    out = room_for(view)
    for watermark, starts in ((0.04, True), (0.05, False)):
        room = room_of(view, 512, watermark)
        count = decodes_then(view.table.rows, view.running, np.array([slot]), room, 0, out)
        assert (count == 2) == starts


def test_decodes_verify_drafts_within_budget_and_length() -> None:
    engine = EngineBuilder()
    free, ending = engine.decode(), engine.decode(output_tokens=97, max_tokens=100)
    view = engine.view()
    assert entries(view, "chunked", room_of(view, 512), 4) == [(free, 5, 4), (ending, 3, 2)]
    assert entries(view, "decodes", room_of(view, 512), 4) == [(free, 5, 4), (ending, 3, 2)]
    assert draft_all(view.table.rows, view.running, 4, room_of(view, 4)).tolist() == [2, 0]


def test_drafts_leave_other_decodes_their_block() -> None:
    engine = EngineBuilder()
    for _ in range(2):
        engine.decode(prompt_tokens=16, output_tokens=16)  # 31 computed: a draft begins a new block
    view = engine.view(free_blocks=1)
    assert draft_all(view.table.rows, view.running, 4, room_of(view, 512)).tolist() == [4, 0]


def test_a_plan_has_the_entries_and_one_reason() -> None:
    plan = batch_plan(np.array([[3, 4, 9], [5, 6, 9], [0, 2, 9]]), 2)
    assert (plan.slots.tolist(), plan.tokens.tolist(), plan.draft_tokens.tolist()) == ([3, 4], [5, 6], [0, 2])
    assert len(set(plan.reasons.tolist())) == 1


def test_parameters_out_of_range_are_named() -> None:
    with pytest.raises(InvalidFieldError, match="draft_tokens"):
        checked_draft_tokens(11)
    with pytest.raises(InvalidFieldError, match="chunk_tokens"):
        checked_tokens("chunk_tokens", 0)
    with pytest.raises(InvalidFieldError, match=r"token_budget: got 1\.5; allowed: a whole number"):
        checked_tokens("token_budget", 1.5)
    with pytest.raises(InvalidFieldError, match="watermark"):
        checked_watermark(1.0)
