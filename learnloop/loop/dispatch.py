"""A learner's callbacks: adding, removing, one order for them, a table of handlers per phase, and calling an event."""

import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

from fastcore.foundation import L

from learnloop.loop.callback import Callback, handler_of, handlers_of
from learnloop.loop.cancel import CancelException
from learnloop.loop.events import BATCH_EVENTS, DOCS, EVENTS, unknown_event
from learnloop.loop.notes import add_note, first_of, in_cleanup
from learnloop.loop.ordering import in_order

_BATCH_EVENTS = frozenset(BATCH_EVENTS)
_CLEANUPS = tuple(n for n in EVENTS if n.startswith("cleanup_"))
_CALLED = tuple(n for n in EVENTS if not n.startswith("cleanup_"))
_SPANS = tuple(n.removeprefix("cleanup_") for n in _CLEANUPS)
_EVENTS_OF = {s: (f"before_{s}", f"after_cancel_{s}", f"after_{s}") for s in _SPANS}

#: The attributes that `_rebuild` writes.
TABLES = ("_train_handlers", "_valid_handlers", "_cleanup_handlers", "_silent")

Handler = Callable[[], Any]
Table = dict[str, list[Handler]]
Skipped = tuple[list[Handler], int, Handler]  # the list of a running event, a place in it, and what stood there


class OuterRun(NamedTuple):
    """A run that another one is nested in, as it was when that began."""

    n_spans: int  # open in it
    task: str | None
    muted: list[Callback]


