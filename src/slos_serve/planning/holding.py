"""Who waits for whom: decodes that are ahead of their due times, or prompts."""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.core.request import RequestArray
from slos_serve.perf.batch_time import K_C, K_CTX, K_M, K_S, K_SEQ
from slos_serve.planning.batch import Limits, beyond_roofline_s, tokens_done, tokens_left
from slos_serve.planning.prefill_rate import FloatArray, linear_step_s
from slos_serve.planning.work import Drafts, Work

# Decodes that could wait are held for prompts while KV is plenty. From the first share of it in use on they run for
# part of the time that prompts can wait, from the second on for all of it: KV is what limits then, and whoever ends
# early gives back what it holds.
KV_SHORT_FROM, KV_SHORT = 0.7, 0.9
# Without a promise a prompt waits until promised decodes are some tokens ahead on average, or nearly as far as their
# stall bounds let them be.
LEAD_OF_STALL = 0.9


@njit(cache=True)
def ahead_enough(rows: RequestArray, work: Work, now_s: float, lead_tokens: float) -> bool:
    """Whether promised decodes are on average ``lead_tokens`` ahead, or as far as their stall bounds let them be."""
    lead, wanted = 0.0, 0.0
    for j in range(len(work.decodes)):
        slot = work.decodes[j]
        tpot_s = rows["tpot_s"][slot]
        if not np.isfinite(tpot_s):
            continue  # nothing is due of it but by its stall bound
        lead += (work.decode_due_s[j] - now_s) / tpot_s - 1.0
        wanted += min(lead_tokens, LEAD_OF_STALL * rows["max_stall_s"][slot] / tpot_s - 1.0)
    return lead >= wanted


@njit(cache=True)
def decode_s(rows: RequestArray, slot: int, draft: int, coefficients: FloatArray) -> float:
    """Seconds that a decode verifying ``draft`` drafts adds to a batch of many tokens."""
    tokens_s = (max(coefficients[K_C], coefficients[K_M]) + coefficients[K_SEQ]) * (1.0 + draft)
    return float(tokens_s + coefficients[K_CTX] * rows["computed_tokens"][slot])


@njit(cache=True)
def prompts_wait_s(
    rows: RequestArray, work: Work, drafts: Drafts, now_s: float, limits: Limits, longest_s: float
) -> float:
    """For how long every promised prompt can wait and still be done in time, one after the other in deadline order.

    What is left of the engine's time is theirs beside decodes that each run when they need to, not before, in steps as
    long as they may be. One such step is kept back, because prompts end within steps. 0 at least: then the decodes have
    to wait.
    """
    coefficients = limits.coefficients
    step_s = min(linear_step_s(coefficients, float(limits.max_tokens)), longest_s, drafts.longest_s)
    share = 1.0 - (linear_step_s(coefficients, 0.0) + coefficients[K_S] * drafts.lengths.max()) / step_s
    for j in range(len(work.decodes)):
        share -= decode_s(rows, work.decodes[j], drafts.lengths[j], coefficients) / drafts.each_s[j]
    if share <= 0.0:
        return 0.0
    slope = max(coefficients[K_C], coefficients[K_M])
    needed_s, wait_s = 0.0, np.inf
    for j in range(len(work.prefills)):
        done, todo = tokens_done(rows, work.prefills[j]), tokens_left(rows, work.prefills[j])
        needed_s += slope * todo + beyond_roofline_s(coefficients, todo, done)
        wait_s = min(wait_s, work.prefill_due_s[j] - now_s - needed_s / share)
    return float(max(wait_s - step_s, 0.0))


@njit(cache=True)
def spare_time_s(
    rows: RequestArray,
    work: Work,
    drafts: Drafts,
    now_s: float,
    kv_used: float,
    limits: Limits,
    longest_s: float,
) -> float:
    """Seconds of decodes that could wait for which the prompts wait instead, so that KV is given back sooner."""
    share = min((kv_used - KV_SHORT_FROM) / (KV_SHORT - KV_SHORT_FROM), 1.0)
    if share <= 0.0 or len(work.decodes) == 0:
        return 0.0
    return share * prompts_wait_s(rows, work, drafts, now_s, limits, longest_s)
