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
    import vllm  # noqa: PLC0415 - only where engines are started

    from slos_serve.files.engine_identity import model_label  # noqa: PLC0415
    from slos_serve.files.profile_file import Profile, save_profile  # noqa: PLC0415
    from slos_serve.launch.cpu_engine import cpu_engine_args  # noqa: PLC0415
    from slos_serve.perf.batch_time import BatchTimeModel  # noqa: PLC0415
    from slos_serve.vllm_plugin.identity import device_name  # noqa: PLC0415

    path = tmp_path_factory.mktemp("profile") / "profile.json"
    engine = ("vllm", vllm.__version__, "2026-01-01T00:00:00+00:00", cpu_engine_args()[1])
    model = BatchTimeModel(k_c_s=0.002, b_c_s=0.02, k_m_s=0.0005, b_m_s=0.04, k_seq_s=0.005)
    save_profile(Profile(model_label(cpu_model), device_name(), *engine, 1, 40_000, 128, 2048, model), path)
    return path
