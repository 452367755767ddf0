"""Promises that the API process told clients bind vLLM's real scheduler from the moment that it has the request."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from slos_serve.bench.demo_plan import DemoSettings, classes_yaml, plan_demo
from slos_serve.bench.requests import BenchRequest
from slos_serve.core.verdict import Verdict
from slos_serve.files.profile_file import load_profile, save_profile
from slos_serve.perf.batch_time import BatchTimeModel
from slos_serve.testing.dry_engine import DryEngine
from slos_serve.vllm_plugin.slo_args import TICKET_KEY
from tests.vllm.dry_load import Start, events, prompt
from tests.vllm.told_load import ToldLoad

# About the engine of the demo: SmolLM2 135M on two CPU cores.
CPU = BatchTimeModel(k_c_s=1.2e-3, b_c_s=27e-3, k_m_s=0.0, b_m_s=34e-3, k_ctx_s=4.3e-6, k_q_s=5.2e-7, k_seq_s=6.4e-4)
WEAKER = "{ttft_ms: 650, tpot_ms: 100, otherwise: [{ttft_ms: 8000, tpot_ms: 200}]}"


def verdicts(
    start: Start, folder: Path, told: dict[str, int], *, front: int | None, chat: str = WEAKER, kept: bool = True
) -> list[str]:
    """Of a long request and of thirty short ones, which are together twice what can be promised."""
    (folder / "classes.yaml").write_text(f"classes:\n  chat: {chat}\n", encoding="utf-8")
    engine, rng = start(), np.random.default_rng(3)
    engine.scheduler._slo_desk._front = front  # a dry engine has no API process
    engine.add("long", prompt(rng, 2000), 4, {"slo_class": "chat", **told})
    for number in range(30):
        engine.add(f"r{number}", prompt(rng, 200), 20, {"slo_class": "chat"})
    engine.run()
    assert engine.scheduler._slo.guard.counts == {}
    found = {event["request_id"]: event for event in events(folder, "request")}
    assert all(event["ttft_ok"] for event in found.values() if event["verdict"] != "best-effort") is kept
    return [found["long"]["verdict"], *(found[f"r{number}"]["verdict"] for number in range(30))]


def test_nobody_takes_the_place_of_one_that_was_told(start: Start, tmp_path: Path) -> None:
    chat = "{ttft_ms: 650, tpot_ms: 100}"
    assert verdicts(start, tmp_path, {}, front=1, chat=chat)[0] == "best-effort", "short ones are worth more"
    (tmp_path / "events.jsonl").unlink()
    told = verdicts(start, tmp_path, {"slo_told": 0}, front=1, chat=chat)
    assert told[0] == "admitted" and 5 <= told[1:].count("admitted") < 30


def test_a_weaker_promise_that_was_told_is_the_one_that_is_given(start: Start, tmp_path: Path) -> None:
    assert verdicts(start, tmp_path, {"slo_told": 1}, front=1)[0] == "second-best"


def test_without_an_api_process_that_judges_nothing_was_told(start: Start, tmp_path: Path) -> None:
    told = verdicts(start, tmp_path, {"slo_told": 0}, front=None, chat="{ttft_ms: 650, tpot_ms: 100}")
    assert told[0] == "best-effort"


@pytest.mark.parametrize("told", ["1", 7, -1, True])
def test_what_is_told_wrongly_harms_nobody(start: Start, tmp_path: Path, told: object) -> None:
    assert verdicts(start, tmp_path, {"slo_told": told}, front=1)[0] in ("admitted", "second-best")  # type: ignore[dict-item]


def test_a_told_promise_that_is_lost_before_its_prompt_begins_is_a_broken_promise(start: Start, tmp_path: Path) -> None:
    verdicts(start, tmp_path, {"slo_told": 0}, front=1, chat="{ttft_ms: 1}", kept=False)
    (told,) = (event for event in events(tmp_path, "request") if event["request_id"] == "long")
    assert (told["verdict"], told["ttft_ok"]) == ("admitted", False)


@pytest.mark.parametrize("bitmask", [True, False], ids=["bitmask asked for", "not asked for"])
def test_nobody_is_told_before_the_batch_is_with_the_workers(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bitmask: bool
) -> None:
    load = dry_load(start, tmp_path, f"classes:\n  chat: {WEAKER}\n")
    scheduler, publisher = load.engine.scheduler, load.engine.scheduler._slo.publisher
    told: list[float | str] = []
    monkeypatch.setattr(publisher, "deliver", lambda publication: told.append(publication.time_s))
    monkeypatch.setattr(scheduler._slo, "front", SimpleNamespace(write=lambda fields: told.append(*fields), close=int))
    load.engine.add("a", prompt(np.random.default_rng(0), 200), 4, {"slo_class": "chat", TICKET_KEY: 7})
    output = scheduler.schedule()
    assert output.num_scheduled_tokens and told == []
    if bitmask:
        scheduler.get_grammar_bitmask(output)
        assert told == ["promised", 0.0]
    result = load.engine.device.execute(output)[1]
    scheduler.update_from_output(output, result)
    assert told == ["promised", 0.0]


def dry_load(start: Start, folder: Path, classes: str, max_num_seqs: int = 64) -> ToldLoad:
    """The demo's engine behind a front end that knows these classes."""
    (folder / "classes.yaml").write_text(classes, encoding="utf-8")
    (folder / "events.jsonl").unlink(missing_ok=True)
    save_profile(replace(load_profile(folder / "profile.json"), model=CPU), folder / "profile.json")
    scheduler = start(depth=1, async_scheduling=False, num_blocks=3000, max_num_seqs=max_num_seqs).scheduler
    return ToldLoad(DryEngine(scheduler, CPU, depth=1), folder)


