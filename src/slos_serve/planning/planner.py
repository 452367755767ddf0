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
from slos_serve.planning.admission_kernel import INFEASIBLE, admit
from slos_serve.planning.batching import form_batch
from slos_serve.planning.candidates import ADMITTED, BEST_EFFORT, UNDECIDED, demote_lost, forecast_lengths, gather
from slos_serve.planning.lengths import EDGES, LengthForecast
from slos_serve.planning.memory import forecast, reserve
from slos_serve.planning.prefill_rate import FloatArray, linear_step_s
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
        if not self.settings.oracle_lengths:
            table = self.lengths.table()
            forecast_lengths(rows, view.running, table, EDGES)
            forecast_lengths(rows, view.waiting, table, EDGES)
        demoted = self._give_up(rows, view, now_s)
        active = np.concatenate((view.running, view.waiting))
        undecided = active[rows["status"][active] == UNDECIDED]
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
        slots, tokens, reasons, held, held_reasons, preempt, step_s = formed
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
        )

    def _memory(
        self, rows: RequestArray, view: EngineView, slots: SlotArray, due_s: FloatArray, now_s: float, pace_s: float
    ) -> tuple[FloatArray, FloatArray]:
        if not self.settings.forecast_memory:
            return reserve(rows, view.running, slots, view.total_blocks, view.block_size)
        survival = self.lengths.survival()
        return forecast(
            rows, view.running, slots, due_s, now_s, pace_s, survival, EDGES, view.total_blocks, view.block_size
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
    ) -> tuple[SlotArray, SlotArray, SlotArray, SlotArray, SlotArray, SlotArray, float]:
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
        slots, due_s, cost, tier, must, base_counts, periods_s, extra_s = gather(
            rows,
            view.running,
            view.waiting,
            now_s,
            self._coefficients,
            self.settings.tpot_margin,
            self.settings.max_implied_ttft_s,
        )
        is_must = must > 0.0
        memory, room = self._memory(rows, view, slots, due_s, now_s, float(periods_s[0]))
        ones = np.ones(len(periods_s))
        # The batch that ends a prompt is cut short by its due time: one more fixed cost than a fluid has.
        cut_short_s = linear_step_s(self._coefficients, 0.0)
        taken, _, _, status, labels = admit(
            due_s,
            cost,
            tier,
            memory,
            rows["weight"][slots],
            is_must,
            base_counts,
            periods_s,
            ones,
            extra_s,
            0.0,
            self._coefficients,
            float(view.max_num_batched_tokens),
            now_s + cut_short_s,
            room,
            self.settings.max_labels,
        )
        self.counters.admissions += 1
        self.counters.labels += labels
        if status == INFEASIBLE:
            # What is promised already does not fit any more (a forecast was wrong): promise nothing new.
            self.counters.infeasible_musts += 1
            taken = is_must
        is_running = rows["running"][slots] == 1
        # One that already computes in what was left over is promised its SLO as soon as it fits.
        rows["status"][slots[taken & is_running]] = ADMITTED
        return slots[taken & ~is_running], slots[~taken & ~is_running]
