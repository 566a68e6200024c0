"""Schedule-free optimizers, which train on one set of weights and are evaluated on another."""

from typing import Any

import torch

from learnloop.loop.callback import Callback


class ScheduleFreeCallback(Callback):
    """Switches a schedule-free optimizer (arXiv 2405.15682, the package `schedulefree`) to and fro.

    `Learner(…, opt_func=schedulefree.AdamWScheduleFree, cbs=ScheduleFreeCallback())`. Outside of a training phase the
    model holds the averaged weights: for validation, for predictions, and for whatever is saved then. A state taken in
    the middle of a phase holds the weights of training, and a resume goes on with them. Works with every optimizer
    that has `train()` and `eval()`. Cost per batch: none; a validation inside a training phase copies the weights.
    """

    _kept: Any = None  # the weights of training, while a validation goes on inside it

    def before_fit(self) -> None:
        opt = self.learn.opt
        if opt is not None and not (hasattr(opt, "train") and hasattr(opt, "eval")):
            raise TypeError(
                f"ScheduleFreeCallback needs an optimizer with `train()` and `eval()`, but this is {opt._title()}; "
                "pass `opt_func=schedulefree.AdamWScheduleFree`, or take the callback away."
            )

    def before_train(self) -> None:
        self.learn.opt.train()

    def cleanup_train(self) -> None:
        if self.learn.opt is not None:
            self.learn.opt.eval()

    @torch.no_grad()
    def before_validate(self) -> None:
        opt = self.learn.opt
        if opt is not None and _trains(opt):
            self._kept = [(p, p.detach().clone()) for group in opt.param_lists for p in group]
            opt.eval()

    @torch.no_grad()
    def cleanup_validate(self) -> None:
        if self._kept is not None:
            self.learn.opt.train()
            for p, value in self._kept:
                p.copy_(value)  # the way there and back rounds; a validation must not move a training
            self._kept = None


def _trains(opt: Any) -> bool:
    return any(group.get("train_mode") for group in opt.param_groups)
