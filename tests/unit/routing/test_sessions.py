"""Where sessions' prefixes are."""

from __future__ import annotations

from slos_serve.routing.sessions import Sessions


def test_whole_blocks_of_the_last_round_are_cached_where_it_ran() -> None:
    sessions = Sessions(block_size=16)
    assert sessions.cached("s", 100) == {}
    sessions.sent("s", "a", 100)
    assert sessions.cached("s", 500) == {"a": 96}
    sessions.sent("s", "b", 333)
    assert sessions.cached("s", 500) == {"b": 320}


def test_one_token_is_always_left_to_compute() -> None:
    sessions = Sessions(block_size=16)
    sessions.sent("s", "a", 64)
    assert sessions.cached("s", 64) == {"a": 48}
    assert sessions.cached("s", 10) == {}


def test_the_longest_silent_is_forgotten_first() -> None:
    sessions = Sessions(most=2)
    for name in ("x", "y"):
        sessions.sent(name, "a", 100)
    sessions.sent("x", "a", 200)
    sessions.sent("z", "a", 100)
    assert len(sessions) == 2
    assert sessions.cached("y", 500) == {} and sessions.cached("x", 500) == {"a": 192}


def test_a_dead_replicas_prefixes_are_gone() -> None:
    sessions = Sessions()
    sessions.sent("x", "a", 100)
    sessions.sent("y", "b", 100)
    sessions.forget_replica("a")
    assert sessions.cached("x", 500) == {} and sessions.cached("y", 500) == {"b": 96}
