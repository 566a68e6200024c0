"""Batches that do not fit into memory, done in parts."""

import traceback
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from fastcore.basics import noop
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from learnloop.callbacks.again import (
    Buffers,
    Noted,
    goes_back,
    keeping,
    note,
    put_back,
    reopen_autocast,
    set_batch_attributes,
)
from learnloop.callbacks.gradients import GradientAccumulation
from learnloop.data.batches import elements, find_bs, first_tensor, rebuilt, to_detach
from learnloop.loop.callback import Callback, check_alone
from learnloop.loop.layers import put_around, take_away
from learnloop.loop.spans import BACKWARD, run_span

#: What stands in errors that torch raises as plain RuntimeErrors where memory is short.
_SAID = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")


class MicroBatch(Callback):
    """After an out-of-memory error in a training batch does it again in parts that fit, and so all batches after it.

    Gradients, buffers and random state are put back first, and parts are halved until one fits; that `size` is kept.
    Each part goes through the model, the loss and the backward pass by itself, with their events; its gradient counts
    by its number of samples, so that the step is that of the whole batch for a loss that is a mean over samples. That
    does not hold for batch norm in training mode, whose statistics are then those of parts (a warning says so), nor for
    a loss or a model that compares samples; dropout draws other masks. From `after_backward` on `xb`, `yb`, `pred` and
    `loss` are those of the whole batch again. Where a single sample does not fit, the error goes on its way. Validation
    needs less memory and is left alone. Cost per batch: a copy of random states and buffers, and while gradients are
    accumulated, of these; where it is split, what smaller batches cost.
    """

    order, run_valid, tasks = -8.5, False, ("fit", "lr_find")  # before SAM, whose second pass it has to split as well
    _stateattrs = ("size",)

    def __init__(self, size: int | None = None):  # samples per part at most; None: whole batches until one does not fit
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"`size={size!r}`: pass a number of samples, 1 or more, or None to find it out.")
        self.size = size
        self._has_warned = False  # in this fit
        self._in_hand: _Batch | None = None  # None outside of a batch, and when its gradients are there
        self._is_inside = False  # a part goes back, which is not the batch

    def before_fit(self) -> None:
        check_alone(MicroBatch, self.learn, "split the other's parts")
        self._has_warned = False

    def before_train(self) -> None:
        put_around(self.learn, "_forward", self._go_forward)
        put_around(self.learn, "_backward", self._go_back)

    # The two places where memory runs out

    def _go_forward(self, forward: Callable[[], None]) -> None:
        learn = self.learn
        if not learn.training:
            return forward()
        self._in_hand = batch = _Batch(learn, forward)
        is_whole = self.size is None or batch.n <= self.size
        if not is_whole or not self._fits(forward):
            self._in_parts(batch, but_last=True)  # through that one the loop goes back
            if not goes_back(learn):
                self._gather(batch)
        return None

    def _go_back(self, backward: Callable[[], None]) -> None:
        batch = self._in_hand
        if batch is None or not self.learn.training:
            return backward()
        batch.set_gradients_aside()
        if self._is_inside:
            return backward()
        if not self._fits(backward):
            self._in_parts(batch, but_last=False)
        return self._gather(batch)

    def before_backward(self) -> None:
        """A part counts by its samples; GradientAccumulation sees to that by itself."""
        learn, batch = self.learn, self._in_hand
        if batch is not None and batch.sizes and not any(cb.run for cb in learn._grab_cbs(GradientAccumulation)):
            loss = learn._raw_loss if learn._loss_grad is None else learn._loss_grad
            learn.loss_grad = loss * (batch.sizes[-1] / batch.n)

    def after_cancel_backward(self) -> None:
        if self._in_hand is not None and not self._is_inside:
            self._gather(self._in_hand)

    def _fits(self, attempt: Callable[[], None]) -> bool:
        """Whether memory was enough for it; if not, parts are smaller from now on."""
        try:
            attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(error)
            return False
        return True

    def _shrink(self, error: BaseException) -> None:
        n = self._in_hand.n  # type: ignore[union-attr]
        size = n if self.size is None else min(n, self.size)
        if size == 1:
            error.add_note("MicroBatch has split the batch down to single samples, and one does not fit either.")
            raise error
        self.size = (size + 1) // 2
        traceback.clear_frames(error.__traceback__)  # they hold what did not fit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.learn.logger is not noop:
            print(f"Out of memory with {size} samples: batches are done in parts of {self.size} from here on.")

    # Parts

    def _in_parts(self, batch: "_Batch", but_last: bool) -> None:
        """Does the parts of a batch, smaller ones where they do not fit; `but_last`: does not go back through that."""
        self._is_inside = True
        try:
            while not self._fits(lambda: self._do_parts(batch, but_last)):
                pass
        finally:
            self._is_inside = False
        self._warn(batch.learn.model)

    def _do_parts(self, batch: "_Batch", but_last: bool) -> None:
        learn = batch.learn
        batch.begin_again()
        for start, end in parts(batch.n, self.size or 1):
            batch.take(start, end)
            batch.forward()
            if end == batch.n and but_last:
                return
            if goes_back(learn):
                run_span(learn, BACKWARD, learn._backward)
            batch.keep_part()

    def _gather(self, batch: "_Batch") -> None:
        self._in_hand = None
        batch.gather()

    def _warn(self, model: Any) -> None:
        if self._has_warned or not isinstance(model, nn.Module):
            return
        self._has_warned = True
        if any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
            warnings.warn(
                f"batches are done in parts of {self.size} samples, and batch norm takes statistics from each part: "
                "this is not quite the training with whole batches. `BnFreeze` or another norm would make it the same.",
                stacklevel=2,
            )

    # The end

    def after_cancel_batch(self) -> None:
        if self._in_hand is not None:  # of a batch that came to no end nothing stays
            self._in_hand.put_gradients_back()
            set_batch_attributes(self.learn, self._in_hand.noted[3])
            self._in_hand = None

    def cleanup_batch(self) -> None:
        if self.learn.training and self._in_hand is not None:
            self._in_hand.put_gradients_back()
            self._in_hand = None

    def cleanup_train(self) -> None:
        take_away(self.learn, "_forward", self._go_forward)
        take_away(self.learn, "_backward", self._go_back)
        self._in_hand = None

    def cleanup_fit(self) -> None:
        self.cleanup_train()  # where `before_train` was sent by hand


