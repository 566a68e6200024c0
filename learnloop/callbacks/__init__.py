"""Callbacks, one family of behaviour per file; may import the loop and what lies below it, no learner."""
