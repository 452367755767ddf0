"""Ray is imported here, first, because it warns about itself as it is imported and warnings are errors in tests."""

from __future__ import annotations

import importlib.util
import warnings

if importlib.util.find_spec("ray") is not None and importlib.util.find_spec("vllm") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import slos_serve.ray_serve.app
        import slos_serve.ray_serve.router  # noqa: F401 - for the import itself
