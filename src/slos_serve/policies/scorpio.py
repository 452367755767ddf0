"""SCORPIO: least deadline first with rejection (TTFT guard), virtual-batch-size admission and credits (TPOT guard).

A waiting request is rejected once the prompts ahead of it in deadline order could not be prefilled before its deadline.
The rest start in deadline order while the step time predicted for the *virtual* batch size, the sum over running
requests of (tightest TPOT / own TPOT), stays under the tightest TPOT. A looser request earns that ratio as credit in
each decode step and takes part when it has a whole one, so it decodes just as fast as it was promised. Answer lengths
are predicted. The base engine is vLLM V0 (prefill first); ``chunk_tokens`` gives the chunked variant. Source: Tang et
al. 2025 (arXiv 2505.23022), sections 4.1 to 4.3.

Simplified against the paper: answer lengths are the class's mean of answers seen (the paper fine-tunes OPT-125M to sort
each prompt into 100 length bins); step times come from the engine's batch-time model (the paper fits its own, linear in
batch size and mean length). Added: fixed drafts. Since every decode then yields the same number of tokens a step in the
mean, the TPOT guard compares the step with the tightest TPOT times that number, learnt; credits stay per step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import RequestArray
from slos_serve.core.slo import check_number
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.policies.base import StockPolicy
from slos_serve.policies.queue_order import (
    IntArray,
    batch_plan,
    checked_draft_tokens,
    checked_tokens,
    chunked,
    draft_all,
    rest_of_prompt,
    room_for,
    room_of,
    whole_prompts,
)

# Margins of the authors' implementation: seconds added to a predicted wait, and share of the TPOT that may be used.
WAIT_MARGIN_S = 0.05
TPOT_SHARE = 0.99
WATERMARK = 0.01
# Without any answer seen, this many output tokens are assumed.
PRIOR_OUTPUT_TOKENS = 256.0
# Verifications after which an old one counts 1/e when the tokens of a decode step are learnt.
VERIFICATIONS_KEPT = 1000.0


class Scorpio(StockPolicy):
    """See :class:`slos_serve.policies.base.Policy`.

    Args:
        model: batch-time model, in the place of the authors' fitted predictors.
        num_classes: classes whose answer lengths are learnt apart.
        token_budget: prompt tokens of a prefill step.
        chunk_tokens: above 0, the token budget of a chunked step that decodes and prefills together.
        draft_tokens: drafts of every decode that takes part in a step, where the engine has a drafter.
    """

    def __init__(
        self,
        model: BatchTimeModel,
        num_classes: int,
        token_budget: int = 8192,
        chunk_tokens: int = 0,
        draft_tokens: int = 0,
    ) -> None:
        self._model = model
        self._token_budget = checked_tokens("token_budget", token_budget)
        self._draft_tokens = checked_draft_tokens(draft_tokens)
        self._tokens_a_step = 1.0
        self._chunk_tokens = int(check_number("chunk_tokens", chunk_tokens, low=0, high=1e6, low_included=True))
        self._credits = np.zeros(64, dtype=np.float64)
        self._owner = np.full(64, -1, dtype=np.int64)
        self._answers = np.full((num_classes, 2), (1.0, PRIOR_OUTPUT_TOKENS))

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Reject, order, admit, and give the step to prompts or to the decodes whose credit is due."""
        rows = view.table.rows
        waiting, rejected = self._ttft_guard(now_s, rows, view.waiting)
        admitted = self._tpot_guard(rows, view, waiting)
        prefills = (rest_of_prompt(view) or self._start(rows, view, admitted)) if not self._chunk_tokens else None
        if prefills is not None and len(prefills.slots):
            prefills.rejected = rejected
            return prefills
        decodes = self._with_credit(rows, view.running)
        chunked_step = self._chunk_tokens > 0
        plan = self._mixed(rows, view, decodes, admitted) if chunked_step else self._decode(rows, view, decodes)
        plan.rejected = rejected
        return plan

    def _ttft_guard(self, now_s: float, rows: RequestArray, waiting: IntArray) -> tuple[IntArray, IntArray]:
        """Waiting slots in deadline order, and those that cannot be in time any more."""
        due_s = rows["ttft_due_s"][waiting]
        ordered = waiting[np.lexsort((rows["order"][waiting], due_s))]
        left = rows["prompt_tokens"][ordered] + rows["output_tokens"][ordered] - rows["cached_tokens"][ordered]
        started = rows["output_tokens"][ordered] > 0
        keep = np.ones(len(ordered), dtype=np.bool_)
        ahead = 0
        for i, slot in enumerate(ordered):
            ahead += int(left[i])
            wait_s = self._model.step_s(BatchShape(ahead)) + WAIT_MARGIN_S
            if not started[i] and now_s + wait_s > rows["ttft_due_s"][slot]:
                keep[i] = False
                ahead -= int(left[i])
        return ordered[keep], ordered[~keep]

    def _tpot_guard(self, rows: RequestArray, view: EngineView, ordered: IntArray) -> IntArray:
        """The longest prefix of ``ordered`` that the predicted step time of the virtual batch allows."""
        tpots = rows["tpot_s"][view.running]
        lengths = (rows["prompt_tokens"] + rows["output_tokens"])[view.running]
        limits, total_length = list(tpots[np.isfinite(tpots)]), float(lengths.sum())
        count = len(view.running)
        for i, slot in enumerate(ordered):
            tpot = float(rows["tpot_s"][slot])
            total_length += float(rows["prompt_tokens"][slot] + rows["output_tokens"][slot])
            count += 1
            if np.isfinite(tpot):
                limits.append(tpot)
            if not limits:
                continue
            tightest = min(limits)
            virtual = float(np.sum(tightest / np.asarray(limits)))
            context = total_length / count + 0.5 * self._expected_output(int(rows["class_index"][slot]))
            allowed_s = TPOT_SHARE * tightest * self._tokens_a_step
            if self._decode_s(virtual, context) >= allowed_s and (i or len(view.running)):
                return ordered[:i]
        return ordered

    def _decode_s(self, virtual_batch: float, context_tokens: float) -> float:
        size, drafts = max(round(virtual_batch), 1), self._draft_tokens
        shape = BatchShape(
            new_tokens=size * (1 + drafts),
            context_tokens=round(virtual_batch * context_tokens),
            num_seqs=size,
            draft_steps=drafts,
            draft_tokens=size * drafts,
        )
        return self._model.step_s(shape)

    def _expected_output(self, class_index: int) -> float:
        count, total = self._answers[class_index]
        return float(total / count)

    def _start(self, rows: RequestArray, view: EngineView, admitted: IntArray) -> StepPlan:
        out = room_for(view)
        room = room_of(view, self._token_budget, WATERMARK)
        return batch_plan(out, whole_prompts(rows, admitted, len(view.running), room, view.max_num_batched_tokens, out))

    def _decode(self, rows: RequestArray, view: EngineView, decodes: IntArray) -> StepPlan:
        """A step of decodes alone."""
        drafts = draft_all(rows, decodes, self._draft_tokens, room_of(view, view.max_num_batched_tokens))
        return batch_plan(np.stack((decodes, 1 + drafts, drafts)), len(decodes))

    def _with_credit(self, rows: RequestArray, running: IntArray) -> IntArray:
        """Running slots that decode in this step; spends and earns credits."""
        if len(rows) > len(self._credits):
            grown = len(rows) - len(self._credits)
            self._credits = np.concatenate((self._credits, np.zeros(grown)))
            self._owner = np.concatenate((self._owner, np.full(grown, -1, dtype=np.int64)))
        if len(running) == 0:
            return running.copy()
        new = self._owner[running] != rows["order"][running]  # the slot went to another request
        self._credits[running[new]] = 0.0
        self._owner[running] = rows["order"][running]
        tpots = rows["tpot_s"][running]
        tightest = float(tpots.min())
        earned = self._earned(tpots, tightest)
        self._credits[running] += earned
        due = (self._credits[running] >= 1.0 - 1e-9) | (tpots <= tightest)
        self._credits[running[due]] = np.maximum(self._credits[running[due]] - 1.0, 0.0)
        return np.asarray(running[due])

    @staticmethod
    def _earned(tpots: NDArray[np.float64], tightest: float) -> NDArray[np.float64]:
        """Ratio of the tightest TPOT to each own; 1 for those without a promise when nobody has one."""
        if not np.isfinite(tightest):
            return np.ones_like(tpots)
        return np.asarray(np.where(np.isfinite(tpots), tightest / tpots, 0.1))

    def _mixed(self, rows: RequestArray, view: EngineView, decodes: IntArray, admitted: IntArray) -> StepPlan:
        """The chunked variant: decodes with credit, running prompts, then admitted ones, in one token budget."""
        left = rows["prompt_tokens"] + rows["output_tokens"] - rows["computed_tokens"]
        prompts = view.running[left[view.running] > 1]
        decodes = decodes[left[decodes] == 1]
        ordered = np.concatenate((decodes, prompts))
        out = room_for(view)
        # Held decodes stay in the engine: their places do not go to others.
        held = len(view.running) - len(ordered)
        room = room_of(view, self._chunk_tokens, WATERMARK)._replace(seqs=view.max_num_seqs - held)
        return batch_plan(out, chunked(rows, ordered, admitted, room, self._draft_tokens, out))

    def on_verified(self, class_index: IntArray, drafted: IntArray, accepted: IntArray) -> None:
        """Learn how many tokens a decode yields in a step."""
        share = -np.expm1(-len(accepted) / VERIFICATIONS_KEPT)
        if len(accepted):
            self._tokens_a_step += share * (1.0 + float(accepted.mean()) - self._tokens_a_step)

    def on_request_done(self, class_index: int, prompt_tokens: int, output_tokens: int) -> None:
        """Learn the mean answer length of a class."""
        self._answers[class_index] += (1.0, float(output_tokens))
