"""The planner's knobs, each with the reason it exists."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slos_serve.core.request import MAX_DRAFT_TOKENS
from slos_serve.core.slo import check_number

# (share of admitted requests that attain, residual quantile planned at), as ``python -m benchmarks risk`` measures it.
QUANTILE_OF_LEVEL = ((0.5, 0.5), (0.97, 0.5), (0.98, 0.95), (0.99, 0.99), (0.999, 0.999))


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    """How cautious the planner is, and which of its ideas are on (switches exist for ablation).

    Attributes:
        tpot_margin: share of every TPOT target kept in hand against step-time noise.
        ttft_margin_s: seconds of every TTFT promise kept for what happens outside the engine (HTTP, tokenising).
        attain_level: share of the admitted requests that are to attain. Batches are planned at the quantile of measured
            over predicted step times that keeps it (docs/scheduling.md has the curve).
        residual_quantile: plan at this quantile whatever ``attain_level`` says; 0 to go by the level.
        step_margin: least share by which batches are planned slower than the corrected model says.
        length_quantile: quantile of the remaining output length that memory is reserved for.
        max_implied_ttft_s: deadline used to order a request that has a TPOT promise but no TTFT promise.
        length_weight: power of the prompt's length that a class's weight is multiplied with: 0 counts requests, 1
            counts prompt tokens, so that long requests are not the first to be passed over.
        open_prompts: where requests are declined, prompts promised and not yet computed are bounded together to this
            many mean ones (times the weight of the one that asks, if above 1), so that a few long ones do not take the
            time of many that come next; 0 for no bound.
        max_labels: work limit of the admission DP before its greedy answer stands in.
        min_chunk_tokens: no prefill chunk is smaller, unless it is the last one of its prompt.
        aging_s: longest time the oldest request without a promise goes without progress; 0 for no such rule.
        skip_admission: False asks admission even where its answer could not change the step (tests).
        dp_admission: False admits in arrival order whatever fits (ablation).
        dynamic_batch: False uses a fixed token budget of ``fixed_budget`` (ablation).
        fixed_budget: token budget of a step without dynamic batch size.
        hold_decodes: False runs every decode in every step (ablation).
        forecast_memory: False reserves the sum of forecast peaks rather than a forecast over time (ablation).
        count_freed: False lets admission count on a token every TPOT from every decode, however far ahead (ablation).
        best_effort: False leaves unattainable requests in the queue's front, as a stock engine would (ablation).
        oracle_lengths: ``expected_tokens`` of the table is the truth; do not forecast (simulator only).
        max_draft_tokens: longest draft that may be planned, 0 to 10; 0 (no drafter in the engine) is no speculation.
        adaptive_drafts: False drafts ``max_draft_tokens`` for every decode in every step (ablation).
        longest_step_s: with drafts, batches beside decodes may last as long as the tokens of a verification, up to
            this: a prompt that comes in the middle of a batch waits for its end.
        acceptance_confidence: standard deviations by which planning stays below the mean of observed acceptance.
        known_acceptance: acceptance of a draft token, taken as known instead of learnt (simulator only).
    """

    tpot_margin: float = 0.05
    ttft_margin_s: float = 0.0
    attain_level: float = 0.99
    residual_quantile: float = 0.0
    step_margin: float = 0.05
    length_quantile: float = 0.7
    max_implied_ttft_s: float = 30.0
    length_weight: float = 0.0
    open_prompts: float = 3.5
    max_labels: int = 20_000
    min_chunk_tokens: int = 16
    aging_s: float = 10.0
    skip_admission: bool = True
    dp_admission: bool = True
    dynamic_batch: bool = True
    fixed_budget: int = 512
    hold_decodes: bool = True
    forecast_memory: bool = True
    count_freed: bool = True
    best_effort: bool = True
    oracle_lengths: bool = False
    max_draft_tokens: int = 0
    adaptive_drafts: bool = True
    longest_step_s: float = 0.14
    acceptance_confidence: float = 1.0
    known_acceptance: float | None = None

    def __post_init__(self) -> None:
        check_number("tpot_margin", self.tpot_margin, low=0.0, high=0.9, low_included=True)
        check_number("ttft_margin_s", self.ttft_margin_s, low=0.0, high=60.0, low_included=True)
        check_number("attain_level", self.attain_level, low=0.5, high=0.9999, low_included=True)
        check_number("residual_quantile", self.residual_quantile, low=0.0, high=0.9999, low_included=True)
        check_number("step_margin", self.step_margin, low=0.0, high=1.0, low_included=True)
        check_number("length_quantile", self.length_quantile, low=0.0, high=0.999)
        check_number("length_weight", self.length_weight, low=0.0, high=2.0, low_included=True)
        check_number("open_prompts", self.open_prompts, low=0.0, high=1e6, low_included=True)
        check_number("aging_s", self.aging_s, low=0.0, high=86_400.0, low_included=True)
        check_number("max_implied_ttft_s", self.max_implied_ttft_s, low=0.0, high=3600.0)
        check_number("max_draft_tokens", self.max_draft_tokens, low=0, high=MAX_DRAFT_TOKENS, low_included=True)
        check_number("longest_step_s", self.longest_step_s, low=0.0, high=60.0, low_included=True)
        check_number("acceptance_confidence", self.acceptance_confidence, low=0.0, high=10.0, low_included=True)
        if self.known_acceptance is not None:
            check_number("known_acceptance", self.known_acceptance, low=0.0, high=0.99, low_included=True)

    @property
    def planned_quantile(self) -> float:
        """Quantile of measured over predicted step times to plan batches at."""
        if self.residual_quantile > 0.0:
            return self.residual_quantile
        levels, quantiles = zip(*QUANTILE_OF_LEVEL, strict=True)
        return float(np.interp(self.attain_level, levels, quantiles))