class _Batch:
    """A batch that may have to be done again: what it was before its forward pass, and what its parts gave so far."""

    def __init__(self, learn: Any, forward: Callable[[], None]):
        self.learn, self.forward = learn, forward
        self.n = find_bs(learn.xb)
        self.noted: Noted = note(learn)
        self.buffers = Buffers(learn.model)
        self.aside: list[tuple[Any, Tensor]] | None = None  # gradients of batches before it; None: they are in place
        self.sizes: list[int] = []  # samples of the parts so far, with the one in hand; empty where it is done whole
        self.results: list[tuple[Any, Any, Any]] = []  # pred, loss, loss for the record of those that are done
        self.attributes: list[tuple[Any, str, Any]] = []  # of callbacks, with a row per sample

    # Gradients

    def set_gradients_aside(self) -> None:
        """Those of earlier batches make room, so that those of this one can be dropped."""
        if self.aside is None:
            self.aside = [(p, p.grad) for p in self.learn._parameters() if p.grad is not None]
            for p, _ in self.aside:
                p.grad = None

    def put_gradients_back(self) -> None:
        if self.aside is not None:
            for p in self.learn._parameters():
                p.grad = None
            for p, grad in self.aside:
                p.grad = grad
            self.aside = None

    # Parts

    def begin_again(self) -> None:
        """Everything as it was before the batch."""
        learn, n = self.learn, self.n
        self.put_gradients_back()
        self.buffers.put_back()
        put_back(learn, self.noted)
        self.sizes, self.results = [], []
        named = [(cb, name, getattr(cb, name)) for cb, names in keeping(learn) for name in names]
        self.attributes = [(cb, name, value) for cb, name, value in named if rows(value, n, 0, 0) is not value]

    def take(self, start: int, end: int) -> None:
        """Makes a part the batch in hand."""
        learn, (xb, yb, _, _) = self.learn, self.noted
        learn.xb, learn.yb = rows((xb, yb), self.n, start, end)
        learn.pred = learn._raw_loss = learn._loss = learn._loss_grad = learn._output_loss = None
        for cb, name, value in self.attributes:
            object.__setattr__(cb, name, rows(value, self.n, start, end))
        self.sizes.append(end - start)
        reopen_autocast(learn)

    def keep_part(self) -> None:
        learn = self.learn
        raw = learn._raw_loss
        self.results.append(to_detach((learn.pred, raw, learn._finished_loss()), cpu=False))

    @torch.no_grad()
    def gather(self) -> None:
        """Gradient, prediction and loss of the whole batch."""
        learn = self.learn
        for p, grad in self.aside or ():
            p.grad = grad if p.grad is None else grad.add_(p.grad)
        if not self.sizes:
            return
        if len(self.results) < len(self.sizes):
            self.keep_part()
        learn.xb, learn.yb = self.noted[:2]
        for cb, name, value in self.attributes:
            object.__setattr__(cb, name, value)
        learn.pred, learn._raw_loss, learn._loss = joined(self.results, self.sizes)
        learn._loss_grad = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in _SAID)


def parts(n: int, most: int) -> list[tuple[int, int]]:
    """Where the parts of `n` samples begin and end: as few as go with `most` in each, and of nearly one size."""
    n_parts = -(-n // most)
    ends = [n * i // n_parts for i in range(n_parts + 1)]
    return list(pairwise(ends))


def rows(value: Any, n: int, start: int, end: int) -> Any:
    """The samples from `start` to `end`: every tensor, array or plain list of `n` rows; the rest as it is."""
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return value[start:end] if value.ndim and len(value) == n else value
    if isinstance(value, list) and len(value) == n and first_tensor(value) is None:
        return value[start:end]
    return rebuilt(value, lambda v: rows(v, n, start, end))


def joined(values: Sequence[Any], sizes: list[int]) -> Any:
    """One structure from those of parts: rows one after another, single numbers as their mean by samples."""
    first = values[0]
    if isinstance(first, (Tensor, int, float)) and not getattr(first, "ndim", 0):
        return sum(value * (size / sum(sizes)) for value, size in zip(values, sizes, strict=True))
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if elements(first) is None:
        return first
    columns = zip(*map(elements, values), strict=True)
    return rebuilt(first, lambda _: joined(next(columns), sizes))
