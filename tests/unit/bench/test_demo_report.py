"""The demo's result from synthetic sides: shape, counts, claims, table and chart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from slos_serve.bench.demo_events import SchedulerEvents, read_events
from slos_serve.bench.demo_plan import DemoPlan
from slos_serve.bench.demo_report import OURS, PHASES, STOCK, SideRun, claims, demo_json, demo_table, side_run
from slos_serve.bench.plots import due_line, plot_demo, stream_shown
from slos_serve.metrics.attainment import StageTarget
from tests.unit.bench.builders import MODEL, demo_side, load_of, response_of, small_plan

FIELDS = {
    "requests", "attained", "attained_by_class", "admitted", "admitted_attained", "best_effort", "ttft_ms", "tpot_ms",
    "planner_ms",
}  # fmt: skip


def sides_of(plan: DemoPlan, ours_slow_from: int = 12, stock_slow_from: int = 4) -> dict[str, SideRun]:
    """Stock misses from its 5th burst request on; ours from its 13th on, all of them best effort."""
    verdicts = {request.request_id: "admitted" for request in (*plan.calm, *plan.burst[:ours_slow_from])}
    verdicts |= {request.request_id: "best-effort" for request in plan.burst[ours_slow_from:]}
    events = SchedulerEvents(verdicts, plan_ms={"burst": [0.1, 0.2, 0.3]}, added_ms={"burst": [0.4]})
    return {
        STOCK: demo_side(plan, slow_from=stock_slow_from),
        OURS: demo_side(plan, slow_from=ours_slow_from, events=events),
    }


def test_json_has_the_promised_shape() -> None:
    plan = small_plan()
    result = json.loads(json.dumps(demo_json(sides_of(plan), {"seed": 0}), allow_nan=False))
    assert set(result) == {STOCK, OURS, "ratio", "calm_ttft_ratio", "setup"}
    for side in (STOCK, OURS):
        for phase in PHASES:
            found = result[side][phase]
            assert set(found) >= FIELDS
            assert set(found["planner_ms"]) == set(found["ttft_ms"]) == {"p50", "p99"}
            assert found["admitted"] + found["best_effort"] == found["requests"]
            assert sum(found["attained_by_class"].values()) == found["attained"]
    assert result[OURS]["burst"]["planner_ms"]["p50"] == pytest.approx(0.2)
    assert result[STOCK]["burst"]["planner_ms"] == {"p50": None, "p99": None}


def test_counts_follow_the_verdicts() -> None:
    plan = small_plan()
    result = demo_json(sides_of(plan), {})
    promised = [request for request in plan.burst if request.slo_class is not None]
    early = [request for request in plan.burst[:12] if request.slo_class is not None]
    ours, stock = result[OURS]["burst"], result[STOCK]["burst"]
    assert (ours["requests"], ours["admitted"], ours["attained"]) == (len(promised), len(early), len(early))
    assert ours["best_effort"] == ours["best_effort_completed"] == len(promised) - len(early)
    assert stock["admitted"] == stock["requests"] and stock["best_effort"] == 0
    assert result["ratio"] == pytest.approx(ours["attained"] / stock["attained"])
    assert ours["no_slo"]["requests"] == len(plan.burst) - len(promised)


def test_claims_hold_only_when_they_hold() -> None:
    plan = small_plan()
    assert all(held for _, held in claims(demo_json(sides_of(plan), {})))
    even = claims(demo_json(sides_of(plan, ours_slow_from=4), {}))
    assert [held for _, held in even] == [False, True, True, True, True, True, True]


def test_the_calm_phase_is_judged_by_the_median_and_shows_its_interval() -> None:
    result = demo_json(sides_of(small_plan()), {})
    found = []
    for median, interval in ((1.2, [1.09, 1.4]), (1.2, [1.11, 1.4]), (1.09, None), (1.11, None), (None, None)):
        result["calm_ttft_ratio"] = {"pairs": 25, "median": median, "interval": interval}
        found.append(claims(result)[-1])
    assert [held for _, held in found] == [False, False, True, False, False]
    assert "TTFT 1.20 times (median over the same requests, 95 % interval 1.09 to 1.40)" in found[0][0]


def test_throughput_of_the_burst_and_every_token_are_claims() -> None:
    plan = small_plan()
    result = demo_json(sides_of(plan), {})
    result[OURS]["burst"]["throughput"]["output_tokens_per_s"] *= 0.5
    result[OURS]["burst"]["admitted_strict"] = 0
    assert [held for _, held in claims(result)] == [True, True, False, False, True, True, True]


def test_verdicts_that_were_told_are_held_against_what_the_engine_did() -> None:
    plan = small_plan()
    sides = sides_of(plan)
    promised = [one for one in sides[OURS].loads["burst"].responses if one.request.slo_class is not None]
    free = [one for one in sides[OURS].loads["burst"].responses if one.request.slo_class is None]
    for response in (*promised, *free):  # what the engine did, but for two that were told the contrary
        response.verdict = sides[OURS].events.verdicts[response.request.request_id]  # type: ignore[union-attr]
    for response in promised[:2]:
        response.verdict = "best-effort"
    promised[-1].verdict = None  # nothing was said
    result = demo_json(sides, {})
    assert result[STOCK]["burst"]["verdicts"] == {}
    found = result[OURS]["burst"]["verdicts"]
    late = [one for one in promised if sides[OURS].events.verdicts[one.request.request_id] != "admitted"]  # type: ignore[union-attr]
    assert found["best-effort"] == {"admitted": 2, "best-effort": len(late) - 1}
    assert found["admitted"] == {"admitted": len(promised) - len(late) - 2}
    with (console := Console(width=180)).capture() as captured:
        console.print(demo_table(result))
    assert f"{len(promised) - 3}/{len(promised) - 1} true, 2 got more" in captured.get()


def test_weaker_promises_are_counted_apart_and_claimed() -> None:
    plan = small_plan()
    sides = sides_of(plan)
    events = sides[OURS].events
    assert events is not None
    late = [one.request_id for one in plan.burst[12:] if one.slo_class is not None]
    for request_id in late[:-1]:
        events.verdicts[request_id], events.kept[request_id] = "second-best", True
    events.kept[late[0]] = False
    result = demo_json(sides, {})
    burst = result[OURS]["burst"]
    assert burst["second_best"] == {"given": len(late) - 1, "kept": len(late) - 2}
    assert burst["best_effort"] == 1 and burst["admitted"] + len(late) == burst["requests"]
    assert result[STOCK]["burst"]["second_best"] == {"given": 0, "kept": 0}
    (some, many_have), (kept, are_kept) = claims(result)[:2]
    given = burst["requests"] - 1
    assert f"{given / burst['requests']:.1%} of the requests get some" in some and many_have
    assert f"of the {given} promises given" in kept and are_kept is ((given - 1) / given >= 0.95)
    with (console := Console(width=180)).capture() as captured:
        console.print(demo_table(result))
    assert f"{len(late) - 2}/{len(late) - 1} kept" in captured.get()
    assert len(claims(result)) == len(claims(demo_json(sides_of(plan), {}))) + 2


def test_calm_first_tokens_are_compared_request_by_request() -> None:
    plan = small_plan()
    stock = demo_side(plan, slow_from=4)
    slower = [response_of(request, ttft_s=0.1 if index % 2 else 0.15) for index, request in enumerate(plan.calm)]
    loads = {"calm": load_of(slower), "burst": stock.loads["burst"]}
    ours = side_run(loads, plan, MODEL, None)
    found = demo_json({STOCK: stock, OURS: ours}, {})["calm_ttft_ratio"]
    promised = [index for index, request in enumerate(plan.calm) if request.slo_class is not None]
    expected = np.median([1.0 if index % 2 else 1.5 for index in promised])
    assert found["pairs"] == len(promised) and found["median"] == pytest.approx(expected)
    assert found["interval"] == pytest.approx([1.0, 1.5])


def test_stock_that_attains_nothing_counts_as_one() -> None:
    result = demo_json(sides_of(small_plan(), stock_slow_from=0), {})
    assert result["stock"]["burst"]["attained"] == 0
    assert result["ratio"] == result["slos_serve"]["burst"]["attained"] > 0
    assert claims(result)[0][1]


def test_table_names_both_sides() -> None:
    with (console := Console(width=180)).capture() as captured:
        console.print(demo_table(demo_json(sides_of(small_plan()), {})))
    text = captured.get()
    assert "stock vLLM" in text and "with slos-serve" in text and "all with an SLO" in text


def test_chart_is_written(tmp_path: Path) -> None:
    plan = small_plan()
    sides = sides_of(plan)
    path = tmp_path / "demo.png"
    setup = {"model": "m", "device": "a CPU", "engine_version": "1", "seed": 0, "calm_load": 0.5, "burst_load": 2.0}
    plot_demo(demo_json(sides, setup), sides, plan, MODEL, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_shown_stream_is_one_of_the_second_half() -> None:
    plan = small_plan()
    shown = stream_shown(sides_of(plan), "chat")
    chosen = next(request for request in plan.burst if request.request_id == shown)
    assert chosen.slo_class == "chat" and chosen.arrival_s >= plan.burst[-1].arrival_s / 2.0


def test_due_line_starts_at_the_ttft() -> None:
    assert due_line(StageTarget(1.0, 0.5), 3) == ([1.0, 1.5, 2.0], [1, 2, 3])


def test_events_are_told_apart_by_phase(tmp_path: Path) -> None:
    step = {"kind": "step", "plan_ms": 1.0, "added_ms": 2.0, "fallback": None}
    done = {"kind": "request", "request_id": "chatcmpl-burst-00007-ab12", "verdict": "admitted", "num_preemptions": 1}
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps(step) + "\n", encoding="utf-8")
    warm = path.stat().st_size
    with path.open("a", encoding="utf-8") as file:
        for event in (step | {"plan_ms": 3.0, "fallback": "overrun"}, done, {"kind": "step_done"}):
            file.write(json.dumps(event) + "\n")
    events = read_events(path, [("warm", warm), ("burst", path.stat().st_size)])
    assert events.plan_ms == {"warm": [1.0], "burst": [3.0]}
    assert events.fallbacks == {"burst": 1}
    assert events.verdicts == {"burst-00007": "admitted"}
    assert events.preemptions == {"burst-00007": 1}
    assert read_events(tmp_path / "none.jsonl", []).verdicts == {}
