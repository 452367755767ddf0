"""Routers that hear replicas without a network."""

from __future__ import annotations

import json

from slos_serve.ray_serve.dispatch import Dispatcher
from slos_serve.ray_serve.ticket import Ticket
from slos_serve.ray_serve.wire import Envelope, Notes
from tests.builders import EngineBuilder
from tests.unit.routing.fleet import NOW_S, loaded, published, request

AHEAD_S = 5000.0  # the router's clock against the replicas'


class Postman:
    """A mailbox that is filled by hand."""

    def __init__(self, name: str = "me") -> None:
        self.name = name
        self.heard: dict[str, str] = {}
        self.waiting: dict[str, Envelope] = {}

    def listen(self, replica: str, address: str) -> None:
        self.heard[replica] = address

    def ignore(self, replica: str) -> None:
        del self.heard[replica]

    def take(self) -> dict[str, Envelope]:
        taken, self.waiting = self.waiting, {}
        return taken

    def bring(
        self,
        replica: str,
        engine: EngineBuilder,
        *,
        at_s: float = 0.0,
        unchanged: bool = False,
        tickets: list[int] | None = None,
        notes: Notes | None = None,
    ) -> None:
        """What the engine publishes, sent ``at_s`` after NOW_S and received a millisecond later."""
        sent_s = NOW_S + at_s
        named = {} if tickets is None else {"tickets": tickets}
        document = published(engine, "", sequence=int(at_s * 1000), time_s=NOW_S + at_s).as_dict()
        payload = json.dumps(document | named).encode()
        self.waiting[replica] = Envelope(sent_s, unchanged, payload, sent_s + AHEAD_S + 0.001, notes or Notes())


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_S + AHEAD_S + 0.001

    def __call__(self) -> float:
        return self.now_s


def ticket(prompt_tokens: int = 200, session: str | None = None, **given: object) -> Ticket:
    asked = request(prompt_tokens, **given)  # type: ignore[arg-type]  # fields by name
    late = {"arrival_s": asked.arrival_s + AHEAD_S, "ttft_due_s": asked.ttft_due_s + AHEAD_S}
    fields = {name: getattr(asked, name) for name in asked.__slots__} | late
    return Ticket(type(asked)(**fields), slo_class="chat", session=session)


def two_routers(clock: Clock, told: tuple[str, ...], replicas: str = "ab") -> dict[str, Dispatcher]:
    """Two endpoints' routers that heard the same publications of replicas with room for some requests."""
    found = {}
    for name in ("me", "you"):
        postman = Postman(name)
        found[name] = Dispatcher(postman, clock_s=clock)
        found[name].set_replicas({replica: f"tcp://{replica}" for replica in replicas})
        for replica in replicas:
            postman.bring(replica, loaded(0), notes=Notes(routers=told))
    return found
