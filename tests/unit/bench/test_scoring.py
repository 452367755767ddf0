"""Scoring a run against its classes, and refusing beforehand what cannot be scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slos_serve.bench.record import RECORD_FORMAT, write_record
from slos_serve.bench.requests import BenchRequest, LoadResult
from slos_serve.bench.scoring import check_scorable, score_response, score_responses, targets_for
from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, ClassSet, single_stage
from slos_serve.metrics.summary import Outcome
from tests.unit.bench.builders import MODEL, response_of

CLASSES = ClassSet(
    {
        "absolute": single_stage("absolute", SLO(ttft_ms=500.0, tpot_ms=50.0)),
        "slowdown": single_stage("slowdown", SLO(ttft_slowdown=3.0, ttft_floor_ms=100.0)),
        "free": single_stage("free", SLO()),
    }
)


def request_of(slo_class: str | None, ttft_ms: float | None = None) -> BenchRequest:
    return BenchRequest("r-1", 5.0, "hello", 10, slo_class, ttft_ms=ttft_ms)


def test_slowdown_scales_with_the_counted_prompt() -> None:
    zero_load_s = MODEL.zero_load_s(100)
    on_time = response_of(request_of("slowdown"), ttft_s=3.0 * zero_load_s)
    late = response_of(request_of("slowdown"), ttft_s=3.1 * zero_load_s)
    assert [scored.attained for scored in score_responses([on_time, late], CLASSES, MODEL)] == [True, False]


def test_own_number_counts_over_the_class() -> None:
    response = response_of(request_of("absolute", ttft_ms=50.0), ttft_s=0.1)
    assert not score_response(response, CLASSES, None).attained


@pytest.mark.parametrize("slo_class", [None, "free", "none"])
def test_nothing_promised_is_told_apart(slo_class: str | None) -> None:
    scored = score_response(response_of(request_of(slo_class), ttft_s=99.0), CLASSES, MODEL)
    assert not scored.has_slo and scored.attained
    assert scored.slo_class == (slo_class or "none")


def test_rejected_request_is_a_miss() -> None:
    scored = score_response(response_of(request_of("absolute"), outcome=Outcome.REJECTED), CLASSES, None)
    assert scored.has_slo and not scored.attained


def test_slowdown_without_a_model_is_refused_before_sending() -> None:
    check_scorable([request_of("absolute"), request_of("slowdown", ttft_ms=100.0)], CLASSES, None)
    with pytest.raises(InvalidFieldError, match="--profile"):
        check_scorable([request_of("slowdown")], CLASSES, None)
    check_scorable([request_of("slowdown")], CLASSES, MODEL)


def test_unknown_class_is_refused_before_sending() -> None:
    with pytest.raises(InvalidFieldError, match="absolute"):
        check_scorable([request_of("fastest")], CLASSES, MODEL)


def test_slowdown_needs_the_servers_count() -> None:
    with pytest.raises(InvalidFieldError, match="slowdown"):
        score_response(response_of(request_of("slowdown"), prompt_tokens=0), CLASSES, MODEL)


def test_record_holds_what_a_replay_needs(tmp_path: Path) -> None:
    responses = [response_of(request_of("absolute"), tokens=3), response_of(request_of(None), tokens=0)]
    scored = score_responses(responses, CLASSES, MODEL)
    targets = [targets_for(response, CLASSES, MODEL) for response in responses]
    path = tmp_path / "record.jsonl"
    load = LoadResult(responses, 8.0, 0.0, stolen=[(0.0, 0.0), (2.0, 0.5)])
    write_record(path, {"seed": 1}, load, scored, targets, {"r-1": "admitted"})
    run, stolen, first, second = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert (run["kind"], run["format"], run["seed"]) == ("run", RECORD_FORMAT, 1)
    assert stolen == {"kind": "stolen", "t_s": [0.0, 2.0], "seconds": [0.0, 0.5]}
    assert (first["arrival_s"], first["prompt_tokens"], first["output_tokens"]) == (5.0, 100, 3)
    assert (first["slo_class"], first["ttft_ms"], first["tpot_ms"]) == ("absolute", 500.0, [50.0])
    assert first["token_times_s"] == pytest.approx([5.1, 5.11, 5.12])
    assert first["first_token_s"] == pytest.approx(5.1)
    assert (first["verdict"], first["attained"]) == ("admitted", True)
    assert (second["ttft_ms"], second["tpot_ms"], second["first_token_s"]) == (None, [None], None)