class Dispatcher:
    """Holds callbacks and sends them events; `self("before_batch")` calls every handler of that event in order."""

    cbs: L  # callbacks as they were added; `ordered_cbs` gives them as they run
    training: bool  # the phase: whose table of handlers counts
    _leaving: tuple[Callback, ...] = ()  # those that get their last cleanups now, before they are taken away
    task: str | None  # the run that is active: 'fit', 'lr_find', 'validate' or 'predict'; None outside of runs

    def __init__(self) -> None:
        self.cbs, self.training, self.task = L(), False, None
        self._muted: list[Callback] = []  # callbacks that started a nested run: they do not hear it
        self._outer_runs: list[OuterRun] = []  # that the active one is nested in, outermost first
        self._open_spans: list[Any] = []  # spans that have begun and not been cleaned up, outermost first
        self._rebuild()

    def __call__(self, event_name: str | Iterable[str]) -> None:
        """Sends an event (or several) to every callback that listens, in their order."""
        try:
            handlers = (self._train_handlers if self.training else self._valid_handlers)[event_name]  # type: ignore[index]
        except (KeyError, TypeError):
            return self._call_unlisted(event_name)
        if not handlers:
            return None
        handler = None
        try:
            for handler in handlers:
                handler()
        except CancelException:
            raise
        except Exception as error:
            add_note(error, self, f"{owner_of(handler)!r}.{event_name}")
            raise

    def _call_unlisted(self, event_name: Any) -> None:
        """Events that are in no phase's table: several at once, a cleanup sent by hand, a name that is none."""
        if not isinstance(event_name, str):
            for name in event_name:
                self(name)
        elif event_name in _CLEANUPS:
            for handler in self._cleanup_handlers[event_name]:
                handler()
        else:
            raise ValueError(unknown_event(event_name))

    # Adding and removing

    def add_cb(self, cb: Callback | type[Callback]) -> Self:
        """Adds one callback (a class is instantiated); it hears the next event."""
        return self.add_cbs([cb])

    def add_cbs(self, cbs: Any) -> Self:
        """Adds callbacks, all or none: a wrong one or a circle of laws leaves the learner as it was."""
        self._add(instances(cbs))
        return self

    def _add(self, cbs: list[Callback]) -> None:
        for cb in cbs:
            self._check_addable(cb, cbs)
        in_order([*self.cbs, *cbs])
        for cb in cbs:
            object.__setattr__(cb, "learn", self)
            self.cbs.append(cb)
            self._assign_attribute(cb.name)
        if cbs:
            self._rebuild()

    def _check_addable(self, cb: Callback, adding: list[Callback]) -> None:
        if any(cb is other for other in self.cbs) or sum(cb is other for other in adding) > 1:
            raise ValueError(f"`{cb!r}` is on this learner already; add another instance, or remove this one first.")
        name = cb.name
        if hasattr(type(self), name) or not isinstance(self.__dict__.get(name, cb), Callback):
            raise ValueError(
                f"`{type(cb).__name__}` would hide `learn.{name}`: its class name in snake case is how it is reached. "
                f"Rename the class, for example to `My{type(cb).__name__}`."
            )

    def remove_cb(self, cb: Callback | type[Callback]) -> Self:
        """Removes a callback, or all of a class. Inside open spans it gets their cleanups first."""
        return self.remove_cbs([cb])

    def remove_cbs(self, cbs: Any) -> Self:
        """Removes callbacks (instances, or classes for all of their instances); one that is not there is ignored."""
        outer = self._leaving  # whose cleanups may have called this
        leaving = [cb for cb in self._find(cbs) if not any(cb is other for other in outer)]
        self._leaving = (*outer, *leaving)
        kept: list[BaseException] = []
        try:
            for cb in leaving:
                self._close_spans_of(cb, kept)
        finally:
            self._leaving = outer
        self._detach(leaving)
        if kept:
            try:
                raise first_of(kept)
            finally:
                kept.clear()  # its frames name the list: they would live until the next gc
        return self

    def _close_spans_of(self, cb: Callback, kept: list[BaseException]) -> None:
        """Its cleanups of the open spans, innermost first; what they raise is added to `kept`."""
        handlers = dict(_handlers(cb))
        for i, span in reversed([*enumerate(self._open_spans)]):
            try:
                if self._takes_part(cb, *self._run_of_span(i)):
                    handlers.get(span.cleanup, _nothing)()
            except BaseException as error:
                kept.append(in_cleanup(error, self, f"{cb!r}.{span.cleanup}"))

    def _detach(self, leaving: list[Callback]) -> list[Skipped]:
        """Takes callbacks away; returns what was skipped in running events, for those that come back."""
        skipped = [place for cb in leaving for place in self._skip_in_running_events(cb)]
        for cb in leaving:
            self.cbs = L(other for other in self.cbs if other is not cb)
            if cb.learn is self:
                object.__setattr__(cb, "learn", None)
            self._assign_attribute(cb.name)
        if leaving:
            self._rebuild()
        return skipped

    def _find(self, cbs: Any) -> list[Callback]:
        wanted = listed(cbs)
        return [cb for cb in self.cbs if any(cb is w or (isinstance(w, type) and isinstance(cb, w)) for w in wanted)]

    def _assign_attribute(self, name: str) -> None:
        """`learn.<name>` is the callback of that name that was added last; the one before takes over from it."""
        owners = [cb for cb in self.cbs if cb.name == name]
        if owners:
            self.__dict__[name] = owners[-1]
        else:
            self.__dict__.pop(name, None)

    @contextmanager
    def added_cbs(self, cbs: Any) -> Iterator[Self]:
        """A context with these callbacks added; just these leave at its end."""
        added = instances(cbs)
        self._add(added)
        try:
            yield self
        finally:
            self.remove_cbs(added)

    @contextmanager
    def removed_cbs(self, cbs: Any) -> Iterator[Self]:
        """A context without these callbacks; the same instances come back to the same places. Runs no cleanup."""
        places = [(self.cbs.index(cb), cb) for cb in self._find(cbs)]
        skipped = self._detach([cb for _, cb in places])
        try:
            yield self
        finally:
            for handlers, i, handler in skipped:  # back before its turn, it hears the running event after all
                handlers[i] = handler
            self._put_back(places)

    def _put_back(self, places: list[tuple[int, Callback]]) -> None:
        cbs = list(self.cbs)
        for index, cb in places:
            cbs.insert(index, cb)
            object.__setattr__(cb, "learn", self)
        self.cbs = L(cbs)
        for _, cb in places:
            self._assign_attribute(cb.name)
        self._rebuild()

    def __getitem__(self, cls: type[Callback]) -> Any:
        """The callback of that class; an `L` of them where there are several."""
        found = self._grab_cbs(cls)
        if not found:
            raise KeyError(f"no {getattr(cls, '__name__', cls)} among the callbacks {list(self.cbs)}")
        return found[0] if len(found) == 1 else found

    def _grab_cbs(self, cls: type[Callback]) -> L:
        return L(cb for cb in self.cbs if isinstance(cb, cls))

    def ordered_cbs(self, event_name: str) -> L:
        """Callbacks that have a handler for an event, in the order in which they run."""
        if event_name not in DOCS:
            raise ValueError(unknown_event(event_name))
        cbs = [cb for cb in in_order(self.cbs) if handler_of(cb, event_name) is not None]
        return L(reversed(cbs) if event_name in _CLEANUPS else cbs)

    # The tables

    def _rebuild(self) -> None:
        """Writes the tables anew: fresh lists, so that a running event finishes over those it started with."""
        train: Table = {n: [] for n in _CALLED}
        valid: Table = {n: [] for n in _CALLED}
        cleanups: Table = {n: [] for n in _CLEANUPS}
        for cb in in_order(self.cbs):
            if self._takes_part(cb, self.task, self._muted):
                for name, handler in _handlers(cb):
                    if name in cleanups:
                        cleanups[name].insert(0, handler)
                    elif cb.run:
                        inside = name in _BATCH_EVENTS
                        if cb.run_train or not inside:
                            train[name].append(handler)
                        if cb.run_valid or not inside:
                            valid[name].append(handler)
        self._train_handlers, self._valid_handlers, self._cleanup_handlers = train, valid, cleanups
        self._silent = _silent(train, cleanups) & _silent(valid, cleanups)
        if type(self).__call__ is not Dispatcher.__call__:  # it hears every event itself
            self._silent = frozenset()

    def _takes_part(self, cb: Callback, task: str | None, muted: list[Callback]) -> bool:
        tasks = (cb.tasks,) if isinstance(cb.tasks, str) else cb.tasks
        return (task is None or task in tasks) and not any(cb is other for other in muted)

    def _run_of_span(self, number: int) -> tuple[str | None, list[Callback]]:
        """Task and muted callbacks of the run that an open span belongs to."""
        outer = next((run for run in self._outer_runs if number < run.n_spans), None)
        return (self.task, self._muted) if outer is None else (outer.task, outer.muted)

    # Events that are running now, looked up on the stack: so that calling a handler costs nothing extra

    def _skip_in_running_events(self, cb: Callback) -> list[Skipped]:
        skipped = []
        for handlers, _ in self._running_events():
            for i, handler in enumerate(handlers):
                if owner_of(handler) is cb:
                    handlers[i] = _nothing
                    skipped.append((handlers, i, handler))
        return skipped

    def _callers(self) -> list[Callback]:
        """The callbacks whose handlers are running now."""
        return [owner_of(handler) for _, handler in self._running_events() if handler is not None]

    def _running_events(self) -> Iterator[tuple[list[Handler], Handler | None]]:
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code in _CALLING:
                names = frame.f_locals
                if names.get(frame.f_code.co_varnames[0]) is self and "handlers" in names:
                    yield names["handlers"], names.get("handler")
            frame = frame.f_back  # type: ignore[assignment]


