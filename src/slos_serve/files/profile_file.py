"""Batch-time profiles on disk: one JSON file per engine configuration, its samples in a CSV beside it.

A profile says what it was measured on, and :meth:`Profile.check_matches` refuses to predict what is far from it: a plan
made with another machine's times breaks promises without anybody seeing why. Files are written whole or not at all.
"""

from __future__ import annotations

import csv
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from slos_serve.core.errors import InvalidFieldError, ProfileMismatchError
from slos_serve.core.slo import check_number
from slos_serve.files.cache_folder import cache_folder, lookup_folders
from slos_serve.files.engine_identity import (
    CONFIGURATION_FIELDS,
    FIRST_FIELDS,
    Difference,
    EngineIdentity,
    Value,
    differences,
)
from slos_serve.perf.batch_time import BatchShape, BatchTimeModel
from slos_serve.perf.fit import Sample
from slos_serve.perf.residuals import RegionError

FORMAT = "slos-serve-profile/1"
SAMPLE_COLUMNS = (
    "new_tokens",
    "context_tokens",
    "quad_tokens2",
    "num_seqs",
    "draft_steps",
    "draft_tokens",
    "prefill_tokens",
    "duration_s",
)
_COLUMNS_WITHOUT_DRAFTS = tuple(name for name in SAMPLE_COLUMNS if name != "draft_tokens")
_COEFFICIENTS = tuple(f.name for f in fields(BatchTimeModel))
_TEXT_FIELDS = ("model", "device", "engine", "engine_version", "created", "dtype", "source")
_COUNT_FIELDS = ("tensor_parallel", "kv_capacity_tokens", "block_size", "max_num_batched_tokens")
_LARGEST_COUNT = 1e12


@dataclass(frozen=True)
class Profile:
    """A measured batch-time model and what it was measured on.

    Attributes:
        model_name: label of the model, see :func:`model_label` (``model`` in the file).
        device: name of the device, with the core count for a CPU.
        engine, engine_version: ``vllm`` and its version.
        created: date and time, ISO 8601 with zone.
        dtype: of the weights' computation.
        tensor_parallel: devices that share one copy of the model.
        kv_capacity_tokens: tokens of KV cache that fit.
        block_size: tokens a KV block.
        max_num_batched_tokens: most tokens a batch may hold.
        model: the coefficients (``batch_time`` in the file).
        residual_quantiles: quantile -> ratio measured / predicted, on held-out batches.
        fit: error on held-out batches by region.
        source: how it came about: the command without its secrets, seed, seconds, sampling, scheduling.
        configuration: what else of the engine's configuration it was measured on, by the names of
            :data:`slos_serve.files.engine_identity.CONFIGURATION_FIELDS`; empty in old profiles.
    """

    model_name: str
    device: str
    engine: str
    engine_version: str
    created: str
    dtype: str
    tensor_parallel: int
    kv_capacity_tokens: int
    block_size: int
    max_num_batched_tokens: int
    model: BatchTimeModel
    residual_quantiles: Mapping[float, float] = field(default_factory=dict)
    fit: Mapping[str, RegionError] = field(default_factory=dict)
    source: str = ""
    configuration: Mapping[str, Value] = field(default_factory=dict)

    @property
    def identity(self) -> EngineIdentity:
        """The engine it was measured on; unknown where an old profile does not say."""
        first = {name: getattr(self, name) for name in FIRST_FIELDS if name != "model"}
        return EngineIdentity(model=self.model_name, **first, **self.configuration)  # type: ignore[arg-type]

    def check_matches(self, engine: EngineIdentity, *, allow_mismatch: bool = False) -> list[Difference]:
        """Compare with the engine that is to be predicted.

        Args:
            engine: its identity; what is unknown in it is not compared.
            allow_mismatch: return far differences too instead of refusing.

        Returns:
            What differs and may be planned with.

        Raises:
            ProfileMismatchError: listing everything that is too far from what was measured.
        """
        found = [one for one in differences(engine, self.identity) if one.here is not None]
        far = [one for one in found if one.far]
        if far and not allow_mismatch:
            raise ProfileMismatchError(
                "this profile was measured on something else: "
                + "; ".join(map(str, far))
                + ". Measure again with 'slos-serve profile MODEL', or use it anyway with --allow-profile-mismatch."
            )
        return found

    def quantile_ratio(self, quantile: float, default: float = 1.0) -> float:
        """Ratio measured / predicted at a stored quantile, ``default`` when the profile has none."""
        return self.residual_quantiles.get(quantile, default)


