"""A KV connector without a network: external hits, async loads and delayed frees, counted in engine steps.

The scheduler's half answers vLLM's scheduler from a request's ``kv_transfer_params``; the worker's half,
:class:`DryTransfers`, runs on the device and reports what has arrived and what has been sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

NAME = "DryConnector"


@dataclass
class DryMetadata(KVConnectorMetadata):
    """What one step starts: loads with their steps and whether they fail, and steps for sends of finished requests.

    ``tokens_within`` are those that are loaded within the step.
    """

    loads: dict[str, tuple[int, bool]] = field(default_factory=dict)
    sends: dict[str, int] = field(default_factory=dict)
    tokens_within: int = 0


class DryConnector(KVConnectorBase_V1):
    """The scheduler's half."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._asked: dict[str, int] = {}
        self._loaded: set[str] = set()
        self._meta = DryMetadata()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens stored outside beyond the local hit; once for each request, as a prefill server hands over once."""
        load = (request.kv_transfer_params or {}).get("load")
        if load is None or request.request_id in self._loaded:
            return 0, False
        tokens, is_async, _, unsure_asks, _ = load
        asked = self._asked.get(request.request_id, 0)
        if asked < unsure_asks:
            self._asked[request.request_id] = asked + 1
            return None, False
        # A load within the step leaves the last token to be computed; an async one may bring the whole prompt.
        most = request.num_tokens - (0 if is_async else 1)
        extra = max(min(tokens, most) - num_computed_tokens, 0)
        return extra, bool(is_async and extra > 0)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks are there: note the load that the coming step starts."""
        load = (request.kv_transfer_params or {}).get("load")
        if load is None or not num_external_tokens:
            return
        self._loaded.add(request.request_id)
        if load[1]:
            self._meta.loads[request.request_id] = (load[2], bool(load[4]))
        else:
            self._meta.tokens_within += num_external_tokens

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the step starts; forgets it."""
        meta, self._meta = self._meta, DryMetadata()
        return meta

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A producer keeps the blocks of a complete answer until they are sent."""
        self._asked.pop(request.request_id, None)
        self._loaded.discard(request.request_id)
        steps = (request.kv_transfer_params or {}).get("send_steps", 0)
        complete = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        if not steps or not complete or not self._kv_transfer_config.is_kv_producer:
            return False, None
        self._meta.sends[request.request_id] = steps
        return True, {"do_remote_prefill": True}

    def start_load_kv(self, *_: Any, **__: Any) -> None:
        """Worker's side: not used, see :class:`DryTransfers`."""

    def wait_for_layer_load(self, *_: Any, **__: Any) -> None:
        """Worker's side: not used."""

    def save_kv_layer(self, *_: Any, **__: Any) -> None:
        """Worker's side: not used."""

    def wait_for_save(self) -> None:
        """Worker's side: not used."""


class DryTransfers:
    """The worker's half: counts transfers down, one engine step at a time."""

    def __init__(self) -> None:
        self._loads: dict[str, tuple[int, bool]] = {}
        self._sends: dict[str, int] = {}

    def step(self, meta: Any) -> KVConnectorOutput | None:
        """What has finished by the end of this step, ``None`` when nothing has."""
        if isinstance(meta, DryMetadata):
            self._loads |= meta.loads
            self._sends |= meta.sends
        arrived = _due(self._loads, ((key, steps) for key, (steps, _) in self._loads.items()))
        broken = {key for key in arrived if self._loads[key][1]}
        sent = _due(self._sends, self._sends.items())
        self._loads = {key: (steps - 1, bad) for key, (steps, bad) in self._loads.items() if key not in arrived}
        self._sends = {key: steps - 1 for key, steps in self._sends.items() if key not in sent}
        if not arrived and not sent:
            return None
        output = KVConnectorOutput(finished_sending=sent or None, finished_recving=arrived or None)
        if broken:
            output.failed_recving = broken
        return output


def _due(pending: dict[str, Any], left: Iterable[tuple[str, int]]) -> set[str]:
    return {key for key, steps in left if steps <= 1 and key in pending}


def register() -> None:
    """Make ``--kv-transfer-config '{"kv_connector": "DryConnector", ...}'`` find the class."""
    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, __name__, DryConnector.__name__)
