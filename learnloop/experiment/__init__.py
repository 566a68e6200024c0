"""Functions over learners: studies, and records of runs; imports no integration, neither `all` nor `__main__`."""
