"""What every test may use: hypothesis profiles, the optional data folder, the small CPU model."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from slos_serve.launch.cpu_model import CpuModelError, resolve_model

PROJECT = Path(__file__).resolve().parent.parent

# Examples are the same in every run and never fail for being slow: the machine may be shared.
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs an engine or Ray where it is not installed."""
    for marker, module in (("engine", "vllm"), ("ray", "ray")):
        if item.get_closest_marker(marker) is not None and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the original traces: SLOS_SERVE_SHARED_DATA, else shared/data beside the project. Skips without it."""
    folder = Path(os.environ.get("SLOS_SERVE_SHARED_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the folder of original traces is not here (SLOS_SERVE_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def cpu_model() -> str:
    """Folder of the small model's checkpoint, converted first if need be. Skips where its package is absent."""
    try:
        return resolve_model("smollm2")
    except CpuModelError as error:
        pytest.skip(str(error))
