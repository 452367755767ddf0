"""QoServe: as many prompt tokens in a step as the decodes' slack allows, in a hybrid order, with eager relegation.

Every step runs all decodes. The prompt tokens beside them come from a grid of step sizes: the largest step whose
predicted time, with a margin, ends before the tightest decode's next token is due. Prompts go in the order of

    first-token deadline + alpha * prompt tokens left

which is earliest deadline first with alpha 0 and nearly shortest remaining prefill first with the paper's 8 ms a token.
A waiting prompt that could not end in time even if the engine computed nothing else is relegated: from then on it comes
after all others, and nothing is refused. A class of a non-interactive tier has a deadline for its last token: its first
token is due as much earlier as its longest likely answer (mean and two standard deviations of the class) takes at the
pace of that tier, and so on for every later token.

Source: Goel et al., ASPLOS 2026, "QoServe" (arXiv 2503.22562, "Niyama"); grid, margin and alpha of its artifact.
Simplified: step times come from the engine's batch-time model (the paper trains a forest on profiles); no importance
hints among the relegated; a decode whose request missed already, or was relegated, does not count for the slack; the
next token is due at first token + tokens * TPOT, since promises here are mean paces. The artifact's smaller grid for a
nearly full cache is left out: a watermark keeps room instead.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from slos_serve.core.plan import EngineView, Reason, StepPlan
from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.core.slo import check_number
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.formula import K_CTX, K_Q, K_SEQ
from slos_serve.perf.jit import in_place
from slos_serve.perf.step_time import batch_s
from slos_serve.policies.base import StockPolicy
from slos_serve.policies.queue_order import (
    IntArray,
    batch_plan,
    checked_draft_tokens,
    checked_tokens,
    checked_watermark,
    decodes_then,
    room_for,
    room_of,
    tokens_left,
)
from slos_serve.policies.slot_marks import SlotMarks, among

FloatArray = NDArray[np.float64]
SMALLEST_STEP, GRID_STEP, LARGEST_STEP = 128, 256, 2552
# The newest step's share in the prefill throughput that relegation reckons with.
THROUGHPUT_SHARE = 0.1
TIER_PACE_S = 0.05  # per output token of non-interactive tiers, as in the artifact
# Answers of a class are taken for this long until one was seen.
PRIOR_OUTPUT_TOKENS = 256.0


def step_sizes(max_tokens: int) -> IntArray:
    """The grid: 128, every multiple of 256 below ``max_tokens``, and ``max_tokens``."""
    inner = np.arange(GRID_STEP, max_tokens, GRID_STEP, dtype=np.int64)
    return np.unique(np.concatenate(([min(SMALLEST_STEP, max_tokens)], inner, [max_tokens])))


class QoServe(StockPolicy):
    """See :class:`slos_serve.policies.base.Policy`.

    Args:
        model: batch-time model.
        num_classes: classes whose answer lengths are learnt apart.
        alpha_ms: milliseconds that a prompt token left weighs against the deadline.
        time_margin: share by which steps are taken for longer than predicted.
        max_tokens: the largest step.
        watermark: share of the KV blocks that stays free when a prompt starts.
        draft_tokens: drafts of every decode, where the engine has a drafter.
    """

    def __init__(
        self,
        model: BatchTimeModel,
        num_classes: int,
        *,
        alpha_ms: float = 8.0,
        time_margin: float = 0.2,
        max_tokens: int = LARGEST_STEP,
        watermark: float = 0.01,
        draft_tokens: int = 0,
    ) -> None:
        self._coefficients = model.coefficients
        self._alpha_s = check_number("alpha_ms", alpha_ms, low=0.0, high=1e4, low_included=True) / 1000.0
        self._stretch = 1.0 + check_number("time_margin", time_margin, low=0.0, high=10.0, low_included=True)
        self._sizes = step_sizes(checked_tokens("max_tokens", max_tokens))
        self._watermark = checked_watermark(watermark)
        self._draft_tokens = checked_draft_tokens(draft_tokens)
        self._answers = np.tile([1.0, PRIOR_OUTPUT_TOKENS, PRIOR_OUTPUT_TOKENS**2], (num_classes, 1))
        self._likely = longest_likely(self._answers)
        self._relegated = SlotMarks()
        self._prefill_tokens = 0
        self._tokens_per_s = LARGEST_STEP / model.step_s(BatchShape(LARGEST_STEP))

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Relegate, order, and size the step."""
        rows = view.table.rows
        relegated = self._relegated.orders(rows)
        told = Told(self._coefficients, self._sizes, self._likely, relegated, self._draft_tokens)
        size, ordered, lost, decodes = order_and_size(
            rows, view.running, view.waiting, told, now_s, self._alpha_s, self._tokens_per_s, self._stretch
        )
        out = room_for(view)
        room = room_of(view, max(size, decodes * (1 + self._draft_tokens)), self._watermark)
        plan = batch_plan(out, decodes_then(rows, view.running, ordered, room, self._draft_tokens, out))
        plan.reasons[:] = Reason.PREFILL_DEADLINE
        plan.reasons[:decodes] = Reason.DECODE_DUE
        plan.demoted = lost
        return plan

    def commit(self, plan: StepPlan, view: EngineView, ran: SlotArray) -> None:
        """Remember who was relegated and how many prompt tokens run."""
        self._relegated.add(view.table.rows, plan.demoted)
        prompts = (plan.reasons == Reason.PREFILL_DEADLINE) & among(view.table.rows, plan.slots, ran)
        self._prefill_tokens = int(plan.tokens[prompts].sum())

    def on_step_done(self, shape: BatchShape, duration_s: float) -> None:
        """Learn how many prompt tokens a second the engine computes while there are prompts."""
        if self._prefill_tokens and duration_s > 0.0:
            self._tokens_per_s += THROUGHPUT_SHARE * (self._prefill_tokens / duration_s - self._tokens_per_s)

    def on_request_done(self, class_index: int, prompt_tokens: int, output_tokens: int) -> None:
        """Learn mean and spread of a class's answers."""
        self._answers[class_index] += (1.0, float(output_tokens), float(output_tokens) ** 2)
        self._likely = longest_likely(self._answers)


