"""The package's version, in a module that imports nothing: the build reads it."""

from __future__ import annotations

VERSION = "0.2.0"
