"""Keeps vLLM's look at every module from stumbling over llvmlite, which numba brings.

vLLM 0.32 asks each attribute of each loaded module for its ``__dict__`` when a CPU engine starts. llvmlite's library
object takes any name for a function of the library and answers that question with an object that is no dictionary, so
an engine whose process has loaded numba before would not start. That is so when ``scheduler_cls`` is the class and not
its name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def hide_special_names() -> None:
    """Have llvmlite's library answer that it has no attribute ``__anything__``; no function of it is named so."""
    try:
        wrapper: Any = type(import_module("llvmlite.binding.ffi").lib)
        look_up = wrapper.__getattr__
    except (ImportError, AttributeError):
        return  # another llvmlite: nothing to hide

    def look_up_functions(library: object, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(library, name)

    wrapper.__getattr__ = look_up_functions
