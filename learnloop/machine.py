"""What this process runs on: which torch, which pickle, its place among the processes that train together."""

import importlib.util
import os
import pickle
from typing import Any

import torch

__all__ = ["default_pickle", "ismin_torch", "notmax_torch", "num_distrib", "rank_distrib"]


def rank_distrib() -> int:
    """The number of this process among those that train together, from 0; 0 where it is alone."""
    return torch.distributed.get_rank() if _is_in_group() else int(os.environ.get("RANK", 0))


def num_distrib() -> int:
    """How many processes train together; 0 where this one was not started with others."""
    return torch.distributed.get_world_size() if _is_in_group() else int(os.environ.get("WORLD_SIZE", 0))


def _is_in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def ismin_torch(min_version: str) -> bool:
    """Whether torch is at least this version: `ismin_torch("2.11")`."""
    return torch.__version__ >= _checked(min_version)


def notmax_torch(max_version: str) -> bool:
    """Whether torch is older than this version."""
    return torch.__version__ < _checked(max_version)


def _checked(version: str) -> str:
    """Torch would compare `parrot` letter by letter."""
    if not isinstance(version, str) or not version[:1].isdigit():
        raise ValueError(f'{version!r} is no version of torch; pass one as a string, such as "2.11".')
    return version


def default_pickle() -> Any:
    """cloudpickle where it is installed: it also takes along functions and classes that were made in a cell."""
    if importlib.util.find_spec("cloudpickle") is None:
        return pickle
    import cloudpickle

    return cloudpickle
