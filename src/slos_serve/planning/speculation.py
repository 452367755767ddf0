"""How many tokens each decode tier drafts: none where that serves more (the paper's section 4.3).

With acceptance a, a verification of d drafts yields A(d) = (1 - a^(d+1)) / (1 - a) tokens on average, puts d + 1
tokens into a batch and waits for d steps of the draft model. Its context is read once for all of them, and a decode
needs one only every A(d) of its paces. The lengths (d_1 .. d_L) with the largest prefill rate are found by enumeration;
a branch is cut when even its best completion is not better. All zeros are always among them, so drafts are made only
where they pay.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from slos_serve.perf.formula import K_S, K_SEQ
from slos_serve.perf.jit import in_place
from slos_serve.perf.step_time import batch_s
from slos_serve.planning.state import FloatArray, IntArray
from slos_serve.planning.supply import prefill_rate
from slos_serve.planning.tiers import Tiers

# Another set of lengths replaces the present one when it is better by this share of the prefill rate of an engine
# without decodes: counts that come and go do not make the lengths flap.
HYSTERESIS_SHARE = 0.01
# First index of a table of lengths.
PERIOD_S, TOKENS_EACH, EXTRA_S_EACH = range(3)


@in_place
def tokens_each_verification(acceptance: float, draft: int) -> float:
    """Tokens that a verification of ``draft`` draft tokens yields on average: A(d), summed up."""
    total, term = 1.0, 1.0
    for _ in range(draft):
        term *= acceptance
        total += term
    return total


@in_place
def paces_in_a_batch(mean_tokens: float, pace_s: float, longest_step_s: float) -> float:
    """How many paces of a tier a batch may last whose verifications bring ``mean_tokens`` each; 1 at least."""
    return max(min(mean_tokens, longest_step_s / pace_s), 1.0)


@njit(cache=True)
def table_of_lengths(
    pace_s: FloatArray, tiers: Tiers, longest: int, longest_step_s: float, draft_s_each: float
) -> FloatArray:
    """What one decode of each tier asks of batches under each draft length 0 .. ``longest``.

    A tier's period, the longest batch that carries it, is what the tokens of a verification last on average, but not
    more than ``longest_step_s`` nor less than one pace. A decode takes ``tiers.extra_s`` beside the roofline part, and
    ``draft_s_each`` for each draft that it verifies.

    Returns:
        float64 [3, L, longest + 1]: period in seconds, tokens in a period, extra seconds in a period.
    """
    table = np.empty((3, len(pace_s), longest + 1))
    for tier in range(len(pace_s)):
        for draft in range(longest + 1):
            mean = tokens_each_verification(tiers.acceptance[tier], draft)
            longer = paces_in_a_batch(mean, pace_s[tier], longest_step_s)
            each = longer / mean  # verifications in a period
            table[PERIOD_S, tier, draft] = pace_s[tier] * longer
            table[TOKENS_EACH, tier, draft] = each * (draft + 1.0)
            table[EXTRA_S_EACH, tier, draft] = each * (tiers.extra_s[tier] + draft_s_each * draft)
    return table


@njit(cache=True)
def rate_of(
    drafts: IntArray, counts: FloatArray, table: FloatArray, coefficients: FloatArray, max_tokens: float
) -> float:
    """Prefill tokens a second beside ``counts`` decodes that draft ``drafts``; see :func:`table_of_lengths`."""
    own, most = np.empty((3, len(drafts))), 0
    for tier in range(len(drafts)):
        own[:, tier] = table[:, tier, drafts[tier]]
        most = max(most, drafts[tier]) if counts[tier] > 0.0 else most
    return prefill_rate(counts, own[0], own[1], own[2], coefficients[K_S] * most, coefficients, max_tokens)


@njit(cache=True)
def best_completion(table: FloatArray) -> FloatArray:
    """float64 [3, L]: of each tier the longest period and the least work a second that any length has."""
    rest = np.empty(table.shape[:2])
    for tier in range(table.shape[1]):
        longest_s = table[PERIOD_S, tier].max()
        part = longest_s / table[PERIOD_S, tier]
        rest[PERIOD_S, tier] = longest_s
        rest[TOKENS_EACH, tier] = (table[TOKENS_EACH, tier] * part).min()
        rest[EXTRA_S_EACH, tier] = (table[EXTRA_S_EACH, tier] * part).min()
    return rest


@njit(cache=True)
def best_drafts(
    counts: FloatArray,
    table: FloatArray,
    coefficients: FloatArray,
    max_tokens: float,
    present: IntArray,
    hysteresis: float,
) -> tuple[IntArray, float, int]:
    """The draft lengths with the largest prefill rate.

    Lengths of a tier nobody decodes in stay 0. The bound on a branch takes :func:`best_completion` for the tiers not
    decided yet, and no draft model: the rate falls with each of these.

    Args:
        counts: float64 [L], decodes in each tier.
        table: see :func:`table_of_lengths`.
        present: int64 [L], the lengths in use; kept unless others are better by more than ``hysteresis``.
        hysteresis: prefill tokens a second; 0 takes the best.

    Returns:
        drafts (int64 [L]), their rate, and how many rates were computed.
    """
    tiers, lengths = table.shape[1], table.shape[2]
    best = np.where(counts > 0.0, present, 0)
    best_rate = rate_of(best, counts, table, coefficients, max_tokens)
    threshold, rest = best_rate + hysteresis, best_completion(table)
    own, drafts, computed, level = rest.copy(), np.full(tiers, -1), 1, 0
    while level >= 0:
        drafts[level] += 1
        if drafts[level] == lengths or (drafts[level] > 0 and counts[level] <= 0.0):
            drafts[level] = -1
            own[:, level] = rest[:, level]
            level -= 1
            continue
        own[:, level] = table[:, level, drafts[level]]
        draft_s = coefficients[K_S] * drafts[: level + 1].max()
        rate = prefill_rate(counts, own[0], own[1], own[2], draft_s, coefficients, max_tokens)
        computed += 1
        if rate <= threshold:
            continue
        if level < tiers - 1:
            level += 1
        else:
            best, best_rate, threshold = drafts.copy(), rate, rate
    return best, best_rate, computed


@njit(cache=True)
def fastest_draft(
    pace_s: FloatArray,
    tiers: Tiers,
    coefficients: FloatArray,
    max_tokens: float,
    longest: int,
    longest_step_s: float,
) -> int:
    """The draft length at which a step of all decodes and nothing else brings the most tokens a second.

    One length for all tiers. Steps longer than what their own verifications bring on average lasts, or than
    ``longest_step_s``, are left out, but for those without drafts.
    """
    best, best_rate = 0, 0.0
    counts = np.maximum(tiers.decodes, 1.0)
    for draft in range(longest + 1):
        own_s, most_s, brought = 0.0, np.inf, 0.0
        for tier in range(len(counts)):
            mean = tokens_each_verification(tiers.acceptance[tier], draft)
            most_s = min(most_s, pace_s[tier] * paces_in_a_batch(mean, pace_s[tier], longest_step_s))
            brought += counts[tier] * mean
            own_s += counts[tier] * (tiers.extra_s[tier] + coefficients[K_SEQ] * draft)
        tokens = counts.sum() * (draft + 1.0)
        step_s = batch_s(coefficients, tokens, own_s, draft)
        if draft > 0 and (step_s > most_s or tokens > max_tokens):
            break
        if brought > best_rate * step_s * (1.0 + HYSTERESIS_SHARE):
            best, best_rate = draft, brought / step_s
    return best
