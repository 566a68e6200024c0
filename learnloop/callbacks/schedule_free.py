"""Schedule-free optimizers, which train on one set of weights and are evaluated on another."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from learnloop.callbacks.averaging import Averaging
from learnloop.loop.callback import Callback, check_alone


class ScheduleFreeCallback(Callback):
    """Switches a schedule-free optimizer (arXiv 2405.15682, the package `schedulefree`) to and fro.

    `Learner(…, opt_func=schedulefree.AdamWScheduleFree, cbs=ScheduleFreeCallback())`. Outside of a training phase the
    model holds the averaged weights: for validation, for predictions, and for what `learn.save` writes then. A state
    taken in the middle of a phase holds the weights of training, as the model does after Ctrl-C: a resume goes on with
    them. After `learn.load` the average is that of the file, or begins anew with the loaded weights where the
    optimizer's state was not in it. Works with every optimizer that has `train()` and `eval()`. Cost per batch: none; a
    validation inside a training phase copies the weights.
    """

    _is_training = False  # between `before_train` and `cleanup_train`
    _kept: Any = None  # the weights of training, while a validation goes on inside it

    def before_fit(self) -> None:
        opt = self.learn.opt
        if opt is not None and not (hasattr(opt, "train") and hasattr(opt, "eval")):
            raise TypeError(
                f"ScheduleFreeCallback needs an optimizer with `train()` and `eval()`, but this is {opt._title()}; "
                "pass `opt_func=schedulefree.AdamWScheduleFree`, or take the callback away."
            )
        check_alone(ScheduleFreeCallback, self.learn, "switch the optimizer to and fro")
        others = self.learn._grab_cbs(Averaging)
        if others:
            raise ValueError(f"{others} would average weights that the optimizer averages already. Keep one of them.")

    def before_train(self) -> None:
        self._is_training = True
        self.learn.opt.train()

    def cleanup_train(self) -> None:
        learn = self.learn
        self._is_training = False
        if learn.opt is not None and not learn.interrupted:  # after Ctrl-C `resume` goes on with the very weights
            learn.opt.eval()

    @torch.no_grad()
    def before_validate(self) -> None:
        opt = self.learn.opt
        if opt is not None and _trains(opt):
            self._kept = _copied(opt)
            opt.eval()

    def cleanup_validate(self) -> None:
        if self._kept is not None:
            self.learn.opt.train()
            _write(self._kept)  # the way there and back rounds; a validation must not move a training
            self._kept = None

    @contextmanager
    def trained_weights(self) -> Iterator[None]:
        """A context in which the model has the weights of a training phase that a validation goes on in."""
        if self._kept is None:
            yield
            return
        opt = self.learn.opt
        scored = _copied(opt)
        opt.train()
        _write(self._kept)
        try:
            yield
        finally:
            opt.eval()
            _write(scored)

    def weights_loaded(self, with_opt: bool) -> None:
        """Begins the average anew, unless the optimizer's state came with the weights."""
        opt = self.learn.opt
        if opt is None:
            return
        if not with_opt:
            _begin_average(opt)
        elif self._is_training and self._kept is None:
            opt.train()
        else:
            opt.eval()  # the file may be one of the middle of a phase
        self._kept = None if self._kept is None else []  # the way back starts from the loaded weights


def _trains(opt: Any) -> bool:
    return any(group.get("train_mode") for group in opt.param_groups)


def _copied(opt: Any) -> list[tuple[Tensor, Tensor]]:
    return [(p, p.detach().clone()) for group in opt.param_lists for p in group]


@torch.no_grad()
def _write(values: list[tuple[Tensor, Tensor]]) -> None:
    for p, value in values:
        p.copy_(value)


@torch.no_grad()
def _begin_average(opt: Any) -> None:
    """Lets the average, and the weights that the steps are made on (`z`), be those that the model has."""
    state = getattr(opt, "opt", opt).state
    for group in opt.param_groups:
        if "weight_sum" in group:
            group["weight_sum"] = 0.0
        for p in group["params"]:
            if "z" in state.get(p, ()):
                state[p]["z"].copy_(p)
