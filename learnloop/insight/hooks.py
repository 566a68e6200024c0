"""Hooks on modules: what goes in and comes out of them, forward and backward. Each can always be removed."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

from fastcore.foundation import L
from torch import nn

from learnloop.data.batches import to_detach


class Hook:
    """Calls `hook_func(module, input, output)` whenever a module has run, and keeps what it returns in `stored`.

    With `is_forward=False` it is called in the backward pass, with the gradients of input and output, both tuples.
    `with Hook(…) as hook:` removes it at the end; `stored` stays, and neither the module nor the hook holds the other.
    What was detached shares memory with the activation: an operation in place behind the module shows in it. Where such
    an operation follows directly, torch refuses backward hooks.
    """

    def __init__(
        self,
        m: nn.Module,
        hook_func: Callable[[nn.Module, Any, Any], Any],
        is_forward: bool = True,
        detach: bool = True,  # hand over input and output without their graph
        cpu: bool = False,  # and in host memory, for which the device is waited for; only with `detach`
    ):
        if not isinstance(m, nn.Module):
            raise TypeError(
                f"a hook goes on a torch module, and this is a {type(m).__name__}; for several, use `Hooks`."
            )
        self.hook_func: Callable[[nn.Module, Any, Any], Any] | None = hook_func
        self.detach, self.cpu = detach, cpu
        self.stored: Any = None  # what `hook_func` returned last; None before
        self.removed = False
        self.hook: Any = (m.register_forward_hook if is_forward else m.register_full_backward_hook)(self.hook_fn)

    def hook_fn(self, module: nn.Module, input: Any, output: Any) -> None:
        """What torch calls; it changes neither output nor gradient."""
        if self.hook_func is None:
            return  # removed while the module was running
        if self.detach:
            input, output = to_detach(input, cpu=self.cpu), to_detach(output, cpu=self.cpu)
        self.stored = self.hook_func(module, input, output)

    def remove(self) -> None:
        """Takes it off the module; the second time does nothing."""
        if not self.removed:
            self.hook.remove()
            self.hook = self.hook_func = None  # functions often hold the callback or the model that they work for
            self.removed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'removed' if self.removed else 'active'})"


class Hooks:
    """A `Hook` on each of several modules, with one function; all of them are registered or none."""

    def __init__(
        self,
        ms: Iterable[nn.Module],
        hook_func: Callable[[nn.Module, Any, Any], Any],
        is_forward: bool = True,
        detach: bool = True,
        cpu: bool = False,
    ):
        self.hooks: list[Hook] = []
        try:
            for m in ms:
                self.hooks.append(Hook(m, hook_func, is_forward, detach, cpu))
        except BaseException:
            self.remove()
            raise

    @property
    def stored(self) -> L:
        """What each of them stored, in the order of the modules."""
        return L(hook.stored for hook in self.hooks)

    def remove(self) -> None:
        """Takes all of them off."""
        for hook in self.hooks:
            hook.remove()

    def __getitem__(self, i: Any) -> Any:
        return self.hooks[i]

    def __len__(self) -> int:
        return len(self.hooks)

    def __iter__(self) -> Iterator[Hook]:
        return iter(self.hooks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} modules, {sum(not hook.removed for hook in self)} active)"


def hook_output(module: nn.Module, detach: bool = True, cpu: bool = False, grad: bool = False) -> Hook:
    """A `Hook` that stores the output of a module, or with `grad` the gradients of its outputs, a tuple."""
    return Hook(module, _output, is_forward=not grad, detach=detach, cpu=cpu)


def hook_outputs(modules: Iterable[nn.Module], detach: bool = True, cpu: bool = False, grad: bool = False) -> Hooks:
    """`Hooks` that store the output of each module, or with `grad` the gradients of its outputs, a tuple."""
    return Hooks(modules, _output, is_forward=not grad, detach=detach, cpu=cpu)


def _output(module: nn.Module, input: Any, output: Any) -> Any:
    return output
