"""Reading composed YAML nodes, which know their lines, into checked values."""

from __future__ import annotations

import re
from collections.abc import Mapping

import yaml

from slos_serve.core.errors import InvalidFieldError
from slos_serve.core.slo import check_number

MOST_WHOLE = 10_000_000
_SCIENTIFIC = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


class NodeReader:
    """Values of YAML nodes; a fault names the file and the line.

    Args:
        name: what errors call the file.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._scalars = yaml.constructor.SafeConstructor()

    def _mapping(self, node: yaml.Node, field: str, allowed: tuple[str, ...] | None) -> dict[str, yaml.Node]:
        """Values by key; an empty value (``batch:``) counts as an empty mapping."""
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise InvalidFieldError(field, shown(node), "a mapping (key: value)", self._where(node))
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self._name_of(key_node, f"key of {field}")
            inner = key if field == "class file" else f"{field}.{key}"
            if allowed is not None and key not in allowed:
                raise InvalidFieldError(f"key of {field}", key, f"one of {list(allowed)}", self._where(key_node))
            if key in found:
                raise InvalidFieldError(inner, "given twice", "once", self._where(key_node))
            found[key] = value
        return found

    def _number(
        self,
        keys: Mapping[str, yaml.Node],
        field: str,
        key: str,
        high: float,
        low: float = 0.0,
        low_included: bool = False,
    ) -> float | None:
        if key not in keys:
            return None
        name = f"{field}.{key}" if field else key
        value, where = self._scalar(keys[key]), self._where(keys[key])
        return check_number(name, value, low=low, high=high, low_included=low_included, where=where)

    def _whole(self, keys: Mapping[str, yaml.Node], field: str, key: str, low: int) -> int | None:
        if key not in keys:
            return None
        value = self._scalar(keys[key])
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MOST_WHOLE:
            allowed = f"a whole number in [{low}, {MOST_WHOLE}]"
            raise InvalidFieldError(f"{field}.{key}", value, allowed, self._where(keys[key]))
        return value

    def _scalar(self, node: yaml.Node) -> object:
        """The node's value as YAML types it; what it is called when it is no scalar or not what its tag says.

        Two surprises of YAML 1.1 are left out: ``1e3`` is a number, and ``12:30`` is none.
        """
        if not isinstance(node, yaml.ScalarNode):
            return shown(node)
        try:
            value: object = self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError):
            return node.value
        if node.style is None and _SCIENTIFIC.fullmatch(node.value):
            return float(node.value)
        return node.value if isinstance(value, int | float) and ":" in node.value else value

    def _name_of(self, node: yaml.Node, field: str) -> str:
        """Text of a name as written: a class may be called ``no`` or ``7b`` without quotes."""
        if not isinstance(node, yaml.ScalarNode):
            raise InvalidFieldError(field, shown(node), "a name", self._where(node))
        return str(node.value)

    def _where(self, node: yaml.Node) -> str:
        return f"{self._name}:{node.start_mark.line + 1}"

    def _placed(self, error: InvalidFieldError, node: yaml.Node | None) -> InvalidFieldError:
        where = self._name if node is None else self._where(node)
        return InvalidFieldError(error.field, error.given, error.allowed, where)


def shown(node: yaml.Node) -> str:
    """What errors call a node that is no scalar of the right kind."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
