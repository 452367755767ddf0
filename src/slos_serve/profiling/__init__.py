"""Batch-time profiles: run a grid of batches on the real engine, measure them, fit the model."""
