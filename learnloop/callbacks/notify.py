"""Messages about a training, to a chat or any server, which cost it nothing."""

import logging
import math
import string
import sys
import time
from collections.abc import Mapping
from typing import Any

from learnloop.callbacks.recorder import Recorder
from learnloop.callbacks.reports import how_it_ended
from learnloop.callbacks.sender import Sender
from learnloop.callbacks.services import SERVICES, Service
from learnloop.loop.callback import Callback
from learnloop.machine import rank_distrib

__all__ = ["Notify"]

#: A message for each event. The fields are those of `FIELDS`.
TEMPLATES = {
    "start": "{name}: training begins, {n_epoch} epochs",
    "epoch": "{name}: {n_done} of {n_epoch} epochs done: {row}",
    "best": "{name}: best {monitor} so far is {best}, in epoch {epoch}",
    "end": "{name}: training has ended after {time}: {row}",
    "error": "{name}: training failed in epoch {epoch} after {time}: {error}",
    "interrupt": "{name}: training was interrupted in epoch {epoch} after {time}",
}
#: What a template may name, each with an example.
FIELDS = {
    **{"event": "end", "name": "Sequential", "epoch": 4, "n_done": 5, "n_epoch": 5, "step": 500, "error": ""},
    **{"row": "train_loss 0.1, valid_loss 0.2", "monitor": "valid_loss", "value": "0.2", "best": "0.2"},
    "time": "0:01:23",
}
_ENDS = {"done": "end", "interrupted": "interrupt", "error": "error"}

#: Not a warning: where those are errors, one would end a training.
_log = logging.getLogger("learnloop")


