"""Mirrors of engines for tests of routing."""

from __future__ import annotations

from slos_serve.planning.planner import Planner
from slos_serve.planning.settings import PlannerSettings
from slos_serve.routing.mirrors import Mirrors
from slos_serve.routing.publication import Publication
from slos_serve.routing.publisher import publication_of, snapshot_of
from slos_serve.routing.router import RoutingRequest
from tests.builders import OPT_13B_A100, EngineBuilder

NOW_S = EngineBuilder.now_s


def published(engine: EngineBuilder, replica: str = "a", sequence: int = 0, time_s: float = NOW_S) -> Publication:
    """What an engine publishes."""
    planner = Planner(OPT_13B_A100, 1, PlannerSettings())
    return publication_of(planner, OPT_13B_A100, snapshot_of(engine.view(), time_s), replica=replica, sequence=sequence)


def mirrors_of(**engines: EngineBuilder) -> Mirrors:
    """A mirror of each engine, by name."""
    mirrors = Mirrors(engines)
    for name, engine in engines.items():
        assert mirrors.update(published(engine, name))
    return mirrors


def loaded(decodes: int, **given: float) -> EngineBuilder:
    """An engine with this many promised decodes."""
    engine = EngineBuilder(**given)  # type: ignore[arg-type]  # sizes by name
    for _ in range(decodes):
        engine.decode()
    return engine


def request(
    prompt_tokens: int = 200, *, due_in_s: float = 1.0, tpot_s: float = 0.1, max_tokens: int = 100, **given: object
) -> RoutingRequest:
    """A request that arrives now."""
    due_s = NOW_S + due_in_s
    return RoutingRequest(NOW_S, prompt_tokens, max_tokens, due_s, tpot_s, **given)  # type: ignore[arg-type]  # by name
