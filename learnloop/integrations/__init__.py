"""Trackers of experiments, each behind its own extra; imports no learner, and nothing above imports it."""