class Notify(Callback):
    """Sends a message when a training begins, ends, fails or is interrupted: `Notify("slack", every=5)`.

    Addresses and tokens are read from the environment when a message is sent (for Slack from `SLACK_WEBHOOK_URL`, see
    `learnloop.callbacks.services`); they are kept in no attribute, state or text. A thread sends, tries again where a
    server fails, and gives up `wait` seconds after the end of the fit; what did not arrive is counted in one line of
    the log `learnloop`. Nothing that a server does reaches the training. Only the first of several processes sends.
    It acts in `before_fit`, `after_epoch` and `cleanup_fit`. Cost per batch: none; per message some 50 µs.
    """

    order, run_after = Recorder.order + 20, Recorder
    tasks = ("fit",)
    reads_only = acts_outside = True
    _stateattrs = ("best",)

    def __init__(
        self,
        service: str | Service = "webhook",  # 'webhook', 'slack', 'discord', 'telegram', 'ntfy', or one made by hand
        every: int | None = None,  # epochs from one message to the next; None: none of them
        on: tuple[str, ...] = ("start", "end", "error", "interrupt"),  # these, and 'best' for each new best value
        monitor: str = "valid_loss",  # the column of which `best` is the best
        template: str | Mapping[str, str] | None = None,  # a message for all events, or for some; fields as in `FIELDS`
        name: str | None = None,  # of the training; None: the class of the model
        *,
        timeout: float = 5.0,  # seconds that a server may take to connect, and again to answer
        retries: int = 2,  # after a first try that failed
        pause: float = 1.0,  # seconds before the first of them, then twice as long each
        wait: float = 2.0,  # seconds by which the end of a fit may be delayed, at most
    ):
        self.service = _service(service)
        self.on, self.every, self.monitor, self.name_of_run = _checked_events(on), every, monitor, name
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"`every={every!r}`: pass a number of epochs, 1 or more, or None for no such messages.")
        self.templates = {**TEMPLATES, **_checked_templates(template)}
        self.timeout, self.retries, self.pause, self.wait = timeout, retries, pause, wait
        self.best: float | None = None  # the best value of `monitor` in this fit
        self._sender: Sender | None = None
        self._began: float | None = None  # monotonic time; None outside of a fit
        self._outer: int | None = None  # the id of an exception that was being handled when the fit began

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no thread."""
        return {**vars(self), "_sender": None, "_began": None}

    # The events

    def before_fit(self) -> None:
        """Looks whether there is somewhere to send to, and says that the training begins."""
        self.best, self._began, self._outer = None, None, id(sys.exception())
        self._check_monitor()
        if rank_distrib() or not self._has_address():
            return
        self._sender = self._sender or Sender(self.timeout, self.retries, self.pause)
        self._sender.open()
        self._began = time.monotonic()
        self._say("start")

    def _check_monitor(self) -> None:
        recorder = self.learn.__dict__.get("recorder")
        columns = [] if recorder is None else list(recorder.metric_names[1:])
        if "best" in self.on and self.monitor not in columns:
            raise ValueError(
                f"`Notify` monitors `{self.monitor}`, but this fit records {', '.join(columns) or 'nothing'}."
            )

    def _has_address(self) -> bool:
        missing = self.service.missing()
        if missing:
            _log.warning(f"Notify sends nothing: {' and '.join(missing)} must be set in the environment.")
        return not missing

    def after_epoch(self) -> None:
        """Looks at the row that the Recorder has made."""
        value = self._row().get(self.monitor)
        if is_better(value, self.best, self.monitor):
            self.best = value
            self._say("best")
        if self.every is not None and (self.learn.epoch + 1) % self.every == 0:
            self._say("epoch")

    def cleanup_fit(self) -> None:
        """Says how the training ended, and waits a little until that has been sent."""
        how, sender = how_it_ended(self.learn, self._outer), self._sender
        if sender is None or self._began is None:
            return
        if how in _ENDS:
            error = sys.exception() if how == "error" else None
            self._say(_ENDS[how], error="" if error is None else said_by(error))
        self._began = None
        sender.close(self.wait)
        if sender.n_failed:
            _log.warning(
                f"Notify: {sender.n_failed} messages to {type(self.service).__name__} did not arrive ({sender.reason})."
            )

    # The messages

    def _say(self, event: str, **more: Any) -> None:
        sender, service = self._sender, self.service
        if sender is None or self._began is None or (event not in self.on and event != "epoch"):
            return
        try:
            fields = {**self._fields(event), **more}
            text = self.templates[event].format(**fields)
        except Exception as error:  # such as that of a metric's `__str__`
            _log.warning(f"Notify could not make its message: {type(error).__name__}.")
            return
        sender.put(lambda: service.request(text, fields))

    def _fields(self, event: str) -> dict[str, Any]:
        learn, row = self.learn, self._row()
        return {
            "event": event,
            "name": self.name_of_run or type(learn.model).__name__,
            "epoch": learn.epoch,
            "n_done": learn.epoch + 1,
            "n_epoch": learn.n_epoch,
            "step": learn.train_iter,
            "row": said_of(row),
            "monitor": self.monitor,
            "value": short(row.get(self.monitor)),
            "best": short(self.best),
            "time": clock(time.monotonic() - (self._began or 0)),
            "error": "",
        }

    def _row(self) -> dict[str, Any]:
        """The last row of this fit by column; empty before the first."""
        recorder = self.learn.__dict__.get("recorder")
        return recorder.history[-1] if recorder is not None and recorder.history else {}


def _service(service: str | Service) -> Service:
    if isinstance(service, Service):
        return service
    if service not in SERVICES:
        raise ValueError(  # without repeating it: it may be an address that is a secret
            f"`service` is none that is known; there are {', '.join(SERVICES)}. Addresses and tokens are read from the "
            "environment, for a plain webhook from `WEBHOOK_URL`."
        )
    return SERVICES[service]()


def _checked_events(on: Any) -> tuple[str, ...]:
    events = (on,) if isinstance(on, str) else tuple(on)
    unknown = [event for event in events if event not in TEMPLATES]
    if unknown:
        raise ValueError(f"`on` names {', '.join(map(repr, unknown))}; there are {', '.join(TEMPLATES)}.")
    return events


def _checked_templates(template: str | Mapping[str, str] | None) -> dict[str, str]:
    if template is None:
        return {}
    templates = dict.fromkeys(TEMPLATES, template) if isinstance(template, str) else dict(template)
    _checked_events(templates)
    for text in templates.values():
        named = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        unknown = [name for name in named if name not in FIELDS]
        if unknown:
            raise ValueError(f"the template names {{{unknown[0]}}}; the fields are {', '.join(FIELDS)}.")
        text.format(**FIELDS)  # a ValueError where a format does not fit: numbers of the record come as text
    return templates


def is_better(value: Any, best: float | None, monitor: str) -> bool:
    """Whether a value beats the best one: of losses and errors the smaller, of anything else the larger."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    if best is None:
        return True
    return value < best if "loss" in monitor or "error" in monitor else value > best


def said_of(row: Mapping[str, Any]) -> str:
    """A row of the record in one line."""
    cells = [f"{name} {short(value)}" for name, value in row.items() if name not in ("epoch", "time")]
    return ", ".join(cells) or "no row yet"


def said_by(error: BaseException) -> str:
    """An exception's class and text; the class alone where making the text fails."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def short(value: Any) -> str:
    """A number with four digits; anything else as it is, None as a dash."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, s = divmod(int(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}"
