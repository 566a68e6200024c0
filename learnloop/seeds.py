"""Seeding every generator at once."""

import os
import random

import numpy as np
import torch

__all__ = ["set_seed"]


def set_seed(
    s: int,  # from -2**63 to 2**64 - 1, as torch takes it
    reproducible: bool = False,  # choose algorithms in torch that compute the same every time
) -> None:
    """Seeds python, numpy and torch on all devices: what follows draws the same random numbers each time.

    On an accelerator the same numbers drawn are not yet the same numbers computed. `reproducible=True` sees to that for
    the rest of the process, best before its first computation: cuDNN's benchmarks go off, torch's deterministic
    algorithms on, and cuBLAS gets a workspace of fixed size unless CUBLAS_WORKSPACE_CONFIG is set. It costs about a
    second at once, in which torch loads its compiler, and speed afterwards; an operation without a deterministic
    algorithm raises a RuntimeError, until `torch.use_deterministic_algorithms(True, warn_only=True)` lets it warn.
    """
    s = _checked(s)
    random.seed(s)
    np.random.seed(s % 2**32)  # numpy takes no more bits
    torch.manual_seed(s)
    if reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one of the two that torch accepts
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.use_deterministic_algorithms(True)


def _checked(seed: int) -> int:
    """As 64 bits without a sign: python would seed -1 like 1."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"`set_seed({seed!r})`: a seed is a whole number.")
    seed = int(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"`set_seed({seed})`: torch takes seeds from -2**63 to 2**64 - 1.")
    return seed % 2**64