def longest_likely(answers: FloatArray) -> FloatArray:
    """float64 [classes]: mean and two standard deviations of the answers of each.

    Args:
        answers: float64 [classes, 3], how many, their sum, and the sum of their squares.
    """
    count, total, squares = answers.T
    spread = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0.0))
    return np.asarray(total / count + 2.0 * spread)


class Told(NamedTuple):
    """What the policy knows.

    Attributes:
        coefficients: float64 [8], batch times.
        sizes: int64 [n], the grid, ascending.
        likely: float64 [classes], see :func:`longest_likely`.
        relegated: int64 [rows], see :meth:`slos_serve.policies.slot_marks.SlotMarks.orders`.
        drafts: of every decode.
    """

    coefficients: FloatArray
    sizes: IntArray
    likely: FloatArray
    relegated: IntArray
    drafts: int


@in_place
def likely_tokens(rows: RequestArray, slot: int, likely: FloatArray) -> float:
    """Tokens of an answer, as far as the client allows."""
    return float(min(likely[rows["class_index"][slot]], rows["max_tokens"][slot]))


@in_place
def first_due_s(rows: RequestArray, slot: int, likely: FloatArray) -> float:
    """When a first token is due; of a non-interactive tier, so that the last one is in time."""
    in_time_s = rows["answer_due_s"][slot] - likely_tokens(rows, slot, likely) * TIER_PACE_S
    return float(min(rows["ttft_due_s"][slot], in_time_s))


