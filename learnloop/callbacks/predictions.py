"""Predictions over a whole set: gathered in memory, streamed to a folder, or fetched during a training."""

from pathlib import Path
from typing import Any

import torch
from fastcore.basics import detuplify
from torch import Tensor

from learnloop.data.batches import find_bs, to_detach
from learnloop.data.tensors import to_concat
from learnloop.loop.callback import Callback
from learnloop.loop.dispatch import listed
from learnloop.losses import per_sample


class GatherPredsCallback(Callback):
    """Gathers predictions and targets of the validated batches, and with them inputs and losses.

    What it keeps is in host memory; what it saves goes to a file per batch, named by its number: `torch.load(folder /
    "0")`. Files that an earlier, longer run left in such a folder are removed. A batch that was cancelled before it had
    a prediction is not gathered. Cost per batch: one copy to the host for each thing kept or saved.
    """

    run_train = False

    def __init__(
        self,
        with_input: bool = False,
        with_loss: bool = False,  # one number per sample; the loss must not be reduced meanwhile
        save_preds: str | Path | None = None,  # a folder for the model's outputs
        save_targs: str | Path | None = None,  # a folder for the targets
        with_preds: bool = True,  # keep predictions in memory
        with_targs: bool = True,
        concat_dim: int = 0,  # along which batches are joined
    ):
        self.with_input, self.with_loss, self.with_preds, self.with_targs = (
            with_input,
            with_loss,
            with_preds,
            with_targs,
        )
        self.save_preds, self.save_targs = _folder(save_preds), _folder(save_targs)
        self.acts_outside = self.save_preds is not None or self.save_targs is not None
        self.concat_dim = concat_dim
        self._forget()

    def _forget(self) -> None:
        self.preds: Any = []
        self.targets: Any = []
        self.inputs: Any = []
        self.losses: Any = []
        self.batches: list[int] = []  # numbers of the batches that were gathered
        self._input: Any = None
        self._is_joined = False

    def before_validate(self) -> None:
        self._forget()
        for folder in (self.save_preds, self.save_targs):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)

    def before_batch(self) -> None:
        if self.with_input:  # now, since the loop may hand the model something else
            self._input = to_detach(self.learn.xb)

    def after_batch(self) -> None:
        learn = self.learn
        if learn.pred is None:
            return
        self.batches.append(learn.iter)
        if self.with_input:
            self.inputs.append(self._input)
        if self.with_preds or self.save_preds is not None:
            self._take(self.preds if self.with_preds else None, learn.pred, self.save_preds)
        if self.with_targs or self.save_targs is not None:
            self._take(self.targets if self.with_targs else None, learn.yb, self.save_targs)
        if self.with_loss:
            self.losses.append(to_detach(_per_sample(learn)))

    def _take(self, kept: list[Any] | None, value: Any, folder: Path | None) -> None:
        value = to_detach(value)
        if kept is not None:
            kept.append(value)
        if folder is not None:
            torch.save(detuplify(value), folder / str(self.learn.iter))

    def after_validate(self) -> None:
        """Joins the batches."""
        if self._is_joined:  # a cancel kept `before_validate` from here: what there is belongs to an earlier validation
            self._forget()
        self._is_joined, self._input = True, None
        for folder in (self.save_preds, self.save_targs):
            _remove_others(folder, self.batches)
        self.inputs = self._joined(self.inputs, self.with_input)
        self.preds = self._joined(self.preds, self.with_preds)
        self.targets = self._joined(self.targets, self.with_targs)
        self.losses = self._joined(self.losses, self.with_loss, dim=0)

    def cleanup_validate(self) -> None:
        if not self._is_joined:  # cut short: what there is would be taken for the whole
            self._forget()
            self.inputs = self.preds = self.targets = self.losses = None

    def _joined(self, values: Any, wanted: bool, dim: int | None = None) -> Any:
        if not wanted or not values:
            return None  # also where every batch was cancelled
        return detuplify(to_concat(values, dim=self.concat_dim if dim is None else dim))

    def all_tensors(self) -> list[Any]:
        """What was gathered: inputs if they were asked for, predictions, targets, losses if they were asked for."""
        first, last = [self.inputs] if self.with_input else [], [self.losses] if self.with_loss else []
        return [*first, self.preds, self.targets, *last]


class FetchPredsCallback(Callback):
    """After each validation on `dls.valid`, predictions of a loader in `preds`: what `get_preds` returns.

    Callbacks with `remove_on_fetch = True`, and those in `cbs`, are away meanwhile. Cost: a pass over that loader per
    epoch.
    """

    remove_on_fetch = True

    def __init__(
        self,
        ds_idx: Any = 1,  # which loader of `dls`
        dl: Any = None,  # another loader
        with_input: bool = False,
        with_decoded: bool = False,
        cbs: Any = None,  # callbacks to take away meanwhile
        reorder: bool = True,  # in the order of the dataset
    ):
        self.ds_idx, self.dl, self.with_input, self.with_decoded = ds_idx, dl, with_input, with_decoded
        self.cbs, self.reorder = cbs, reorder
        self.preds: Any = None

    def after_validate(self) -> None:
        learn = self.learn
        if learn.task == "fit" and learn.dl is not learn._loader(1):
            return  # a further set
        away = [cb for cb in learn.cbs if getattr(cb, "remove_on_fetch", False) and cb is not self]
        with learn.removed_cbs([*away, *listed(self.cbs)]):
            self.preds = learn.get_preds(
                self.ds_idx, self.dl, self.with_input, with_decoded=self.with_decoded, reorder=self.reorder
            )


def blended_preds(
    augmented: list[Any],  # one for each augmented pass: tensors, or structures of them
    plain: Any,  # without augmentation
    beta: float | None,  # the weight of `plain`; None: both, as a tuple
    use_max: bool,  # the largest of all, not a mean
) -> Any:
    """One prediction out of several of the same samples."""
    if use_max:
        return combined(lambda *preds: torch.stack(preds).amax(0), plain, *augmented)
    mean = combined(lambda *preds: torch.stack(preds).mean(0), *augmented)
    return (mean, plain) if beta is None else combined(lambda a, b: torch.lerp(a, b, beta), mean, plain)


def combined(function: Any, *values: Any) -> Any:
    """What a function of several tensors makes of each place of several structures that are alike."""
    first = values[0]
    if isinstance(first, Tensor):
        return function(*values)
    if isinstance(first, dict):
        return type(first)({key: combined(function, *(v[key] for v in values)) for key in first})
    parts = [combined(function, *places) for places in zip(*values, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)


def _folder(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _remove_others(folder: Path | None, batches: list[int]) -> None:
    """Removes the files of batches that this run did not have."""
    kept = {str(i) for i in batches}
    for file in folder.iterdir() if folder is not None else ():
        if file.name.isdecimal() and file.name not in kept:
            file.unlink()


def _per_sample(learn: Any) -> Tensor:
    """One number per sample of the batch, from a loss with one or several values for each."""
    loss, n = learn._finished_loss(), find_bs(learn.yb if len(learn.yb) else learn.xb)
    if loss is None:
        raise ValueError(
            "`with_loss` needs targets, and this batch has none. Leave it out, or pass a loader with both."
        )
    return per_sample(loss, n)
