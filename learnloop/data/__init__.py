"""Batches, loaders and datasets; imports nothing from `loop` or `callbacks`."""
