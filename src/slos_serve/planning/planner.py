"""The planner: one call before every batch turns the state of an engine into a step plan.

In reading order: forecast lengths, give up what is lost, admit (Algorithm 1), form the batch, make the promises that
the batch begins to keep. A waiting request is promised nothing until its first prefill chunk runs ("late binding"):
until then every plan decides anew, so a request that fits badly gives way to two that fit well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slos_serve.core.plan import EngineView, Reason, StepPlan
from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.planning.admission import judge, write_forecasts
from slos_serve.planning.batching import form_batch
from slos_serve.planning.candidates import ADMITTED, BEST_EFFORT, UNDECIDED, demote_lost
from slos_serve.planning.drafting import Drafting
from slos_serve.planning.lengths import LengthForecast
from slos_serve.planning.settings import PlannerSettings

_NONE: SlotArray = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class PlannerCounters:
    """What the planner did, for metrics and benchmarks (counts only grow)."""

    plans: int = 0
    admissions: int = 0
    labels: int = 0
    greedy_answers: int = 0
    infeasible_musts: int = 0
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
        self._model = model
        self.correct(1.0)

    def correct(self, factor: float) -> None:
        """Plan from now on as if batches took ``factor`` times what the model says (online correction)."""
        self._coefficients = self._model.coefficients * (factor * (1.0 + self.settings.step_margin))

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Plan the step that starts at ``now_s``."""
        rows = view.table.rows
        self.counters.plans += 1
        write_forecasts(view, self.settings, self.lengths)
        demoted = self._give_up(rows, view, now_s)
        active = np.concatenate((view.running, view.waiting))
        undecided = active[rows["status"][active] == UNDECIDED]
        self.drafting.choose(now_s, view, self._coefficients)
        chosen, passed_over = self._admit(rows, view, now_s)
        others = view.waiting[rows["status"][view.waiting] == BEST_EFFORT]
        # Those passed over may still make it in what is left over, so they come before best effort.
        leftover = np.concatenate((passed_over, others[np.argsort(rows["order"][others], kind="stable")]))
        formed = self._form(rows, view.running, view.free_blocks, chosen, leftover, now_s, view)
        running, freed = view.running, view.free_blocks
        sacrificed: list[int] = []
        while len(formed[0]) == 0 and len(running) > 1:
            # Every running request is short of KV blocks and none is free: one must give its own back.
            victim = self._cheapest_to_lose(rows, running)
            sacrificed.append(victim)
            running = running[running != victim]
            freed += -(-int(rows["computed_tokens"][victim]) // view.block_size)
            formed = self._form(rows, running, freed, chosen, leftover, now_s, view)
        slots, tokens, reasons, drafts, held, held_reasons, preempt, step_s = formed
        if sacrificed:
            demoted = np.concatenate((demoted, self._lose(rows, sacrificed)))
            preempt = np.concatenate((np.array(sacrificed, dtype=np.int64), preempt))
        promised = slots[reasons == Reason.PREFILL_DEADLINE]
        rows["status"][promised[rows["status"][promised] == UNDECIDED]] = ADMITTED
        # Also those that were computing in what was left over and fit now.
        admitted = undecided[rows["status"][undecided] == ADMITTED]
        return StepPlan(
            slots=slots,
            tokens=tokens,
            reasons=reasons,
            held=held,
            held_reasons=held_reasons,
            preempt=preempt,
            admitted=admitted,
            demoted=demoted,
            predicted_s=step_s,
            draft_tokens=drafts if self.settings.max_draft_tokens > 0 else _NONE,
        )

    def _cheapest_to_lose(self, rows: RequestArray, running: SlotArray) -> int:
        """Best effort before promises; among the former the youngest, among the latter who has computed least."""
        promised = rows["status"][running] == ADMITTED
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
    ) -> tuple[SlotArray, SlotArray, SlotArray, SlotArray, SlotArray, SlotArray, SlotArray, float]:
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
            view.block_size,
            view.max_num_seqs,
            self.settings.hold_decodes,
            0 if self.settings.dynamic_batch else self.settings.fixed_budget,
            lengths.tpot_s,
            lengths.tokens,
            lengths.alone_tokens,
            lengths.longer,
        )

    def _give_up(self, rows: RequestArray, view: EngineView, now_s: float) -> SlotArray:
        if not self.settings.best_effort:
            return _NONE
        active = np.concatenate((view.running, view.waiting))
        demoted = np.empty(len(active), dtype=np.int64)
        count = demote_lost(rows, active, now_s, self._coefficients, demoted)
        self.counters.demoted += count
        return demoted[:count]

    def _admit(self, rows: RequestArray, view: EngineView, now_s: float) -> tuple[SlotArray, SlotArray]:
        """Waiting slots to serve (promised already, or picked now) and those passed over; both in deadline order."""
        waits = np.any(rows["status"][view.waiting] != BEST_EFFORT)
        if not waits and not np.any(rows["status"][view.running] == UNDECIDED):
            return _NONE, _NONE
        found = judge(
            view,
            now_s,
            self._coefficients,
            self.settings,
            self.lengths,
            forecast_memory=self.settings.forecast_memory,
            drafts=self.drafting.present,
        )
        slots, taken = found.slots, found.taken
        self.counters.admissions += 1
        self.counters.labels += found.labels
        self.counters.infeasible_musts += found.infeasible
        is_running = rows["running"][slots] == 1
        # One that already computes in what was left over is promised its SLO as soon as it fits.
        rows["status"][slots[taken & is_running]] = ADMITTED
        return slots[taken & ~is_running], slots[~taken & ~is_running]
