"""What a callback is: handlers for events, attributes read through the learner, a place in the order."""

import functools
import types
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from typing import Any

from fastcore.basics import camel2snake

from learnloop import html
from learnloop.loop.events import BATCH_EVENTS, DOCS, EVENTS, FORMER_NAMES, PREFIXES, one_edit_away, unknown_event

TASKS = ("fit", "lr_find", "validate", "predict")

#: Setting one of these on a callback changes who hears what.
_TABLE_ATTRIBUTES = {*EVENTS, "order", "run", "run_train", "run_valid", "run_before", "run_after", "tasks"}
_EVENTS = frozenset(EVENTS)
_BATCH_EVENTS = frozenset(BATCH_EVENTS)


class Callback:
    """Code that runs at events of the loop: a method named like an event is its handler.

    Reading an attribute looks on the callback, then the learner, then the model; writing goes through the owner:
    `self.learn.pred = …`. `Callback(before_batch=f)` builds one from functions that take the callback.
    """

    learn: Any = None  # the Learner this is on; None when on none
    order: float = 0  # a wish: smaller runs earlier, ties as added
    run_before: Any = ()  # a law: class, name or tuple of them that this runs before
    run_after: Any = ()  # a law: class, name or tuple of them that this runs after
    run: bool = True  # False: hears no event; back to True after each fit
    run_train: bool = True  # False: hears no batch event of a training phase
    run_valid: bool = True  # False: hears no batch event of a validation phase
    tasks: tuple[str, ...] = TASKS  # the values of `learn.task` in which it takes part
    reads_only: bool = False  # True: a training is the same with and without it, so a resume may add or leave it out
    acts_outside: bool = False  # True: writes files or sends messages; a dry run lists its handlers and calls none
    _stateattrs: tuple[str, ...] = ()  # attributes that a resume must bring back
    _not_events: tuple[str, ...] = ()  # methods that look like handlers on purpose

    def __init__(self, **handlers: Callable[["Callback"], Any]):
        for name, function in handlers.items():
            if name not in _EVENTS:
                raise TypeError(unknown_event(name))
            if not callable(function):
                raise TypeError(f"`{name}={function!r}` is no function; pass one that takes the callback.")
            setattr(self, name, types.MethodType(function, self))

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if callable(value) or isinstance(value, (staticmethod, classmethod)):
                check_handler_name(cls, name)
        unknown = set(_as_tuple(cls.tasks)) - set(TASKS)
        if unknown:
            raise ValueError(f"`{cls.__name__}.tasks` names {sorted(unknown)}; tasks are {', '.join(TASKS)}.")

    @property
    def name(self) -> str:
        """The attribute under which a learner knows it: the class name in snake case, without `Callback` at its end."""
        return _attribute_name(type(self).__name__)

    def __repr__(self) -> str:
        return type(self).__name__

    def _repr_html_(self) -> str:
        """What it is, where it stands, what it hears, and its settings; without this the learner's would be shown."""
        heard = sorted(handled_events(self), key=EVENTS.index)
        rows = [("hears", ", ".join(heard) or "nothing"), ("order", f"{self.order:g}")]
        rows += [(name, repr(value)) for name, value in vars(self).items() if _is_setting(name, value)]
        text = (type(self).__doc__ or "").strip().split("\n")[0]
        return html.table(rows, caption=f"{self!r}: {text}" if text else repr(self))

    def __call__(self, event_name: str) -> Any:
        """Runs the handler of one event by hand, if it is heard now, and returns what that returns."""
        handler = handler_of(self, event_name)
        return handler() if handler is not None and self._hears(event_name) else None

    def _hears(self, event_name: str) -> bool:
        if event_name.startswith("cleanup_"):
            return True
        in_phase = self.run_train if getattr(self.learn, "training", True) else self.run_valid
        return self.run and (in_phase or event_name not in _BATCH_EVENTS)

    def __getattr__(self, name: str) -> Any:
        # Handlers are a callback's own: a learner or model attribute of that name must not become one.
        learn = self.learn
        if learn is not None and name not in DOCS and not name.startswith("__"):
            try:
                return getattr(learn, name)
            except AttributeError:
                if _is_property(learn, name):
                    raise
        if _is_property(self, name):
            return object.__getattribute__(self, name)  # its getter failed: with what it says itself
        raise AttributeError(_Missing(name, self, learn), name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        learn = self.learn
        if name.startswith(PREFIXES) and callable(value):
            check_handler_name(type(self), name)
        if learn is not None and name != "learn":
            if _shadows(self, learn, name):
                _warn_shadow(self, name)
            if name in _TABLE_ATTRIBUTES:
                _set_in_tables(self, name, lambda: object.__setattr__(self, name, value))
            else:
                object.__setattr__(self, name, value)
            return
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in _TABLE_ATTRIBUTES and self.learn is not None:
            _set_in_tables(self, name, lambda: object.__delattr__(self, name))
        else:
            object.__delattr__(self, name)

    def identity(self) -> dict[str, Any]:
        """Settings, by name, without which a resumed fit would be another: refused where they differ."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume: the attributes named in `_stateattrs`, here and in the base classes."""
        own = vars(self)
        return {name: own[name] for name in state_attributes(type(self)) if name in own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned."""
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def trained_weights(self) -> AbstractContextManager[Any]:
        """A context in which the model has the weights that are trained: for who puts others in for a while."""
        return nullcontext()

    def weights_loaded(self, with_opt: bool) -> None:
        """Called when weights were loaded into the model, the optimizer's state too if `with_opt`.

        For who keeps something that belonged to the former ones.
        """


@functools.cache
def _attribute_name(class_name: str) -> str:
    return str(camel2snake(class_name.removesuffix("Callback") or "callback"))


def _is_setting(name: str, value: Any) -> bool:
    return not name.startswith("_") and name != "learn" and isinstance(value, (bool, int, float, str))


def _set_in_tables(cb: Callback, name: str, change: Callable[[], None]) -> None:
    """Changes an attribute that decides who hears what; one that makes a circle of laws is put back."""
    own = vars(cb)
    former = {name: own[name]} if name in own else {}
    change()
    try:
        cb.learn._rebuild()
    except Exception:
        own.pop(name, None)
        own.update(former)
        raise


def state_attributes(cls: type) -> tuple[str, ...]:
    """Every name in `_stateattrs` of a class and its bases, bases first, each once."""
    names = [n for c in reversed(cls.__mro__) for n in _as_tuple(vars(c).get("_stateattrs", ()))]
    return tuple(dict.fromkeys(names))


def check_alone(kind: type[Callback], learn: Any, what: str) -> None:
    """ValueError where several callbacks of a kind are at work, of which each would do `what`."""
    found = [cb for cb in learn.cbs if isinstance(cb, kind) and cb.run]
    if len(found) > 1:
        raise ValueError(f"{found} would each {what}. Keep one of them.")


def handled_events(cb: Callback) -> set[str]:
    """Events for which a callback has a handler of its own; nothing is asked of the learner."""
    return set(handlers_of(cb))


def handlers_of(cb: Callback) -> dict[str, Callable[[], Any]]:
    """The callback's own handlers by event, ready to be called."""
    own = _EVENTS.intersection(vars(cb))
    names = own.union(*[_EVENTS.intersection(vars(c)) for c in type(cb).__mro__])
    return {name: handler for name in names if (handler := handler_of(cb, name)) is not None}


def handler_of(cb: Callback, event_name: str) -> Callable[[], Any] | None:
    """The callback's own handler for an event, ready to be called; None where it has none."""
    try:
        handler = object.__getattribute__(cb, event_name)
    except AttributeError:
        return None
    return handler if callable(handler) else None


def check_handler_name(cls: type, name: str) -> None:
    """Refuses a method that was surely meant as a handler, and warns of one that may have been."""
    if name in _EVENTS or name in getattr(cls, "_not_events", ()):
        return
    if name in FORMER_NAMES:
        raise TypeError(f"`{cls.__name__}.{name}`: {unknown_event(name)}")
    if not name.startswith(PREFIXES):
        return
    near = one_edit_away(name)
    if near:
        raise TypeError(
            f"`{cls.__name__}.{name}` looks like a handler, but no event has that name. Did you mean `{near}`?"
        )
    warnings.warn(
        f"`{cls.__name__}.{name}` looks like a handler, but no event has that name, so nothing calls it. "
        f'If that is meant, set `_not_events = ("{name}",)`.',
        stacklevel=3,
    )


def nearest(name: str, *owners: Any) -> str:
    """` Did you mean …?` with the nearest attribute of `owners`, or nothing."""
    known = {n for owner in owners for n in [*dir(type(owner)), *vars(owner)] if not n.startswith("_")}
    near = get_close_matches(name, known, n=1)
    return f" Did you mean `{near[0]}`?" if near else ""


class _Missing:
    """The text of an AttributeError, made only when somebody reads it: `hasattr` asks often and reads never."""

    def __init__(self, name: str, cb: Callback, learn: Any):
        self.name, self.cb, self.learn = name, cb, learn

    def __str__(self) -> str:
        if self.learn is None:
            return f"`{self.cb}` has no attribute `{self.name}`; it is on no learner.{nearest(self.name, self.cb)}"
        model = vars(self.learn).get("model")
        return (
            f"`{self.name}` is neither on the callback `{self.cb}`, nor on the learner, nor on the model "
            f"`{type(model).__name__}`.{nearest(self.name, self.cb, self.learn, model)}"
        )

    __repr__ = __str__

    def __reduce__(self) -> Any:
        return str, (str(self),)


def _is_property(owner: Any, name: str) -> bool:
    return isinstance(getattr(type(owner), name, None), property)


def _shadows(cb: Callback, learn: Any, name: str) -> bool:
    # Dictionaries only: `hasattr` would walk on to the model for every attribute that a handler sets.
    known = name in learn.__dict__ or name in _class_names(type(learn))  # type: ignore[arg-type]
    return known and name not in _class_names(type(cb))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=512)
def _class_names(cls: Any) -> frozenset[str]:
    return frozenset(dir(cls))


def _warn_shadow(cb: Callback, name: str) -> None:
    warnings.warn(
        f"`self.{name} = …` in {cb!r} hides the learner's `{name}` from this callback and changes nothing there. "
        f"Write `self.learn.{name} = …` to change it, or take another name.",
        stacklevel=3,
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
