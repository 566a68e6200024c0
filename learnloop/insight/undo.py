"""A learner put back as it was, beyond what a state holds: attributes, hooks, the place of weights in memory."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from learnloop.data.keyed import preserved_randomness
from learnloop.loop.interrupt import uncut


@contextmanager
def untouched(learn: Any, cbs: list[Any]) -> Iterator["Before"]:
    """A context at whose end `learn` and `cbs` have every attribute that they had, with the values that it had.

    Callbacks and metrics work on copies of their attributes meanwhile; one that cannot be copied, such as an open file,
    is shared. The values of weights, optimizer and counters are a state's business: `run_undone` calls `reassemble` of
    what this gives before it loads that, so that a state meets the parts that it was taken of.
    """
    before = Before(learn, cbs)
    with preserved_randomness():
        try:
            _work_on_copies(learn, cbs)
            yield before
        finally:
            before.put_back()


class Before:
    """What a learner is made of, by reference."""

    def __init__(self, learn: Any, cbs: list[Any]):
        self.learn, self.kind, self.attributes = learn, type(learn), dict(vars(learn))
        self.model, self.opt = learn.model, learn.opt
        self.cbs = list(learn.cbs)  # the list itself grows where one joins
        self.of_cbs = [(cb, dict(vars(cb))) for cb in cbs]
        self.modules = [_Shelf(m) for part in (learn.model, learn.loss_func) for m in _modules(part)]
        self.places = [(t, t.data) for part in (learn.model, learn.loss_func) for t in _tensors(part)]
        self.loss_values = [(t, t.detach().clone()) for t in _tensors(learn.loss_func)]
        self.generators = [(g, g.get_state()) for g in _generators(learn.dls)]
        self.frozen_idx = getattr(learn.opt, "frozen_idx", None)

    def reassemble(self) -> None:
        """Model and optimizer are in their places with all that is in them; the values of tensors may be others."""
        vars(self.learn).update(model=self.model, opt=self.opt)
        for shelf in self.modules:
            shelf.put_back()
        for t, data in self.places:
            if t.device != data.device or t.data_ptr() != data.data_ptr() or t.stride() != data.stride():
                t.data = data  # it was moved to a device, or to another order in memory

    @uncut
    def put_back(self) -> None:
        learn = self.learn
        object.__setattr__(learn, "__class__", self.kind)
        self.reassemble()
        _refill(vars(learn), self.attributes)
        learn.cbs[:] = self.cbs
        with torch.no_grad():
            for t, value in self.loss_values:
                t.copy_(value)
        for generator, state in self.generators:
            generator.set_state(state)
        if self.frozen_idx is not None:
            learn.opt.frozen_idx = self.frozen_idx
        for cb, attributes in self.of_cbs:
            _refill(vars(cb), attributes)
        learn._rebuild()


class _Shelf:
    """The attributes of a module, and what is in those that are containers: parameters, buffers, children, hooks."""

    def __init__(self, module: nn.Module):
        self.module, self.attributes = module, dict(vars(module))
        containers = [value for value in self.attributes.values() if isinstance(value, (dict, list, set))]
        self.contents = [(container, copy.copy(container)) for container in containers]

    def put_back(self) -> None:
        _refill(vars(self.module), self.attributes)
        for container, content in self.contents:
            _refill(container, content)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _modules(part: Any) -> Iterable[nn.Module]:
    return part.modules() if isinstance(part, nn.Module) else ()


def _tensors(part: Any) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else []


def _generators(dls: Any) -> list[torch.Generator]:
    """Generators of torch that loaders and their samplers have for themselves."""
    found = []
    for dl in dls if hasattr(dls, "__iter__") else (dls.train, getattr(dls, "valid", None)):
        sampler, batch_sampler = getattr(dl, "sampler", None), getattr(dl, "batch_sampler", None)
        for owner in (dl, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found.append(generator)
    return found


# Copies


def _work_on_copies(learn: Any, cbs: list[Any]) -> None:
    memo = {id(thing): thing for thing in _shared(learn, cbs)}
    for owner in cbs:
        for name, value in list(vars(owner).items()):
            vars(owner)[name] = _copied(value, memo)
    own = vars(learn)
    for name, value in list(own.items()):
        if name == "_metrics" or (not name.startswith("_") and type(value) in (list, dict, set)):
            own[name] = _copied(value, memo)


def _shared(learn: Any, cbs: list[Any]) -> Iterator[Any]:
    """What copies refer to instead of copying it: the learner, its parts, and the data."""
    yield from (learn, learn.dls, learn.opt, learn.model, learn.loss_func, learn.opt_func, learn.logger, *cbs)
    yield from learn.dls if hasattr(learn.dls, "__iter__") else (learn.dls.train, getattr(learn.dls, "valid", None))
    for part in (learn.model, learn.loss_func):
        for module in _modules(part):
            yield from (module, vars(module), module._parameters, module._buffers, module._modules)
        yield from _tensors(part)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, (DataLoader, Dataset)) or hasattr(value, "keyed_batches"):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a file, a lock, a tensor inside a graph
        return value
