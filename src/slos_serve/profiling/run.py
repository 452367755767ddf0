"""Profiles a model: starts the engine as the server would, keeps it supplied with requests, fits what it measured.

The engine core runs in its own process and its outputs are detokenised in this one, as in the server, with the server's
defaults for batch size and sampling. Two kinds of random-token prompts keep the grid reachable: a pool of requests that
decode for as long as the run lasts, and streams of prompts that ask for one token each. Nothing hits a prefix cache.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from slos_serve.core.errors import (
    InvalidFieldError,
    SlosServeError,
    UnsupportedEngineError,
)
from slos_serve.core.redaction import redacted_arguments, secrets_of
from slos_serve.files.engine_identity import CONFIGURATION_FIELDS, model_label
from slos_serve.files.profile_file import Profile
from slos_serve.launch.options import without_option
from slos_serve.perf.batch_time import BatchShape
from slos_serve.perf.fit import HELD_OUT_EVERY, Sample, fit_held_out
from slos_serve.perf.residuals import FOLLOWED, error_by_region, error_followed, ratio_quantiles
from slos_serve.profiling.scheduler import MAX_DECODES_ENV, SAMPLES_ENV, SEED_ENV
from slos_serve.profiling.stolen_time import DISTURBED_SHARE, undisturbed
from slos_serve.vllm_plugin.identity import EngineIdentity, identity_of

SERVER_PARSER_HOMES = (
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",
)
SCHEDULER_CLS = "slos_serve.profiling.scheduler.ProfilingScheduler"
DEFAULT_DURATION_S = 60.0
MAX_DECODES_CPU = 32
MAX_DECODES_GPU = 256
PREFILL_STREAMS = 16
SHORT_PROMPT_TOKENS = 16
LONG_PROMPT_TOKENS = 4096
# Of the pool, this part has short prompts, so that many decodes with little context are there early.
SHORT_SHARE = 0.7
# Part of the KV cache that the prompts of the pool may fill; the rest is for their growth and the prefill streams.
POOL_KV_SHARE = 0.4
POLL_S = 0.25
# Fewer undisturbed batches than this make a poor fit: measuring then goes on for up to so many times the duration.
ENOUGH_SAMPLES = 60
MOST_STRETCH = 3.0
# An engine that has run no step for this long has died or hangs.
SILENCE_S = 300.0
REAP_S = 10.0
# Of a server's arguments; they change nothing about batches.
HTTP_OPTIONS = ("--host", "--port", "--uds", "--api-key", "--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certs")

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class ProfileRun:
    """What profiling an engine gave.

    Attributes:
        profile: the fitted model with its errors on held-out batches.
        samples: every measured batch that was kept, in order; every fourth was held out.
        num_disturbed: batches left out because the hypervisor took the processor away meanwhile.
        async_scheduling: whether the engine scheduled one step ahead.
        max_num_seqs: most requests that the engine runs at once.
    """

    profile: Profile
    samples: list[Sample]
    num_disturbed: int
    async_scheduling: bool
    max_num_seqs: int


def profile_engine(
    model: str,
    vllm_args: Sequence[str] = (),
    *,
    duration_s: float = DEFAULT_DURATION_S,
    seed: int = 0,
    label: str | None = None,
    progress: Progress | None = None,
) -> ProfileRun:
    """Measure batches over the grid on the real engine and fit the batch-time model.

    Args:
        model: what vLLM takes as ``--model``.
        vllm_args: any arguments of vLLM's server; those of its HTTP side change nothing.
        duration_s: seconds of measuring, after the engine has started and warmed up; up to :data:`MOST_STRETCH` times
            as long when a slow or busy machine has run fewer than :data:`ENOUGH_SAMPLES` undisturbed batches by then.
        seed: of the prompts, the grid and its order.
        label: name of the model in the profile; default its :func:`model_label`.
        progress: told the phase and the part of it that is done, in [0, 1].

    Raises:
        InvalidFieldError: ``duration_s`` is not positive, or too little was measured to fit.
        SlosServeError: the engine stopped running steps.
        SystemExit: vLLM's parser refused an argument (it has printed why).
    """
    if not 0.0 < duration_s < float("inf"):
        raise InvalidFieldError("duration", duration_s, "seconds, above 0")
    told = progress or _tell_nobody
    engine_args = parse_engine_args(model, vllm_args)
    engine_args.scheduler_cls = SCHEDULER_CLS
    with tempfile.TemporaryDirectory(prefix="slos-serve-profile-") as folder:
        file = Path(folder) / "samples.jsonl"
        with _environment(
            {
                SAMPLES_ENV: str(file),
                SEED_ENV: str(seed),
                MAX_DECODES_ENV: str(_max_decodes()),
            }
        ):
            try:
                identity, sampling = asyncio.run(_measure(engine_args, file, duration_s, seed, told))
            finally:
                _reap_engine()
        facts, measured = read_raw_samples(file)
    told("fit", 0.0)
    run = _fit(identity, facts, measured, label or model_label(model))
    conditions = f"slos-serve profile: {duration_s:g} s, seed {seed}, {len(run.samples)} batches ("
    conditions += f"{run.num_disturbed} disturbed ones left out), sampling {sampling}, "
    conditions += f"async scheduling {'on' if run.async_scheduling else 'off'}, arguments {_shown(vllm_args)}"
    told("fit", 1.0)
    return replace(run, profile=replace(run.profile, source=conditions))


def _fit(
    identity: EngineIdentity, facts: Mapping[str, Any], measured: Sequence[tuple[Sample, float]], label: str
) -> ProfileRun:
    """The profile of what was measured, disturbed batches left out."""
    samples = undisturbed(measured)
    fitted = fit_held_out(samples)
    profile = Profile(
        model_name=label,
        device=str(identity.device),
        engine="vllm",
        engine_version=str(identity.engine_version),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dtype=str(identity.dtype),
        tensor_parallel=identity.tensor_parallel or 1,
        kv_capacity_tokens=facts["kv_capacity_tokens"],
        block_size=facts["block_size"],
        max_num_batched_tokens=facts["max_num_batched_tokens"],
        model=fitted.model,
        residual_quantiles=ratio_quantiles(fitted.model, fitted.held_out),
        fit={
            **error_by_region(fitted.model, fitted.held_out),
            FOLLOWED: error_followed(fitted.model, samples, HELD_OUT_EVERY),
        },
        configuration={name: value for name, value in identity.known.items() if name in CONFIGURATION_FIELDS},
    )
    num_disturbed = len(measured) - len(samples)
    return ProfileRun(profile, samples, num_disturbed, facts["async_scheduling"], facts["max_num_seqs"])


def parse_engine_args(model: str, vllm_args: Sequence[str]) -> AsyncEngineArgs:
    """vLLM's own parser on its own server arguments."""
    parser = _server_parser(FlexibleArgumentParser(prog="vllm arguments"))
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", model, *vllm_args]))


