"""Tables and JSON of a benchmark run."""

from __future__ import annotations

import json
from dataclasses import replace

from rich.console import Console

from slos_serve.bench.report import class_json, class_table, client_json, error_counts, throughput_json, warnings_of
from slos_serve.bench.requests import BenchRequest, Response
from slos_serve.bench.scoring import score_responses
from slos_serve.core.slo import SLO, ClassSet, single_stage
from slos_serve.metrics.summary import Outcome, summarize
from tests.unit.bench.builders import load_of, response_of

CLASSES = ClassSet({"chat": single_stage("chat", SLO(ttft_ms=500.0, tpot_ms=50.0))})


def run_of(lag_s: float = 0.0) -> list[Response]:
    requests = [BenchRequest(f"r-{index}", float(index), "hi", 9, "chat") for index in range(4)]
    requests.append(BenchRequest("r-4", 4.0, "hi", 9))
    responses = [response_of(request) for request in requests]
    responses[1] = response_of(requests[1], outcome=Outcome.REJECTED)
    return [replace(response, sent_s=response.sent_s + lag_s) for response in responses]


def test_table_shows_each_class_and_the_total() -> None:
    rows = summarize(score_responses(run_of(), CLASSES, None))
    with (console := Console(width=160)).capture() as captured:
        console.print(class_table(rows, "a run"))
    text = captured.get()
    assert "3 (75.0%)" in text and "none (no SLO)" in text and "total" in text


def test_json_is_plain_json() -> None:
    rows = summarize(score_responses(run_of(), CLASSES, None))
    read = json.loads(json.dumps([class_json(row) for row in rows], allow_nan=False))
    assert read[0]["attained"] == 3 and read[0]["attained_rate"] == 0.75
    assert json.loads(json.dumps(class_json(summarize([])[0]), allow_nan=False))["attained_rate"] is None


def test_lateness_of_the_client_is_told() -> None:
    assert not client_json(load_of(run_of()))["late"]
    assert warnings_of(load_of(run_of()), sent_slo=True) == []
    (warning,) = warnings_of(load_of(run_of(lag_s=0.2)), sent_slo=True)
    assert "200 ms" in warning


def test_a_server_that_ignores_the_slo_is_told() -> None:
    deaf = [replace(response, class_applied=None) for response in run_of()]
    assert any("confirmed no SLO class" in text for text in warnings_of(load_of(deaf), sent_slo=True))
    assert warnings_of(load_of(deaf), sent_slo=False) == []


def test_a_server_without_usage_is_told() -> None:
    blind = [replace(response, prompt_tokens=0) for response in run_of()]
    assert any("no usage" in text for text in warnings_of(load_of(blind), sent_slo=True))


def test_throughput_and_errors() -> None:
    load = load_of(run_of())
    load.wall_s = 10.0
    assert throughput_json(load)["output_tokens_per_s"] == 5.0
    assert error_counts(load.responses) == {"too busy": 1}
