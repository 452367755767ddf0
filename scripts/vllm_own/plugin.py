"""A pytest plug-in that runs vLLM's own scheduler tests with SLOScheduler in place of vLLM's schedulers.

``VLLM_OWN_MODE`` says how: ``stock`` (vLLM's classes), ``bare`` (ours without a batch-time profile), ``profile`` (with
one), ``promise`` (with one, and a promise on every request). The models that the tests name are small configurations in
a folder of our own, since only their shapes matter to a scheduler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODE = os.environ.get("VLLM_OWN_MODE", "stock")
FOLDER = Path(os.environ["VLLM_OWN_FOLDER"])
PROMISE = {"slo_ttft_ms": 2000, "slo_tpot_ms": 100}
OPT = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 768, "num_attention_heads": 12,
       "num_hidden_layers": 12, "ffn_dim": 3072, "vocab_size": 50272, "max_position_embeddings": 2048,
       "word_embed_proj_dim": 768, "do_layer_norm_before": True, "eos_token_id": 2,
       "torch_dtype": "float16"}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32,
         "num_key_value_heads": 8, "num_hidden_layers": 16, "intermediate_size": 8192, "vocab_size": 128256,
         "max_position_embeddings": 131072, "torch_dtype": "bfloat16"}  # fmt: skip
QWEN = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936}
VISION = {"model_type": "clip_vision_model", "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24,
          "intermediate_size": 4096, "image_size": 336, "patch_size": 14, "projection_dim": 768}  # fmt: skip
LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
         "text_config": {**LLAMA, "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096},
         "vision_config": VISION, "torch_dtype": "float16"}  # fmt: skip
MODELS = {
    "facebook/opt-125m": OPT,
    "facebook/opt-350m": OPT,
    "meta-llama/Llama-3.2-1B-Instruct": LLAMA,
    "Qwen/Qwen3-0.6B": QWEN,
    "llava-hf/llava-1.5-7b-hf": LLAVA,
}


def pytest_configure(config: pytest.Config) -> None:
    """Prepare models and classes before any test module is imported."""
    for mark in ("cpu_test", "skip_global_cleanup", "optional", "slow_test"):
        config.addinivalue_line("markers", f"{mark}: vLLM's")
    _models()
    _images()
    if MODE != "stock":
        _configure_ours()
        _replace()


def pytest_unconfigure() -> None:
    """Leave no telemetry thread behind."""
    for scheduler in _made:
        with contextlib.suppress(Exception):  # a mock in the place of a connector
            scheduler.shutdown()


@pytest.fixture
def caplog_vllm(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Fixture of vLLM's own conftest: its log, seen by caplog."""
    logger = logging.getLogger("vllm")
    before, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.INFO):
        yield caplog
    logger.propagate = before


_made: list[Any] = []


def _models() -> None:
    """A hub cache that holds the configurations."""
    hub = FOLDER / "hub"
    for name, config in MODELS.items():
        snapshot = hub / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")
        refs = snapshot.parent.parent / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text("0", encoding="utf-8")


def _images() -> None:
    """Multimodal models without their processors."""
    from unittest import mock

    from vllm.config import model
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.v1 import structured_output
    from vllm.v1.core.sched import scheduler

    registry, inspect = ModelRegistry, ModelRegistry.inspect_model_cls

    def inspected(architectures: Any, *args: Any, **kwargs: Any) -> Any:
        if "LlavaForConditionalGeneration" not in architectures:
            return inspect(architectures, *args, **kwargs)
        info, _ = inspect(["LlamaForCausalLM"], *args, **kwargs)
        return dataclasses.replace(info, supports_multimodal=True), "LlavaForConditionalGeneration"

    registry.inspect_model_cls = inspected
    model.ModelConfig._supports_multimodal_inputs = lambda self: self.is_multimodal_model

    def budget(vllm_config: Any, *_: Any, **__: Any) -> Any:
        tokens = vllm_config.scheduler_config.max_num_encoder_input_tokens
        return mock.Mock(
            encoder_compute_budget=tokens,
            encoder_cache_size=vllm_config.scheduler_config.encoder_cache_size,
            mm_max_toks_per_item={"image": 576},
        )

    scheduler.MultiModalBudget = budget
    tokenizer = structured_output.cached_tokenizer_from_config

    def tokenizer_or_none(*args: Any, **kwargs: Any) -> Any:
        try:
            return tokenizer(*args, **kwargs)
        except (OSError, ValueError):
            return None

    structured_output.cached_tokenizer_from_config = tokenizer_or_none


def _configure_ours() -> None:
    from slos_serve.files import profile_file
    from slos_serve.perf.batch_time import BatchTimeModel
    from slos_serve.vllm_plugin import compat
    from slos_serve.vllm_plugin.config import CLASSES_ENV, PROFILE_ENV

    (FOLDER / "classes.yaml").write_text("classes:\n  chat: {ttft_ms: 1000, tpot_ms: 100}\n", encoding="utf-8")
    os.environ[CLASSES_ENV] = str(FOLDER / "classes.yaml")
    if MODE == "bare":
        return
    model = BatchTimeModel(0.11e-3, 8e-3, 0.0385e-3, 19.9e-3, 6.3e-7, 7.1e-9)  # OPT-13B on one A100
    profile = profile_file.Profile(
        "any", "any", "vllm", compat.engine_version(), "now", "float16", 1, 64_000, 16, 2048, model
    )
    profile_file.save_profile(profile, FOLDER / "profile.json")
    os.environ[PROFILE_ENV] = str(FOLDER / "profile.json")
    profile_file.Profile.check_matches = lambda *_, **__: []


def _replace() -> None:
    """Put ours where the tests import vLLM's schedulers from."""
    # Before the classes are replaced: vLLM's other schedulers extend them.
    from vllm.v1.core.sched import async_scheduler, diffusion_scheduler, scheduler  # noqa: F401

    from slos_serve.vllm_plugin import compat
    from slos_serve.vllm_plugin import scheduler as ours

    stock = {"AsyncScheduler": async_scheduler.AsyncScheduler, "Scheduler": scheduler.Scheduler}
    original = compat.stock_class

    def stock_class(config: Any) -> type:
        for module, name in ((async_scheduler, "AsyncScheduler"), (scheduler, "Scheduler")):
            setattr(module, name, stock[name])
        try:
            return original(config)
        finally:
            async_scheduler.AsyncScheduler, scheduler.Scheduler = replaced_async, replaced_sync

    replaced_async = _promising(ours.SLOScheduler)
    replaced_sync = _promising(ours.SLOSyncScheduler)
    compat.stock_class = stock_class
    async_scheduler.AsyncScheduler, scheduler.Scheduler = replaced_async, replaced_sync


def _promising(base: type[Any]) -> type[Any]:
    """Ours with a promise on every request that brings none."""

    class Own(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _made.append(self)

        def add_request(self, request: Any) -> None:
            sampling = request.sampling_params
            if MODE == "promise" and sampling is not None:
                sampling.extra_args = {**PROMISE, **(sampling.extra_args or {})}
            super().add_request(request)

    Own.__name__ = base.__name__
    return Own


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append every failure with its last line to the list."""
    if report.failed:
        text = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr)
        line = {"test": report.nodeid, "error": text.strip().splitlines()[-1][-300:]}
        with (FOLDER / f"failures-{MODE}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    sys.stdout.flush()
