"""What a replica tells routers about itself: enough to answer "can you attain this?" in its place.

A publication holds no requests, only what admission adds up: decodes by tier, prefill still owed by due time, KV left
after every reservation. Its size grows with the prompts that are pending, not with the decodes that run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.request import NUM_SHARES
from slos_serve.perf.formula import NUM_COEFFICIENTS
from slos_serve.planning.demand import SIZES
from slos_serve.planning.state import FloatArray, IntArray
from slos_serve.planning.supply import MOMENT_TOKENS

FORMAT = "slos-serve-publication/9"


@dataclass(frozen=True, slots=True, eq=False)
class Publication:
    """State that one replica's next plan will start from. All times are on the replica's clock.

    Attributes:
        replica: its name among the router's replicas.
        sequence: grows by one with every publication of a replica's life.
        time_s: when it was made, right after a plan.
        ready_s: when the step of that plan is predicted to end and the next plan is made; the state is that of then.
        seen_until_s: requests that reached the replica by then are counted in.
        correction: factor between observed and modelled batch times, already in ``coefficients``.
        coefficients: float64 [8], seconds, as the planner plans with them; see :mod:`slos_serve.perf.batch_time`.
        margin, max_implied_ttft_s: of the planner's settings.
        max_step_tokens: most tokens in a batch.
        draft_s: sequential seconds of the draft model a batch.
        pace_s: float64 [L], TPOT of each decode tier.
        periods_s, tokens_each, extra_s_each: float64 [L], see :class:`slos_serve.planning.supply.Supply`.
        counts: float64 [L], promised decodes that run.
        in_tier: float64 [L], requests that ``extra_s_each`` is the mean of.
        due_s: float64 [n], first-token deadlines of the prompts that the replica means to compute, ascending.
        cost_tokens: float64 [n], prefill tokens each still owes, attention counted in.
        tier: int64 [n], decode tier each enters.
        weight: float64 [n], value of each to admission.
        needs_seat: float64 [n], 1 where a prompt waits for its seat, 0 where it has one.
        begun: int64 [n], 1 where it is promised for good, 0 where another may still take its place.
        memory: float64 [n, K], KV blocks of each, at each checkpoint of the planner's forecast.
        memory_left: float64 [K], KV blocks beside all of these.
        total_blocks, free_blocks, block_size: KV cache.
        moments_s: float64 [M], ascending.
        lent_tokens: float64 [M], prefill tokens that running decodes lend until each of these moments.
        seats: float64 [M], of those that need one, requests that can have a seat (``max_num_seqs``) by each of these
            moments.
        to_come: float64 [2 * SIZES], what an open request is charged for cheaper ones that are to come, see
            :func:`slos_serve.planning.demand.build_demand`.
        num_requests: unfinished requests of any kind.
        num_unpromised: of them, best effort and those passed over.
        queued_shares: int64 [q], shares with a request of those that has no token yet.
        queued_tokens: float64 [q], prompt tokens that these have still to compute.
        forecast_tokens: float64 [classes], forecast output length of a request that has not begun.
        boosted: int64 [b], shares (:func:`slos_serve.core.request.share_of`) whose weights are multiplied.
        boost: float64 [b], with what; it is already in ``weight``.
    """

    replica: str
    sequence: int
    time_s: float
    ready_s: float
    seen_until_s: float
    correction: float
    coefficients: FloatArray
    margin: float
    max_implied_ttft_s: float
    max_step_tokens: int
    draft_s: float
    pace_s: FloatArray
    periods_s: FloatArray
    tokens_each: FloatArray
    extra_s_each: FloatArray
    counts: FloatArray
    in_tier: FloatArray
    due_s: FloatArray
    cost_tokens: FloatArray
    tier: IntArray
    weight: FloatArray
    needs_seat: FloatArray
    begun: IntArray
    memory: FloatArray
    memory_left: FloatArray
    total_blocks: int
    free_blocks: int
    block_size: int
    moments_s: FloatArray
    lent_tokens: FloatArray
    seats: FloatArray
    to_come: FloatArray
    num_requests: int
    num_unpromised: int
    queued_shares: IntArray
    queued_tokens: FloatArray
    forecast_tokens: FloatArray
    boosted: IntArray
    boost: FloatArray

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, text and lists, for any transport that carries JSON; ``inf`` as the text ``"inf"``."""
        return {"format": FORMAT} | {name: _plain(getattr(self, name)) for name in _NAMES}

    @classmethod
    def of_dict(cls, given: Mapping[str, Any]) -> Publication:
        """The inverse of :meth:`as_dict`.

        Raises:
            InvalidFieldError: not a publication of this format, or fields that do not belong together.
        """
        if given.get("format") != FORMAT:
            raise InvalidFieldError("format", given.get("format"), FORMAT)
        missing = [name for name in _NAMES if name not in given]
        if missing:
            raise InvalidFieldError("publication", missing, "every field of a publication")
        try:
            found = cls(**{name: _KINDS[kind](given[name]) for name, kind in _NAMES.items()})
            found = replace(found, memory=found.memory.reshape(-1, len(found.memory_left)))
            found.check()
        except InvalidFieldError:
            raise
        except (TypeError, ValueError) as fault:
            raise InvalidFieldError("publication", str(fault), "numbers and lists of numbers") from fault
        return found

    def check(self) -> None:
        """Raise :class:`InvalidFieldError` when arrays do not belong together or a count is impossible."""
        for name, size in (("coefficients", NUM_COEFFICIENTS), *_sizes(self)):
            if np.shape(getattr(self, name)) != (size,):
                raise InvalidFieldError(name, np.shape(getattr(self, name)), f"{size} numbers in one list")
        if np.shape(self.memory) != (len(self.due_s), len(self.memory_left)):
            raise InvalidFieldError("memory", np.shape(self.memory), "a row for each prompt, a column a checkpoint")
        if len(self.pace_s) == 0 or len(self.memory_left) == 0:
            raise InvalidFieldError("pace_s", len(self.pace_s), "at least one tier and one memory checkpoint")
        if len(self.tier) and not (self.tier.min() >= 0 and self.tier.max() < len(self.pace_s)):
            raise InvalidFieldError("tier", int(self.tier.max()), f"0 to {len(self.pace_s) - 1}")
        for name in ("due_s", "moments_s"):
            if np.any(np.diff(getattr(self, name)) < 0.0):
                raise InvalidFieldError(name, "unsorted", "times in ascending order")
        if len(self.forecast_tokens) == 0:
            raise InvalidFieldError("forecast_tokens", 0, "a number for each class")
        if not np.all((self.boosted >= 0) & (self.boosted < NUM_SHARES)):
            raise InvalidFieldError("boosted", self.boosted.tolist(), f"0 to {NUM_SHARES - 1}")
        if not np.all(np.isfinite(self.boost) & (self.boost > 0.0)):
            raise InvalidFieldError("boost", self.boost.tolist(), "finite numbers above 0")
        if self.block_size < 1 or self.total_blocks < 0:
            raise InvalidFieldError("block_size", self.block_size, "1 or more, and total_blocks 0 or more")
        for name in ("coefficients", "time_s", "ready_s", "seen_until_s"):
            if not np.all(np.isfinite(getattr(self, name))):
                raise InvalidFieldError(name, "not finite", "finite seconds")


