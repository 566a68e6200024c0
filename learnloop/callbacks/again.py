"""A batch that is computed once more: what is noted before, put back for it, and put right after it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from learnloop.callbacks.precision import MixedPrecision
from learnloop.data.keyed import random_states, set_random_states

#: What a learner knows of the batch in hand.
_IN_HAND = ("xb", "yb", "pred", "_raw_loss", "_loss", "_loss_grad", "_output_loss")


# The batch: plain data, for a window of them may have to be stored

Noted = tuple[Any, Any, dict[str, Any], list[dict[str, Any]]]


def note(learn: Any) -> Noted:
    """The batch just before its forward pass: inputs, targets, random states, what callbacks keep of it."""
    return learn.xb, learn.yb, random_states(), batch_attributes(learn)


def put_back(learn: Any, noted: Noted) -> None:
    """Makes everything as it was noted, with autocast open where there is one."""
    learn.xb, learn.yb, random, attributes = noted
    learn.pred = learn._raw_loss = learn._loss = learn._loss_grad = learn._output_loss = None
    set_random_states(random)
    set_batch_attributes(learn, attributes)
    reopen_autocast(learn)


def reopen_autocast(learn: Any) -> None:
    for cb in learn._grab_cbs(MixedPrecision):
        if cb.run:
            cb.reopen()


def batch_attributes(learn: Any) -> list[dict[str, Any]]:
    """What callbacks keep of the batch in hand: for each that names attributes in `_batchattrs`, their values."""
    return [{name: getattr(cb, name) for name in names} for cb, names in keeping(learn)]


def set_batch_attributes(learn: Any, attributes: list[dict[str, Any]]) -> None:
    for (cb, _), values in zip(keeping(learn), attributes, strict=False):  # one may have been added meanwhile
        for name, value in values.items():
            object.__setattr__(cb, name, value)


def keeping(learn: Any) -> list[tuple[Any, tuple[str, ...]]]:
    """The callbacks that name attributes in `_batchattrs`, with these names."""
    return [(cb, names) for cb in learn.cbs if (names := getattr(type(cb), "_batchattrs", ()))]


def goes_back(learn: Any) -> bool:
    """Whether the loop would go back through the loss in hand."""
    has_loss = len(learn.yb) or learn._output_loss is not None
    return learn.training and bool(has_loss) and not (learn._has_no_graph() and learn._has_nothing_to_train())


@contextmanager
def kept_in_hand(learn: Any) -> Iterator[None]:
    """What is computed inside leaves no trace in the batch in hand, the random generators and the model's buffers."""
    former = {name: learn.__dict__.get(name) for name in _IN_HAND}
    random, attributes, buffers = random_states(), batch_attributes(learn), Buffers(learn.model)
    try:
        yield
    finally:
        learn.__dict__.update(former)
        set_random_states(random)
        set_batch_attributes(learn, attributes)
        buffers.put_back()


# The model


class Buffers:
    """Copies of a model's buffers; `put_back` gives the values back, and the tensors where a module replaced them."""

    @torch.no_grad()
    def __init__(self, model: Any):
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self.slots = [(m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
        self.copies: list[Tensor] = [b.detach().clone() for _, _, b in self.slots]

    @torch.no_grad()
    def put_back(self) -> None:
        for (buffers, name, buffer), copy in zip(self.slots, self.copies, strict=True):
            buffer.copy_(copy)
            buffers[name] = buffer


# Who hears it


@contextmanager
def unheard_by_readers(learn: Any, handles: Callable[[Any], bool]) -> Iterator[None]:
    """Callbacks that only read, and of which `handles(cb)` is true, hear nothing of what happens inside."""
    readers = [cb for cb in learn.cbs if cb.reads_only and handles(cb)]
    if not readers:
        yield
        return
    muted = list(learn._muted)
    learn._muted = [*muted, *readers]
    learn._rebuild()
    try:
        yield
    finally:
        learn._muted = muted
        learn._rebuild()
