"""What clients are told."""

from __future__ import annotations

import math

from slos_serve.core.told import Told, tpot_between_s
from slos_serve.core.verdict import SENTENCES, Verdict, Why

TOLD = Told(
    "chat",
    Verdict.SECOND_BEST,
    Why.FITS,
    rank=1,
    target_ttft_s=1.2,
    target_tpot_s=0.1,
    predicted_ttft_s=0.3052,
)


def test_headers_hold_what_is_known_in_whole_milliseconds() -> None:
    assert TOLD.headers() == {
        "x-slo-verdict": "second-best",
        "x-slo-reason": "fits",
        "x-slo-reason-text": SENTENCES[Why.FITS],
        "x-slo-rank": "1",
        "x-slo-target-ttft-ms": "1200",
        "x-slo-target-tpot-ms": "100",
        "x-slo-predicted-ttft-ms": "305",
    }
    assert Told("chat", target_ttft_s=1.0).headers() == {}, "it was not judged"


def test_the_usage_holds_the_same_and_what_was_measured() -> None:
    found = TOLD.measured(0.291, 0.0413)
    assert found == {
        "class": "chat",
        "verdict": "second-best",
        "reason": "fits",
        "rank": 1,
        "ttft_ms": 291.0,
        "tpot_ms": 41.3,
        "target_ttft_ms": 1200.0,
        "target_tpot_ms": 100.0,
        "predicted_ttft_ms": 305.2,
    }
    assert Told().measured(0.5, math.inf) == {"class": None, "ttft_ms": 500.0}


def test_one_token_has_no_pace() -> None:
    assert tpot_between_s(1.0, 3.0, 5) == 0.5
    assert tpot_between_s(1.0, 3.0, 1) == tpot_between_s(None, 3.0, 5) == tpot_between_s(1.0, None, 5) == math.inf
