"""What can go wrong in a simulation that is not the user's doing: a policy that breaks the engine's rules."""

from __future__ import annotations

from slos_serve.core.errors import SlosServeError


class PlanFaultError(SlosServeError):
    """A step plan that no engine could execute: too many tokens, a slot twice, tokens from nowhere."""


class StuckError(SlosServeError):
    """A policy that plans nothing although requests wait, for longer than any engine would idle."""
