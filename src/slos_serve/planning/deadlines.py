"""The deadline of a complete answer as times that the rest of the plan understands: a due first token and a pace.

Nobody knows how long an answer will be, so no lead is saved for later: each token is due a pace after the one before.
The pace is what is left of the time over the forecast of what is left of the answer, drawn anew in every plan.
Admission reckons with it down to that of an engine with few decodes. Steps are cut short only for paces that a loaded
engine has anyway: tighter ones would cost more deadlines than they keep (benchmarks/LOG.md). The first token is due
when a share of the time to spare has passed; later, of what is left of it.
"""

from __future__ import annotations

import numpy as np

from slos_serve.perf.jit import in_place
from slos_serve.perf.lengths import share_left, survives
from slos_serve.perf.step_time import alone_s
from slos_serve.planning.state import FloatArray, State, tokens_done, tokens_left

# Share of the time to spare that may pass before the first token. To spare is what a forecast answer leaves of the
# time until its deadline when every token is as fast as a batch can be.
WAIT_OF_SPARE = 0.3
# Share of the time until a deadline that counts as to spare however long the answer: a prompt that is due the moment it
# can be computed would fit beside nobody, and half of the answers are shorter than forecast.
LEAST_SPARE = 0.2
# Shortest pace that admission reckons with, and that steps are cut short for, in times of a batch with one decode.
SHORTEST_PACE, SHORTEST_STEP = 2.5, 8.0
# A deadline is given up once this share of such answers would miss it at full speed.
LATE_SHARE = 0.9


@in_place
def pace_answers(state: State, survival: FloatArray) -> None:
    """Write ``ttft_due_s``, ``tpot_s`` and ``step_pace_s`` of the requests whose complete answer is due at some time.

    What else they are promised holds beside it. A deadline that is lost becomes a first token due at -inf or, once
    there is one, a pace of 0.

    Args:
        survival: float64 [classes, bins + 1], see :meth:`slos_serve.perf.lengths.LengthForecast.survival`.
    """
    rows = state.rows
    for part in (state.running, state.waiting):
        for slot in part:
            if rows["answer_due_s"][slot] == np.inf:
                continue
            pace_answer(state, slot)
            if is_late(state, slot, survival[rows["class_index"][slot]]):
                rows["tpot_s"][slot] = 0.0
                if rows["output_tokens"][slot] == 0:
                    rows["ttft_due_s"][slot] = -np.inf


@in_place
def pace_answer(state: State, slot: int) -> None:
    """Write the due first token and the paces of one request with a deadline."""
    rows, token_s = state.rows, alone_s(state.coefficients, 1.0, 0.0)
    left = float(max(rows["expected_tokens"][slot] - rows["output_tokens"][slot], 1))
    begins_s, due_s = rows["last_token_s"][slot], rows["answer_due_s"][slot]
    if rows["output_tokens"][slot] == 0:
        earliest_s = next_token_s(state, slot)
        first_s = earliest_s - (state.now_s - rows["arrival_s"][slot])
        begins_s = first_s + WAIT_OF_SPARE * spare_s(due_s - first_s, left * token_s)
        if begins_s < earliest_s:
            begins_s = earliest_s + WAIT_OF_SPARE * spare_s(due_s - earliest_s, left * token_s)
        rows["ttft_due_s"][slot] = min(rows["promised_ttft_due_s"][slot], begins_s)
    promised_s, pace_s = rows["promised_tpot_s"][slot], (due_s - begins_s) / left
    rows["tpot_s"][slot] = min(promised_s, max(pace_s, SHORTEST_PACE * token_s))
    rows["step_pace_s"][slot] = min(promised_s, max(pace_s, SHORTEST_STEP * token_s))


@in_place
def spare_s(until_s: float, answer_s: float) -> float:
    """What an answer of ``answer_s`` seconds leaves of the time until its deadline."""
    return float(max(until_s - answer_s, LEAST_SPARE * until_s, 0.0))


@in_place
def next_token_s(state: State, slot: int) -> float:
    """When the next token of a request can come at the earliest."""
    left = float(max(tokens_left(state.rows, slot), 1))
    return float(state.now_s + alone_s(state.coefficients, left, tokens_done(state.rows, slot)))


@in_place
def is_late(state: State, slot: int, survival: FloatArray) -> bool:
    """Whether a deadline is lost: most such answers would miss it with every token as fast as a batch can be."""
    rows = state.rows
    left_s = rows["answer_due_s"][slot] - next_token_s(state, slot)
    if left_s < 0.0:
        return True
    so_far = survives(survival, float(rows["output_tokens"][slot]))
    tokens = 1.0 + left_s / alone_s(state.coefficients, 1.0, 0.0)
    return bool(share_left(rows, slot, tokens, so_far, survival) >= LATE_SHARE)
