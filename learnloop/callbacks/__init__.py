"""Callbacks, one family of behaviour per file; may import the loop, `data`, `optim`, `metrics` and `plots`, no learner."""