@in_place
def next_due_s(rows: RequestArray, slot: int, told: Told) -> float:
    """When the next token of a decode is due; inf where nothing is lost with it."""
    if rows["missed"][slot] != 0 or told.relegated[slot] == rows["order"][slot]:
        return float(np.inf)
    tokens, tpot_s = rows["stage_tokens"][slot], rows["tpot_s"][slot]
    paced_s = rows["stage_start_s"][slot] + tokens * tpot_s if tokens > 0 else rows["last_token_s"][slot] + tpot_s
    left = max(likely_tokens(rows, slot, told.likely) - rows["output_tokens"][slot], 1.0)
    return float(min(paced_s, rows["answer_due_s"][slot] - left * TIER_PACE_S))


@njit(cache=True)
def order_and_size(
    rows: RequestArray,
    running: IntArray,
    waiting: IntArray,
    told: Told,
    now_s: float,
    alpha_s: float,
    tokens_per_s: float,
    stretch: float,
) -> tuple[int, IntArray, IntArray, int]:
    """The step's size, prompts in order, those of them relegated now, and the number of decodes."""
    decodes, prompts = np.empty(len(running), dtype=np.int64), np.empty(len(running) + len(waiting), dtype=np.int64)
    num_decodes, num_prompts, slack_s = 0, 0, np.inf
    for slot in running:
        if tokens_left(rows, slot) == 1:
            decodes[num_decodes] = slot
            num_decodes += 1
            slack_s = min(slack_s, next_due_s(rows, slot, told) - now_s)
        else:
            prompts[num_prompts] = slot
            num_prompts += 1
    prompts[num_prompts : num_prompts + len(waiting)] = waiting
    prompts = prompts[: num_prompts + len(waiting)]
    key_s, last, lost = np.empty(len(prompts)), np.empty(len(prompts), dtype=np.bool_), np.empty_like(prompts)
    num_lost = 0
    for j in range(len(prompts)):
        slot = prompts[j]
        due_s, left = first_due_s(rows, slot, told.likely), tokens_left(rows, slot)
        last[j] = told.relegated[slot] == rows["order"][slot]
        fresh = rows["running"][slot] == 0 and rows["output_tokens"][slot] == 0 and not last[j]
        if fresh and np.isfinite(due_s) and now_s + left / tokens_per_s > due_s:
            last[j] = True
            lost[num_lost] = slot
            num_lost += 1
        key_s[j] = due_s + alpha_s * left
    order = np.argsort(rows["order"][prompts], kind="mergesort")
    order = order[np.argsort(key_s[order], kind="mergesort")]
    ordered = np.concatenate((prompts[order][~last[order]], prompts[order][last[order]]))
    size = told.sizes[-1]
    if slack_s < np.inf:
        size = largest_size(rows, decodes[:num_decodes], ordered, told, slack_s, stretch)
    return int(size), ordered, lost[:num_lost], num_decodes


@njit(cache=True)
def largest_size(
    rows: RequestArray, decodes: IntArray, ordered: IntArray, told: Told, slack_s: float, stretch: float
) -> int:
    """The largest step of the grid that, ``stretch`` times as long as predicted, takes ``slack_s`` at most; at least
    the smallest.

    Args:
        ordered: prompts, as they would fill the step beside the decodes.
    """
    drafts, count, found, context = told.drafts, float(len(decodes)), told.sizes[0], 0.0
    for slot in decodes:
        context += rows["computed_tokens"][slot]
    for size in told.sizes:
        left = max(size - len(decodes) * (1 + drafts), 0)
        tokens, seqs, held, units = count * (1.0 + drafts), count, context, 0.0
        for slot in ordered:
            chunk = float(min(left, tokens_left(rows, slot)))
            if chunk <= 0.0:
                break
            done = rows["prompt_tokens"][slot] + rows["output_tokens"][slot] - tokens_left(rows, slot)
            left -= int(chunk)
            tokens, seqs, held, units = tokens + chunk, seqs + 1.0, held + done, units + chunk * (chunk + 2.0 * done)
        requests_s = told.coefficients[K_CTX] * held + told.coefficients[K_Q] * units
        requests_s += told.coefficients[K_SEQ] * (seqs + count * drafts)
        if stretch * batch_s(told.coefficients, tokens, requests_s, drafts) > slack_s:
            break
        found = size
    return int(found)
