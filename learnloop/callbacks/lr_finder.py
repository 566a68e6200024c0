"""The finder: a short training with a growing learning rate, and what its losses suggest."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from learnloop.callbacks.schedule import ParamScheduler
from learnloop.loop.cancel import CancelFitException, CancelValidException
from learnloop.loop.spans import BATCH
from learnloop.loop.state import capture, restore
from learnloop.optim.schedules import CurveSchedule, SchedExp

LEAST = 6  # batches of a pass
LAST = 5  # losses at its end that nothing is suggested from: there it diverges

#: What a suggestion is: a rate, and the point (rate, loss) that shows it in the picture.
Suggestion = tuple[float, tuple[float, float]]


class LRFinder(ParamScheduler):
    """Lets the rate grow by equal factors over `num_it` batches, and ends once the loss diverges or is not a number.

    Smith, arXiv 1506.01186. `learn.lr_find()` runs it, puts everything back and suggests a rate. In a plain
    `fit(cbs=LRFinder())` it ends the fit, validates nothing and puts back weights and optimizer; the record stays.
    After Ctrl-C the weights are those of the moment, and `learn.resume()` puts the former ones back at its end. Cost
    per batch: the smoothed loss is read, which waits for the device.
    """

    order = ParamScheduler.order + 1  # where another one sets the rate too, this one's counts
    _stateattrs: tuple[str, ...] = ("best_loss", "_before")

    def __init__(
        self,
        start_lr: Any = 1e-7,  # a number, or one per group
        end_lr: Any = 10,
        num_it: int = 100,  # batches; at least 6 are made
        stop_div: bool = True,  # end where the smoothed loss is above four times its best
    ):
        if isinstance(num_it, bool) or not isinstance(num_it, int):
            raise TypeError(f"`num_it={num_it!r}`: pass a whole number of batches.")
        super().__init__({"lr": _growing(start_lr, end_lr)})
        self.num_it, self.stop_div, self.best_loss = max(LEAST, num_it), stop_div, math.inf
        self._before: dict[str, Any] | None = None  # what to put back after a plain fit

    def before_fit(self) -> None:
        super().before_fit()
        self.best_loss = math.inf
        self._before = capture(self.learn) if self.learn.task == "fit" else None

    def before_batch(self) -> None:
        self.learn.opt.set_hyper("lr", self.scheds["lr"](self.learn.train_iter / self.num_it))

    def after_batch(self) -> None:
        super().after_batch()
        losses = self.learn.recorder.losses
        if (losses and self._has_diverged(float(losses[-1]))) or self.learn.train_iter >= self.num_it:
            raise CancelFitException

    def _has_diverged(self, loss: float) -> bool:
        self.best_loss = min(self.best_loss, loss)
        # Four times the best; the same distance above it where that is negative.
        return self.stop_div and not (math.isfinite(loss) and loss <= self.best_loss + 3 * abs(self.best_loss))

    def before_validate(self) -> None:
        raise CancelValidException

    def cleanup_fit(self) -> None:
        super().cleanup_fit()
        learn, before, self._before = self.learn, self._before, None
        if learn.interrupted:
            return  # a resume goes on with the very weights, and has those to put back in its state
        if before is not None and any(span is BATCH for span in learn._open_spans):
            learn.at_boundary(partial(_put_back, learn, before))  # taken off inside a batch: its backward needs them
        elif before is not None:
            _put_back(learn, before)


def _put_back(learn: Any, before: dict[str, Any]) -> None:
    """Weights and optimizer as they were before the fit; what the fit has recorded and counted stays."""
    now = {"modes": [m.training for m in learn.model.modules()]} if isinstance(learn.model, nn.Module) else {}
    of_the_fit = {"counters": {}, "callbacks": [], "kept": learn._kept.state_dict(), **now}
    restore(learn, {**before, **of_the_fit})


def _growing(start_lr: Any, end_lr: Any) -> CurveSchedule:
    try:
        start, end = np.asarray(start_lr, dtype=float), np.asarray(end_lr, dtype=float)
        grows = bool((np.isfinite(end) & (start > 0) & (start < end)).all())
    except (TypeError, ValueError):
        grows = False
    if not grows:
        raise ValueError(
            f"`start_lr={start_lr!r}`, `end_lr={end_lr!r}`: the rate grows from one to the other. Pass two numbers "
            "above 0, or lists with one per group, the start below the end."
        )
    return SchedExp(start if start.ndim else float(start), end if end.ndim else float(end))


# What the losses of a pass suggest: functions of rates, smoothed losses and the length of the pass


def valley(lrs: Sequence[float], losses: Sequence[float], num_it: int) -> Suggestion:
    """The rate in the middle of the longest valley: the longest sequence of losses each below the one before."""
    x, y = _checked(valley, lrs, losses, 1)
    start, end = _longest_fall(y)
    third = (end - start) / 3
    return _at(x, y, max(0, start + int(third) + int(third / 2)))


def _longest_fall(losses: np.ndarray) -> tuple[int, int]:
    """(start, end): where the longest falling sequence ends, and the index that many losses before."""
    lengths: list[int] = []  # of the longest falling sequence that ends with each loss
    lowest: list[float] = []  # negated last loss of the falling sequences of each length, the highest of them
    for loss in losses:
        k = bisect_left(lowest, -loss)
        lowest[k : k + 1] = [-loss]
        lengths.append(k + 1)
    longest = max(lengths)
    end = lengths.index(longest)
    return (end - longest, end) if end else (0, 0)


def slide(
    lrs: Sequence[float],
    losses: Sequence[float],
    num_it: int,
    lr_diff: int = 15,  # width of the interval, in batches
    thresh: float = 0.005,  # difference in slope at which it stops
    adjust_value: float = 1.0,  # factor on the rate that it found
) -> Suggestion:
    """Slides an interval down from the end until the slopes at its two ends are nearly the same; its lower end."""
    x, y = _checked(slide, lrs, losses, lr_diff + 1)
    slopes = np.gradient(y)
    right = len(y) - 1
    lower = right - lr_diff
    for left in range(right - lr_diff, -1, -1):
        if not abs(slopes[left + lr_diff] - slopes[left]) > thresh:
            break
        lower = left
    rate = float(x[lower]) * adjust_value
    return rate, (rate, float(np.interp(np.log10(rate), np.log10(x), y)))


def minimum(lrs: Sequence[float], losses: Sequence[float], num_it: int) -> Suggestion:
    """A tenth of the rate with the lowest loss."""
    x, y = _checked(minimum, lrs, losses, 1)
    rate, point = _at(x, y, int(np.argmin(y)))
    return rate / 10, point


def steep(lrs: Sequence[float], losses: Sequence[float], num_it: int) -> Suggestion:
    """The rate at which the loss falls fastest over the logarithm of the rate."""
    x, y = _checked(steep, lrs, losses, 2)
    return _at(x, y, int(np.argmin(np.diff(y) / np.diff(np.log(x)))))


def _at(rates: np.ndarray, losses: np.ndarray, index: int) -> Suggestion:
    rate = float(rates[index])
    return rate, (rate, float(losses[index]))


def _checked(rule: Callable[..., Any], lrs: Any, losses: Any, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Rates and losses as arrays; ValueError where there are too few for a rule."""
    rates, losses = np.array([float(lr) for lr in lrs]), np.array([float(loss) for loss in losses])
    if len(rates) != len(losses):
        raise ValueError(f"`{rule.__name__}` got {len(rates)} rates and {len(losses)} losses; pass one loss per rate.")
    if len(losses) < least:
        raise ValueError(
            f"`{rule.__name__}` needs {least} losses or more, and got {len(losses)}; take more batches "
            "(`num_it`), or a lower `end_lr` if the pass diverged early."
        )
    return rates, losses


