"""Metrics: numbers over an epoch, built up batch by batch without waiting for the accelerator."""

import functools
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from fastcore.basics import camel2snake, class2attr
from torch import Tensor, nn

from learnloop import html
from learnloop.data.batches import SINGLES, find_bs, find_device, n_beside, to_detach

__all__ = [
    "AvgLoss",
    "AvgMetric",
    "AvgSmoothLoss",
    "ForeignMetric",
    "Metric",
    "ValueMetric",
    "accuracy",
    "error_rate",
    "flatten_check",
    "mk_metric",
    "name_of",
    "smooth",
]

Number = Tensor | float


class Metric:
    """One number over the batches of an epoch. A subclass fills in `reset`, `accumulate` and `value`.

    The Recorder resets it at the start of each phase, and at the end of the epoch, so that nothing stays alive in it.
    """

    on: str | None = None  # computed on the batches of: 'train', 'valid' or 'both'; None: as the Recorder says

    def reset(self) -> None:
        """Forget everything: a new epoch begins."""

    def accumulate(self, learn: Any) -> None:
        """Take in the batch just done; reads `learn.pred`, `learn.yb`, `learn.loss`."""

    @property
    def value(self) -> Any:
        """The number so far; None before the first batch."""
        raise NotImplementedError(f"`{type(self).__name__}` has no `value`. Define it as a property.")

    @property
    def name(self) -> str:
        """The column's title: the class name in snake case, without `Metric`."""
        return class2attr(self, "Metric")

    def __repr__(self) -> str:
        on = "" if self.on is None else f", on={self.on!r}"
        return f"{type(self).__name__}({self.name}{on})"

    def _repr_html_(self) -> str:
        return html.code(repr(self))

    def state_dict(self) -> dict[str, Any]:
        """What was gathered so far: every attribute made of numbers and tensors. Override it for other kinds."""
        return {name: _copied(value) for name, value in vars(self).items() if _is_plain(value)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, to the bit."""
        for name, value in state.items():
            setattr(self, name, _copied(value))


class _Mean(Metric):
    """A mean over an epoch, each batch weighted with its size."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total: Number = 0.0  # what was folded: sum of value times batch size
        self.count = 0  # number of items folded
        self._recent: list[tuple[Number, int]] = []  # (value, batch size) of the batches since the last fold
        self._room = 0  # how many of these there may be; 0: not known yet

    def _take(self, value: Number, size: int, pred: Any) -> None:
        self._recent.append((value, size))
        if len(self._recent) >= self._room:
            self._room = n_beside(pred)
            if len(self._recent) >= self._room:
                self.total, self.count, self._recent = *_folded(self.total, self.count, self._recent), []

    @property
    def value(self) -> Number | None:
        total, count = _folded(self.total, self.count, self._recent)  # not kept: reading must not move a rounding
        return total / count if count else None


class AvgMetric(_Mean):
    """The mean of `func(pred, *yb)` over an epoch, each batch weighted with its size; batches without `yb` are skipped.

    `value` is a tensor on the device of the predictions, or a float where `func` returns python numbers.
    """

    def __init__(self, func: Callable[..., Number]) -> None:
        self.func = func
        super().__init__()

    def accumulate(self, learn: Any) -> None:
        pred, yb = learn.pred, learn.yb
        if len(yb):
            value = self.func(pred, *yb)
            self._take(value if _is_one_number(value) else _one_number(value, self), find_bs(yb), pred)

    @property
    def name(self) -> str:
        return name_of(self.func)


class AvgLoss(_Mean):
    """The mean loss over an epoch, each batch weighted with its size: that of `yb`, or of `xb` where that is empty."""

    def accumulate(self, learn: Any) -> None:
        yb, loss = learn.yb, _read(learn)
        value = loss if _is_one_number(loss) else _one_number(_mean(loss), self)
        self._take(value, find_bs(yb if len(yb) else learn.xb), learn.pred)

    @property
    def name(self) -> str:
        return "loss"


class AvgSmoothLoss(Metric):
    """The exponentially weighted mean of the losses, debiased; `beta` is the weight of the past, 0 <= beta < 1.

    Losses are kept on their device until `value` is read, which brings them to the host in one transfer.
    `value` is a tensor in host memory.
    """

    def __init__(self, beta: float = 0.98) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"`beta` is {beta}, but the past weighs at least 0 and less than 1. The default is 0.98.")
        self.beta = beta
        self.reset()

    def reset(self) -> None:
        self.val = 0.0  # the running mean, not debiased, over the losses taken to the host
        self.count = 0  # losses seen, those that wait included
        self._waiting: list[Tensor] = []  # losses not yet on the host, older ones as stacks of SINGLES
        self._recent: list[Tensor] = []

    def accumulate(self, learn: Any) -> None:
        self.count += 1
        self._recent.append(torch.as_tensor(_one_number(_mean(learn.loss), self)))
        if len(self._recent) == SINGLES:
            self._waiting.append(_stacked(self._recent))
            self._recent = []

    @property
    def value(self) -> Tensor | None:
        self._settle()
        return torch.tensor(self.val / (1 - self.beta**self.count)) if self.count else None

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {"val": self.val, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self.val, self.count = state["val"], state["count"]

    def _settle(self) -> None:
        """Bring the losses that wait to the host and into `val`; the order of losses decides, not when it is done."""
        if not self._waiting and not self._recent:
            return
        blocks = [*self._waiting, _stacked(self._recent)] if self._recent else self._waiting
        device = blocks[-1].device
        for loss in torch.cat([block.to(device) for block in blocks]).tolist():
            self.val = blend(loss, self.val, self.beta)
        self._waiting, self._recent = [], []


class ValueMetric(Metric):
    """A number computed elsewhere, for instance by a callback: `func()` when it is read."""

    def __init__(self, func: Callable[[], Any], metric_name: str | None = None) -> None:
        self.func, self.metric_name = func, metric_name

    @property
    def value(self) -> Any:
        return self.func()

    @property
    def name(self) -> str:
        return self.metric_name or name_of(self.func)


class ForeignMetric(Metric):
    """The number of an object with `update(pred, *yb)`, `compute()` and `reset()`, as torchmetrics makes them.

    Its state moves to the device of the predictions. What torchmetrics checks in every `update` waits for that device;
    `validate_args=False`, given to its metric, leaves the checks out.
    """

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self.count = 0  # batches seen
        self._device: torch.device | None = None  # where the state is known to be

    def reset(self) -> None:
        self.metric.reset()
        self.count = 0

    def accumulate(self, learn: Any) -> None:
        yb = learn.yb
        if not len(yb):
            return
        device = find_device(learn.pred)
        if device is not None and device != self._device and hasattr(self.metric, "to"):
            self.metric.to(device)
            self._device = device
        self.metric.update(to_detach(learn.pred, cpu=False), *yb)
        self.count += 1

    @property
    def value(self) -> Number | None:
        if not self.count:
            return None
        number = self.metric.compute()
        if isinstance(number, Real) or (isinstance(number, Tensor) and number.numel() == 1):
            return _one_number(number, self)
        what = f"shape {tuple(number.shape)}" if isinstance(number, Tensor) else repr(number)
        raise ValueError(
            f"metric `{self.name}` computed {what}; a column holds one number. Choose an average where it takes one."
        )

    @property
    def name(self) -> str:
        return camel2snake(type(self.metric).__name__)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "metric": _foreign_state(self.metric)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self.count, self._device = state["count"], None
        _load_foreign_state(self.metric, state["metric"])


def mk_metric(
    m: Any,
    on: str | None = None,  # the phase that it is computed in: 'train', 'valid' or 'both'; None: as the metric says
) -> Metric:
    """A metric from what a user wrote: a Metric, a torchmetrics object, a class of these, or a function.

    A function of `(pred, *yb)` is averaged over items, unless it has an `as_metric` that makes a metric of it.
    """
    made = _made(m)
    if on is not None:
        made.on = on
    check_on(made)
    return made


def check_on(metric: Metric) -> None:
    """ValueError for a metric that is on no phase."""
    if metric.on not in (None, "train", "valid", "both"):
        raise ValueError(f'metric `{metric.name}` is on={metric.on!r}; pass "train", "valid", "both" or None.')


def of_phase(metrics: Iterable[Metric], phase: str, by_default: bool) -> list[Metric]:
    """The metrics computed in 'train' or 'valid': those that say so, and `by_default` those that say nothing."""
    return [m for m in metrics if m.on in (phase, "both") or (m.on is None and by_default)]


def _made(m: Any) -> Metric:
    made = m() if isinstance(m, type) else m
    if isinstance(made, Metric):
        return made
    if isinstance(made, nn.ModuleDict):
        raise TypeError(
            f"`metrics` holds a {type(made).__name__}, but each column is one metric. Pass `[*collection.values()]`."
        )
    if all(callable(getattr(made, step, None)) for step in ("update", "compute", "reset")):
        return ForeignMetric(made)
    if not callable(made):
        raise TypeError(f"`metrics` holds {m!r}, which is no metric. Pass a function of (pred, *yb), or a `Metric`.")
    if _makes_a_metric(made):
        raise TypeError(f"`metrics` holds `{name_of(made)}`, which makes a metric when called: `{name_of(made)}(…)`.")
    as_metric = getattr(made, "as_metric", None)
    return AvgMetric(made) if as_metric is None else as_metric()


def _makes_a_metric(func: Any) -> bool:
    """Whether a function is annotated to return a Metric, as those are that set up a metric of scikit-learn."""
    try:
        returned = _unwrapped(func).__annotations__.get("return")
    except (AttributeError, NameError):  # an object; a name that Python 3.14 looks up only now, and does not find
        return False
    return isinstance(returned, type) and issubclass(returned, Metric)


def smooth(losses: Sequence[float], beta: float, val: float = 0.0, count: int = 0) -> list[float]:
    """The running mean after each of the losses, weighted exponentially and debiased.

    `val` and `count`: the running mean (not debiased) and the number of losses before these.
    """
    means = []
    for n, loss in enumerate(losses, count + 1):
        val = blend(loss, val, beta)
        means.append(val / (1 - beta**n))
    return means


# -- functions of predictions and targets


def flatten_check(inp: Tensor, targ: Tensor) -> tuple[Tensor, Tensor]:
    """Both as vectors; ValueError where they have not the same number of elements."""
    if inp.numel() != targ.numel():
        raise ValueError(
            f"the predictions have shape {tuple(inp.shape)} and the targets {tuple(targ.shape)}: not as many. "
            "`axis` names the dimension of the classes, which targets do not have."
        )
    return inp.reshape(-1), targ.reshape(-1)


def accuracy(inp: Tensor, targ: Tensor, axis: int = -1) -> Tensor:
    """The share of predictions whose largest entry along `axis` is at the index that the target names."""
    pred = inp.argmax(dim=axis)
    if pred.shape != targ.shape:
        pred, targ = flatten_check(pred, targ)
    return (pred == targ).mean(dtype=torch.float32)


def error_rate(inp: Tensor, targ: Tensor, axis: int = -1) -> Tensor:
    """1 - `accuracy`."""
    return 1 - accuracy(inp, targ, axis=axis)


# -- averaging


def _folded(total: Number, count: int, recent: list[tuple[Number, int]]) -> tuple[Number, int]:
    """`total` and `count` with the (value, batch size) pairs in `recent` added."""
    if not recent:
        return total, count
    values, sizes = zip(*recent, strict=True)
    return total + _weighted_sum(values, sizes), count + sum(sizes)


def _weighted_sum(values: Sequence[Number], sizes: Sequence[int]) -> Number:
    """The sum of value times size, on the device of the values; pairwise in float32, so that many do not drift."""
    if not any(isinstance(value, Tensor) for value in values):
        return sum(value * size for value, size in zip(values, sizes, strict=True))
    stacked = _stacked(values)
    if sizes.count(sizes[0]) == len(sizes):
        return (stacked * sizes[0]).sum()
    weights = torch.tensor(sizes, dtype=stacked.dtype).to(stacked.device, non_blocking=True)  # a plain copy would wait
    return (stacked * weights).sum()


def _stacked(values: Sequence[Number]) -> Tensor:
    """Single numbers as one vector where the last tensor among them lies, float64 if any is, else float32."""
    try:
        vector = torch.stack(values)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # plain numbers, or tensors on several devices
        device = next(value.device for value in reversed(values) if isinstance(value, Tensor))
        vector = torch.stack([torch.as_tensor(value, device=device) for value in values])
    return vector if vector.dtype == torch.float64 else vector.float()


def blend(loss: float, val: float, beta: float) -> float:
    """The running mean `val` with one more loss in it; not debiased."""
    return loss + beta * (val - loss)


def _read(learn: Any) -> Any:
    """The batch's loss, without the copy that `learn.loss` makes for a reader that may change it."""
    finished = getattr(learn, "_finished_loss", None)
    return learn.loss if finished is None else finished()


def _mean(loss: Any) -> Any:
    """A loss that was not reduced, reduced."""
    return loss.mean() if isinstance(loss, Tensor) and loss.ndim else loss


def _is_one_number(value: Any) -> bool:
    """Whether it can be kept as it is, as most are."""
    return isinstance(value, Tensor) and not value.ndim and not value.requires_grad


def _one_number(value: Any, metric: Metric) -> Number:
    """What a metric's function returned, if that is one number: a float, or a tensor without graph of its own."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.detach() if value.requires_grad else value
        return value if value.ndim == 0 else value.reshape(())
    if isinstance(value, Real):
        return float(value)
    if (shape := getattr(value, "shape", None)) is None:
        raise TypeError(f"metric `{metric.name}` returned {value!r}; it needs one number per batch. Return a tensor.")
    raise ValueError(
        f"metric `{metric.name}` returned shape {tuple(shape)}; it needs one number per batch. Return its `.mean()`."
    )


def name_of(func: Any) -> str:
    """The name a function was defined with, under any partials; the class name of an object."""
    func = _unwrapped(func)
    return getattr(func, "__name__", type(func).__name__)


def _unwrapped(func: Any) -> Any:
    while isinstance(func, functools.partial):
        func = func.func
    return func


# -- state


def _foreign_state(metric: Any) -> dict[str, Any]:
    """What a metric made elsewhere has gathered; by the name of the part for torchmetrics, which may be nested."""
    parts = _parts(metric)
    if not parts:
        return metric.state_dict() if hasattr(metric, "state_dict") else {}
    return {name: [part.update_count, _copied(part.metric_state)] for name, part in parts.items()}


def _load_foreign_state(metric: Any, state: dict[str, Any]) -> None:
    parts = _parts(metric)
    if not parts and hasattr(metric, "load_state_dict"):
        metric.load_state_dict(state)
    for name, part in parts.items():
        part._update_count, gathered = state[name]  # else it warns that nothing was gathered
        for key, value in gathered.items():
            setattr(part, key, _copied(value))


def _parts(metric: Any) -> dict[str, Any]:
    """The torchmetrics inside one of them, itself under the empty name; their `state_dict` leaves the state out."""
    modules = metric.named_modules() if isinstance(metric, nn.Module) else ()
    return {name: module for name, module in modules if hasattr(module, "metric_state")}


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float) or isinstance(value, Tensor)


def _copied(value: Any) -> Any:
    """A copy that later batches do not change."""
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value.detach().clone() if isinstance(value, Tensor) else value