def test_what_clients_are_told_in_bursts_comes_true(start: Start, tmp_path: Path) -> None:
    found: Counter[tuple[str, str, bool]] = Counter()
    for seed in (1, 2):
        plan = plan_demo(CPU, DemoSettings(seed=seed))
        load = dry_load(start, tmp_path, classes_yaml(plan.classes))
        load.run(plan.burst, {None: 1.3, "chat": 1.2, "coding": 2.2, "summarization": 1.25})
        found += load.compared(events(tmp_path, "request"))
    told, right = found.total(), sum(count for (said, did, _), count in found.items() if said == did)
    admitted = sum(count for (said, _, _), count in found.items() if said == "admitted")
    assert told > 150 and 0.3 * told < admitted < 0.8 * told
    assert right >= 0.99 * told, found
    assert found["admitted", "admitted", True] >= 0.97 * admitted, found


def test_what_is_told_is_kept_where_max_num_seqs_binds(start: Start, tmp_path: Path) -> None:
    plan = plan_demo(CPU, DemoSettings(seed=1))
    load = dry_load(start, tmp_path, classes_yaml(plan.classes), max_num_seqs=8)
    load.run(plan.burst, {None: 1.3, "chat": 1.2, "coding": 2.2, "summarization": 1.25})
    found = load.compared(events(tmp_path, "request"))
    told = sum(count for (said, _, _), count in found.items() if said == "admitted")
    assert found["admitted", "admitted", True] >= 0.97 * told > 0.97 * 15, found


def test_a_weaker_promise_takes_in_nearly_everybody_of_a_burst_at_little_price_for_the_first(
    start: Start, tmp_path: Path
) -> None:
    kept: Counter[tuple[bool, str]] = Counter()
    asked = 0
    for weaker in (False, True):
        plan = plan_demo(CPU, DemoSettings(seed=1, weaker=weaker))
        load = dry_load(start, tmp_path, classes_yaml(plan.classes))
        load.run(plan.burst, {None: 1.3, "chat": 1.2, "coding": 2.2, "summarization": 1.25})
        found = [event for event in events(tmp_path, "request") if event["request_id"] in load.told]
        kept += Counter((weaker, event["verdict"]) for event in found if event["ttft_ok"] and event["tpot_ok"])
        asked = len(found)
    assert kept[True, "admitted"] + kept[True, "second-best"] > 0.95 * asked, kept
    assert kept[True, "second-best"] > 0.3 * asked, kept
    assert kept[True, "admitted"] >= kept[False, "admitted"] - 0.05 * asked, kept


def crowd(count: int, words: int, max_tokens: int) -> list[BenchRequest]:
    """Clients of a class that refuses, all within a fifth of a second."""
    text = "word " * words
    return [BenchRequest(f"r{k}", 0.01 + 0.2 * k / count, text, max_tokens, "strict") for k in range(count)]


@pytest.mark.parametrize(
    ("count", "words", "max_tokens", "tpot_ms", "soon_s"),
    [(10, 470, 4, 2000, 5), (100, 470, 4, 2000, 5), (100, 100, 100, 100, 10)],
    ids=["a few too many", "prompts bind", "decodes bind"],
)
def test_refused_clients_that_wait_as_told_are_served(
    start: Start, tmp_path: Path, count: int, words: int, max_tokens: int, tpot_ms: int, soon_s: int
) -> None:
    load = dry_load(start, tmp_path, f"classes: {{strict: {{ttft_ms: 6000, tpot_ms: {tpot_ms}, when_full: reject}}}}\n")
    load.run(crowd(count, words, max_tokens), {"strict": 1.0}, again=True)
    served = [key for key in load.waits if load.told[key] is Verdict.ADMITTED]
    assert 0 < len(load.waits) < count and len(served) >= 0.8 * len(load.waits)
    assert min(load.waits.values()) <= soon_s, "the first room opens soon"
    assert max(load.waits.values()) > 30 or count < 100, "and the last one does not"
    found = load.compared(events(tmp_path, "request"))
    assert found["admitted", "admitted", True] >= 0.9 * found.total()
