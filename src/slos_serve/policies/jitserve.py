"""JITServe's GMAX: groups of like length with the most goodput gained per second of service, frame by frame.

A request's goodput is its prompt tokens (with the first token in time) and eight for every answer token; what would
come late counts in proportion of allowed to predicted time, to a power. Its density is that goodput over the seconds of
service it still needs. Every ``frame_steps`` steps the policy takes the ``top_k`` * B densest requests, sorts them by
length and picks the B neighbours with the largest sum: a batch of like lengths wastes least. B shrinks while steps take
longer than the tightest pace and grows again. During a frame only the group runs; places that become free go to the
densest of its lengths, then to the densest of all. A request that has waited long and is late is dropped. Answers are
taken for as long as a high quantile of their class, refined as they grow.

Source: Zhang et al., NSDI 2026 (arXiv 2504.20068), and its artifact's weights and defaults. Simplified: the quantile
comes from the class's answers (the paper trains a quantile forest on prompts); when a call of a task is due comes from
the book of tasks (``perf/tasks.py``; the paper matches graphs of earlier tasks); the KV of running requests outside the
group stays, and is preempted only where the group needs the room (the artifact swaps it out to the host); service
counts prompt steps too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.plan import EngineView, Reason, StepPlan
from slos_serve.core.request import RequestArray, SlotArray
from slos_serve.core.slo import check_number
from slos_serve.perf.batch_time import BatchShape
from slos_serve.perf.lengths import LengthForecast, forecast_lengths
from slos_serve.policies.base import StockPolicy
from slos_serve.policies.queue_order import (
    IntArray,
    batch_plan,
    checked_draft_tokens,
    checked_tokens,
    decodes_then,
    room_for,
    room_of,
    tokens_left_of,
)
from slos_serve.policies.slot_marks import SlotMarks, among

FloatArray = NDArray[np.float64]
WATERMARK = 0.01
ANSWER_WEIGHT = 8.0  # goodput of an answer token, a prompt token's being 1
FIRST_STEP_S = 0.02  # what a step is taken for before one was measured
STEP_SHARE = 0.1  # the newest step's share in the mean
RESIZE = 0.1  # share by which B shrinks or grows with a frame
NO_PROMISE = 1e-9  # factor on the density of those that nothing is promised


class JitServe(StockPolicy):
    """See :class:`slos_serve.policies.base.Policy`.

    Args:
        num_classes: classes whose answer lengths are learnt apart.
        token_budget: most tokens in a step.
        frame_steps: steps after which the group is chosen anew.
        top_k: how many times B requests the group is chosen from.
        lateness_power: power of allowed over predicted time that late goodput is multiplied with.
        drop_after_s: least time that a late request has waited when it is dropped.
        length_quantile: quantile of the answer lengths of a class.
        draft_tokens: drafts of every decode, where the engine has a drafter.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        token_budget: int = 512,
        frame_steps: int = 50,
        top_k: int = 2,
        lateness_power: float = 1.0,
        drop_after_s: float = 5.0,
        length_quantile: float = 0.9,
        draft_tokens: int = 0,
    ) -> None:
        self._lengths = LengthForecast(num_classes, length_quantile)
        self._token_budget = checked_tokens("token_budget", token_budget)
        self._frame_steps = int(check_number("frame_steps", frame_steps, low=1, high=1e6, low_included=True))
        self._top_k = int(check_number("top_k", top_k, low=1, high=1e3, low_included=True))
        self._power = check_number("lateness_power", lateness_power, low=0.0, high=100.0, low_included=True)
        self._drop_after_s = check_number("drop_after_s", drop_after_s, low=0.0, high=1e6, low_included=True)
        self._draft_tokens = checked_draft_tokens(draft_tokens)
        self._step_s = FIRST_STEP_S
        self._batch = np.inf
        self._steps_left = 0
        self._group = SlotMarks()
        self._sizes = (1, 0)
        self._chosen: tuple[StepPlan, SlotArray, bool] | None = None

    def plan(self, now_s: float, view: EngineView) -> StepPlan:
        """Drop, choose the group where a frame begins, and run what of it fits."""
        rows = view.table.rows
        rejected = self._too_late(now_s, rows, view.waiting)
        everyone = np.concatenate((view.running, view.waiting[~among(rows, view.waiting, rejected)]))
        forecast_lengths(rows, everyone, self._lengths.table())
        density = np.zeros(len(rows))
        density[everyone] = self.density(now_s, rows, everyone)
        batch = int(min(self._batch, view.max_num_seqs))
        members = everyone[self._group.of(rows, everyone)]
        begins = self._steps_left <= 0 or len(members) == 0
        if begins:
            group = self._best_group(rows, everyone, density, batch)
        else:
            group = np.concatenate((members, self._joining(rows, everyone, density, batch)))
        group = group[np.argsort(-density[group], kind="stable")]
        victims = self._victims(view, group, density) if begins else group[:0]
        plan = self._fill(view, group, victims, batch)
        if len(plan.slots) == 0:  # the group has no room: whoever holds it goes on
            victims = group[:0]
            plan = self._fill(view, everyone[np.argsort(-density[everyone], kind="stable")], victims, batch)
        plan.rejected, plan.preempt = rejected, victims
        self._chosen = (plan, group, begins)
        return plan

    def commit(self, plan: StepPlan, view: EngineView, ran: SlotArray) -> None:
        """Keep the group."""
        if self._chosen is None or self._chosen[0] is not plan:
            return
        _, group, begins = self._chosen
        rows = view.table.rows
        self._steps_left -= 1
        if begins:
            self._group.clear()
            self._steps_left = self._frame_steps - 1
            sizes = _size(rows, group)
            self._sizes = (int(sizes.min(initial=1)), int(sizes.max(initial=0)))
            self._resize(len(group), float(rows["tpot_s"][group].min(initial=np.inf)), view.max_num_seqs)
        self._group.add(rows, group)

    def _resize(self, now: int, tightest_s: float, most: int) -> None:
        """B of the next frame."""
        shrinks = self._step_s > tightest_s
        resized = now * (1.0 - RESIZE) if shrinks else self._batch * (1.0 + RESIZE) + 1.0
        self._batch = float(np.clip(resized, 1.0, most))

    def on_step_done(self, shape: BatchShape, duration_s: float) -> None:
        """Follow how long steps take."""
        self._step_s += STEP_SHARE * (duration_s - self._step_s)

    def on_request_done(self, class_index: int, prompt_tokens: int, output_tokens: int) -> None:
        """Learn how long answers of the class are."""
        self._lengths.observe(class_index, output_tokens)

    def density(self, now_s: float, rows: RequestArray, slots: SlotArray) -> FloatArray:
        """float64 [n]: goodput over the seconds of service that each still needs."""
        prompt, generated = rows["prompt_tokens"][slots], rows["output_tokens"][slots]
        answer = rows["expected_tokens"][slots]
        ttft_s = rows["ttft_due_s"][slots] - rows["arrival_s"][slots]
        prompt_steps = np.ceil(np.where(generated > 0, 0, tokens_left_of(rows, slots)) / self._token_budget)
        answer_left = np.maximum(answer - generated, 1)
        waited_s, service_s = now_s - rows["arrival_s"][slots], self._step_s * (prompt_steps + answer_left)
        with np.errstate(invalid="ignore"):  # an answer without a pace is never late
            allowed_s = np.where(np.isinf(rows["tpot_s"][slots]), np.inf, ttft_s + answer * rows["tpot_s"][slots])
        allowed_s = np.where(np.isinf(ttft_s), np.inf, allowed_s)
        allowed_s = np.minimum(allowed_s, rows["answer_due_s"][slots] - rows["arrival_s"][slots])
        late_prompt = _ratio(ttft_s, waited_s + self._step_s * prompt_steps) ** self._power
        late_answer = _ratio(allowed_s, waited_s + service_s) ** self._power
        in_time = (generated > 0) & (rows["missed"][slots] == 0)
        gained = np.where(in_time, prompt + ANSWER_WEIGHT * generated, prompt * late_prompt)
        to_gain = ANSWER_WEIGHT * np.where(in_time, answer_left, answer) * late_answer
        promised = np.where(rows["has_slo"][slots] == 1, 1.0, NO_PROMISE)
        return np.asarray(promised * (gained + to_gain) / service_s)

    def _too_late(self, now_s: float, rows: RequestArray, waiting: SlotArray) -> SlotArray:
        waited_s = now_s - rows["arrival_s"][waiting]
        late = (rows["ttft_due_s"][waiting] < now_s) & (rows["output_tokens"][waiting] == 0)
        late |= rows["answer_due_s"][waiting] < now_s
        return np.asarray(waiting[late & (waited_s > self._drop_after_s)])

    def _joining(self, rows: RequestArray, slots: SlotArray, density: FloatArray, batch: int) -> SlotArray:
        """Who takes the places of the group that became free."""
        member = self._group.of(rows, slots)
        rest = slots[~member]
        sizes = _size(rows, rest)
        unlike = (sizes < self._sizes[0]) | (sizes > self._sizes[1])
        return np.asarray(rest[np.lexsort((-density[rest], unlike))[: max(batch - int(member.sum()), 0)]])

    def _best_group(self, rows: RequestArray, slots: SlotArray, density: FloatArray, batch: int) -> SlotArray:
        """Neighbours in length, B of them, with the largest sum of densities among the densest ``top_k`` * B."""
        if len(slots) <= batch:
            return slots
        densest = slots[np.argsort(-density[slots], kind="stable")][: self._top_k * batch]
        by_length = densest[np.argsort(_size(rows, densest), kind="stable")]
        sums = np.convolve(density[by_length], np.ones(batch), mode="valid")
        first = int(np.argmax(sums))
        return np.asarray(by_length[first : first + batch])

    def _victims(self, view: EngineView, group: SlotArray, density: FloatArray) -> SlotArray:
        """Running requests outside the group that the densest waiting one of the group takes the room of."""
        rows, block_size = view.table.rows, view.block_size
        waiting = group[rows["running"][group] == 0]
        if len(waiting) == 0:
            return np.asarray(waiting)
        first = waiting[:1]
        lacking = -(-int(_size(rows, first)[0]) // block_size)
        lacking += int(WATERMARK * view.total_blocks) + _owed_blocks(view, view.running) - view.free_blocks
        outside = view.running[~among(rows, view.running, group)]
        outside = outside[density[outside] < density[first[0]]]
        outside = outside[np.argsort(density[outside], kind="stable")]
        held = -(-rows["computed_tokens"][outside] // block_size)
        enough = int(np.searchsorted(np.cumsum(held), lacking)) + 1
        return np.asarray(outside[:enough] if 0 < lacking <= held.sum() else outside[:0])

    def _fill(self, view: EngineView, group: SlotArray, victims: SlotArray, batch: int) -> StepPlan:
        """Decodes of the group, then its prompts by density; what others hold or still need is not theirs to take."""
        rows = view.table.rows
        active = view.running[among(rows, view.running, group)]
        held = view.running[~among(rows, view.running, np.concatenate((group, victims)))]
        freed = int((-(-rows["computed_tokens"][victims] // view.block_size)).sum())
        room = room_of(view, self._token_budget, WATERMARK)
        room = room._replace(
            seqs=min(room.seqs - len(held), batch), blocks=room.blocks + freed - _owed_blocks(view, held)
        )
        out = room_for(view)
        count = decodes_then(rows, active, group, room, self._draft_tokens, out)
        return batch_plan(out, count, Reason.PREFILL_DEADLINE)


def _size(rows: RequestArray, slots: SlotArray) -> IntArray:
    """Tokens of prompt and answer so far."""
    return np.asarray(rows["prompt_tokens"][slots] + rows["output_tokens"][slots])


def _owed_blocks(view: EngineView, slots: SlotArray) -> int:
    """Blocks that running prompts still need."""
    rows = view.table.rows
    under_way = slots[tokens_left_of(rows, slots) > 1]
    whole = -(-_size(rows, under_way) // view.block_size)
    return int((whole - (-(-rows["computed_tokens"][under_way] // view.block_size))).sum())


def _ratio(allowed_s: FloatArray, predicted_s: FloatArray) -> FloatArray:
    """Allowed over predicted time, at most 1."""
    return np.asarray(np.clip(allowed_s / np.maximum(predicted_s, 1e-9), 1e-6, 1.0))
