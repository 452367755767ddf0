"""Types for the names of numba that the kernels use; numba ships none. A jitted function keeps its own type."""

from collections.abc import Callable
from typing import Any, TypeVar, overload

_F = TypeVar("_F", bound=Callable[..., Any])

@overload
def njit(function: _F, /) -> _F: ...
@overload
def njit(
    *, cache: bool = ..., nogil: bool = ..., fastmath: bool = ..., inline: str = ..., _nrt: bool = ...
) -> Callable[[_F], _F]: ...