_NAMES = {field.name: str(field.type) for field in fields(Publication)}


def _sizes(publication: Publication) -> list[tuple[str, int]]:
    tiers, owed = len(publication.pace_s), len(publication.due_s)
    by_tier = ("periods_s", "tokens_each", "extra_s_each", "counts", "in_tier")
    by_prompt = ("cost_tokens", "tier", "weight", "needs_seat", "begun")
    by_moment = ("moments_s", "lent_tokens", "seats")
    by_share, queued = ("boosted", "boost"), ("queued_shares", "queued_tokens")
    sizes = [(by_tier, tiers), (by_prompt, owed), (by_moment, len(MOMENT_TOKENS)), (by_share, len(publication.boost))]
    sizes += [(queued, len(publication.queued_tokens)), (("to_come",), 2 * SIZES)]
    return [(name, size) for names, size in sizes for name in names]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        items = value.ravel().tolist()
        return items if np.isfinite(value).all() else [_plain(item) for item in items]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


def _floats(value: Any) -> FloatArray:
    return np.fromiter(map(float, value), dtype=np.float64)


def _ints(value: Any) -> IntArray:
    return np.fromiter(map(int, value), dtype=np.int64)


_KINDS: dict[str, Any] = {"str": str, "int": int, "float": float, "FloatArray": _floats, "IntArray": _ints}