def save_profile(profile: Profile, path: Path, samples: Sequence[Sample] | None = None) -> None:
    """Write the profile, and the samples beside it when given; parent folders are made."""
    record: dict[str, Any] = {"format": FORMAT, "model": profile.model_name}
    record |= {name: getattr(profile, name) for name in _TEXT_FIELDS[1:-1]}
    record |= {name: getattr(profile, name) for name in _COUNT_FIELDS}
    record["batch_time"] = {name: getattr(profile.model, name) for name in _COEFFICIENTS}
    record["residual_quantiles"] = {f"{q:g}": ratio for q, ratio in profile.residual_quantiles.items()}
    record["fit"] = {region: asdict(error) for region, error in profile.fit.items()}
    record["configuration"] = dict(profile.configuration)
    record["source"] = profile.source
    if samples is not None:
        save_samples(samples, samples_path(path))
    _write_atomically(path, json.dumps(record, indent=2) + "\n")


def profile_path(name: str) -> Path:
    """Where a profile lies: a shipped one by its name, any other by its path."""
    shipped = Path(str(resources.files("slos_serve") / "profiles" / f"{name}.json"))
    return shipped if "/" not in name and shipped.is_file() else Path(name)


def load_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        InvalidFieldError: naming the file and the field that cannot be used; also when the file cannot be read.
    """
    where = str(path)
    record = _read_object(path)
    if record.get("format") != FORMAT:
        raise InvalidFieldError("format", record.get("format"), repr(FORMAT), where)
    text = {name: _text(record, name, where) for name in _TEXT_FIELDS}
    counts = {name: _count(record, name, where) for name in _COUNT_FIELDS}
    return Profile(
        model_name=text["model"],
        device=text["device"],
        engine=text["engine"],
        engine_version=text["engine_version"],
        created=text["created"],
        dtype=text["dtype"],
        tensor_parallel=counts["tensor_parallel"],
        kv_capacity_tokens=counts["kv_capacity_tokens"],
        block_size=counts["block_size"],
        max_num_batched_tokens=counts["max_num_batched_tokens"],
        model=_batch_time(record, where),
        residual_quantiles=_quantiles(record, where),
        fit=_regions(record, where),
        source=text["source"],
        configuration=_configuration(record, where),
    )


def samples_path(profile_path: Path) -> Path:
    """Where the samples of a profile lie: ``NAME.samples.csv`` beside ``NAME.json``."""
    return profile_path.with_name(profile_path.stem + ".samples.csv")


def save_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write measured batches as CSV with a header, times to the microsecond."""
    lines = [",".join(SAMPLE_COLUMNS)]
    for sample in samples:
        shape = sample.shape
        numbers = [shape.new_tokens, shape.context_tokens, shape.quad_tokens2, shape.num_seqs, shape.draft_steps]
        counts = [*numbers, shape.draft_tokens]
        lines.append(",".join(map(str, counts)) + f",{sample.prefill_tokens},{sample.duration_s:.6f}")
    _write_atomically(path, "\n".join(lines) + "\n")


def load_samples(path: Path) -> list[Sample]:
    """Read measured batches.

    Raises:
        InvalidFieldError: naming file, line and column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidFieldError("samples file", str(path), f"a readable CSV file ({error})") from error
    if rows and tuple(rows[0]) == _COLUMNS_WITHOUT_DRAFTS:  # written before drafts to verify were kept
        at = SAMPLE_COLUMNS.index("draft_tokens")
        rows = [list(SAMPLE_COLUMNS), *([*row[:at], "0", *row[at:]] for row in rows[1:])]
    if not rows or tuple(rows[0]) != SAMPLE_COLUMNS:
        raise InvalidFieldError("header", rows[0] if rows else "", ",".join(SAMPLE_COLUMNS), str(path))
    return [_sample(row, f"{path}, line {number}") for number, row in enumerate(rows[1:], start=2)]


def default_profile_path(engine: EngineIdentity) -> Path:
    """Where the profile of this engine is kept: in the user's cache folder, told apart by its fingerprint."""
    shown = (engine.model, engine.device, f"vllm{engine.engine_version}", engine.dtype, f"tp{engine.tensor_parallel}")
    key = "-".join(str(part) for part in (*shown, engine.fingerprint))
    name = re.sub(r"[^A-Za-z0-9._]+", "-", key).strip("-").lower()
    return cache_folder() / "profiles" / f"{name}.json"


