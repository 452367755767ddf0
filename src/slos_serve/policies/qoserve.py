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

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.plan import EngineView, Reason, StepPlan
from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.core.slo import check_number
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.formula import features_s
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
    tokens_done_of,
    tokens_left_of,
)
from slos_serve.policies.slot_marks import SlotMarks

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
        self._relegated = SlotMarks()
        self._prefill_tokens = 0
        self._tokens_per_s = LARGEST_STEP / model.step_s(BatchShape(LARGEST_STEP))

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Relegate, order, and size the step."""
        rows = view.table.rows
        decoding = tokens_left_of(rows, view.running) == 1
        decodes, prompts = view.running[decoding], np.concatenate((view.running[~decoding], view.waiting))
        due_s, left = self.first_due_s(rows, prompts), tokens_left_of(rows, prompts)
        relegated = self._relegated.of(rows, prompts)
        fresh = (rows["running"][prompts] == 0) & (rows["output_tokens"][prompts] == 0) & ~relegated
        lost = fresh & np.isfinite(due_s) & (now_s + left / self._tokens_per_s > due_s)
        key_s = due_s + self._alpha_s * left
        ordered = prompts[np.lexsort((rows["order"][prompts], key_s, relegated | lost))]
        size = self._step_tokens(now_s, rows, decodes, ordered)
        out = room_for(view)
        room = room_of(view, max(size, len(decodes) * (1 + self._draft_tokens)), self._watermark)
        plan = batch_plan(out, decodes_then(rows, view.running, ordered, room, self._draft_tokens, out))
        plan.reasons[:] = np.where(np.isin(plan.slots, decodes), int(Reason.DECODE_DUE), int(Reason.PREFILL_DEADLINE))
        plan.demoted = prompts[lost]
        return plan

    def commit(self, plan: StepPlan, view: EngineView, ran: SlotArray) -> None:
        """Remember who was relegated and how many prompt tokens run."""
        self._relegated.add(view.table.rows, plan.demoted)
        prompts = (plan.reasons == Reason.PREFILL_DEADLINE) & np.isin(plan.slots, ran)
        self._prefill_tokens = int(plan.tokens[prompts].sum())

    def on_step_done(self, shape: BatchShape, duration_s: float) -> None:
        """Learn how many prompt tokens a second the engine computes while there are prompts."""
        if self._prefill_tokens and duration_s > 0.0:
            self._tokens_per_s += THROUGHPUT_SHARE * (self._prefill_tokens / duration_s - self._tokens_per_s)

    def on_request_done(self, class_index: int, prompt_tokens: int, output_tokens: int) -> None:
        """Learn mean and spread of a class's answers."""
        self._answers[class_index] += (1.0, float(output_tokens), float(output_tokens) ** 2)

    def _longest_likely(self, rows: RequestArray, slots: SlotArray) -> FloatArray:
        """Tokens of an answer, class by class: mean and two standard deviations, as far as the client allows."""
        count, total, squares = self._answers[rows["class_index"][slots]].T
        spread = np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0.0))
        return np.asarray(np.minimum(total / count + 2.0 * spread, rows["max_tokens"][slots]))

    def first_due_s(self, rows: RequestArray, slots: SlotArray) -> FloatArray:
        """When first tokens are due; of a non-interactive tier, so that the last one is in time."""
        in_time_s = rows["answer_due_s"][slots] - self._longest_likely(rows, slots) * TIER_PACE_S
        return np.asarray(np.minimum(rows["ttft_due_s"][slots], in_time_s))

    def _next_due_s(self, rows: RequestArray, decodes: SlotArray) -> FloatArray:
        """When the next token of each decode is due; inf for those that nothing is lost with."""
        start_s, last_s = rows["stage_start_s"][decodes], rows["last_token_s"][decodes]
        tokens, tpot_s = rows["stage_tokens"][decodes], rows["tpot_s"][decodes]
        with np.errstate(invalid="ignore"):  # no token yet times no pace
            paced_s = np.where(tokens > 0, start_s + tokens * tpot_s, last_s + tpot_s)
        left = np.maximum(self._longest_likely(rows, decodes) - rows["output_tokens"][decodes], 1.0)
        tier_s = rows["answer_due_s"][decodes] - left * TIER_PACE_S
        counts = (rows["missed"][decodes] == 0) & ~self._relegated.of(rows, decodes)
        return np.asarray(np.where(counts, np.minimum(paced_s, tier_s), np.inf))

    def _step_tokens(self, now_s: float, rows: RequestArray, decodes: SlotArray, ordered: SlotArray) -> int:
        """The largest step of the grid that the decodes' slack allows, at least the smallest."""
        slack_s = float(self._next_due_s(rows, decodes).min(initial=np.inf)) - now_s
        if not np.isfinite(slack_s):
            return int(self._sizes[-1])
        times_s = self._stretch * self._times_s(rows, decodes, ordered)
        return int(self._sizes[max(int(np.searchsorted(times_s, slack_s, side="right")) - 1, 0)])

    def _times_s(self, rows: RequestArray, decodes: SlotArray, ordered: SlotArray) -> FloatArray:
        """float64 [sizes]: predicted time of the step of each size, not falling."""
        count, drafts = len(decodes), self._draft_tokens
        budgets = np.maximum(self._sizes - count * (1 + drafts), 0)
        left = tokens_left_of(rows, ordered)
        before = np.concatenate(([0], np.cumsum(left)))[:-1]
        reached = int(np.searchsorted(before, budgets[-1]))
        before, left, done = before[:reached], left[:reached], tokens_done_of(rows, ordered[:reached])
        chunks = np.clip(budgets[:, None] - before, 0, left)
        seqs = count + (chunks > 0).sum(axis=1)
        tokens = count * (1 + drafts) + chunks.sum(axis=1)
        context = rows["computed_tokens"][decodes].sum() + ((chunks > 0) * done).sum(axis=1)
        units = (chunks * (chunks + 2 * done)).sum(axis=1)
        times_s = features_s(self._coefficients, tokens, context, units, seqs + count * drafts, drafts)
        return np.asarray(np.maximum.accumulate(times_s))
