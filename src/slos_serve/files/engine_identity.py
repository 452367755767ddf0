"""Which engine a batch-time profile belongs to, and how far another engine is from it.

The identity is a fingerprint of the resolved configuration: everything that changes how long a batch takes. Two
identities are equal, near or far. Near ones (a patch release, another ``max_num_seqs``, a field that an old profile
does not have) are planned with: the online correction follows what is left of the error. Far ones (another device,
quantisation, parallel layout) predict a different machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

Value = str | int | bool
# Times are extrapolated beyond the largest batch measured; further than this they are guesses.
MOST_TOKENS_STRETCH = 4
NONE = "none"
_SNAPSHOT = re.compile(r"(?:^|/)models--(?P<name>[^/]+)/snapshots/[^/]+/?$")
_RELEASE = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """What a profile was, or must have been, measured on. ``None`` is unknown, in each field.

    Attributes:
        model: label of the model, see :func:`model_label`.
        device: name of the accelerator, or of the CPU with its cores.
        engine_version: vLLM's.
        dtype: of the weights' computation.
        tensor_parallel, pipeline_parallel, data_parallel: sizes of the groups.
        expert_parallel: experts are spread over the group.
        quantization: method, ``none`` without.
        kv_cache_dtype: of the KV cache, ``auto`` resolved to the model's.
        eager: neither compiled nor with graphs.
        model_runner: ``V1`` or ``V2``.
        speculation: method and number of drafts, ``none`` without.
        max_num_batched_tokens, max_num_seqs: largest batch.
        async_scheduling: one step is scheduled ahead.
    """

    model: str | None = None
    device: str | None = None
    engine_version: str | None = None
    dtype: str | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    data_parallel: int | None = None
    expert_parallel: bool | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    eager: bool | None = None
    model_runner: str | None = None
    speculation: str | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    async_scheduling: bool | None = None

    @property
    def known(self) -> dict[str, Value]:
        """The fields that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits over all fields."""
        text = json.dumps(self.known, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:8]


# Kept under a name of their own in a profile since its first format; the rest is in its ``configuration``.
FIRST_FIELDS = ("model", "device", "engine_version", "dtype", "tensor_parallel", "max_num_batched_tokens")
CONFIGURATION_FIELDS: Mapping[str, type] = {
    "pipeline_parallel": int,
    "data_parallel": int,
    "expert_parallel": bool,
    "quantization": str,
    "kv_cache_dtype": str,
    "eager": bool,
    "model_runner": str,
    "speculation": str,
    "max_num_seqs": int,
    "async_scheduling": bool,
}


@dataclass(frozen=True, slots=True)
class Difference:
    """A field in which an engine differs from a profile.

    Attributes:
        field: its name.
        here, there: its value in the engine and in the profile; ``None`` is unknown.
        far: whether the profile must not be used.
    """

    field: str
    here: Value | None
    there: Value | None
    far: bool

    def __str__(self) -> str:
        if self.there is None or self.here is None:
            known, where = (self.here, "here") if self.there is None else (self.there, "in the profile")
            return f"{self.field} is {known!r} {where} and unknown {'in the profile' if where == 'here' else 'here'}"
        return f"{self.field} is {self.here!r} here and {self.there!r} in the profile"


def describe(found: Sequence[Difference]) -> str:
    """One sentence about a profile that is used in spite of these differences."""
    far = any(one.far for one in found)
    kind = "the profile was measured on something else" if far else "the profile fits approximately"
    ordered = sorted(found, key=lambda one: not one.far)
    return f"{kind}: {'; '.join(map(str, ordered))}. Planned step times follow measured ones while serving."


def differences(here: EngineIdentity, there: EngineIdentity) -> list[Difference]:
    """Every field in which the engine ``here`` differs from the profile's ``there``; unknown in both is none."""
    found = []
    for field in fields(EngineIdentity):
        ours, theirs = getattr(here, field.name), getattr(there, field.name)
        if ours == theirs:
            continue
        far = ours is not None and theirs is not None and _is_far(field.name, ours, theirs, here)
        found.append(Difference(field.name, ours, theirs, far))
    return found


def _is_far(name: str, here: Any, there: Any, engine: EngineIdentity) -> bool:
    if name == "engine_version":
        ours, theirs = _RELEASE.match(here), _RELEASE.match(there)
        return ours is None or theirs is None or ours.groups() != theirs.groups()
    if name == "max_num_batched_tokens":
        return bool(here > MOST_TOKENS_STRETCH * there)
    if name == "data_parallel":
        # Ranks of a dense model run apart; experts are exchanged between ranks in every step.
        return engine.expert_parallel is True
    if name == "speculation":
        # N-grams are looked up on the CPU; a draft model's steps belong to the batch.
        return any(not value.startswith(("ngram", NONE)) for value in (here, there))
    return name not in ("max_num_seqs", "async_scheduling")


def model_label(model: str) -> str:
    """Name a model goes by in profiles.

    A hub name is its own label, also where it was replaced by its local snapshot
    (``.../models--ORG--NAME/snapshots/HASH`` is ``ORG/NAME``); another local folder goes by its last component.
    """
    snapshot = _SNAPSHOT.search(model)
    if snapshot is not None:
        return snapshot["name"].replace("--", "/")
    path = Path(model).expanduser()
    if not path.is_dir():
        return model
    snapshot = _SNAPSHOT.search(str(path.resolve()))
    return path.resolve().name if snapshot is None else snapshot["name"].replace("--", "/")
