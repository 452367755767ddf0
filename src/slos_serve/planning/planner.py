"""The planner: one call before every batch turns the state of an engine into a step plan.

In reading order: forecast lengths, give up what is lost, admit (Algorithm 1), form the batch, make the promises that
the batch begins to keep. A waiting request is promised nothing until its first prefill chunk runs ("late binding"):
until then every plan decides anew, so a request that fits badly gives way to two that fit well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slos_serve.core.plan import EngineView, StepPlan
from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.planning.admission import judge, write_forecasts
from slos_serve.planning.aging import NOBODY, Aging
from slos_serve.planning.arrivals import NO_ARRIVALS, look_at
from slos_serve.planning.batching import PREFILL_DEADLINE, form_batch
from slos_serve.planning.candidates import (
    ADMITTED,
    BEST_EFFORT,
    UNDECIDED,
    demote_lost,
    first_asking_s,
    next_due_s,
    open_prompts,
    share_out,
    someone_asks,
    tokens_to_do,
)
from slos_serve.planning.drafting import Drafting
from slos_serve.planning.lengths import LengthForecast
from slos_serve.planning.prefill_rate import linear_step_s
from slos_serve.planning.settings import PlannerSettings

Formed = tuple[SlotArray, SlotArray, SlotArray, SlotArray, SlotArray, SlotArray, SlotArray, float]
# A step of prompts takes at most this share of the tightest TTFT, and at least this many times a step's fixed cost.
STEP_SHARE_OF_TTFT, LEAST_STEP_FIXED = 0.5, 4.0
# The only prompt there is makes a step that much longer: with few about, another that comes during it is rare, and it
# is cut in parts less often.
LONE_PERIODS = 1.5
# How far ahead promised decodes are to be before prompts without a promise run, in tokens: the lead is what the next
# burst of promised prompts is computed with. Little while everybody is promised what they ask for; from where this
# share of the recent requests was not, most answers end first. Requests are counted over about as many.
CALM_LEAD_TOKENS, LEAD_TOKENS, DECLINED_SHARE, RECENT_REQUESTS = 2.0, 100.0, 0.2, 64.0
# Promised prompts are bounded together (see ``most_open_tokens``) where this share of the recent requests was declined;
# where half of it was, the bound is twice as high.
CROWDED_SHARE = 0.05
_NONE: SlotArray = np.empty(0, dtype=np.int64)
_NOT_TAKEN = np.empty(0, dtype=np.bool_)


@dataclass(slots=True)
class PlannerCounters:
    """What the planner did, for metrics and benchmarks (counts only grow)."""

    plans: int = 0
    admissions: int = 0
    labels: int = 0
    greedy_answers: int = 0
    infeasible_musts: int = 0
    not_asked: int = 0
    demoted: int = 0


class Planner:
    """Plans steps of one engine.

    Args:
        model: batch times of the engine.
        num_classes: SLO classes that requests may belong to.
        settings: knobs.
    """

    def __init__(self, model: BatchTimeModel, num_classes: int, settings: PlannerSettings | None = None) -> None:
        self.settings = settings or PlannerSettings()
        self.lengths = LengthForecast(num_classes, self.settings.length_quantile)
        self.drafting = Drafting(num_classes, self.settings)
        self.counters = PlannerCounters()
        self._arrivals = NO_ARRIVALS
        self._passed_over = 0.0
        self._aging = Aging(self.settings.aging_s)
        self._model = model
        self.correct(1.0)

    def correct(self, factor: float, spread: float | None = None) -> None:
        """Plan from now on as if batches took ``factor`` times what the model says (online correction).

        Args:
            factor: measured over modelled, centre.
            spread: how much slower than that batches are planned; ``None`` for the settings' ``step_margin``, which is
                also the least.
        """
        self.step_margin = self.settings.step_margin if spread is None else max(self.settings.step_margin, spread)
        self._coefficients = self._model.coefficients * (factor * (1.0 + self.step_margin))

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Plan the step that starts at ``now_s``."""
        rows = view.table.rows
        self.counters.plans += 1
        write_forecasts(view, self.settings, self.lengths)
        demoted = self._give_up(rows, view, now_s)
        self.drafting.choose(now_s, view, self._coefficients)
        self._arrivals = look_at(rows, view.waiting, self._coefficients, self._arrivals)
        self._aging.look(rows, view.running, view.waiting, now_s)
        chosen, leftover, fitting = _NONE, _NONE, _NONE
        formed = self._without_asking(rows, view, now_s)
        if formed is None:
            chosen, leftover, fitting = self._admit(rows, view, now_s)
            formed = self._form(rows, view.running, view.free_blocks, chosen, leftover, now_s, view)
        running, freed = view.running, view.free_blocks
        sacrificed: list[int] = []
        while len(formed[0]) == 0 and len(running) > 1:
            # Every running request is short of KV blocks and none is free: one must give its own back.
            victim = self._cheapest_to_lose(rows, running)
            sacrificed.append(victim)
            if victim == self._aging.kept:
                self._aging.due = False
            running = running[running != victim]
            freed += -(-int(rows["computed_tokens"][victim]) // view.block_size)
            formed = self._form(rows, running, freed, chosen, leftover, now_s, view)
        slots, tokens, reasons, drafts, held, held_reasons, preempt, step_s = formed
        if sacrificed:
            demoted = np.concatenate((demoted, self._lose(rows, sacrificed)))
            preempt = np.concatenate((np.array(sacrificed, dtype=np.int64), preempt))
            fitting = fitting[rows["status"][fitting] == ADMITTED]
        promised = slots[reasons == PREFILL_DEADLINE]
        started = promised[rows["status"][promised] == UNDECIDED]
        rows["status"][started] = ADMITTED
        self._decided(len(fitting) + len(started), len(demoted))
        return StepPlan(
            slots=slots,
            tokens=tokens,
            reasons=reasons,
            held=held,
            held_reasons=held_reasons,
            preempt=preempt,
            # Also those that were computing in what was left over and fit now.
            admitted=np.concatenate((fitting, started)),
            demoted=demoted,
            predicted_s=step_s,
            draft_tokens=drafts if self.settings.max_draft_tokens > 0 else _NONE,
        )

    def _cheapest_to_lose(self, rows: RequestArray, running: SlotArray) -> int:
        """Best effort before promises; among the former the youngest, among the latter who has computed least."""
        promised = (rows["status"][running] == ADMITTED) | (running == self._aging.kept)
        cost = np.where(promised, rows["computed_tokens"][running], -rows["order"][running] - 1)
        return int(running[np.lexsort((cost, promised))[0]])

    def _lose(self, rows: RequestArray, sacrificed: list[int]) -> SlotArray:
        """Demote those of the sacrificed that were promised something; returns them."""
        slots = np.array(sacrificed, dtype=np.int64)
        lost: SlotArray = slots[rows["status"][slots] == ADMITTED]
        rows["status"][lost] = BEST_EFFORT
        self.counters.demoted += len(lost)
        return lost

    def _form(
        self,
        rows: RequestArray,
        running: SlotArray,
        free_blocks: int,
        chosen: SlotArray,
        leftover: SlotArray,
        now_s: float,
        view: EngineView,
    ) -> Formed:
        lengths = self.drafting.present
        return form_batch(
            rows,
            running,
            chosen,
            leftover,
            now_s,
            self._coefficients,
            self.settings.tpot_margin,
            view.max_num_batched_tokens,
            self.settings.min_chunk_tokens,
            free_blocks,
            view.total_blocks,
            view.block_size,
            view.max_num_seqs,
            self.settings.hold_decodes,
            0 if self.settings.dynamic_batch else self.settings.fixed_budget,
            lengths.tpot_s,
            lengths.tokens,
            lengths.alone_tokens,
            lengths.longer,
            lengths.yields,
            self.longest_step_s() * (LONE_PERIODS if open_prompts(rows, running, view.waiting) == 1 else 1.0),
            self._lead_tokens(),
            self._aging.kept,
            self._aging.kept if self._aging.due else NOBODY,
        )

    def longest_step_s(self) -> float:
        """A request that comes while a step of prompts runs must still make its first token by a step of its own."""
        fixed_s = float(linear_step_s(self._coefficients, 0.0))
        own_s = max(STEP_SHARE_OF_TTFT * self._arrivals.tightest_s, LEAST_STEP_FIXED * fixed_s)
        if self.drafting.present.tokens.any():
            return max(own_s, self.settings.longest_step_s)  # draft lengths are chosen for steps as long as that
        return own_s

    def most_open_tokens(self) -> float:
        """Most prefill, in tokens, that promised prompts may have left when one more is promised; inf for no bound.

        A prompt that is promised takes its time whatever comes until it is due. Where requests are declined anyway, a
        few long ones at once leave none for the short ones that come next.
        """
        most = self.settings.open_prompts * self._arrivals.mean_tokens
        return most * max(CROWDED_SHARE / self._passed_over, 1.0) if most * self._passed_over > 0.0 else np.inf

    def _lead_tokens(self) -> float:
        crowded = min(self._passed_over / DECLINED_SHARE, 1.0)
        return CALM_LEAD_TOKENS + crowded * (LEAD_TOKENS - CALM_LEAD_TOKENS)

    def _decided(self, promised: int, passed_over: int) -> None:
        """Learn how crowded it is from the requests that were promised something now, and those that never will be."""
        for share, count in ((0.0, promised), (1.0, passed_over)):
            self._passed_over = share + (self._passed_over - share) * (1.0 - 1.0 / RECENT_REQUESTS) ** count

    def _give_up(self, rows: RequestArray, view: EngineView, now_s: float) -> SlotArray:
        if not self.settings.best_effort:
            return _NONE
        active = np.concatenate((view.running, view.waiting))
        demoted = np.empty(len(active), dtype=np.int64)
        count = demote_lost(rows, active, now_s, self._coefficients, demoted)
        self.counters.demoted += count
        return demoted[:count]

    def _without_asking(self, rows: RequestArray, view: EngineView, now_s: float) -> Formed | None:
        """The step where no answer of admission could change it, else ``None``.

        A promised prompt that runs, due no later than anybody who waits, takes all the room there is and is not done:
        whoever admission served would come after it.
        """
        margin = self.settings.tpot_margin
        asking_s = first_asking_s(rows, view.running, view.waiting, margin) if len(view.waiting) else -np.inf
        if asking_s == -np.inf or self._aging.due or not self.settings.skip_admission:
            return None
        formed = self._form(rows, view.running, view.free_blocks, _NONE, _NONE, now_s, view)
        last = np.flatnonzero(formed[2] == PREFILL_DEADLINE)[-1:]
        if len(last) == 0:
            return None
        slot, tokens = int(formed[0][last[0]]), int(formed[1][last[0]])
        if tokens >= tokens_to_do(rows, slot) or next_due_s(rows, slot, margin) > asking_s:
            return None
        self.counters.not_asked += 1
        return formed

    def _admit(self, rows: RequestArray, view: EngineView, now_s: float) -> tuple[SlotArray, SlotArray, SlotArray]:
        """Waiting slots to serve and those that use what is left over; running ones that fit are promised their SLO."""
        slots, taken = _NONE, _NOT_TAKEN
        if someone_asks(rows, view.running, view.waiting):
            found = judge(
                view,
                now_s,
                self._coefficients,
                self.settings,
                self.lengths,
                forecast_memory=self.settings.forecast_memory,
                count_freed=self.settings.count_freed,
                longest_step_s=self.longest_step_s(),
                most_open_tokens=self.most_open_tokens(),
                kept_blocks=self._aging.blocks(rows, view.block_size),
                drafts=self.drafting.present,
            )
            slots, taken = found.slots, found.taken
            self.counters.admissions += 1
            self.counters.labels += found.labels
            self.counters.greedy_answers += found.stopped
            self.counters.infeasible_musts += found.infeasible
        chosen, leftover, fitting = share_out(rows, view.waiting, slots, taken)
        rows["status"][fitting] = ADMITTED
        return chosen, leftover, fitting
