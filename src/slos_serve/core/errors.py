"""The errors that cross a boundary, each saying which field, what was given and what is allowed."""

from __future__ import annotations


class SlosServeError(Exception):
    """Root of every error raised on purpose by this package."""


class InvalidFieldError(SlosServeError, ValueError):
    """A value given by a person or a client that cannot be used.

    Args:
        field: name of the field as the giver wrote it (``slo_ttft_ms``, ``classes.chat.weight``).
        given: the offending value.
        allowed: what would have been accepted, as a phrase that follows "allowed:".
        where: file and line, when the value came from a file.
    """

    def __init__(self, field: str, given: object, allowed: str, where: str | None = None) -> None:
        self.field = field
        self.given = given
        self.allowed = allowed
        self.where = where
        shown = repr(given)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        place = f"{where}: " if where else ""
        super().__init__(f"{place}{field}: got {shown}; allowed: {allowed}")

    def __reduce__(self) -> tuple[type[InvalidFieldError], tuple[str, object, str, str | None]]:
        """Raised in another process it arrives as it was."""
        return type(self), (self.field, self.given, self.allowed, self.where)


class ProfileMismatchError(SlosServeError):
    """A batch-time profile was measured on another model, device or engine than the one it is asked to predict."""


class UnsupportedEngineError(SlosServeError):
    """The installed vLLM is outside the supported range, or lacks a name that the plug-in steers by."""


class PlanMismatchError(SlosServeError):
    """A plan does not agree with the engine's own lists; the step falls back to the engine's own order."""
