"""Which prompts begin alike, on cases that can be read off."""

from __future__ import annotations

import numpy as np

from slos_serve.workload.prefixes import prefixes_of_blocks, prefixes_of_sessions, prefixes_of_turns
from slos_serve.workload.scenarios import make_workload


def test_a_round_begins_with_the_round_before() -> None:
    load = make_workload("tool", 1.0, 3, seed=1)
    prefixes = prefixes_of_sessions(load.calls)
    calls = load.calls
    for call in range(len(calls)):
        path = prefixes.path(call).tolist()
        session = np.flatnonzero(calls["session"] == calls["session"][call])
        assert path == session[: np.flatnonzero(session == call)[0]].tolist()
        assert prefixes.end[call] == calls["prompt_tokens"][call] + calls["output_tokens"][call] - 1
        assert prefixes.begin[call] == (prefixes.end[path[-1]] if path else 0)


def test_turns_behind_a_common_beginning() -> None:
    prefixes = prefixes_of_turns(np.array([100, 130, 30]), np.array([10, 5, 5]), np.array([-1, 0, 0]), 40)
    assert prefixes.path(0).tolist() == [0]
    assert prefixes.path(1).tolist() == [0, 1]  # the beginning, then all of the first turn
    assert prefixes.path(2).tolist() == []  # too short to continue anything
    assert prefixes.begin.tolist() == [0, 40, 109, 0] and prefixes.end.tolist() == [40, 109, 134, 34]


def test_recorded_hashes_become_few_nodes() -> None:
    blocks = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 6], [7, 8]]
    prompts, outputs = np.array([2000, 2048, 1000, 900]), np.array([1, 1, 1, 1])
    prefixes = prefixes_of_blocks(prompts, outputs, blocks, 512)
    assert prefixes.num_shared == 2
    first, second = prefixes.path(0).tolist()
    assert prefixes.path(1).tolist() == [first, second] and prefixes.path(2).tolist() == [first]
    assert (prefixes.begin[first], prefixes.end[first]) == (0, 512)
    assert (prefixes.begin[second], prefixes.end[second]) == (512, 1536)
    assert prefixes.path(3).tolist() == []


def test_a_prompt_that_ends_within_a_shared_block_keeps_it_to_itself() -> None:
    prefixes = prefixes_of_blocks(np.array([512, 600]), np.array([1, 1]), [[1], [1, 2]], 512)
    assert prefixes.path(0).tolist() == [] and prefixes.path(1).tolist() == [0]
