"""Cells of the matrix in which capacity says nothing, because requests come in clumps however low the rate.

With CV 3 most requests come together with others. On an engine that is slow for its promises fewer than 90 % of them
attain then, however long it rests in between, and the rate at which 90 % do is near zero and differs tenfold by seed.
Where nobody carries a twentieth of the bound, attained shares at half of the bound are compared instead.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slos_serve.sim.interval import ratio_of_means
from slos_serve.sim.profiles import find_profile
from slos_serve.sim.question import Answer, Question
from slos_serve.sim.search import candidates
from slos_serve.sim.seeds import tuning_seeds

FLAT_SHARE, LOAD = 0.05, 0.5
TARGET = 0.9
Row = dict[str, Any]


@dataclass(frozen=True)
class Shares:
    """What attains at one rate.

    Attributes:
        rate_rps_per_gpu: at which.
        by_policy: policy -> its answers on the seeds of tables, ours first.
    """

    rate_rps_per_gpu: float
    by_policy: Mapping[str, Sequence[Answer]]


def is_flat(bases: Sequence[Question], bound_rps: float) -> Generator[list[Question], list[Answer], bool]:
    """Whether nobody carries ``FLAT_SHARE`` of the bound on a tuning seed, with any of its parameters.

    Args:
        bases: one for each policy; those that are likely to carry most first.
        bound_rps: of one replica.
    """
    (seed,) = tuning_seeds(1)
    for base in bases:
        for one in candidates(base):
            (found,) = yield [one.at(FLAT_SHARE * bound_rps * one.replicas, seed, TARGET)]
            if found.attainment >= TARGET:
                return False
    return True


def attained_shares(
    bases: Sequence[Question], bound_rps: float, seeds: Sequence[int], most: int
) -> Generator[list[Question], list[Answer], Shares]:
    """The first policy and the ``most`` best others at ``LOAD`` times the bound; a tuning seed chooses parameters and
    rivals. Arguments as of :func:`is_flat`; ``seeds`` of tables."""
    (seed,) = tuning_seeds(1)
    rate_rps = LOAD * bound_rps
    best: list[tuple[float, Question]] = []
    for base in bases:
        tried = candidates(base)
        found = yield [one.at(rate_rps * one.replicas, seed) for one in tried]
        best.append(max(zip((one.attainment for one in found), tried, strict=True), key=lambda pair: pair[0]))
    ours, *rivals = best
    rivals.sort(key=lambda pair: -pair[0])
    by_policy = {}
    for _, one in (ours, *rivals[:most]):
        by_policy[one.policy] = yield [one.at(rate_rps * one.replicas, each) for each in seeds]
    return Shares(rate_rps / find_profile(bases[0].profile).tensor_parallel, by_policy)


def row_of_shares(found: Shares) -> Row:
    """The first policy over the best other by attained shares, and both shares."""
    row: Row = {"flat": True, "rps_per_gpu": found.rate_rps_per_gpu}
    for metric, name in (("mean", "attainment"), ("strict", "strict")):
        ours, *rivals = (
            (policy, [float(getattr(one, name)) for one in answers]) for policy, answers in found.by_policy.items()
        )
        rival, best = max(rivals, key=lambda pair: sum(pair[1]))
        over, low, high = ratio_of_means(ours[1], best)
        means = {"ours": sum(ours[1]) / len(best), "best": sum(best) / len(best)}
        row[metric] = {"rival": rival, "over": over, "low": low, "high": high, **means}
    return row


def table_of_shares(rows: Sequence[Row]) -> str:
    """Markdown, worst first."""
    lines = [
        f"In {len(rows)} cells nobody carries {FLAT_SHARE:.0%} of the bound. Attained at {LOAD:g} times the bound:",
        "",
        "| engine | scenario | arrivals | ours attains | best rival | every token | best rival |",
        "|" + "---|" * 7,
    ]
    for row in sorted(rows, key=lambda one: float(min(one["mean"]["over"], one["strict"]["over"]))):
        cells = [row["engine"], row["scenario"], row["arrivals"]]
        for one in (row["mean"], row["strict"]):
            cells += [f"{one['ours']:.1%}", f"{one['best']:.1%} ({one['rival']})"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
