"""SLOs-Serve: an LLM serving scheduler in which every request carries its own latency promises."""

from slos_serve.kernel_cache import use_kernel_cache

__version__ = "0.1.0"
# Before any module of the package imports numba.
KERNEL_CACHE = use_kernel_cache()
