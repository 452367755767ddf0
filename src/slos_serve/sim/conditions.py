"""How a simulated engine differs from its batch-time model: the default of every table, and the exact engine.

``AS_SERVED`` is nearer to a server than the model alone. Step times vary from step to step and in spells, the next step
is planned while one executes, and scheduling takes time in every step. The same holds for every policy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slos_serve.core.slo import check_number
from slos_serve.sim.engine import SimSettings


@dataclass(frozen=True, slots=True)
class Conditions:
    """What stands between the batch-time model and a step.

    Attributes:
        noise: coefficient of variation of each step's time.
        bias: every step takes this multiple of what the model says.
        spell_every_s, spell_s, spell_factor: now and then, on average that often and that long, steps take this
            multiple; 0 for never.
        plan_ahead: the next step is planned while one executes, as vLLM's asynchronous scheduling does.
        scheduling_s: added to every step.
    """

    noise: float = 0.0
    bias: float = 1.0
    spell_every_s: float = 0.0
    spell_s: float = 0.0
    spell_factor: float = 1.0
    plan_ahead: bool = False
    scheduling_s: float = 0.0

    def __post_init__(self) -> None:
        check_number("scheduling_s", self.scheduling_s, low=0.0, high=10.0, low_included=True)

    def on(self, settings: SimSettings) -> SimSettings:
        """The same simulation under these conditions."""
        error = replace(
            settings.error,
            bias=self.bias,
            noise=self.noise,
            spell_every_s=self.spell_every_s,
            spell_s=self.spell_s,
            spell_factor=self.spell_factor,
        )
        return replace(settings, error=error, plan_ahead=self.plan_ahead, scheduling_s=self.scheduling_s)


EXACT = Conditions()
# 2 ms of scheduling: stock vLLM's own schedule() with 256 requests running takes 2.1 ms (docs/benchmarks.md). The noise
# is that of batches of equal shape on a GPU; how often and how much an engine is slow for a while is an assumption.
AS_SERVED = Conditions(
    noise=0.1, spell_every_s=120.0, spell_s=3.0, spell_factor=1.3, plan_ahead=True, scheduling_s=0.002
)
