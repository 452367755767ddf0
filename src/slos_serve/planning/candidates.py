"""From the request table to the inputs of admission: tiers, what runs, who asks, what each costs.

Everything here is per plan and cheap: one pass over the running and the waiting requests.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray, SlotArray, Status
from slos_serve.perf.batch_time import K_C, K_CTX, K_M, K_Q, K_SEQ
from slos_serve.planning.lengths import bin_of
from slos_serve.planning.prefill_rate import BoolArray, FloatArray, IntArray, linear_step_s

UNDECIDED = int(Status.UNDECIDED)
ADMITTED = int(Status.ADMITTED)
BEST_EFFORT = int(Status.BEST_EFFORT)
MAX_TIERS = 4
MAX_DISTINCT = 64
# Part of what a stage can make up for by decoding at full speed that the planner counts on. Small: its answer may end
# long before the forecast says, and whoever catches up leaves no room for prompts.
CATCH_UP_SHARE = 0.02
# Lead, in tokens, that a stage gets out of the TPOT margin. A promise is about the mean, so what a late step takes is a
# part of one token however long the answer: more lead would cost pace for nothing.
AHEAD_TOKENS = 1.0


@njit(cache=True)
def forecast_lengths(rows: RequestArray, slots: SlotArray, table: FloatArray, edges: FloatArray) -> None:
    """Write ``expected_tokens`` of each slot: its class's conditional quantile, or the client's hint while it holds.

    Args:
        table: float64 [classes, bins], see :class:`slos_serve.planning.lengths.LengthForecast`.
        edges: float64 [bins].
    """
    for slot in slots:
        generated = rows["output_tokens"][slot]
        hint = rows["hint_tokens"][slot]
        if hint > generated:
            expected = float(hint)
        else:
            at = min(bin_of(edges, float(generated)), len(edges) - 1)
            expected = max(float(table[rows["class_index"][slot], at]), float(generated + 1))
        rows["expected_tokens"][slot] = min(int(expected), rows["max_tokens"][slot])


@njit(cache=True)
def tokens_to_do(rows: RequestArray, slot: int) -> int:
    """Tokens whose KV is missing before the next token can be sampled; 1 for a decode."""
    return int(rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - rows["computed_tokens"][slot])


@njit(cache=True)
def next_due_s(rows: RequestArray, slot: int, tpot_margin: float) -> float:
    """When the next token is due: the first by the TTFT, token k of a stage by its start + k * TPOT.

    The margin is taken off every TPOT until a stage is ``AHEAD_TOKENS`` ahead; from then on it keeps that lead.
    Nobody promises when a later stage begins; its first token is given the pace of those that follow it.
    """
    if rows["output_tokens"][slot] == 0:
        return float(rows["ttft_due_s"][slot])
    tpot_s, stage_tokens = rows["tpot_s"][slot], rows["stage_tokens"][slot]
    if stage_tokens == 0:
        paced = rows["last_token_s"][slot] + tpot_s * (1.0 - tpot_margin)
    else:
        paced = rows["stage_start_s"][slot] + tpot_s * (stage_tokens - min(stage_tokens * tpot_margin, AHEAD_TOKENS))
    return float(min(paced, rows["last_token_s"][slot] + rows["max_stall_s"][slot]))


@njit(cache=True)
def latest_due_s(rows: RequestArray, slot: int, tpot_margin: float, fastest_s: float) -> float:
    """The due time that admission counts on: a stage that has begun is about its mean, so it can catch up in part."""
    due_s = next_due_s(rows, slot, tpot_margin)
    if rows["stage_tokens"][slot] == 0 or not np.isfinite(rows["tpot_s"][slot]):
        return due_s
    left = rows["expected_tokens"][slot] - rows["output_tokens"][slot]
    return float(due_s + CATCH_UP_SHARE * max(left, 0) * max(rows["tpot_s"][slot] - fastest_s, 0.0))


@njit(cache=True)
def demote_lost(
    rows: RequestArray, slots: SlotArray, now_s: float, coefficients: FloatArray, demoted: SlotArray
) -> int:
    """Turn requests whose promise can no longer be kept into best effort; fills ``demoted``, returns how many.

    A first token is lost when even alone on the engine the prompt would end late. A decode stage is lost when all the
    tokens it may still produce, each as fast as a batch can be, would not bring its mean back to the target. One that
    missed already, in an earlier stage or an earlier call of its session, cannot attain whatever is done for it.
    """
    count = 0
    fastest_s = linear_step_s(coefficients, 1.0) + coefficients[K_SEQ]
    for slot in slots:
        if rows["status"][slot] == BEST_EFFORT:
            continue
        if rows["missed"][slot] == 1:
            lost = True
        elif rows["output_tokens"][slot] == 0:
            todo = max(tokens_to_do(rows, slot) - rows["cached_tokens"][slot], 1)
            alone_s = linear_step_s(coefficients, float(todo)) + coefficients[K_Q] * todo * todo + coefficients[K_SEQ]
            lost = now_s + alone_s > rows["ttft_due_s"][slot]
        elif rows["stage_tokens"][slot] == 0:
            lost = False
        else:
            left = rows["max_tokens"][slot] - rows["output_tokens"][slot]
            due_s = rows["stage_start_s"][slot] + rows["stage_tokens"][slot] * rows["tpot_s"][slot]
            late_s = now_s + fastest_s - due_s
            lost = late_s > 0.0 and late_s > (left - 1) * (rows["tpot_s"][slot] - fastest_s)
        if lost:
            rows["status"][slot] = BEST_EFFORT
            demoted[count] = slot
            count += 1
    return count


@njit(cache=True)
def tier_periods(rows: RequestArray, running: SlotArray, waiting: SlotArray) -> FloatArray:
    """Distinct TPOTs among SLO requests, ascending, at most MAX_TIERS: the loosest ones merge into the next tighter."""
    distinct = np.empty(MAX_DISTINCT)
    count = 0
    for part in (running, waiting):
        for slot in part:
            if rows["status"][slot] == BEST_EFFORT:
                continue
            tpot_s = rows["tpot_s"][slot]
            known = False
            for j in range(count):
                if distinct[j] == tpot_s:
                    known = True
                    break
            if not known and count < MAX_DISTINCT:
                distinct[count] = tpot_s
                count += 1
    if count == 0:
        return np.full(1, np.inf)
    ordered = np.sort(distinct[:count])
    if count <= MAX_TIERS:
        return ordered
    chosen = np.empty(MAX_TIERS)
    for j in range(MAX_TIERS):
        chosen[j] = ordered[(j * count) // MAX_TIERS]
    return chosen


@njit(cache=True)
def tier_of(periods_s: FloatArray, tpot_s: float) -> int:
    """The loosest tier that is at least as tight as ``tpot_s``."""
    found = 0
    for j in range(len(periods_s)):
        if periods_s[j] <= tpot_s:
            found = j
    return found


@njit(cache=True)
def prompt_cost_tokens(rows: RequestArray, slot: int, coefficients: FloatArray) -> float:
    """What is left to compute of a prompt, in tokens: those of it, and what attention takes in the time of as many."""
    todo, done = tokens_to_do(rows, slot), rows["computed_tokens"][slot]
    if rows["running"][slot] == 0:
        done += rows["cached_tokens"][slot]
        todo = max(todo - rows["cached_tokens"][slot], 1)
    extra_s = coefficients[K_Q] * todo * (todo + 2 * done) + coefficients[K_SEQ] + coefficients[K_CTX] * done
    return float(todo + extra_s / max(coefficients[K_C], coefficients[K_M]))


@njit(cache=True)
def gather(
    rows: RequestArray,
    running: SlotArray,
    waiting: SlotArray,
    start_s: float,
    coefficients: FloatArray,
    tpot_margin: float,
    max_implied_ttft_s: float,
) -> tuple[SlotArray, FloatArray, FloatArray, IntArray, FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """Sort out who decodes, who must be prefilled and who may be admitted.

    Returns:
        slots (int64 [n]): requests with prefill left, in deadline order.
        due_s (float64 [n]), cost_tokens (float64 [n]), tier (int64 [n]), must (float64 [n], 1.0 where promised),
        base_counts (float64 [L]), pace_s (float64 [L], TPOT with the margin taken off), extra_s_each (float64 [L]),
        periods_s (float64 [L], time between two tokens of those that decode now).
    """
    tiers = tier_periods(rows, running, waiting)
    num_tiers = len(tiers)
    base_counts = np.zeros(num_tiers)
    context = np.zeros(num_tiers)
    in_tier = np.zeros(num_tiers)
    ahead = np.zeros(num_tiers)
    most = len(running) + len(waiting)
    slots = np.empty(most, dtype=np.int64)
    due_s = np.empty(most)
    cost = np.empty(most)
    tier = np.empty(most, dtype=np.int64)
    must = np.zeros(most)
    count = 0
    fastest_s = linear_step_s(coefficients, 1.0) + coefficients[K_SEQ]
    for part in (running, waiting):
        for slot in part:
            status = rows["status"][slot]
            if status == BEST_EFFORT:
                continue
            level = tier_of(tiers, rows["tpot_s"][slot])
            todo = tokens_to_do(rows, slot)
            # A decode reads its context once a token: on average what it holds now plus half of what will come.
            context[level] += rows["prompt_tokens"][slot] + 0.5 * (
                rows["output_tokens"][slot] + rows["expected_tokens"][slot]
            )
            in_tier[level] += 1.0
            if rows["output_tokens"][slot] > 0 and todo <= 1 and status == ADMITTED:
                base_counts[level] += 1.0
                ahead[level] += 1.0 if rows["stage_tokens"][slot] * tpot_margin >= AHEAD_TOKENS else 0.0
                continue
            slots[count] = slot
            due = latest_due_s(rows, slot, tpot_margin, fastest_s)
            due_s[count] = min(due, rows["arrival_s"][slot] + max_implied_ttft_s) if due == np.inf else due
            due_s[count] = max(due_s[count], start_s)
            cost[count] = prompt_cost_tokens(rows, slot, coefficients)
            tier[count] = level
            must[count] = 1.0 if status == ADMITTED else 0.0
            count += 1
    order = np.argsort(due_s[:count], kind="mergesort")
    extra_s_each, periods_s = np.empty(num_tiers), np.empty(num_tiers)
    for j in range(num_tiers):
        mean_context = context[j] / in_tier[j] if in_tier[j] > 0.0 else 0.0
        extra_s_each[j] = coefficients[K_CTX] * mean_context + coefficients[K_SEQ]
        # Who has its lead asks for a token every TPOT, the others a little more often.
        periods_s[j] = tiers[j] * (1.0 - tpot_margin * (1.0 - ahead[j] / max(base_counts[j], 1.0)))
    return (
        slots[:count][order],
        due_s[:count][order],
        cost[:count][order],
        tier[:count][order],
        must[:count][order],
        base_counts,
        tiers * (1.0 - tpot_margin),
        extra_s_each,
        periods_s,
    )


@njit(cache=True)
def someone_asks(rows: RequestArray, running: SlotArray, waiting: SlotArray) -> bool:
    """Whether admission has anything to say: a promise is open, or one that was made waits to start."""
    asks = False
    for slot in waiting:
        asks = asks or rows["status"][slot] != BEST_EFFORT
    for slot in running:
        asks = asks or rows["status"][slot] == UNDECIDED
    return asks


@njit(cache=True)
def open_prompts(rows: RequestArray, running: SlotArray, waiting: SlotArray) -> int:
    """How many prompts are to be computed of requests that are promised something or still may be."""
    count = 0
    for slot in waiting:
        count += 1 if rows["status"][slot] != BEST_EFFORT else 0
    for slot in running:
        count += 1 if rows["status"][slot] != BEST_EFFORT and tokens_to_do(rows, slot) > 1 else 0
    return count


@njit(cache=True)
def share_out(
    rows: RequestArray, waiting: SlotArray, slots: SlotArray, taken: BoolArray
) -> tuple[SlotArray, SlotArray, SlotArray]:
    """Who is served after admission.

    Args:
        slots, taken: int64 and bool [n], requests with prefill left and whether admission serves them.

    Returns:
        chosen: waiting ones that are served, in deadline order.
        leftover: those that may use what is left over: passed over, in deadline order (they may still make it), then
            best effort, first come first.
        fitting: running ones without a promise that fit now.
    """
    most = len(waiting)
    chosen, leftover = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    fitting = np.empty(len(slots), dtype=np.int64)
    num_chosen, num_leftover, num_fitting = 0, 0, 0
    for j in range(len(slots)):
        slot = slots[j]
        if rows["running"][slot] == 1:
            if taken[j] and rows["status"][slot] == UNDECIDED:
                fitting[num_fitting] = slot
                num_fitting += 1
        elif taken[j]:
            chosen[num_chosen] = slot
            num_chosen += 1
        else:
            leftover[num_leftover] = slot
            num_leftover += 1
    passed_over = num_leftover
    for slot in waiting:
        if rows["status"][slot] == BEST_EFFORT:
            leftover[num_leftover] = slot
            num_leftover += 1
    others = leftover[passed_over:num_leftover]
    leftover[passed_over:num_leftover] = others[np.argsort(rows["order"][others], kind="mergesort")]
    return chosen[:num_chosen], leftover[:num_leftover], fitting[:num_fitting]


@njit(cache=True)
def first_asking_s(rows: RequestArray, running: SlotArray, waiting: SlotArray, tpot_margin: float) -> float:
    """Earliest due time of a waiting request that is promised something or may be, inf without one.

    -inf when no promised prompt that runs is due by then, or when one that runs may still be promised: then what
    admission says may change the step whatever its room.
    """
    earliest_s, prompt_s = np.inf, np.inf
    for slot in running:
        if rows["status"][slot] == UNDECIDED:
            return -np.inf
        if rows["status"][slot] == ADMITTED and tokens_to_do(rows, slot) > 1:
            prompt_s = min(prompt_s, next_due_s(rows, slot, tpot_margin))
    for slot in waiting:
        if rows["status"][slot] != BEST_EFFORT:
            earliest_s = min(earliest_s, next_due_s(rows, slot, tpot_margin))
    return earliest_s if prompt_s <= earliest_s else -np.inf
