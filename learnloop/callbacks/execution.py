"""How the model is run: the order of its numbers in memory, and compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from learnloop.loop.callback import Callback


class ChannelsLast(Callback):
    """Keeps the weights of images' layers with channels last in memory, which convolutions on tensor cores prefer.

    Set in `before_fit`; it stays until `learn.to_contiguous()`. Inputs need nothing: the first convolution takes them
    as they are, and what comes out of it has channels last. Source: pytorch.org, "Channels Last Memory Format in
    PyTorch". Cost per batch: none.
    """

    order = -1

    def before_fit(self) -> None:
        model = self.learn.model
        if isinstance(model, nn.Module):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Compile(Callback):
    """Runs the model through `torch.compile` during fits and validations, and keeps count of what that compiles.

    It acts in `before_fit` and takes itself off in `cleanup_fit`; what was compiled is kept for the next fit. The
    model stays the same object, and the names in its state dict stay clean. Compiling takes place in the first batch
    of each phase, and again whenever shapes change; `recompilations` says why. Source: docs.pytorch.org,
    torch.compile. Cost per batch: torch's guards; what it saves depends on the model.
    """

    def __init__(self, **options: Any):  # of `torch.compile`: backend, mode, dynamic, fullgraph, options
        self.options = options
        self.n_compiled = 0  # pieces of the forward pass compiled during this fit, or the last one
        self.recompilations: list[str] = []  # why one of them was compiled again: what did not hold any more
        self._compiled: tuple[Any, Any] = (None, None)  # the model, and what was made of it
        self._former: list[Any] = []  # what was in its place; empty outside of a run
        self._since = 0.0  # the start of the newest compilation that was counted

    def before_fit(self) -> None:
        model = self.learn.model
        if not isinstance(model, nn.Module):
            raise TypeError(f"Compile needs a torch module, and the model is a {type(model).__name__}.")
        if self._compiled[0] is not model:
            self._compiled = model, torch.compile(_caller(model), **self.options)
        self.n_compiled, self.recompilations, self._since = 0, [], _newest_start()
        self._former = [model._compiled_call_impl]
        model._compiled_call_impl = self._compiled[1]  # where `model.compile()` puts it

    def after_train(self) -> None:
        self._count()

    def after_validate(self) -> None:
        self._count()

    def _count(self) -> None:
        new = [c for c in _compilations() if c.start_time_us > self._since]
        self.n_compiled += len(new)
        self.recompilations += [_reason(c) for c in new if c.recompile_reason]
        self._since = max([self._since, *(c.start_time_us for c in new)])

    def cleanup_fit(self) -> None:
        if self._former:
            self._count()
            self._compiled[0]._compiled_call_impl = self._former.pop()


def _caller(model: nn.Module) -> Callable[..., Any]:
    """A function of its own around the model: torch compiles no frame inside torch, which is where its containers run.

    Its code is a copy, because torch limits how often one code is compiled, over all models.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=type(model).__name__)
    return call


def _compilations() -> list[Any]:
    """What torch has compiled in this process, the last 64, backward passes and the like left out."""
    from torch._dynamo.utils import get_compilation_metrics

    return [c for c in get_compilation_metrics() if c.co_name is not None and c.start_time_us is not None]


def _newest_start() -> float:
    return max((c.start_time_us for c in _compilations()), default=0)


def _reason(compilation: Any) -> str:
    """`Sequential: tensor 'args[0]' size mismatch at index 0. expected 8, actual 5`."""
    text = compilation.recompile_reason.splitlines()[0].partition(": ")[2].partition("  #")[0]
    return f"{compilation.co_name}: {text.strip()}"
