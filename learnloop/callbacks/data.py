"""What becomes of batches on their way into the model: transformed, resized, collected."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from fastcore.foundation import L
from torch import Tensor

from learnloop.data import transforms
from learnloop.data.batches import describe, to_detach
from learnloop.loop.callback import Callback


class BatchTransform(Callback):
    """Runs functions over the first input, a whole batch on its device: `BatchTransform(transforms.flip)`.

    In training only, in `before_batch`; with `valid=True` in every phase, as `transforms.normalize` needs it. What is
    random in them comes from torch's generator of that device. Cost per batch: the functions themselves.
    """

    order = -5

    def __init__(
        self,
        *functions: Callable[[Tensor], Tensor],  # in the order in which they run; `partial` gives them options
        valid: bool = False,  # in validation and prediction too
    ):
        for function in functions:
            if not callable(function):
                raise TypeError(f"`{function!r}` is no function; pass functions of a batch, such as `transforms.flip`.")
        self.functions, self.run_valid = functions, valid

    def before_batch(self) -> None:
        learn = self.learn
        x, *others = learn.xb
        if not isinstance(x, Tensor):
            raise TypeError(
                f"BatchTransform runs functions of a tensor, and the first input is a {type(x).__name__}. "
                "Change it in a `before_batch` handler of your own."
            )
        for function in self.functions:
            x = function(x)
        learn.xb = (x, *others)


@contextmanager
def augmenting(
    cbs: Any,  # a learner's callbacks
    item_functions: list[Callable[[Tensor], Tensor]],  # of one sample's first input; run first
    functions: list[Callable[[Tensor], Tensor]],  # of the first input of a batch
) -> Iterator[list[Callback]]:
    """A context in which predictions are of augmented inputs: by these functions, or as the training augments them.

    It gives the callbacks that such a run needs beside the learner's own.
    """
    functions = [*(partial(each_sample, function=f) for f in item_functions), *functions]
    own = [cb for cb in cbs if isinstance(cb, BatchTransform) and not cb.run_valid]
    if not functions and not own:
        raise ValueError(
            "`tta` has nothing to augment with: pass functions of a batch, `batch_tfms=transforms.flip`, or train with "
            "a BatchTransform."
        )
    chosen = [] if functions else own
    try:
        for cb in chosen:
            cb.run_valid = True
        yield [BatchTransform(*functions, valid=True)] if functions else []
    finally:
        for cb in chosen:
            cb.run_valid = False


def each_sample(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A batch of what a function makes of each sample."""
    return torch.stack([function(sample) for sample in x])


class ProgressiveResize(Callback):
    """Trains on small images first, whose size grows with the training; validation has them whole.

    In `before_batch` of training the first input is resized to a part of its height and width: `initial` until `delay`
    of the training is done, then growing evenly up to the whole, at which the last part `finetune` is trained. Source:
    Howard, fast.ai/2018/08/10; the schedule is that of docs.mosaicml.com/composer, Progressive Resizing. Cost per
    batch: one interpolation; small images save more.
    """

    order, run_valid, tasks = -4, False, ("fit",)

    def __init__(
        self,
        initial: float = 0.5,  # part of height and width at first
        delay: float = 0.5,  # part of the training at that size
        finetune: float = 0.2,  # part of the training at full size
        multiple: int = 4,  # sizes in between are multiples of it
    ):
        if not 0 < initial <= 1:
            raise ValueError(f"`initial={initial}`: it is a part of the size; pass more than 0, and 1 at most.")
        if delay < 0 or finetune < 0 or delay + finetune > 1:
            raise ValueError(
                f"`delay={delay}` and `finetune={finetune}` are parts of one training; together 1 at most."
            )
        self.initial, self.delay, self.finetune, self.multiple = initial, delay, finetune, multiple

    def before_batch(self) -> None:
        learn = self.learn
        part = part_at(learn.pct_train, self.initial, self.delay, self.finetune)
        x, *others = learn.xb
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise TypeError(
                "ProgressiveResize needs images of shape (n, channels, height, width) as the first input, and got "
                f"{describe(x)}."
            )
        size = [size_near(part * full, full, self.multiple) for full in x.shape[-2:]]
        if size != list(x.shape[-2:]):
            learn.xb = (transforms.resize(x, size), *others)


def part_at(progress: float, initial: float, delay: float, finetune: float) -> float:
    """The part of its full size that an image has when `progress` of the training is done."""
    growing = 1 - delay - finetune
    if progress < delay:
        return initial
    return min(1.0, initial + (1 - initial) * (progress - delay) / growing) if growing > 0 else 1.0


def size_near(size: float, full: int, multiple: int) -> int:
    """The multiple that is nearest, one at least; the full size where that is reached."""
    return full if size >= full else min(full, max(multiple, round(size / multiple) * multiple))


class CollectDataCallback(Callback):
    """Collects every batch in `data`, an `L` of tuples (xb, yb, pred, loss), as copies in host memory.

    It acts in `after_batch` and begins anew in `before_fit`; what it collected stays. Source:
    docs.fast.ai/callback.data. Cost per batch: all of its memory, and a wait for the device.
    """

    _stateattrs = ("data",)

    def __init__(self) -> None:
        self.data = L()

    def before_fit(self) -> None:
        self.data = L()

    def after_batch(self) -> None:
        learn = self.learn
        self.data.append(copy.deepcopy(to_detach((learn.xb, learn.yb, learn.pred, learn.loss))))
