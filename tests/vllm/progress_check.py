"""Holds the planner's rows against vLLM's own counters, and what is taken to have run against vLLM's step."""

from __future__ import annotations

from typing import Any

import numpy as np

from slos_serve.core.request import SlotArray
from slos_serve.vllm_plugin import compat_counters


def check_rows(scheduler: Any) -> None:
    """Let every look at the running requests fail when a row says other than vLLM's request, and every commit when
    other requests are taken to have run than did, or in another order; stock has neither."""
    control = getattr(scheduler, "_slo", None)
    if control is None:
        return
    book, sync, ran = control.book, control.book.sync_running, control._ran

    def checked(scheduler: Any, pending_first_s: float) -> SlotArray:
        slots: SlotArray = sync(scheduler, pending_first_s)
        requests, rows = book.progress.requests_of(slots), book.table.rows
        assert [one.request_id for one in requests] == [one.request_id for one in scheduler.running]
        assert (rows["running"][slots] == 1).all()
        if not scheduler.num_spec_tokens:  # drafts in flight are counted otherwise
            counted = computed, outputs, in_flight = compat_counters.counters(requests)
            blocked = compat_counters.cannot_run_now(scheduler, requests, counted, compat_counters.ends_of(requests))
            np.testing.assert_array_equal(rows["computed_tokens"][slots], computed)
            np.testing.assert_array_equal(rows["output_tokens"][slots], outputs + in_flight)
            np.testing.assert_array_equal(rows["blocked"][slots], blocked)
        return slots

    def checked_ran(output: Any, proposal: Any) -> SlotArray:
        slots: SlotArray = ran(output, proposal)
        np.testing.assert_array_equal(slots, book.slots_of(output.num_scheduled_tokens))
        return slots

    book.sync_running, control._ran = checked, checked_ran
