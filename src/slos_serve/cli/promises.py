"""What a class promises, as cells of the tables that ``serve`` and ``classes check`` print."""

from __future__ import annotations

from slos_serve.core.slo import SLO, SLOClass
from slos_serve.core.tasks import TaskClass


def shown_ms(value: float | None) -> str:
    """A number of milliseconds, or that nothing is promised."""
    return "no promise" if value is None else f"{value:g} ms"


def shown_first_token(slo: SLO) -> str:
    """The promise of the first token."""
    if slo.ttft_ms is None and slo.ttft_slowdown is not None:
        return f"{slo.ttft_slowdown:g} x the prompt alone, at least {slo.ttft_floor_ms:g} ms"
    return shown_ms(slo.ttft_ms)


def shown_per_token(slo_class: SLOClass) -> str:
    """The time per output token of each stage."""
    return ", then ".join(shown_ms(stage.slo.tpot_ms) for stage in slo_class.stages)


def shown_whole(slo_class: SLOClass) -> str:
    """What is promised of the complete answer and of the whole task, and how many weaker promises follow."""
    told = [f"answer {slo_class.slo.e2e_ms:g} ms"] if slo_class.slo.e2e_ms is not None else []
    if isinstance(slo_class, TaskClass):
        told.append(f"task {slo_class.task.task_ms:g} ms")
    if slo_class.otherwise:
        told.append(f"{len(slo_class.otherwise)} weaker")
    return ", ".join(told) or "-"
