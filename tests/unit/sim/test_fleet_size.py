"""Sizing a fleet: traffic at any rate, the fewest servers, a fleet that scales by headroom, a day's use."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import SLO, ClassSet, single_stage
from slos_serve.files.mix_file import MixClass, MixFile
from slos_serve.sim import traffic as traffic_module
from slos_serve.sim.conditions import EXACT
from slos_serve.sim.engine import SimSettings, simulate
from slos_serve.sim.fleet_size import OURS, Asked, Size, day_use, servers_through, size_fleet
from slos_serve.sim.power import IDLE_SHARE, Power, power_of
from slos_serve.sim.profiles import find_profile, limits_of
from slos_serve.sim.recording import Recording
from slos_serve.sim.scaled_router import ScaledRouter, Scaling
from slos_serve.sim.sizing import Trial, Trials, mean_load_rps, offline_rps, trial_of
from slos_serve.sim.slo_router import SloRouting
from slos_serve.sim.tasks import SimTasks
from slos_serve.sim.traffic import LEAST_REQUESTS, Course, MixTraffic, TraceTraffic
from slos_serve.workload.scenarios import make_workload

PROFILE = find_profile("opt-13b-a100")
MIX = MixFile((MixClass("chat", 3.0, "chat"), MixClass("coding", 1.0, "coding")), peak_rps=6.0, day=(1.0, 2.0, 1.0))


def traffic(**given: object) -> MixTraffic:
    return MixTraffic(replace(MIX, **given), None, "mix")  # type: ignore[arg-type]  # fields by name


# --------------------------------------------------------------------------------------------------------- traffic


def test_a_mix_has_its_shares_and_the_same_requests_at_every_rate() -> None:
    slow, fast = traffic().at(2.0, 500.0), traffic().at(20.0, 100.0)
    assert slow.num_requests == LEAST_REQUESTS and fast.num_requests == 2000
    share = float((fast.calls["class_index"] == 0).mean())
    assert share == pytest.approx(0.75, abs=0.03)
    assert fast.calls["arrival_s"][-1] == pytest.approx(100.0, rel=0.05)
    with_own = MixClass("x", 1.0, None, 500.0, 200.0)
    classes = ClassSet({"x": single_stage("x", SLO(ttft_ms=1000.0))})
    drawn = MixTraffic(MixFile((with_own,)), classes, "mix", 5.0).at(5.0, 1000.0).calls
    assert drawn["prompt_tokens"].mean() == pytest.approx(500.0, rel=0.05)
    assert drawn["output_tokens"].mean() == pytest.approx(200.0, rel=0.05)


@pytest.mark.parametrize(
    ("mix", "named"),
    [
        (replace(MIX, peak_rps=None), "peak_rps"),
        (MixFile((MixClass("a", 1.0, "tool"),), 1.0), "like"),
        (MixFile((MixClass("a", 1.0, None, 5.0, 5.0),), 1.0), "class file"),
    ],
)
def test_a_mix_that_cannot_be_drawn_is_named(mix: MixFile, named: str) -> None:
    with pytest.raises(InvalidFieldError, match=named):
        MixTraffic(mix, None, "mix")
    with pytest.raises(InvalidFieldError, match="a class of the class file"):
        MixTraffic(MIX, ClassSet({}), "mix")


def write_trace(path: Path, hours: list[int]) -> Path:
    lines = ["Timestamp,Request tokens,Response tokens"]
    lines += [
        f"{3600 * hour + 3600 * i / count:.2f},{100 + hour},20"
        for hour, count in enumerate(hours)
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_long_trace_gives_the_course_and_its_busiest_hour(tmp_path: Path) -> None:
    found = TraceTraffic(write_trace(tmp_path / "day.csv", [30, 60, 120, 60, 60, 30, 30]), None, 10_000)
    assert found.course.hours == 6.0 and found.course.relative.max() == 1.0
    assert np.round(120 * found.course.relative).tolist() == [30, 60, 120, 60, 60, 30]
    assert found.peak_rps == pytest.approx(120 / 3600)
    at = found.at(2.0, 60.0)
    assert at.num_requests == 120, "the hour has no more"
    assert set(at.calls["prompt_tokens"].tolist()) == {102}
    assert at.calls["arrival_s"][-1] == pytest.approx(60.0, rel=0.05)


def test_a_trace_of_ages_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ages.csv"
    file.write_text("Timestamp,Request tokens,Response tokens\n0,2,3\n1e12,2,3\n")
    with pytest.raises(InvalidFieldError, match=r"ages\.csv:3: timestamp: got '1e\+12 s'.*ten years"):
        TraceTraffic(file, None, 10)


def test_a_short_trace_is_the_busiest_time_of_a_recorded_day(tmp_path: Path) -> None:
    found = TraceTraffic(write_trace(tmp_path / "hour.csv", [200]), None, 10_000, peak_rps=3.0)
    assert found.peak_rps == 3.0 and found.course.hours == 24.0 and len(found.course.relative) == 144
    assert found.at(3.0, 1.0).num_requests == 200


# ----------------------------------------------------------------------------------------------------------- search


class Known(Trials):
    """Trials whose answers are known."""

    def of(self, servers: int) -> Trial:
        if servers not in self.known:
            self.known[servers] = Trial(servers, 0.0, 0.0 if servers >= 7 else 1.0, 1.0)
        return self.known[servers]


@pytest.mark.parametrize("first", [1, 2, 6, 7, 8, 30, 64])
def test_the_search_finds_the_fewest_wherever_it_begins(first: int) -> None:
    trials = Known(traffic().at(1.0, 1.0), PROFILE, SimSettings())
    assert trials.fewest(0.01, 64, first) == 7
    assert len(trials.known) <= 12
    assert Known(traffic().at(1.0, 1.0), PROFILE, SimSettings()).fewest(0.01, 6, first) is None


def test_the_worst_class_decides_and_one_server_fewer_breaks_it() -> None:
    load = make_workload("mixed", 4.0, 400, arrivals="poisson")
    trials = Trials(load, PROFILE, SimSettings(policy="vllm", parameters={"token_budget": 8192}))
    found = trials.fewest(0.1, 16)
    assert found is not None and 2 <= found <= 10
    assert trials.of(found).worst <= 0.1 < trials.of(found - 1).worst
    assert all(trial.worst >= trial.violations and 0.0 < trial.busy <= 1.0 for trial in trials.known.values())


def test_rates_of_one_server() -> None:
    sample = traffic().at(6.0, 60.0)
    mean, offline = mean_load_rps(sample, PROFILE), offline_rps(sample, PROFILE, SimSettings(policy="vllm"))
    assert 1.0 < mean < 10.0 and 1.0 < offline < 10.0


# ---------------------------------------------------------------------------------------------------------- scaling


def run_scaled(rate: float, scaling: Scaling) -> tuple[float, Trial]:
    routers: list[ScaledRouter] = []

    def make(recording: Recording, routing: SloRouting, tasks: SimTasks) -> ScaledRouter:
        routers.append(ScaledRouter(recording, routing, tasks, scaling))
        return routers[-1]

    load = make_workload("chat", rate, round(rate * 120.0), arrivals="poisson")
    settings = SimSettings(replicas=8, router="slo")
    recording = simulate(load, PROFILE.model, limits_of(PROFILE), settings, make_slo_router=make)
    servers = routers[0].server_s / routers[0].counted_s
    return servers, trial_of(recording, servers, scaling.settle_s)


def test_a_fleet_grows_and_shrinks_to_its_target_while_it_settles() -> None:
    from_one, from_many = (run_scaled(7.0, Scaling(first, settle_s=60.0)) for first in (1, 8))
    assert 3.0 <= from_one[0] <= 9.0 and 3.0 <= from_many[0] <= 9.0
    assert from_one[1].worst < 0.02 and from_many[1].worst < 0.02


def test_after_it_settled_servers_come_late_and_go_later() -> None:
    """Nothing goes within ten minutes, so a fleet that begins too large stays so; one too small grows after 150 s."""
    large, _ = run_scaled(2.0, Scaling(8, settle_s=0.0))
    assert large >= 8.0
    small, trial = run_scaled(7.0, Scaling(1, settle_s=0.0, start_s=80.0))
    _, sooner = run_scaled(7.0, Scaling(1, settle_s=0.0, start_s=5.0))
    assert small > 1.0 and trial.violations > sooner.violations


def test_a_trace_shorter_than_the_time_to_settle_is_counted_all_the_same(tmp_path: Path) -> None:
    short = TraceTraffic(write_trace(tmp_path / "short.csv", [200]), None, 10_000, peak_rps=4.0)
    found = size_fleet(Asked(short, PROFILE, EXACT, violations=(0.05,)), [(OURS, None)], lambda *_: None)
    scaled = next(size.peak for size in found.sizes if size.by == f"{OURS}, by headroom")
    assert scaled.servers >= 1.0 and 0.0 <= scaled.violations <= 1.0


# -------------------------------------------------------------------------------------------------------------- day


def trial(servers: float, busy: float = 0.5) -> Trial:
    return Trial(servers, 0.0, 0.0, busy)


def test_server_hours_and_energy_of_a_day_by_hand() -> None:
    course = Course.of([1.0, 2.0, 4.0, 2.0], hours=4.0)
    size = Size("x", OURS, 0.01, (trial(1), trial(3)), (trial(3, 0.25), trial(3, 0.5)))
    rates = np.array([1.0, 4.0])
    # Servers at 1, 2, 4, 2: 1, ceil(1.67), 3, 2; each part has what it or the next one needs.
    assert servers_through(size, rates, course).tolist() == [2.0, 3.0, 3.0, 2.0]
    power = Power(busy=1000.0, idle=200.0)
    follows = day_use(size, rates, course, power, all_day=False)
    assert follows.server_hours == 10.0 and follows.kwh == pytest.approx(10.0 * 0.6)
    stays = day_use(size, rates, course, power, all_day=True)
    busy = np.array([0.25, 1.0 / 3.0, 0.5, 1.0 / 3.0])
    assert stays.server_hours == 12.0 and stays.kwh == pytest.approx(float((3.0 * (0.2 + 0.8 * busy)).sum()))
    assert math.isnan(day_use(size, rates, course, None, all_day=True).kwh)


def test_power_by_the_device_of_a_profile() -> None:
    assert power_of(find_profile("llama-3.1-8b-h100")) == Power(700.0, 700.0 * IDLE_SHARE)
    four = find_profile("opt-66b-a100-tp4")
    assert power_of(four) == Power(1600.0, 1600.0 * IDLE_SHARE)
    assert power_of(replace(four, device="NVIDIA A100 80GB PCIe"), idle_watts=50.0) == Power(1200.0, 200.0)
    assert power_of(find_profile("smollm2-135m-cpu")) is None
    assert power_of(find_profile("smollm2-135m-cpu"), watts=90.0) == Power(90.0, 90.0 * IDLE_SHARE)


def test_every_way_is_there_and_ours_needs_no_more_than_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_module, "LEAST_REQUESTS", 60)
    asked = Asked(traffic(), PROFILE, EXACT, violations=(0.05, 0.01), seconds=10.0)
    seen: list[str] = []
    found = size_fleet(asked, [(OURS, None), ("vllm", None)], lambda *told: seen.append(told[0]))
    ways = [f"{OURS}, 1 %", f"{OURS}, 5 %", "vllm, 1 %", "vllm, 5 %", f"{OURS}, by headroom", "mean load"]
    assert [size.by for size in found.sizes] == [*ways, "vLLM's throughput"] and not found.failed
    assert set(seen) == {OURS, "vllm", "by headroom"}
    strict, loose, stock, loose_stock, scaled, mean, _ = found.sizes
    assert loose.peak.servers <= strict.peak.servers <= stock.peak.servers
    assert loose_stock.peak.servers <= stock.peak.servers
    assert strict.peak.worst <= 0.01 and loose.peak.worst <= 0.05 and scaled.all_day is None
    assert mean.peak.servers == math.ceil(6.0 / found.mean_rps)
    few = size_fleet(replace(asked, most=1, violations=(0.01,)), [("vllm", None)], lambda *_: None)
    assert few.failed == (("vllm", 0.01),) and [size.by for size in few.sizes] == ["mean load", "vLLM's throughput"]