class _SuggestionMethods:
    """The four rules as attributes, so that `SuggestionMethod.<tab>` lists them and a typo fails at once."""

    Valley = staticmethod(valley)
    Slide = staticmethod(slide)
    Minimum = staticmethod(minimum)
    Steep = staticmethod(steep)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_unknown(name))

    def __repr__(self) -> str:
        return "SuggestionMethod: Valley, Slide, Minimum, Steep"


SuggestionMethod = _SuggestionMethods()
_RULES = {rule.__name__: rule for rule in (valley, slide, minimum, steep)}


def _unknown(name: Any) -> str:
    return (
        f"`{name}` is no suggestion; there are SuggestionMethod.Valley, Slide, Minimum and Steep, and functions "
        "(lrs, losses, num_it) -> (lr, (lr, loss)) of your own."
    )


def rules_by_name(rules: Any) -> dict[str, Callable[..., Suggestion]]:
    """One rule or several, as functions or names, by the names that their suggestions get."""
    listed = [] if rules is None else [rules] if callable(rules) or isinstance(rules, str) else list(rules)
    found: dict[str, Callable[..., Suggestion]] = {}
    for rule in listed:
        function = _RULES.get(rule.lower()) if isinstance(rule, str) else rule
        if not callable(function):
            raise ValueError(_unknown(rule))
        name = getattr(function.func if isinstance(function, partial) else function, "__name__", "")
        if not name.isidentifier() or name.startswith("_") or name in found:
            raise ValueError(
                f"`suggest_funcs` needs functions with names of their own, and one is `{name or rule!r}`; "
                "define it with `def` under another name."
            )
        found[name] = function
    return found


def suggested(
    rules: dict[str, Callable[..., Suggestion]], lrs: Sequence[float], losses: Sequence[Any], num_it: int
) -> dict[str, Suggestion]:
    """What each rule makes of a pass without its first tenth, its last five losses and what is not a number."""
    rates = torch.tensor(lrs, dtype=torch.float64)
    values = torch.tensor([float(loss) for loss in losses], dtype=torch.float64)
    odd = torch.nonzero(~torch.isfinite(values)).flatten().tolist()
    # Where a loss is not a number the pass may have ended there, and with it what its last five would have been.
    end = min(odd[0], num_it - LAST) if odd else len(values) - LAST
    used = slice(num_it // 10, max(0, end))
    if not len(values[used]):
        raise ValueError(
            f"`lr_find` has no loss left to suggest a rate from: it made {len(values)} batches"
            + (f", the loss of number {odd[0]} was {float(values[odd[0]])}" if odd else "")
            + f", and the first {num_it // 10} and the last {LAST} are left out. "
            "Pass a lower `start_lr` or a higher `num_it`."
        )
    return {name: rule(rates[used], values[used], num_it) for name, rule in rules.items()}
