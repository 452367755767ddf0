"""The words for what becomes of a request: one vocabulary for answers, metrics, events, `bench` and routers.

A verdict says what the request was given, a reason says why. Both are tokens that never change with the language of a
message; :data:`SENTENCES` has the text for people.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Verdict(StrEnum):
    """What a request is given."""

    ADMITTED = "admitted"
    """The promises of its class."""
    SECOND_BEST = "second-best"
    """A weaker promise that its class names."""
    BEST_EFFORT = "best-effort"
    """No promise: it runs in what is left over."""
    REJECTED = "rejected"
    """Refused; the answer says when to ask again."""
    NO_SLO = "no-slo"
    """It asked for no promise."""


class Why(StrEnum):
    """Reason of a verdict."""

    FITS = "fits"
    FITS_INSTEAD = "fits_instead"
    FITS_AT_PREFIX = "fits_at_prefix"
    FITS_ELSEWHERE = "fits_elsewhere"
    NO_SLO = "no_slo"
    TTFT_TOO_LATE = "ttft_too_late"
    DECODE_RATE = "decode_rate"
    KV_FULL = "kv_full"
    SEQS_FULL = "seqs_full"
    PASSED_OVER = "passed_over"
    SESSION_MISSED = "session_missed"
    NO_STATE = "no_state"
    ALL_FULL = "all_full"
    NO_REPLICA = "no_replica"
    OUT_OF_REACH = "out_of_reach"


SENTENCES: Mapping[Why, str] = {
    Why.FITS: "Its promises can be kept beside all that is promised.",
    Why.FITS_INSTEAD: "Its promises can be kept in the place of a request that has not begun.",
    Why.FITS_AT_PREFIX: "Its promises can be kept where its prefix is cached.",
    Why.FITS_ELSEWHERE: "Its promises can be kept by a replica of another router.",
    Why.NO_SLO: "It asked for no promise.",
    Why.TTFT_TOO_LATE: "Its prompt cannot be computed before its first token is due.",
    Why.DECODE_RATE: "Its tokens, or those of requests that run, would come too slowly.",
    Why.KV_FULL: "The KV cache has no room for it beside what is promised.",
    Why.SEQS_FULL: "The engine runs at most max_num_seqs requests at once, and all of these places are promised.",
    Why.PASSED_OVER: "Requests that cost less, or weigh more, were promised the time it needs.",
    Why.SESSION_MISSED: "A promise of its session is broken already.",
    Why.NO_STATE: "No engine has published its state lately.",
    Why.ALL_FULL: "No replica can keep its promises beside all that is promised.",
    Why.NO_REPLICA: "There is no replica.",
    Why.OUT_OF_REACH: "The replica decided on could not be reached, so another one serves it.",
}
# Verdicts that an engine's scheduler gives; it refuses nobody.
ENGINE_VERDICTS = (Verdict.ADMITTED, Verdict.SECOND_BEST, Verdict.BEST_EFFORT, Verdict.NO_SLO)