def find_profile(engine: EngineIdentity) -> tuple[Path, Profile] | None:
    """The kept profile of this engine, else the nearest that may be used for it, ``None`` when there is none.

    Raises:
        InvalidFieldError: the one of exactly this engine is broken.
    """
    own = default_profile_path(engine)
    kept = [(own, load_profile(own))] if own.is_file() else []
    for path in (path for folder in lookup_folders() for path in sorted((folder / "profiles").glob("*.json"))):
        if path != own:
            with suppress(InvalidFieldError):
                kept.append((path, load_profile(path)))
    usable = []
    for path, profile in kept:
        found = differences(engine, profile.identity)
        if not any(one.far for one in found):
            usable.append((len(found), path != own, path, profile))
    if not usable:
        return None
    _, _, path, profile = min(usable, key=lambda one: one[:3])
    return path, profile


def _read_object(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidFieldError("profile file", str(path), f"a readable JSON file ({error})") from error
    if not isinstance(record, dict):
        raise InvalidFieldError("profile file", type(record).__name__, "a JSON object", str(path))
    return record


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise InvalidFieldError(name, value, "a string", where)
    return value


def _count(record: Mapping[str, Any], name: str, where: str) -> int:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_COUNT:
        raise InvalidFieldError(name, value, f"a whole number from 1 to {_LARGEST_COUNT}", where)
    return value


def _object(record: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = record.get(name)
    if not isinstance(value, dict):
        raise InvalidFieldError(name, value, "an object", where)
    return value


def _configuration(record: Mapping[str, Any], where: str) -> dict[str, Value]:
    given = record.get("configuration", {})
    if not isinstance(given, dict):
        raise InvalidFieldError("configuration", given, "an object", where)
    for name, value in given.items():
        kind = CONFIGURATION_FIELDS.get(name)
        if kind is None:
            raise InvalidFieldError("configuration", name, f"one of {list(CONFIGURATION_FIELDS)}", where)
        if type(value) is not kind:
            raise InvalidFieldError(f"configuration.{name}", value, f"a value of type {kind.__name__}", where)
    return given


def _batch_time(record: Mapping[str, Any], where: str) -> BatchTimeModel:
    given = _object(record, "batch_time", where)
    values = {
        name: check_number(f"batch_time.{name}", given.get(name), low=0.0, high=1e6, low_included=True, where=where)
        for name in _COEFFICIENTS
    }
    try:
        return BatchTimeModel(**values)
    except InvalidFieldError as error:
        raise InvalidFieldError(error.field, error.given, error.allowed, where) from error


def _quantiles(record: Mapping[str, Any], where: str) -> dict[float, float]:
    quantiles = {}
    for key, ratio in _object(record, "residual_quantiles", where).items():
        try:
            quantile = float(key)
        except ValueError:
            quantile = 0.0
        if not 0.0 < quantile < 1.0:
            raise InvalidFieldError("residual_quantiles", key, "keys that are numbers in (0, 1)", where)
        quantiles[quantile] = check_number(f"residual_quantiles.{key}", ratio, low=0.0, high=1e6, where=where)
    return quantiles


def _regions(record: Mapping[str, Any], where: str) -> dict[str, RegionError]:
    regions = {}
    for region, given in _object(record, "fit", where).items():
        try:
            regions[region] = RegionError(**given)
        except TypeError as error:
            names = ", ".join(f.name for f in fields(RegionError))
            raise InvalidFieldError(f"fit.{region}", given, f"an object with {names}", where) from error
    return regions


def _sample(row: Sequence[str], where: str) -> Sample:
    if len(row) != len(SAMPLE_COLUMNS):
        raise InvalidFieldError("columns", len(row), f"{len(SAMPLE_COLUMNS)} columns", where)
    counts = []
    for name, text in zip(SAMPLE_COLUMNS[:-1], row[:-1], strict=True):
        if not text.isdecimal():
            raise InvalidFieldError(name, text, "a whole number, 0 or more", where)
        counts.append(int(text))
    try:
        return Sample(BatchShape(*counts[:6]), float(row[-1]), prefill_tokens=counts[6])
    except InvalidFieldError as error:
        raise InvalidFieldError(error.field, error.given, error.allowed, where) from error
    except ValueError as error:
        raise InvalidFieldError(SAMPLE_COLUMNS[-1], row[-1], "a number of seconds above 0", where) from error


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    written = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes the file private; a profile is for everyone whom the umask lets read.
        umask = os.umask(0)
        os.umask(umask)
        written.chmod(0o666 & ~umask)
        written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
