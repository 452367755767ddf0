"""Read the mix file: how much of which class a fleet is to serve, for ``slos-serve size``.

    peak_rps: 40                    # requests a second of all classes at the busiest time of the day
    arrivals: azure-conv            # default poisson
    day: [3, 2, 2, 4, 8, 10, 9, 5]  # relative rate through a day, in equal parts; default: a recorded day
    mix:
      chat:   {share: 60, like: chat}
      code:   {share: 30, like: coding}
      report: {share: 10, prompt_tokens: 6000, output_tokens: 400}

``share`` is relative to the others'. Lengths are those of a scenario (``like``), or log-normal with the means given and
a ``spread`` (the standard deviation of the logarithm). What a class is promised stands in the class file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from slos_serve.core.errors import InvalidFieldError
from slos_serve.files.yaml_nodes import NodeReader, shown

# The mean over prompts and outputs of the shipped tables of chat, code and papers.
DEFAULT_SPREAD = 0.8
MOST_RPS, MOST_TOKENS, MOST_SPREAD = 1e6, 1e7, 3.0
_TOP_KEYS = ("peak_rps", "arrivals", "day", "mix")
_CLASS_KEYS = ("share", "like", "prompt_tokens", "output_tokens", "spread")


@dataclass(frozen=True, slots=True)
class MixClass:
    """One class of a mix.

    Attributes:
        name: of its class.
        share: of the requests, relative to the others'.
        like: scenario whose lengths it has; ``None`` for those that follow.
        prompt_tokens, output_tokens: means.
        spread: standard deviation of the logarithm of both.
    """

    name: str
    share: float
    like: str | None = None
    prompt_tokens: float = math.nan
    output_tokens: float = math.nan
    spread: float = DEFAULT_SPREAD


@dataclass(frozen=True, slots=True)
class MixFile:
    """What a mix file says.

    Attributes:
        classes: at least one.
        peak_rps: requests a second at the busiest time; ``None`` where the command says it.
        arrivals: a process of :mod:`slos_serve.workload.arrivals`.
        day: relative rates of equal parts of a day; ``None`` for a recorded day.
    """

    classes: tuple[MixClass, ...]
    peak_rps: float | None = None
    arrivals: str = "poisson"
    day: tuple[float, ...] | None = None


def load_mix(path: Path) -> MixFile:
    """Read a mix file.

    Raises:
        InvalidFieldError: the file cannot be read, is no YAML, or holds a field that cannot be used; ``where`` is
            ``file:line``.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFieldError("mix file", str(path), f"a readable UTF-8 file ({error})") from error
    except yaml.YAMLError as error:
        raise InvalidFieldError("mix file", str(path), f"YAML ({error})") from error
    except RecursionError as error:
        raise InvalidFieldError("mix file", "endless nesting", "a few levels", str(path)) from error
    if root is None:
        raise InvalidFieldError("mix file", "", "a mapping with the key 'mix'", f"{path}:1")
    return _MixReader(str(path)).mix_file(root)


class _MixReader(NodeReader):
    """Turns composed YAML nodes into a mix."""

    def mix_file(self, root: yaml.Node) -> MixFile:
        top = self._mapping(root, "mix file", _TOP_KEYS)
        if "mix" not in top:
            raise InvalidFieldError("mix", None, "the classes with their shares", self._where(root))
        found = self._mapping(top["mix"], "mix", None)
        if not found:
            raise InvalidFieldError("mix", "empty", "at least one class", self._where(top["mix"]))
        arrivals = self._name_of(top["arrivals"], "arrivals") if "arrivals" in top else "poisson"
        return MixFile(
            tuple(self._class(name, node) for name, node in found.items()),
            self._number(top, "", "peak_rps", MOST_RPS),
            arrivals,
            self._day(top["day"]) if "day" in top else None,
        )

    def _class(self, name: str, node: yaml.Node) -> MixClass:
        field = f"mix.{name}"
        keys = self._mapping(node, field, _CLASS_KEYS)
        share = self._number(keys, field, "share", MOST_RPS)
        lengths = [self._number(keys, field, key, MOST_TOKENS) for key in ("prompt_tokens", "output_tokens")]
        spread = self._number(keys, field, "spread", MOST_SPREAD, low_included=True)
        if share is None:
            raise InvalidFieldError(f"{field}.share", None, "a number above 0", self._where(node))
        if "like" in keys:
            if any(key in keys for key in ("prompt_tokens", "output_tokens", "spread")):
                raise InvalidFieldError(field, "both", "either 'like' or its own lengths", self._where(node))
            return MixClass(name, share, self._name_of(keys["like"], f"{field}.like"))
        prompt, output = lengths
        if prompt is None or output is None:
            allowed = "'like', or 'prompt_tokens' and 'output_tokens'"
            raise InvalidFieldError(field, "no lengths", allowed, self._where(node))
        return MixClass(name, share, None, prompt, output, DEFAULT_SPREAD if spread is None else spread)

    def _day(self, node: yaml.Node) -> tuple[float, ...]:
        if not isinstance(node, yaml.SequenceNode) or len(node.value) < 2:
            raise InvalidFieldError("day", shown(node), "a list of two or more numbers", self._where(node))
        rates = [self._number({"day": each}, "", "day", MOST_RPS, low_included=True) for each in node.value]
        known = tuple(rate for rate in rates if rate is not None)
        if max(known) <= 0.0:
            raise InvalidFieldError("day", "zeros", "at least one number above 0", self._where(node))
        return known
