"""``benchmarks.worlds``: what a number draws, who may be looked at, and how rows are told."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import worlds


def test_a_number_draws_the_same_world_and_load_every_time() -> None:
    one, other = worlds.world(1001), worlds.world(1001)
    assert (one.engine, one.limits, one.model) == (other.engine, other.limits, other.model)
    assert one.asked().calls.tobytes() == other.asked().calls.tobytes()
    assert len({worlds.world(number).engine for number in range(1000, 1020)}) > 10


def test_promises_are_scaled_and_can_be_kept_by_an_idle_engine() -> None:
    for number in range(40):
        one = worlds.world(number)
        load = one.asked()
        paces_s = [stage.slo.tpot_ms / 1000.0 for kind in load.classes for stage in kind.stages if stage.slo.tpot_ms]
        assert min(paces_s) > one.model.b_m_s + one.model.b_c_s
        assert one.limits.kv_capacity_tokens >= worlds.LEAST_KV_TOKENS


@pytest.mark.parametrize(
    "arguments",
    [["--first", "5"], ["--tuning", "--first", "999", "--count", "2"], ["--count", "0"], ["--first", "-1", "--tuning"]],
)
def test_worlds_of_tables_and_of_tuning_are_kept_apart(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        worlds.main(arguments)
    assert refused.value.code == 2


def row(number: int, ours: float, best: float) -> dict[str, Any]:
    def found(mean: float) -> dict[str, float]:
        return {"mean": mean, "strict": mean, "kept": 1.0, "recomputed": 0.0, "tokens_per_s": 100.0}

    described = {"engine": "8B", "kv_tokens": 9000, "scenario": "chat", "arrivals": "poisson", "load": 1.0}
    rivals = dict.fromkeys(worlds.RIVALS, found(0.1)) | {"edf": found(best)}
    return {"world": number, **described, worlds.OURS: found(ours), **rivals}


def test_the_world_in_which_ours_is_furthest_behind_comes_first() -> None:
    said = worlds.table([row(1000, 0.9, 0.5), row(1001, 0.4, 0.6)])
    lines = said.splitlines()
    assert lines[2].startswith("| 1001 |") and "edf 60.0 | -20.0" in lines[2]
    assert "65.0 %, +10.0 points over the best rival of each, behind it by more than one point in 1." in said
    assert "1.000 of stock's" in said


def test_a_world_is_simulated_under_ours_and_every_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "SETS", 1)
    monkeypatch.setattr(worlds, "USUAL_REQUESTS", 30)
    monkeypatch.setattr(worlds, "SPAN_S", 0.0)
    monkeypatch.setattr(worlds, "REQUESTS", {})
    found = worlds.row_of(1000)
    assert all(0.0 <= found[name]["strict"] <= found[name]["mean"] <= 1.0 for name in (worlds.OURS, *worlds.RIVALS))
