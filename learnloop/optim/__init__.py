"""Optimizers and schedules: plain tools over parameters and progress; imports nothing from `loop` or `callbacks`."""