#: Functions whose frames hold `handlers` and the `handler` that runs; `spans.clean_up` adds itself.
_CALLING = {Dispatcher.__call__.__code__}


def calls_handlers(function: Any) -> Any:
    """Marks a function of a learner that goes over a list `handlers`, so that a removal reaches the running list."""
    _CALLING.add(function.__code__)
    return function


def instances(cbs: Any) -> list[Callback]:
    """Callbacks from one, several, or classes; TypeError for anything else."""
    made = [cb() if isinstance(cb, type) and issubclass(cb, Callback) else cb for cb in listed(cbs)]
    for cb in made:
        if not isinstance(cb, Callback):
            hint = " Derive the class from `Callback`." if isinstance(cb, type) or _has_handlers(cb) else ""
            raise TypeError(f"`{cb!r}` is no Callback; `cbs` takes instances or subclasses of Callback.{hint}")
    return made


def _has_handlers(thing: Any) -> bool:
    return any(hasattr(thing, name) for name in EVENTS)


def listed(things: Any) -> list[Any]:
    """None, one thing or several, as a list."""
    if things is None:
        return []
    return list(things) if isinstance(things, (list, tuple, L, set, types.GeneratorType)) else [things]


def _handlers(cb: Callback) -> Iterator[tuple[str, Handler]]:
    """Every event a callback hears, with a handler that carries its owner."""
    if type(cb).__call__ is not Callback.__call__:
        for name in EVENTS:
            yield name, types.MethodType(_caller_of(name), cb)
        return
    for name, handler in handlers_of(cb).items():
        is_own = getattr(handler, "__self__", None) is cb
        yield name, handler if is_own else types.MethodType(_ignoring_self(handler), cb)


def _caller_of(event_name: str) -> Callable[[Callback], Any]:
    return lambda cb: cb(event_name)


def _ignoring_self(handler: Handler) -> Callable[[Callback], Any]:
    return lambda _: handler()


def owner_of(handler: Any) -> Any:
    """The callback to which a handler in a table belongs."""
    return getattr(handler, "__self__", None)


def _nothing() -> None:
    """Stands in the list of a running event for a callback that was removed meanwhile."""


def _silent(table: Table, cleanups: Table) -> frozenset[str]:
    """Spans, and events that are called, that nobody listens to."""
    events = {name for name in _CALLED if not table[name]}
    spans = (s for s in _SPANS if events.issuperset(_EVENTS_OF[s]) and not cleanups[f"cleanup_{s}"])
    return frozenset(events.union(spans))
