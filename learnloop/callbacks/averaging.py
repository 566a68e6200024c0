"""Averages of the weights over a training: validation scores them, and the model has them in the end."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from learnloop.loop.callback import Callback, check_alone
from learnloop.loop.cancel import CancelBatchException, CancelValidException

_SMALL = (torch.float16, torch.bfloat16)

#: Where a parameter or buffer is: some modules replace their buffers, so the tensor itself is looked up each time.
Slot = tuple[dict[str, Any], str]


class Averaging(Callback):
    """What averages of weights have in common: when they stand in for the trained ones, and what becomes of them.

    They are of every parameter and buffer of floating point numbers (others stay the model's own), in float32 for those
    in 16 bits. Every validation and prediction sees them, nested ones too: they are put in at `before_validate` and out
    again at `cleanup_validate`. With `apply_at_end` the model keeps them where a fit ends in an orderly way; after an
    error or Ctrl-C it has the trained weights. Without it, they stay here until the next fit begins. `learn.save`
    writes the weights that are in the model: the averages inside of a validation or of `applied()`.
    """

    order = -5
    run_valid = False
    tasks = ("fit", "validate", "predict")
    _stateattrs: tuple[str, ...] = ("averages", "n_averaged", "_steps")

    def __init__(self, apply_at_end: bool):
        self.apply_at_end = apply_at_end
        self.averages: dict[str, Tensor] = {}  # by the names of the model's `state_dict()`; empty before the first
        self.n_averaged = 0  # weights that went into them
        self._slots: dict[str, Slot] = {}
        self._steps = 0  # `opt_iter` when that was last looked at
        self._is_trained = False  # the training of an epoch has come to its end
        self._former: dict[str, Tensor] | None = None  # the trained weights, while averages are in their place
        self._put_in_at = 0  # the depth of the run that has put them in; -1: `applied()`

    # What a subclass fills in

    def _begin(self) -> None:
        """Called when a fit begins, and when other weights were loaded: there are no averages then."""

    def _stepped(self) -> None:
        """Called once for each batch that made an update."""

    def _epoch_trained(self) -> None:
        """Called after the training of each epoch, when all of its updates are made."""

    def _complete(self) -> None:
        """Called when averages are in the model, before anybody uses them."""

    # The course of a fit

    def before_fit(self) -> None:
        learn = self.learn
        check_alone(Averaging, learn, "put averages in the place of the other's")
        if learn.task == "fit":
            self._steps, self._is_trained = 0, False
            self._restart()

    def _restart(self) -> None:
        self.averages, self.n_averaged = {}, 0
        self._slots = finite_slots(self.learn.model)
        self._begin()

    def after_batch(self) -> None:
        self._catch_up()

    def after_train(self) -> None:
        self._is_trained = True

    def cleanup_train(self) -> None:
        self._catch_up()  # accumulated gradients may be stepped in `after_train`
        if self._is_trained:
            self._is_trained = False
            self._epoch_trained()

    def _catch_up(self) -> None:
        steps = self.learn.opt_iter
        if steps != self._steps:
            self._steps = steps
            self._stepped()

    @torch.no_grad()
    def _take_in(self, weight: float) -> None:
        """Moves the averages towards the weights as they are, by this part of the way."""
        if self.averages:
            averages = list(self.averages.values())
            current = [tensors[key] for tensors, key in self._slots.values()]
            same = [t if t.dtype is a.dtype else t.to(a.dtype) for t, a in zip(current, averages, strict=True)]
            torch._foreach_lerp_(averages, same, weight)
        else:
            self.averages = _copied(self._slots, widened=True)
        self.n_averaged += 1

    def after_fit(self) -> None:
        learn = self.learn
        if learn.task == "fit" and self.apply_at_end and self.n_averaged and not learn.interrupted:
            self._put_in_at = learn._depth
            self._put_in()
            self._former = None  # for good; an error until here would have put them out in the cleanup

    def cleanup_fit(self) -> None:
        if self._put_in_at >= 0:
            self._put_out()  # taken off inside a nested run
        if self.learn.task == "fit" and self.apply_at_end:
            self.averages, self.n_averaged, self._slots = {}, 0, {}

    # In and out of the model

    def before_validate(self) -> None:
        if self.averages and self._former is None:
            self._put_in_at = self.learn._depth
            self._put_in()

    def cleanup_validate(self) -> None:
        if self._put_in_at == self.learn._depth:
            self._put_out()

    def _put_in(self) -> None:
        self._former = _copied(self._slots)  # known before anything is overwritten
        _write(self._slots, self.averages)
        self._complete()

    def _put_out(self) -> None:
        if self._former is not None:
            _write(self._slots, self._former)
            self._former = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model has the averages: `with learn.ema.applied(): learn.save("ema")`."""
        if not self.averages:
            raise RuntimeError(
                f"{self!r} has no averages now: a fit gathers them, and leaves them in the model. "
                "Pass `apply_at_end=False` to keep them beside it."
            )
        if self._former is not None:
            yield
            return
        self._put_in_at = -1
        try:
            self._put_in()
            yield
        finally:
            self._put_out()

    @contextmanager
    def trained_weights(self) -> Iterator[None]:
        """A context in which the model has the trained weights, whatever it is used for meanwhile."""
        if self._former is None:
            yield
            return
        scored = _copied(self._slots)
        _write(self._slots, self._former)
        try:
            yield
        finally:
            _write(self._slots, scored)

    def weights_loaded(self, with_opt: bool) -> None:
        """Begins the averages anew, from the weights that were loaded."""
        if self._former is not None:
            self._former = _copied(self._slots)
        if self._slots:
            self._restart()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        super().load_state_dict(state)
        slots = slots_of(self.learn.model)
        if self.averages:
            self._slots = {name: slots[name] for name in self.averages}
            self.averages = {name: a.to(_tensor(slots[name]).device) for name, a in self.averages.items()}


class EMA(Averaging):
    """Averages the weights exponentially: after each update they move by `1 - decay` of the way to the trained ones.

    They begin with the weights that a fit begins with. Buffers, such as the statistics of batch norm, are averaged too.
    Validations see them, from `before_validate` to `cleanup_validate`; from `after_fit` on the model has them for good,
    but not after an error or Ctrl-C. Source: Polyak and Juditsky 1992; in this form Tan and Le, arXiv 1905.11946.
    Cost per update: one operation over all weights, in `after_batch`; memory: the weights once more, and a third time
    during a validation.
    """

    def __init__(
        self,
        decay: float = 0.999,  # part of the averages that each update keeps: they reach back some 1 / (1 - decay)
        warmup: bool = False,  # less at first: (1 + n) / (10 + n) after n updates, while that is below `decay`
        apply_at_end: bool = True,  # the model has the averages after the fit; False: they stay in this callback
    ):
        super().__init__(apply_at_end)
        if not 0 <= decay < 1:
            raise ValueError(
                f"`decay` is {decay}; it is what each update keeps of the averages: pass 0.999, or 0 to 1."
            )
        self.decay, self.warmup = decay, warmup

    def _begin(self) -> None:
        self.averages = _copied(self._slots, widened=True)

    def _stepped(self) -> None:
        self._take_in(1 - decay_after(self.n_averaged, self.decay, self.warmup))


def decay_after(n: int, decay: float, warmup: bool) -> float:
    """What an update keeps of the averages after `n` earlier ones."""
    return min(decay, (1 + n) / (10 + n)) if warmup else decay


class SWA(Averaging):
    """Averages the weights that a training goes through in its last part, each with the same weight.

    One per epoch, in `cleanup_train`, or one every so many updates, in `after_batch`; best with a rate that stays high,
    as by `fit` or `fit_flat_cos(pct_start=1)`. Validations see the averages, from `before_validate` to
    `cleanup_validate`; from `after_fit` on the model has them for good, but not after an error or Ctrl-C. Before their
    first use, layers of batch norm get statistics of their own, from a pass over the training set. Source: Izmailov et
    al., arXiv 1803.05407. Cost: one operation over all weights when they are taken in; with batch norm, a pass over the
    training set per validation; memory: as for EMA.
    """

    _stateattrs = ("_is_complete",)

    def __init__(
        self,
        start: float = 0.75,  # part of the training after which weights are taken in; its last ones always are
        every: int | None = None,  # updates from one to the next; None: one per epoch
        bn_batches: int | None = None,  # of the training set for batch norm; None: all; 0: averages of the statistics
        apply_at_end: bool = True,  # the model has the averages after the fit; False: they stay in this callback
    ):
        super().__init__(apply_at_end)
        if not 0 <= start <= 1:
            raise ValueError(f"`start` is {start}; it is a part of the training: for epoch 30 of 40 pass 30 / 40.")
        if every is not None and every < 1:
            raise ValueError(f"`every` is {every}; it counts updates, so pass 1 or more, or None for one per epoch.")
        if bn_batches is not None and bn_batches < 0:
            raise ValueError(f"`bn_batches` is {bn_batches}; pass a number of batches, or None for all.")
        self.start, self.every, self.bn_batches = start, every, bn_batches
        self._is_complete = False  # the averages hold statistics of their own

    def _begin(self) -> None:
        self._is_complete = False

    def _stepped(self) -> None:
        learn = self.learn
        if self.every is not None and learn.opt_iter % self.every == 0:
            self._take_in_from(learn.pct_train)

    def _epoch_trained(self) -> None:
        learn = self.learn
        if self.every is None:
            self._take_in_from(learn.pct_train if learn.n_step is not None else (learn.epoch + 1) / learn.n_epoch)

    def _take_in_from(self, done: float) -> None:
        if done >= self.start - 1e-9:  # `pct_train` is a sum of small parts
            self._take_in(1 / (self.n_averaged + 1))
            self._is_complete = False

    def _complete(self) -> None:
        """Statistics of batch norm for the averages, once for each of them."""
        model = self.learn.model
        modules = model.modules() if isinstance(model, nn.Module) else ()
        layers = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
        if layers and self.bn_batches != 0 and not self._is_complete:
            self.learn.validate(ds_idx=0, cbs=_Statistics(layers, self.bn_batches))
            for name, average in self.averages.items():
                average.copy_(_tensor(self._slots[name]).detach())
        self._is_complete = True


class _Statistics(Callback):
    """A pass over a loader from which batch norm takes its statistics, the mean over all batches, and nobody else."""

    order = -5  # after TrainEvalCallback has put the model in eval mode

    def __init__(self, layers: list[Any], n_batches: int | None):
        self.layers, self.n_batches = layers, n_batches
        self.momenta = [layer.momentum for layer in layers]
        self.counts = [layer.num_batches_tracked.clone() for layer in layers]

    def before_validate(self) -> None:
        for layer in self.layers:
            layer.train()

    def before_batch(self) -> None:
        i = self.learn.iter
        if self.n_batches is not None and i >= self.n_batches:
            raise CancelValidException
        for layer in self.layers:
            layer.momentum = 1 / (i + 1)  # `None` means the same, and would wait for the device

    def after_pred(self) -> None:
        self.learn.pred = None  # no metric needs it
        raise CancelBatchException

    def after_validate(self) -> None:
        raise CancelValidException  # there are no numbers to be made

    def cleanup_validate(self) -> None:
        for layer, momentum, count in zip(self.layers, self.momenta, self.counts, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(count)

    @contextmanager
    def trained_weights(self) -> Iterator[None]:
        """A context in which batch norm has counted the batches of the training."""
        now = [layer.num_batches_tracked.clone() for layer in self.layers]
        try:
            for layer, count in zip(self.layers, self.counts, strict=True):
                layer.num_batches_tracked.copy_(count)
            yield
        finally:
            for layer, count in zip(self.layers, now, strict=True):
                layer.num_batches_tracked.copy_(count)


@contextmanager
def scored_weights(learn: Any) -> Iterator[None]:
    """A context in which the model has the weights that a validation scores: averages, where a callback keeps them."""
    with ExitStack() as stack:
        for cb in learn.cbs:
            if isinstance(cb, Averaging) and cb.averages:
                stack.enter_context(cb.applied())
        yield


# Tensors of a model


def slots_of(model: Any) -> dict[str, Slot]:
    """Where the parameters and buffers of floating point numbers are, by name; shared ones once."""
    found: dict[int, tuple[str, Slot]] = {}
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
                    found.setdefault(id(tensor), (f"{path}.{key}".lstrip("."), (tensors, key)))
    return dict(found.values())


def finite_slots(model: Any) -> dict[str, Slot]:
    """Those that can be averaged: of an infinite one, such as a mask of attention, inf - inf would be no number."""
    return {name: slot for name, slot in slots_of(model).items() if bool(torch.isfinite(_tensor(slot)).all())}


def _tensor(slot: Slot) -> Tensor:
    tensors, key = slot
    return tensors[key]


def _copied(slots: dict[str, Slot], widened: bool = False) -> dict[str, Tensor]:
    """Copies by name; `widened`: in float32 where 16 bits could not hold small steps."""
    tensors = {name: _tensor(slot).detach() for name, slot in slots.items()}
    return {n: t.float() if widened and t.dtype in _SMALL else t.clone() for n, t in tensors.items()}


def _write(slots: dict[str, Slot], values: dict[str, Tensor]) -> None:
    for name, slot in slots.items():
        _tensor(slot).data.copy_(values[name])  # `data`: no change to a graph that a run is nested in
