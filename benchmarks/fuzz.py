"""Random episodes over vLLM's real scheduler with the plug-in: a million steps without an exception or a lost request.

python -m benchmarks.fuzz [--steps 1000000] [--seed 0] [--until SEED] [--only FEATURE] [--keep-going N]

Each seed is an episode: features of vLLM in random combination, aborts, pauses, little KV, drafts, one to four steps in
flight. It is played on stock too: an episode that fails there is vLLM's own, and so is one in which streaming-input
sessions lock vLLM on either side. Seeds can be split over machines and gone on from where a run ended. A failing seed
is shrunk to the smallest feature set that fails. Exits 1 when one fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.features import prepare

EVERY_S = 30.0


def main(arguments: Sequence[str]) -> int:
    """Play seeds until there were enough steps; 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of ours to make")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--until", type=int, help="stop before this seed")
    parser.add_argument("--only", default="", help="play only episodes with this feature")
    parser.add_argument("--without", default="", help="features to leave out, by commas")
    parser.add_argument("--keep-going", type=int, default=1, help="failing seeds after which to stop")
    parser.add_argument("--no-shrink", action="store_true", help="do not look for the smallest feature set")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        return _fuzz(options, Path(name))


def _fuzz(options: argparse.Namespace, folder: Path) -> int:
    from tests.vllm.episodes import episode_of
    from tests.vllm.fuzzing import shrink, try_seed

    without = [word for word in options.without.split(",") if word]
    counts, locked, overfull, orphaned = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    steps = episodes = vllms = 0
    failed: list[int] = []
    seed, told_s, start_s = options.seed, time.monotonic(), time.monotonic()
    while steps < options.steps and (options.until is None or seed < options.until):
        if options.only and options.only not in episode_of(seed, without).features:
            seed += 1
            continue
        verdict = try_seed(seed, folder, without)
        episodes += 1
        steps += verdict.ours.steps
        vllms += bool(verdict.stock.error)
        counts.update(verdict.ours.counts)
        locked.update(stock=int(verdict.stock.locked), ours=int(verdict.ours.locked))
        overfull.update(stock=int(verdict.stock.overfull), ours=int(verdict.ours.overfull))
        orphaned.update(stock=int(verdict.stock.orphaned), ours=int(verdict.ours.orphaned))
        if verdict.problem:
            failed.append(seed)
            print(f"seed {seed}: {verdict.problem}", flush=True)
            print(f"  features {sorted(episode_of(seed, without).features)}", flush=True)
            if verdict.ours.trace:
                print("  " + verdict.ours.trace.replace("\n", "\n  "), flush=True)
            if not options.no_shrink:
                features, most, problem = shrink(seed, folder)
                print(f"  smallest: {features}, first {most} requests: {problem}", flush=True)
            if len(failed) >= options.keep_going:
                break
        seed += 1
        if time.monotonic() - told_s > EVERY_S:
            told_s = time.monotonic()
            print(f"{steps} steps, {episodes} episodes, next seed {seed}, {len(failed)} failed", flush=True)
    minutes = (time.monotonic() - start_s) / 60
    print(f"{steps} steps, {episodes} episodes in {minutes:.1f} minutes up to seed {seed}; failed {failed}; "
          f"{vllms} fail on stock as well; sessions lock vLLM in {locked['stock']} on stock, {locked['ours']} on ours, "
          f"its own steps let too many adapters run in {overfull['stock']} and {overfull['ours']} and lose a session "
          f"in {orphaned['stock']} and {orphaned['ours']}; "
          f"stock steps by kind {dict(counts)}")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
