"""A router of two replicas that publish when told to."""

from __future__ import annotations

import pytest

from slos_serve.ray_serve.dispatch import Dispatcher
from tests.unit.ray_serve.routers import Clock, Postman


@pytest.fixture
def postman() -> Postman:
    return Postman()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dispatcher(postman: Postman, clock: Clock) -> Dispatcher:
    dispatcher = Dispatcher(postman, clock_s=clock)
    dispatcher.set_replicas({"a": "tcp://a", "b": "tcp://b"})
    return dispatcher
