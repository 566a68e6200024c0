"""Where and with what something was measured: the head of every page of results."""

import os
import platform
from importlib import metadata

from learnloop.machine import cpu_model


def cpu(threads: int = 1) -> str:
    """The processor, how many of its cores are there, and how many threads computed."""
    used = f"{threads} thread{'s' if threads > 1 else ''} used"
    return f"{cpu_model()}, {n_cores()} cores, {used}"


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
    """Of python, torch, and these packages where they are installed."""
    found = {"python": platform.python_version(), "torch": metadata.version("torch")}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
