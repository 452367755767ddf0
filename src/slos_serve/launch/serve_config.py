"""What one ``slos-serve serve`` runs: settled by the command, read back by the process that starts replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from slos_serve.core.redaction import redacted
from slos_serve.launch.endpoint import Endpoint
from slos_serve.launch.server import START_TIMEOUT_S
from slos_serve.routing.settings import Order
from slos_serve.vllm_plugin.config import PluginConfig, invalid_field


class ServeConfig(BaseModel):
    """Everything that is settled before a server starts; holds no secret.

    Attributes:
        model: what vLLM loads.
        vllm_args: arguments of vLLM's server, API keys left out.
        endpoint: where it listens.
        plugin: the plug-in's configuration.
        replicas: how many Ray Serve runs; ``None`` starts one server of vLLM's.
        order: whom the router asks first.
        startup_timeout_s: how long the server may take to answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    vllm_args: tuple[str, ...] = ()
    endpoint: Endpoint = Endpoint()
    plugin: PluginConfig = PluginConfig()
    replicas: int | None = None
    order: Order = Order.PREFIX
    startup_timeout_s: float = START_TIMEOUT_S

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(self.model_dump_json(exclude_unset=True), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The inverse of :meth:`write`.

        Raises:
            InvalidFieldError: a key or a value cannot be used.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as fault:
            raise invalid_field(fault, cls, where=str(path)) from None

    def shown(self) -> dict[str, Any]:
        """As it may be written down or printed."""
        shown: dict[str, Any] = redacted(self.model_dump(mode="json"))
        return shown
