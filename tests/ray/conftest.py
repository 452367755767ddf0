"""Ray is imported here, first, because it warns about itself as it is imported and warnings are errors in tests."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest

if importlib.util.find_spec("ray") is not None and importlib.util.find_spec("vllm") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import slos_serve.ray_serve.app
        import slos_serve.ray_serve.router  # noqa: F401 - for the import itself


@pytest.fixture(scope="session")
def profile_path(tmp_path_factory: pytest.TempPathFactory, cpu_model: str) -> Path:
    """A profile of the small model on this machine, slow enough to be kept by two engines that share its cores."""
    from tests.cpu_profile import save_rough_profile  # noqa: PLC0415 - only where engines are started

    return save_rough_profile(cpu_model, tmp_path_factory.mktemp("profile"))
