"""What this process runs on: which torch, which pickle, its place among the processes that train together."""

import importlib.util
import os
import pickle
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["default_pickle", "environment", "ismin_torch", "notmax_torch", "num_distrib", "rank_distrib"]


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


def environment() -> dict[str, Any]:
    """Versions and hardware, in plain words."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


@lru_cache
def cpu_model() -> str:
    """The model of the processor; where the system does not tell, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
