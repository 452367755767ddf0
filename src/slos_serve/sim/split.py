"""Prefill and decode on replicas of their own: who gets a prompt, who its answer, and how long KV takes between them.

A replica computes a prompt and gives its KV to another one, which generates the answer. Every replica has one link in
and one out; transfers on a link follow each other. The prefill side gives its blocks back at once, and the decode side
takes its own when the call starts there; both favour the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from slos_serve.sim.recording import Recording
from slos_serve.sim.replica import Replica
from slos_serve.sim.routers import LeastLoaded


@dataclass(frozen=True, slots=True)
class PromptPlace:
    """Where a prompt is computed.

    Attributes:
        replica: there.
        due_s: when its KV must be ready to leave for the promise to be kept.
        promised: a decode replica has promised the answer.
    """

    replica: Replica
    due_s: float
    promised: bool = False


class Placement(Protocol):
    """Picks both replicas of a call. ``alive`` is never empty.

    Attributes:
        decode_begins: the decode side gives the first token, as vLLM has it; otherwise the prefill side does.
        shows_coming: the decode side's policy sees a call while its KV is on its way.
    """

    decode_begins: bool
    shows_coming: bool

    def place_prompt(self, now_s: float, call: int, session: int, alive: Sequence[Replica]) -> PromptPlace | None:
        """Where the prompt goes; ``None`` when nobody computes prompts."""
        ...

    def place_answer(self, now_s: float, call: int, alive: Sequence[Replica]) -> Replica | None:
        """Where the answer is generated, asked when the prompt is computed; ``None`` when nobody does."""
        ...

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """Told when a replica's last request left."""
        ...


@dataclass(slots=True)
class Links:
    """Transfers of KV between replicas.

    Attributes:
        seconds_per_token: to move the KV of one token.
    """

    seconds_per_token: float
    _out_free_s: dict[int, float] = field(default_factory=dict)
    _in_free_s: dict[int, float] = field(default_factory=dict)

    def transfer_s(self, tokens: int) -> float:
        """Seconds that the KV of so many tokens takes on free links."""
        return self.seconds_per_token * tokens

    def move(self, now_s: float, source: int, target: int, tokens: int) -> float:
        """Begin to move KV as soon as both links are free; returns when it is there."""
        if source == target:
            return now_s
        begins_s = max(now_s, self._out_free_s.get(source, 0.0), self._in_free_s.get(target, 0.0))
        ends_s = begins_s + self.transfer_s(tokens)
        self._out_free_s[source] = self._in_free_s[target] = ends_s
        return ends_s


class FixedSplit:
    """The first replicas compute prompts, the others answers; each call goes to the least loaded. See Placement.

    Args:
        recording: of the workload.
        prefill_replicas: how many compute prompts.
        links: between replicas.
        decode_begins: see :class:`Placement`.
    """

    shows_coming = False

    def __init__(self, recording: Recording, prefill_replicas: int, links: Links, *, decode_begins: bool) -> None:
        self.decode_begins = decode_begins
        self._links = links
        self._recording = recording
        self._prefill_replicas = prefill_replicas
        self._router = LeastLoaded()

    def place_prompt(self, now_s: float, call: int, session: int, alive: Sequence[Replica]) -> PromptPlace | None:
        """The least loaded of those that compute prompts."""
        own = [replica for replica in alive if replica.index < self._prefill_replicas]
        row = self._recording.workload.calls[call]
        due_s = now_s + float(row["ttft_s"]) - self._links.transfer_s(int(row["prompt_tokens"]))
        return PromptPlace(self._router.choose(now_s, call, session, own), due_s) if own else None

    def place_answer(self, now_s: float, call: int, alive: Sequence[Replica]) -> Replica | None:
        """The least loaded of the others."""
        own = [replica for replica in alive if replica.index >= self._prefill_replicas]
        return self._router.choose(now_s, call, 0, own) if own else None

    def on_idle(self, now_s: float, replica: Replica) -> None:
        """Nothing to know."""
