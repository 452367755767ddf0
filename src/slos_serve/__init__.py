"""SLOs-Serve: an LLM serving scheduler in which every request carries its own latency promises."""

from slos_serve.kernel_cache import use_kernel_cache
from slos_serve.version import VERSION

__version__ = VERSION
# Before any module of the package imports numba.
KERNEL_CACHE = use_kernel_cache()
