"""Packages that an extra brings, imported when they are used."""

import importlib
from typing import Any


def imported(module: str, user: str, extra: str) -> Any:
    """A module of a package that an extra installs; ImportError that says which."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`{user}` needs {module.partition('.')[0]}: `pip install 'learnloop[{extra}]'`.", name=error.name
        ) from error
