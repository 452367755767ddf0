"""Each feature of vLLM with the plug-in beside stock vLLM: steps to the first token, answers, errors.

python -m benchmarks.features [--only WORDS] [--json] [--markdown docs/vllm.md]

vLLM's real scheduler and KV-cache manager run on an imaginary device in virtual time (OPT-13B on one A100). A scene
passes when nothing fails, the answers are the stock answers and first tokens come at most two steps after stock's.
Then a calm load in JSON mode: one request a second, one in four with a grammar, first token promised within a second.
Exits 1 when a scene fails or the calm load keeps fewer promises than stock.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

MARKS = ("<!-- table: features -->", "<!-- end -->")
CALM_REQUESTS = 80


@dataclass(frozen=True)
class Row:
    """One scene on both schedulers."""

    feature: str
    stock: str
    ours: str
    answers: str
    verdict: str

    @property
    def passed(self) -> bool:
        """Whether ours is no worse than stock."""
        return self.verdict in ("pass", "refused at start")


def prepare(folder: Path) -> None:
    """Write a class file and a profile, and point the plug-in at them."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from slos_serve.vllm_plugin import compat
    from slos_serve.vllm_plugin.config import CLASSES_ENV, PROFILE_ENV
    from tests.vllm.dry_load import CLASSES, write_profile

    (folder / "classes.yaml").write_text(CLASSES, encoding="utf-8")
    write_profile(folder / "profile.json", compat.engine_version())
    os.environ[CLASSES_ENV] = str(folder / "classes.yaml")
    os.environ[PROFILE_ENV] = str(folder / "profile.json")


def row_of(scene: Any, folder: Path) -> Row:
    """Play a scene on both."""
    from slos_serve.vllm_plugin.scheduler import SLOScheduler
    from tests.vllm.feature_probes import complaint, play

    stock, ours = play(scene, folder), play(scene, folder, SLOScheduler)
    problem = complaint(scene, stock, ours)
    if ours.refused and not problem:
        return Row(scene.name, _first(stock), "-", "-", "refused at start")
    same = "yes" if ours.answers == stock.answers or ours.aborted else "NO"
    return Row(scene.name, _first(stock), _first(ours), same, problem or "pass")


def _first(outcome: Any) -> str:
    worst = outcome.worst()
    if outcome.error:
        return outcome.error[:40]
    if not outcome.first:
        return "answered"
    return f"{worst[0]} / {worst[1]:.2f}" if worst else "never"


def calm_run(folder: Path) -> Row:
    """Promises kept in JSON mode by both, one request a second."""
    from slos_serve.vllm_plugin.scheduler import SLOScheduler
    from tests.vllm.feature_probes import Scene, complaint, play

    scene = Scene("JSON mode, 1 request/s", _calm, counted=True)
    stock, ours = play(scene, folder), play(scene, folder, SLOScheduler)
    problem = complaint(scene, stock, ours)
    if not problem and ours.kept < stock.kept:
        problem = "fewer promises kept"
    return Row(
        scene.name,
        f"{stock.kept} of {CALM_REQUESTS} kept",
        f"{ours.kept} of {CALM_REQUESTS} kept",
        "yes" if stock.answers == ours.answers else "NO",
        problem or "pass",
    )


def _calm(play: Any) -> None:
    from slos_serve.testing.request import RequestFeatures

    rng = np.random.default_rng(3)
    engine = play.engine
    for number in range(CALM_REQUESTS):
        arrival_s = float(number)
        while engine.now_s < arrival_s:
            if engine.step() == 0 and not engine.scheduler.has_unfinished_requests():
                engine.now_s = arrival_s
        features = RequestFeatures(grammar_steps=2) if number % 4 == 0 else RequestFeatures()
        play.watch(
            f"r{number}", play.prompt(int(rng.integers(100, 1500))), int(rng.integers(50, 300)), features=features
        )


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/vllm.md."""
    lines = ["| Feature | stock: steps / s to the worst first token | SLOs-Serve | same answers | verdict |"]
    lines.append("|---|---|---|---|---|")
    lines += [f"| {row.feature} | {row.stock} | {row.ours} | {row.answers} | {row.verdict} |" for row in rows]
    return "\n".join(lines)


def write_table(page: Path, text: str) -> None:
    """Put the table between its marks; a page without marks gets it at its end."""
    old = page.read_text(encoding="utf-8")
    block = f"{MARKS[0]}\n{text}\n{MARKS[1]}"
    pattern = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    new = pattern.sub(lambda _: block, old) if pattern.search(old) else f"{old.rstrip()}\n\n{block}\n"
    page.write_text(new, encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Play the scenes; 1 if any fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="play the scenes whose name contains this")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    parser.add_argument("--markdown", type=Path, help="page whose table is written anew")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        from tests.vllm.scenes import SCENES

        scenes = [scene for scene in SCENES if options.only in scene.name]
        for scene in scenes:
            rows.append(row_of(scene, folder))
            _print(rows[-1], as_json=options.json)
        if options.only in "JSON mode":
            rows.append(calm_run(folder))
            _print(rows[-1], as_json=options.json)
    if options.markdown:
        write_table(options.markdown, markdown(rows))
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} no worse than stock", file=sys.stderr)
    return 1 if failed else 0


def _print(row: Row, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(row)), flush=True)
    else:
        print(f"{row.feature:36} {row.stock:>16} {row.ours:>24} {row.answers:>4}  {row.verdict}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