def given_arguments(vllm_args: Sequence[str]) -> dict[str, Any]:
    """What vLLM's own parser makes of those arguments that are given, by name; defaults are left out."""
    parser = _server_parser(FlexibleArgumentParser(prog="vllm arguments"))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return dict(vars(parser.parse_args(list(vllm_args))))


def _server_parser(parser: Any) -> Any:
    """Add the arguments of vLLM's server; the module they live in moves between versions."""
    for home in SERVER_PARSER_HOMES:
        try:
            return import_module(home).make_arg_parser(parser)
        except ModuleNotFoundError as error:
            if error.name is None or not home.startswith(error.name):
                raise
    raise UnsupportedEngineError(f"vLLM {vllm.__version__} has its server's arguments in none of {SERVER_PARSER_HOMES}")


def engine_identity(model: str, vllm_args: Sequence[str] = ()) -> EngineIdentity:
    """Identity of the engine that these arguments would start, without starting it (reads the model's config)."""
    return identity_of(parse_engine_args(model, vllm_args).create_engine_config(UsageContext.OPENAI_API_SERVER))


def read_raw_samples(file: Path) -> tuple[dict[str, Any], list[tuple[Sample, float]]]:
    """What :class:`ProfilingScheduler` wrote: facts about the engine, then each batch with its stolen seconds."""
    lines = file.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise SlosServeError("the engine started without the profiling scheduler: nothing was measured")
    samples = []
    for line in lines[1:]:
        tokens, context, quad, seqs, prefill, duration_s, stolen = json.loads(line)
        sample = Sample(BatchShape(tokens, context, quad, seqs), duration_s, prefill_tokens=prefill)
        samples.append((sample, stolen))
    return json.loads(lines[0]), samples


async def _measure(
    engine_args: AsyncEngineArgs,
    file: Path,
    duration_s: float,
    seed: int,
    progress: Progress,
) -> tuple[EngineIdentity, str]:
    progress("start", 0.0)
    engine = AsyncLLM.from_engine_args(engine_args, usage_context=UsageContext.OPENAI_API_SERVER)
    progress("start", 1.0)
    try:
        load = _Load(engine, seed)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(stream) for stream in load.streams()]
            await _wait(file, duration_s, progress)
            for task in tasks:
                task.cancel()
        return identity_of(engine.vllm_config), load.sampling
    finally:
        engine.shutdown()


