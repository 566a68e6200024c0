"""What of the model is trained, over time: parameter groups that wait, batch norm that stands still."""

from typing import Any

from torch import nn

from learnloop.callbacks.modes import TrainEvalCallback
from learnloop.loop.callback import Callback

bn_types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def set_bn_eval(m: nn.Module, use_eval: bool = True) -> None:
    """Puts every batch norm in `m` whose parameters are all frozen into eval mode, or back into train mode."""
    for layer in _frozen_bn(m):
        layer.train(not use_eval)


def _frozen_bn(model: Any) -> list[nn.Module]:
    """Those without parameters of their own are left alone: nothing says whether they are frozen."""
    layers = model.modules() if isinstance(model, nn.Module) else ()
    return [layer for layer in layers if isinstance(layer, bn_types) and _is_frozen(list(layer.parameters()))]


def _is_frozen(params: list[nn.Parameter]) -> bool:
    return bool(params) and not any(p.requires_grad for p in params)


class BnFreeze(Callback):
    """Keeps the running statistics of frozen batch norm layers as they are: they train in eval mode.

    Set in `before_train`, after `TrainEvalCallback`; their modes are put back in `cleanup_train`. A Learner freezes
    batch norm only with `train_bn=False`. Source: docs.fast.ai/callback.training. Cost per batch: none.
    """

    run_after = TrainEvalCallback

    def __init__(self) -> None:
        self._set: list[nn.Module] = []  # layers that were in train mode before

    def before_train(self) -> None:
        self._set = [layer for layer in _frozen_bn(self.learn.model) if layer.training]
        set_bn_eval(self.learn.model)

    def cleanup_train(self) -> None:
        for layer in self._set:
            layer.train()
        self._set = []


class FreezeUntil(Callback):
    """Freezes parameter groups until an epoch begins: `FreezeUntil(2)` trains the last group alone for two epochs.

    It acts in `before_epoch`, and puts back what was trained before in `cleanup_fit` at the latest. Parameters that are
    always trained, such as those of batch norm (`train_bn`), are let be; the state of the optimizer stays. A group that
    several of them freeze waits for the last. Source: gradual unfreezing, Howard and Ruder, arXiv 1801.06146. Cost per
    batch: none.
    """

    _stateattrs = ("_before",)
    tasks = ("fit", "lr_find")

    def __init__(
        self,
        epoch: int,  # the first in which the groups are trained
        groups: int | slice = slice(None, -1),  # of `learn.opt.param_lists`; by default all but the last
    ):
        self.until, self.groups = epoch, groups
        self._before: list[bool] | None = None  # for each of their parameters while frozen: was it trained before?

    def before_fit(self) -> None:
        self._before = None

    def before_epoch(self) -> None:
        if self.learn.epoch >= self.until:
            self._unfreeze()
        elif self._before is None:
            self._freeze()

    def _freeze(self) -> None:
        params = self._params()
        if not params:
            n = len(self.learn.opt.param_lists)
            raise ValueError(
                f"`groups={self.groups}` names none of the {n} parameter groups, so FreezeUntil has nothing to freeze. "
                "Groups come from `Learner(splitter=…)`."
            )
        held = self._held_by_others()
        self._before = [held.get(id(p), p.requires_grad) for p in params]
        self.learn.opt.set_freeze(self.groups, False)

    def _unfreeze(self) -> None:
        before, self._before = self._before, None
        held = self._held_by_others()
        for p, is_trained in zip(self._params(), before or (), strict=False):
            if id(p) not in held:
                p.requires_grad_(is_trained)

    def _held_by_others(self) -> dict[int, bool]:
        """Of the parameters that another FreezeUntil keeps frozen now, by id: whether they were trained before."""
        others = [cb for cb in self.learn._grab_cbs(FreezeUntil) if cb is not self and cb._before is not None]
        return {id(p): was for cb in others for p, was in zip(cb._params(), cb._before, strict=False)}

    def _params(self) -> list[Any]:
        lists = self.learn.opt.param_lists
        chosen = lists[self.groups] if isinstance(self.groups, slice) else [lists[self.groups]]
        return [p for group in chosen for p in group]

    def cleanup_fit(self) -> None:
        self._unfreeze()
