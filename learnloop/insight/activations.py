"""What layers put out while a model trains: a callback with hooks, and one that keeps statistics of activations."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from fastcore.foundation import L
from torch import Tensor, nn

from learnloop import plots
from learnloop.data.batches import tensors_in
from learnloop.insight.hooks import Hooks
from learnloop.insight.series import Series, joined
from learnloop.loop.callback import Callback
from learnloop.modules import ParameterModule, flatten_model, has_params


class HookCallback(Callback):
    """Has `hook(module, input, output)` called whenever one of the `modules` has run: a subclass fills it in.

    What it returns is in `hooks.stored`, one per module, until the next batch. The hooks are on the model from
    `before_fit` to `cleanup_fit`; with `every=n` from `before_batch` to `cleanup_batch` of the training batches 0, n,
    2n, … alone, and all others run without them. Source: docs.fast.ai/callback.hook. Cost per batch on a CPU: 15 to
    20 µs for each hook, and what it does.
    """

    hooks: Hooks | None = None  # those on the model, or the last that were

    def __init__(
        self,
        modules: nn.Module | Sequence[nn.Module] | None = None,  # None: those with parameters and without children
        every: int | None = None,  # training batches from one that is hooked to the next; None: all, validation too
        remove_end: bool = True,  # False: hooks stay after the fit, until `hooks.remove()` or the next one
        is_forward: bool = True,  # False: the hook gets the gradients of input and output
        detach: bool = True,  # hand over tensors without their graph
        cpu: bool = True,  # and in host memory, for which the device is waited for
        include_paramless: bool = False,  # where `modules` is None, also those without parameters
        hook: Callable[[nn.Module, Any, Any], Any] | None = None,  # instead of the method
    ):
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"`every={every!r}`: pass a whole number of batches, 1 or more, or None for all.")
        self.modules = _checked(modules)
        self.every, self.remove_end, self.is_forward, self.detach, self.cpu = every, remove_end, is_forward, detach, cpu
        self.include_paramless, self._finds_modules = include_paramless, modules is None
        if hook is not None:
            self.hook = hook  # type: ignore[assignment, method-assign]

    def hook(self, m: nn.Module, i: Any, o: Any) -> Any:
        """What happens when a module has run; what it returns is stored, and changes nothing in the model."""

    def before_fit(self) -> None:
        if self._finds_modules:
            self.modules = layers_of(self.learn.model, self.include_paramless)
        if self.every is None:
            self._register()

    def before_batch(self) -> None:
        if self._is_due():
            self._register()

    def after_batch(self) -> None:
        self._end_batch()

    def cleanup_batch(self) -> None:
        self._end_batch()

    def after_fit(self) -> None:
        self._end_fit()

    def cleanup_fit(self) -> None:
        self._end_fit()

    def _is_due(self) -> bool:
        learn = self.learn
        return bool(self.every) and learn.training and not learn._depth and not learn.train_iter % self.every

    def _end_batch(self) -> None:
        if self.every and not self.learn._depth:
            self._remove()

    def _end_fit(self) -> None:
        if self.remove_end or self.every:
            self._remove()

    def _register(self) -> None:
        self._remove()  # those that an earlier fit left on the model
        self.hooks = Hooks(self.modules, self.hook, self.is_forward, self.detach, self.cpu)

    def _remove(self) -> None:
        if self.hooks is not None:
            self.hooks.remove()


def _checked(modules: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    """The modules as a list; TypeError for anything else among them."""
    is_one = isinstance(modules, (nn.Module, str)) or not hasattr(modules, "__iter__")
    found: list[Any] = [] if modules is None else [modules] if is_one else list(modules)  # type: ignore[arg-type]
    wrong = [m for m in found if not isinstance(m, nn.Module)]
    if wrong:
        raise TypeError(f"`modules` takes torch modules, such as `learn.model[0]`, and got {wrong[0]!r}.")
    return found


def layers_of(model: Any, include_paramless: bool = False) -> list[nn.Module]:
    """The modules without children, in order, with parameters unless `include_paramless`."""
    parts = flatten_model(model) if isinstance(model, nn.Module) else []
    return [m for m in parts if not isinstance(m, ParameterModule) and (include_paramless or has_params(m))]


#: What is kept of an output; values up to it are near zero, as are all negative ones.
NUMBERS, NEAR_ZERO = ("mean", "std", "near_zero"), 0.05


class ActivationStats(HookCallback):
    """Keeps mean, deviation and the share near zero of what layers put out in training; histograms if asked for.

    Near zero is what is at most 0.05, as a ReLU puts out for what it cuts off. `stats` has an entry per training batch,
    an entry per layer in it, as a dict; a layer with several outputs has a list of them, one that did not run has None.
    It takes numbers in `after_pred` (`after_backward` with `is_forward=False`), begins anew with each fit, and brings
    them to the host when somebody looks. Source: docs.fast.ai/callback.hook. Cost per batch on a CPU: 80 to 100 µs per
    layer, three passes over its output; `every=n` divides it, but for some 25 µs.
    """

    order, tasks, reads_only = -20, ("fit",), True

    def __init__(
        self,
        with_hist: bool = False,  # histograms too
        modules: nn.Module | Sequence[nn.Module] | None = None,  # None: those with parameters and without children
        every: int | None = None,  # training batches from one that is looked at to the next; None: all
        remove_end: bool = True,  # False: hooks stay after the fit
        is_forward: bool = True,  # False: of the gradients of the outputs
        detach: bool = True,
        cpu: bool = False,  # bring whole outputs to the host, and compute there
        include_paramless: bool = False,  # where `modules` is None, also those without parameters
        bins: int = 40,  # of a histogram
        limits: tuple[float, float] = (0.0, 10.0),  # the smallest and largest value that it counts
    ):
        super().__init__(modules, every, remove_end, is_forward, detach, cpu, include_paramless)
        self.with_hist, self.bins, self.limits = with_hist, bins, limits
        if not is_forward:  # a span that nobody listens to costs less
            self.after_backward = self._take
        self._forget()

    def _forget(self) -> None:
        self.names: list[str] = []  # of the layers, in the model
        self._parts: list[tuple[list[int], Series]] = []  # numbers of outputs per layer, and rows of such batches
        self._taken: Any = None  # of the batch in hand

    def before_fit(self) -> None:
        super().before_fit()
        self._forget()
        named = {m: name for name, m in self.learn.model.named_modules()} if self.modules else {}
        self.names = [named.get(m, type(m).__name__) for m in self.modules]

    def hook(self, m: nn.Module, i: Any, o: Any) -> list[list[Tensor]]:
        """For each tensor in the output the three numbers, then the histogram."""
        if self.learn is None or not self.learn.training:
            return []
        return [self._described(x) for x in tensors_in(o) if x.numel()]

    def _described(self, x: Tensor) -> list[Tensor]:
        x = (x.abs() if x.is_complex() else x).detach().float()
        n = x.numel()
        near_zero = torch.count_nonzero(x <= NEAR_ZERO) / n
        return [
            x.mean(),
            x.std(correction=min(1, n - 1)),
            near_zero,
            *([x.histc(self.bins, *self.limits)] if self.with_hist else []),
        ]

    def after_pred(self) -> None:
        if self.is_forward:
            self._take()

    def _take(self) -> None:
        """Takes what the hooks stored; what runs later in this batch, as a nested validation, is not meant."""
        learn = self.learn
        if learn.training and self.hooks is not None and (self.every is None or self._is_due()):
            self._taken = list(self.hooks.stored)

    def after_batch(self) -> None:
        taken, self._taken = self._taken, None
        if taken is not None:
            self._keep(self.learn.train_iter - 1, taken)
            for hook in self.hooks or ():
                hook.stored = None  # a layer that does not run in the next batch has none
        super().after_batch()

    def cleanup_batch(self) -> None:
        self._taken = None
        super().cleanup_batch()

    def _keep(self, iter: int, taken: list[list[list[Tensor]] | None]) -> None:
        numbers = [n for of_layer in taken for of_output in of_layer or () for n in of_output]
        if not numbers:
            return
        layout = [len(of_layer or ()) for of_layer in taken]
        if not self._parts or self._parts[-1][0] != layout:
            self._parts.append((layout, Series()))
        self._parts[-1][1].append(iter, joined(numbers).view(sum(layout), -1))

    # What survives a resume

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self.names), "parts": [[layout, rows.state_dict()] for layout, rows in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self._parts = list(state["names"]), []
        for layout, rows in state["parts"]:
            self._parts.append((list(layout), Series()))
            self._parts[-1][1].load_state_dict(rows)

    # Looking at it

    @property
    def iters(self) -> list[int]:
        """The training batches that `stats` is about, counted through the fit."""
        return [i for _, rows in self._parts for i in rows.iters]

    @property
    def stats(self) -> L:
        """Per batch an `L` with a dict per layer: `mean`, `std`, `near_zero`, and `hist` if asked for."""
        found = L()
        for layout, rows in self._parts:
            found += [L(_per_layer(outputs, layout)) for outputs in rows.numbers()]
        return found

    def layer_stats(
        self,
        idx: int | str,  # the number of a layer, or its name in the model
        output: int = 0,  # which of its outputs, where it has several
    ) -> L:
        """Means, deviations and shares near zero of a layer, each an `L` with a number per batch."""
        found = self._of_layer(idx, output)
        return L(L(found[:, i].tolist()) for i in range(len(NUMBERS)))

    def hist(self, idx: int | str, output: int = 0) -> Tensor:
        """The histograms of a layer, shape (bins, batches): the logarithm of 1 + count."""
        if not self.with_hist:
            raise ValueError("no histogram was kept. Train with `ActivationStats(with_hist=True)`.")
        return self._of_layer(idx, output)[:, len(NUMBERS) :].t().log1p()

    def _of_layer(self, idx: int | str, output: int) -> Tensor:
        """One output of a layer, shape (batches, numbers); NaN where it did not run."""
        i = self._number_of(idx)
        return torch.cat([_of_output(rows.numbers(), layout, i, output) for layout, rows in self._parts])

    def _number_of(self, idx: int | str) -> int:
        self._check_seen()
        if isinstance(idx, str):
            if idx not in self.names:
                raise KeyError(f"no layer `{idx}` was looked at; there is {', '.join(self.names)}.")
            return self.names.index(idx)
        if not -len(self.names) <= idx < len(self.names):
            raise IndexError(f"there is no layer {idx}: {len(self.names)} were looked at, numbered from 0.")
        return idx % len(self.names)

    def _check_seen(self) -> None:
        if not self._parts:
            raise RuntimeError("no batch was looked at yet. Train first, with this callback on the learner.")

    def color_dim(
        self,
        idx: int | str,
        figsize: tuple[float, float] = (10, 5),  # inches
        ax: Any = None,  # matplotlib axes; None: those of a new figure
    ) -> Any:
        """The histograms of a layer over the batches as colors, returns the axes: healthy layers change slowly."""
        hist = self.hist(idx)
        ax = plots.subplots(1, figsize=figsize)[1][0] if ax is None else ax
        return plots.plot_density(ax, hist.tolist(), self.iters, self.limits, self.names[self._number_of(idx)])

    def plot_hist(self, cols: int = 2, figsize: tuple[float, float] | None = None) -> Any:
        """`color_dim` of every layer; returns the figure."""
        self._check_seen()
        fig, axes = plots.subplots(len(self.names), cols, figsize or _size(len(self.names), cols))
        for i, ax in enumerate(axes):
            self.color_dim(i, ax=ax)
        return fig

    def plot_layer_stats(self, idx: int | str | None = None, figsize: tuple[float, float] = (12, 3)) -> Any:
        """Mean, deviation and share near zero over the batches, of one layer or of all; returns the figure."""
        self._check_seen()
        wanted = range(len(self.names)) if idx is None else [self._number_of(idx)]
        lines = {self.names[i]: self.layer_stats(i) for i in wanted}
        fig, axes = plots.subplots(3, 3, figsize)
        for n, (ax, title) in enumerate(zip(axes, ("mean", "std", "% near zero"), strict=True)):
            percent = 100 if n == 2 else 1
            values = {name: [percent * v for v in stats[n]] for name, stats in lines.items()}
            plots.plot_layers(ax, self.iters, values, title, legend=idx is None and n == 2)
        return fig


def _size(n: int, cols: int) -> tuple[float, float]:
    cols = max(1, min(cols, n))
    return 5 * cols, 2.2 * max(1, -(-n // cols))


def _per_layer(outputs: Tensor, layout: list[int]) -> Iterator[Any]:
    """The dicts of one batch, layer by layer."""
    dicts = iter([_as_dict(row) for row in outputs])
    for n in layout:
        of_layer = [next(dicts) for _ in range(n)]
        yield None if n == 0 else of_layer[0] if n == 1 else of_layer


def _as_dict(row: Tensor) -> dict[str, Any]:
    n = len(NUMBERS)
    hist = {"hist": row[n:]} if len(row) > n else {}
    return {**dict(zip(NUMBERS, row[:n].tolist(), strict=True)), **hist}


def _of_output(numbers: Tensor, layout: list[int], layer: int, output: int) -> Tensor:
    if output < layout[layer]:
        return numbers[:, sum(layout[:layer]) + output]
    return torch.full_like(numbers[:, 0], torch.nan)
