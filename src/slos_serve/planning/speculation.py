"""How many tokens to draft for each decode tier : none where that serves more (the paper's section 4.3).

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
from slos_serve.perf.step_time import batch_s
from slos_serve.planning.state import FloatArray, IntArray
from slos_serve.planning.supply import prefill_rate

# Another set of lengths replaces the present one when it is better by this share of the prefill rate of an engine
# without decodes: counts that come and go do not make the lengths flap.
HYSTERESIS_SHARE = 0.01
# Drafts are made where they add this share of it. Rates are reckoned with the mean of what verifications bring; most of
# those with few right drafts bring one token and cut batches short, and a gain as small as that is not seen.
LEAST_GAIN_SHARE = 0.08


@njit(cache=True)
def tokens_each_verification(acceptance: float, draft: int) -> float:
    """Tokens that a verification of ``draft`` draft tokens yields on average: A(d), summed up."""
    total, term = 1.0, 1.0
    for _ in range(draft):
        term *= acceptance
        total += term
    return total


@njit(cache=True)
def paces_in_a_batch(mean_tokens: float, pace_s: float, longest_step_s: float) -> float:
    """How many paces of a tier a batch may last whose verifications bring ``mean_tokens`` each; 1 at least."""
    return max(min(mean_tokens, longest_step_s / pace_s), 1.0)


@njit(cache=True)
def demand_by_length(
    pace_s: FloatArray,
    extra_s_each: FloatArray,
    acceptance: FloatArray,
    longest: int,
    longest_step_s: float,
    draft_s_each: float,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """What one decode of each tier asks of batches under each draft length 0 .. ``longest``.

    A tier's period, the longest batch that carries it, is what the tokens of a verification last on average, but not
    more than ``longest_step_s`` nor less than one pace. A decode takes ``extra_s_each`` beside the roofline part, and
    ``draft_s_each`` for each draft that it verifies.

    Returns:
        float64 [L, longest + 1] each: period in seconds, tokens in a period, extra seconds in a period.
    """
    shape = (len(pace_s), longest + 1)
    periods, tokens, extra = np.empty(shape), np.empty(shape), np.empty(shape)
    for tier in range(len(pace_s)):
        for draft in range(longest + 1):
            mean = tokens_each_verification(acceptance[tier], draft)
            longer = paces_in_a_batch(mean, pace_s[tier], longest_step_s)
            each = longer / mean  # verifications in a period
            periods[tier, draft] = pace_s[tier] * longer
            tokens[tier, draft] = each * (draft + 1.0)
            extra[tier, draft] = each * (extra_s_each[tier] + draft_s_each * draft)
    return periods, tokens, extra


@njit(cache=True)
def yields_of(
    drafts: IntArray, acceptance: FloatArray, pace_s: FloatArray, longest_step_s: float
) -> tuple[FloatArray, FloatArray]:
    """Tokens of a verification and paces in a batch of each tier (float64 [L]) under its draft length."""
    yields, longer = np.empty(len(drafts)), np.empty(len(drafts))
    for tier in range(len(drafts)):
        yields[tier] = tokens_each_verification(acceptance[tier], drafts[tier])
        longer[tier] = paces_in_a_batch(yields[tier], pace_s[tier], longest_step_s)
    return yields, longer


@njit(cache=True)
def rate_of(
    drafts: IntArray,
    counts: FloatArray,
    periods: FloatArray,
    tokens: FloatArray,
    extra: FloatArray,
    coefficients: FloatArray,
    max_tokens: float,
) -> float:
    """Prefill tokens a second beside ``counts`` decodes that draft ``drafts``; see :func:`demand_by_length`."""
    tiers = len(drafts)
    own_periods, own_tokens, own_extra = np.empty(tiers), np.empty(tiers), np.empty(tiers)
    most = 0
    for tier in range(tiers):
        draft = drafts[tier]
        own_periods[tier], own_tokens[tier] = periods[tier, draft], tokens[tier, draft]
        own_extra[tier] = extra[tier, draft]
        if counts[tier] > 0.0:
            most = max(most, draft)
    draft_s = coefficients[K_S] * most
    return prefill_rate(counts, own_periods, own_tokens, own_extra, draft_s, coefficients, max_tokens)


@njit(cache=True)
def best_drafts(
    counts: FloatArray,
    periods: FloatArray,
    tokens: FloatArray,
    extra: FloatArray,
    coefficients: FloatArray,
    max_tokens: float,
    present: IntArray,
    hysteresis: float,
) -> tuple[IntArray, float, int]:
    """The draft lengths with the largest prefill rate.

    Lengths of a tier nobody decodes in stay 0. The bound on a branch takes, for the tiers not decided yet, the longest
    period and the least work a second that any length has, and no draft model: the rate falls with each of these.

    Args:
        counts: float64 [L], decodes in each tier.
        periods, tokens, extra: see :func:`demand_by_length`.
        coefficients, max_tokens: see :func:`prefill_rate`.
        present: int64 [L], the lengths in use; kept unless others are better by more than ``hysteresis``.
        hysteresis: prefill tokens a second; 0 takes the best.

    Returns:
        drafts (int64 [L]), their rate, and how many rates were computed.
    """
    tiers, longest = periods.shape[0], periods.shape[1] - 1
    best = present.copy()
    for tier in range(tiers):
        if counts[tier] <= 0.0:
            best[tier] = 0
    best_rate = rate_of(best, counts, periods, tokens, extra, coefficients, max_tokens)
    threshold = best_rate + hysteresis
    rest_periods, rest_tokens, rest_extra = np.empty(tiers), np.empty(tiers), np.empty(tiers)
    for tier in range(tiers):
        rest_periods[tier] = periods[tier].max()
        part = rest_periods[tier] / periods[tier]
        rest_tokens[tier] = (tokens[tier] * part).min()
        rest_extra[tier] = (extra[tier] * part).min()
    own_periods, own_tokens, own_extra = rest_periods.copy(), rest_tokens.copy(), rest_extra.copy()
    drafts = np.full(tiers, -1, dtype=np.int64)
    computed, level = 1, 0
    while level >= 0:
        drafts[level] += 1
        if drafts[level] > longest or (drafts[level] > 0 and counts[level] <= 0.0):
            drafts[level] = -1
            own_periods[level], own_tokens[level] = rest_periods[level], rest_tokens[level]
            own_extra[level] = rest_extra[level]
            level -= 1
            continue
        draft = drafts[level]
        own_periods[level], own_tokens[level] = periods[level, draft], tokens[level, draft]
        own_extra[level] = extra[level, draft]
        draft_s = coefficients[K_S] * drafts[: level + 1].max()
        rate = prefill_rate(counts, own_periods, own_tokens, own_extra, draft_s, coefficients, max_tokens)
        computed += 1
        if rate <= threshold:
            continue
        if level == tiers - 1:
            best, best_rate, threshold = drafts.copy(), rate, rate
        else:
            level += 1
    return best, best_rate, computed


@njit(cache=True)
def fastest_draft(
    counts: FloatArray,
    pace_s: FloatArray,
    extra_s_each: FloatArray,
    acceptance: FloatArray,
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
    for draft in range(longest + 1):
        own_s, most_s, brought, tokens = 0.0, np.inf, 0.0, 0.0
        for tier in range(len(counts)):
            mean = tokens_each_verification(acceptance[tier], draft)
            most_s = min(most_s, pace_s[tier] * paces_in_a_batch(mean, pace_s[tier], longest_step_s))
            brought += counts[tier] * mean
            tokens += counts[tier] * (draft + 1.0)
            own_s += counts[tier] * (extra_s_each[tier] + coefficients[K_SEQ] * draft)
        step_s = batch_s(coefficients, tokens, own_s, draft)
        if draft > 0 and (step_s > most_s or tokens > max_tokens):
            break
        if brought > best_rate * step_s * (1.0 + HYSTERESIS_SHARE):
            best, best_rate = draft, brought / step_s
    return best
