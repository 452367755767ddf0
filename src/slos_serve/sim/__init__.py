"""Engines in virtual time: the very policies that serve, executed against a batch-time model."""
