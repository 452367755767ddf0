"""What an engine of the simulator can hold, and how it behaves beyond that."""

from __future__ import annotations

from dataclasses import dataclass, field

from slos_serve.sim.model_error import ModelError


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine can hold.

    Attributes:
        kv_capacity_tokens: KV cache size in tokens.
        block_size: tokens a block.
        max_num_seqs: most running requests.
        max_num_batched_tokens: most tokens in a step.
        prefix_cache: keep KV that nobody uses for prompts that begin alike.
    """

    kv_capacity_tokens: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 16384
    prefix_cache: bool = True

    @property
    def total_blocks(self) -> int:
        """Whole blocks in the KV cache."""
        return self.kv_capacity_tokens // self.block_size


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """How a replica behaves beyond its limits.

    Attributes:
        oracle_lengths: give each answer's true length as the client's hint.
        error: injected batch-time error.
        seed: of the error and of draft acceptance.
        plan_ahead: the next step is planned while one executes, as vLLM's async scheduling does: a request that arrives
            during a step is seen one step later.
        scheduling_s: added to every step.
        is_apart: calls may come in parts: one replica computes the prompt, another the answer.
    """

    oracle_lengths: bool = False
    error: ModelError = field(default_factory=ModelError)
    seed: int = 0
    plan_ahead: bool = False
    scheduling_s: float = 0.0
    is_apart: bool = False