async def _wait(file: Path, duration_s: float, progress: Progress) -> None:
    """Until samples have come for ``duration_s``, the warm-up not counted; longer when that gave too few to fit."""
    size, grown_s, start_s = 0, time.monotonic(), None
    while True:
        await asyncio.sleep(POLL_S)
        now_s = time.monotonic()
        if file.stat().st_size > size:
            start_s = start_s or (now_s if size else None)
            size, grown_s = file.stat().st_size, now_s
        elif now_s - grown_s > SILENCE_S:
            raise SlosServeError(f"the engine has finished no step for {SILENCE_S:g} s")
        if start_s is not None:
            stretch = (now_s - start_s) / duration_s
            progress("measure", min(stretch, 1.0))
            # Counted only now: this process shares its cores with the engine that is measured.
            if stretch >= MOST_STRETCH or (stretch >= 1.0 and _num_undisturbed(file) >= ENOUGH_SAMPLES):
                return


def _num_undisturbed(file: Path) -> int:
    # The engine may be writing the last line.
    complete = file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()[1:]
    rows = [json.loads(line) for line in complete]
    return sum(row[-1] <= DISTURBED_SHARE * row[-2] for row in rows)


class _Load:
    """Keeps the engine supplied: a pool that decodes, streams that prefill."""

    def __init__(self, engine: AsyncLLM, seed: int) -> None:
        config = engine.vllm_config
        self._engine = engine
        self._rng = np.random.default_rng(seed)
        self._ids: Iterator[int] = itertools.count()
        self._vocabulary = config.model_config.get_vocab_size()
        self._detokenize = not config.model_config.skip_tokenizer_init
        self._defaults = config.model_config.get_diff_sampling_param()
        self._room = config.model_config.max_model_len - 1
        self._pool_size = min(_max_decodes(), max(1, config.scheduler_config.max_num_seqs // 2))
        self._longest = min(LONG_PROMPT_TOKENS, self._room * 3 // 4)
        blocks = config.cache_config.num_gpu_blocks or 0
        share = int(POOL_KV_SHARE * blocks * config.cache_config.block_size / self._pool_size)
        self._longest_in_pool = max(2 * SHORT_PROMPT_TOKENS, min(self._longest, 2 * share))

    @property
    def sampling(self) -> str:
        """The sampling defaults that requests ran with."""
        return ", ".join(f"{name} {value}" for name, value in self._defaults.items()) or "temperature 1.0"

    def streams(self) -> list[Any]:
        pool = [self._decode_stream(i < SHORT_SHARE * self._pool_size) for i in range(self._pool_size)]
        return [*pool, *(self._prefill_stream() for _ in range(PREFILL_STREAMS))]

    async def _decode_stream(self, short: bool) -> None:
        while True:
            low, high = SHORT_PROMPT_TOKENS, 4 * SHORT_PROMPT_TOKENS
            if not short:
                low, high = high, self._longest_in_pool
            prompt_tokens = self._log_uniform(low, high)
            await self._request(prompt_tokens, self._room - prompt_tokens)

    async def _prefill_stream(self) -> None:
        while True:
            await self._request(self._log_uniform(2 * SHORT_PROMPT_TOKENS, self._longest), 1)

    async def _request(self, prompt_tokens: int, max_tokens: int) -> None:
        params = SamplingParams(
            **{**self._defaults, "max_tokens": max_tokens},
            ignore_eos=True,
            detokenize=self._detokenize,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = self._rng.integers(0, self._vocabulary, prompt_tokens).tolist()
        async for _ in self._engine.generate({"prompt_token_ids": prompt}, params, f"profile-{next(self._ids)}"):
            pass

    def _log_uniform(self, low: int, high: int) -> int:
        top = max(1, min(high, self._longest))
        return int(np.exp(self._rng.uniform(np.log(min(low, top)), np.log(top))))


def _reap_engine() -> None:
    """Collect the engine's processes: this one may go on to serve for months, with them as zombies."""
    for process in multiprocessing.active_children():
        process.join(REAP_S)


def _shown(vllm_args: Sequence[str]) -> str:
    """The engine's arguments as a profile may show them: it is a file to be shared."""
    for name in HTTP_OPTIONS:
        vllm_args = without_option(vllm_args, name, None)
    return " ".join(redacted_arguments(vllm_args, secrets_of(os.environ))) or "none"


def _max_decodes() -> int:
    return MAX_DECODES_CPU if current_platform.is_cpu() else MAX_DECODES_GPU


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that the engine-core process inherits, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _tell_nobody(phase: str, done: float) -> None:
    """Progress that nobody asked for."""
