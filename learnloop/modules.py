"""Looking at torch modules: their parts in order, their parameters counted; and one that is easier to subclass."""

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["Module", "ParameterModule", "flatten_model", "has_params", "one_param", "total_params"]


class Module(nn.Module):
    """A torch module whose subclasses need not call `super().__init__()`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        module = super().__new__(cls)
        nn.Module.__init__(module)
        return module

    def __init__(self) -> None:
        """Does nothing: what was assigned before a `super().__init__()` stays."""


class ParameterModule(Module):
    """A parameter that a container holds itself, so that it has a place in a list of modules."""

    def __init__(self, val: nn.Parameter):
        self.val = val

    def forward(self, x: Any) -> Any:
        return x


def checked_module(module: Any, function: str) -> nn.Module:
    """The module itself; TypeError where a function that looks at one was given something else."""
    if not isinstance(module, nn.Module):
        hint = " Pass `learn.model`." if hasattr(module, "dls") else ""
        raise TypeError(f"`{function}` takes a torch module, and got something of type {type(module).__name__}.{hint}")
    return module


def flatten_model(model: nn.Module) -> list[nn.Module]:
    """The modules without children, in order, each once; a container's own parameters follow what it contains."""
    checked_module(model, "flatten_model")
    return list(_parts(model, set()))


def _parts(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    """`seen` holds the ids of modules and parameters that have been in the list."""
    if id(module) in seen:
        return
    seen.add(id(module))
    children = list(module.children())
    if not children:
        seen.update(map(id, module.parameters()))
        yield module
    for child in children:
        yield from _parts(child, seen)
    for p in module.parameters(recurse=False):
        if id(p) not in seen:
            seen.add(id(p))
            yield ParameterModule(p)


def one_param(model: nn.Module) -> nn.Parameter | None:
    """The first parameter, to ask for device or dtype; None where there is none."""
    return next(model.parameters(), None)


def has_params(module: nn.Module) -> bool:
    """Whether it has a parameter, its own or in its parts."""
    return one_param(checked_module(module, "has_params")) is not None


def total_params(module: nn.Module) -> tuple[int, bool]:
    """How many numbers its parameters hold, and whether any of them is trained."""
    parameters = list(checked_module(module, "total_params").parameters())
    return sum(p.numel() for p in parameters), any(p.requires_grad for p in parameters)
