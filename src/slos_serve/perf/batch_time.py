"""How long a batch takes, and how many tokens fit in a given time.

    T(batch) = max(k_c * n + b_c, k_m * n + b_m) + k_ctx * ctx + k_q * quad + k_seq * (seqs + drafts) + k_s * s

with ``n`` new tokens, ``ctx`` KV-cache tokens read, ``quad`` the sum over prefill chunks of chunk * (chunk + 2 * done),
``seqs`` requests in the batch, ``drafts`` tokens to verify and ``s`` sequential draft steps. The two branches are the
compute-bound and the memory-bound side of a roofline. ``k_seq`` is the part that each request costs however few tokens
it has (logits, sampling, attention on a CPU), and each draft as well, which is sampled like a token of its own; zero
where the measurements do not show it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slos_serve.core.errors import InvalidFieldError
from slos_serve.perf.formula import features_s


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a batch asks of the hardware.

    Attributes:
        new_tokens: prefill chunks, decode tokens and drafts to verify.
        context_tokens: KV tokens read: for each request of the batch, its tokens cached before this step.
        quad_tokens2: sum over prefill chunks of chunk * (chunk + 2 * done).
        num_seqs: requests in the batch.
        draft_steps: sequential steps of the draft model.
        draft_tokens: those of ``new_tokens`` that are drafts to verify.
    """

    new_tokens: int
    context_tokens: int = 0
    quad_tokens2: int = 0
    num_seqs: int = 1
    draft_steps: int = 0
    draft_tokens: int = 0

    @property
    def features(self) -> NDArray[np.float64]:
        """float64 [5]: new tokens, context, attention units, sampled tokens (requests and drafts), draft steps."""
        sampled = self.num_seqs + self.draft_tokens
        return np.array(
            (self.new_tokens, self.context_tokens, self.quad_tokens2, sampled, self.draft_steps), dtype=np.float64
        )


@dataclass(frozen=True, slots=True)
class BatchTimeModel:
    """Coefficients in seconds; all >= 0, at least one slope > 0.

    Attributes:
        k_c_s, b_c_s: compute-bound branch, per token and constant.
        k_m_s, b_m_s: memory-bound branch, per token and constant.
        k_ctx_s: per cached token read.
        k_q_s: per unit of ``quad``.
        k_seq_s: per request in the batch and per draft to verify.
        k_s_s: per sequential draft step.
    """

    k_c_s: float
    b_c_s: float
    k_m_s: float
    b_m_s: float
    k_ctx_s: float = 0.0
    k_q_s: float = 0.0
    k_seq_s: float = 0.0
    k_s_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in zip(self.__slots__, self.coefficients, strict=True):
            if not np.isfinite(value) or value < 0.0:
                raise InvalidFieldError(f"batch_time.{name}", float(value), "a finite number of seconds, 0 or more")
        if max(self.k_c_s, self.k_m_s) <= 0.0:
            raise InvalidFieldError("batch_time.k_c_s", self.k_c_s, "a slope above 0 in at least one branch")

    @property
    def coefficients(self) -> NDArray[np.float64]:
        """float64 [8], in the order of ``K_C .. K_S``; what kernels take."""
        return np.array([getattr(self, name) for name in self.__slots__], dtype=np.float64)

    def step_s(self, shape: BatchShape) -> float:
        """Seconds the batch takes; 0 for an empty one."""
        if shape.new_tokens <= 0:
            return 0.0
        # Plain numbers: this is asked three times a step, and small arrays take ten times as long.
        sampled = shape.num_seqs + shape.draft_tokens
        own = (self.k_c_s, self.b_c_s, self.k_m_s, self.b_m_s, self.k_ctx_s, self.k_q_s, self.k_seq_s, self.k_s_s)
        units = shape.quad_tokens2
        return float(features_s(own, shape.new_tokens, shape.context_tokens, units, sampled, shape.draft_steps))

    def zero_load_s(self, prompt_tokens: int) -> float:
        """Seconds from start to first token of a prompt alone on the engine, in one batch."""
        return self.step_s(BatchShape(new_tokens=prompt_tokens, quad_tokens2=prompt_tokens * prompt_tokens))

    def scaled(self, factor: float) -> BatchTimeModel:
        """The same model with every coefficient multiplied (online correction, planning at a quantile)."""
        return BatchTimeModel(*(factor * self.coefficients).tolist())
