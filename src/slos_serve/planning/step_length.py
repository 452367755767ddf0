"""How long a step may last: until its earliest due time, longer where a prompt is served by it and no decode harmed."""

from __future__ import annotations

from numba import njit

from slos_serve.core.request import RequestArray
from slos_serve.perf.batch_time import K_CTX, K_S, K_SEQ
from slos_serve.planning.batch import Limits, beyond_roofline_s, tokens_done, tokens_left
from slos_serve.planning.candidates import CATCH_UP_SHARE, next_due_s
from slos_serve.planning.prefill_rate import FloatArray, linear_step_s
from slos_serve.planning.work import Drafts, Work

# With that lead nobody is late after a long step, but prompts that come during it are: the only prompt there is makes a
# step at most this many times as long as one beside drafting decodes may be.
ABSORBED_PERIODS = 2.0


@njit(cache=True)
def _absorbable_s(
    rows: RequestArray,
    slot: int,
    work: Work,
    drafts: Drafts,
    now_s: float,
    coefficients: FloatArray,
    tpot_margin: float,
    all_decodes_s: float,
    all_fixed_s: float,
) -> float:
    """Length of a step that ends the only prompt there is beside every decode, if each can make up for the wait.

    A promise is about the mean of a stage. With nobody else waiting, a decode that comes late once catches up at the
    engine's own speed; it may be late by a small part of what its forecast tokens can make up, never beyond its stall
    bound, and only while decodes take no more than half of their pace: a fuller engine has no time to catch up in.
    0 when one of them could not.
    """
    done, todo = tokens_done(rows, slot), tokens_left(rows, slot)
    whole_s = linear_step_s(coefficients, float(len(work.decodes) + drafts.lengths.sum() + todo)) + all_fixed_s
    whole_s += beyond_roofline_s(coefficients, todo, done)
    for j in range(len(work.decodes)):
        decode = work.decodes[j]
        late_s = now_s + whole_s - work.decode_due_s[j]
        left = rows["expected_tokens"][decode] - rows["output_tokens"][decode]
        gain_s = rows["tpot_s"][decode] * (1.0 - tpot_margin) - all_decodes_s
        if late_s > 0.0 and gain_s < all_decodes_s:
            return 0.0
        if late_s > 0.0 and late_s > CATCH_UP_SHARE * left * gain_s:
            return 0.0
        if now_s + whole_s > rows["last_token_s"][decode] + rows["max_stall_s"][decode]:
            return 0.0
    return float(whole_s)


@njit(cache=True)
def _rescue_s(
    rows: RequestArray,
    work: Work,
    drafts: Drafts,
    now_s: float,
    limit_s: float,
    limits: Limits,
    all_decodes_s: float,
    all_fixed_s: float,
) -> float:
    """Length of a step that ends the promised prompts which no later step would end in time; 0 without any.

    Admission counts prompts as a fluid, batches are whole: the last few tokens of a prompt may fall into a step of
    their own, beside all the decodes once more, and be late. Decodes lend it their margin, which is there for that, and
    a little of what they can catch up. Their due times stay, so that what they lent is made up for next.
    """
    coefficients, prompt_tokens, fixed_s = limits.coefficients, 0.0, all_fixed_s
    tokens = float(len(work.decodes) + drafts.lengths.sum())
    for j in range(len(work.prefills)):
        slot, room_s = work.prefills[j], work.prefill_due_s[j] - now_s
        done, todo = tokens_done(rows, slot), tokens_left(rows, slot)
        prompt_tokens += todo
        fixed_s += beyond_roofline_s(coefficients, todo, done)
        whole_s = linear_step_s(coefficients, tokens + prompt_tokens) + fixed_s
        if whole_s <= limit_s or whole_s + all_decodes_s <= room_s:
            continue
        if whole_s > room_s or tokens + prompt_tokens > limits.max_tokens:
            return 0.0
        for decode in work.decodes:
            late_s = now_s + whole_s - next_due_s(rows, decode, 0.0)
            left = rows["expected_tokens"][decode] - rows["output_tokens"][decode]
            gain_s = rows["tpot_s"][decode] - all_decodes_s
            if late_s > 0.0 and late_s > CATCH_UP_SHARE * left * gain_s:
                return 0.0
        return float(whole_s)
    return 0.0


@njit(cache=True)
def step_limits_s(
    rows: RequestArray,
    work: Work,
    drafts: Drafts,
    now_s: float,
    limits: Limits,
    tpot_margin: float,
    longest_s: float,
) -> tuple[float, float]:
    """How long the step may last (until the earliest due time, a full batch at most), and how long the next one may."""
    coefficients = limits.coefficients
    full_s = min(linear_step_s(coefficients, float(limits.max_tokens)), longest_s)
    all_decodes_s, all_fixed_s = 0.0, 0.0
    if len(work.decodes) > 0:
        context = 0.0
        for slot in work.decodes:
            context += rows["computed_tokens"][slot]
        tokens = float(len(work.decodes) + drafts.lengths.sum())
        all_fixed_s = coefficients[K_SEQ] * tokens + coefficients[K_CTX] * context
        all_fixed_s += coefficients[K_S] * drafts.lengths.max()
        all_decodes_s = linear_step_s(coefficients, tokens) + all_fixed_s
        full_s += all_fixed_s
    limit_s = full_s
    for due_s in work.decode_due_s:
        limit_s = min(limit_s, due_s - now_s)
    limit_s = min(limit_s, max(drafts.longest_s, all_decodes_s))
    if len(work.prefills) == 1 and len(work.decodes) > 0:
        whole_s = _absorbable_s(
            rows, work.prefills[0], work, drafts, now_s, coefficients, tpot_margin, all_decodes_s, all_fixed_s
        )
        if whole_s <= full_s and whole_s <= ABSORBED_PERIODS * drafts.longest_s:
            limit_s = max(limit_s, whole_s)
    if len(work.decodes) > 0:
        limit_s = max(limit_s, _rescue_s(rows, work, drafts, now_s, limit_s, limits, all_decodes_s, all_fixed_s))
    return limit_s, max(min(drafts.ahead_s, full_s), all_decodes_s)
