"""A record of every fit in a file of its own: what was trained with what on what, how it went, how it ended."""

import inspect
import os
import random
import secrets
import subprocess
import sys
import time
import types
from datetime import datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learnloop.callbacks.blockfile import BlockFile
from learnloop.callbacks.logfiles import json_line
from learnloop.callbacks.reports import Reports, description
from learnloop.callbacks.spelling import arguments_of, checksum, spelled
from learnloop.data.batches import describe
from learnloop.data.keyed import length, preserved_randomness
from learnloop.data.loaders import names_of
from learnloop.loop.callback import Callback, handled_events, state_attributes
from learnloop.loop.events import BATCH_EVENTS, EVENTS
from learnloop.loop.ordering import in_order
from learnloop.machine import environment

__all__ = ["RunRecord", "description_of_run"]

ASKED_AGAIN = 30  # seconds after which git is asked again: many short fits would spend their time with it
SECONDS = 1.0  # after which no further sample is read, and a question to git goes without an answer


class RunRecord(Reports):
    """Keeps a record of each fit in a file below `path`: settings, callbacks, code, data, seeds, machine, rows, end.

    Lines of JSON, each flushed: one that describes the fit, one per row of the record, one per `every` batches, one for
    how it ended. A fit without that last line was killed, or goes on. A resumed fit goes on with its file. `runs(path)`
    reads them. Addresses in settings are cut to their host. Of each dataset a few samples are read, as if for training,
    which a dataset that changes by being read would notice: pass `samples=0`. It acts in `before_fit`, `after_batch`
    with `every`, `after_epoch` and `cleanup_fit`. Cost per batch: none; some
    milliseconds per fit, and tens of them where git is asked.
    """

    def __init__(
        self,
        path: str | Path = "runs",  # a folder, below `learn.path` unless absolute; it is made
        every: int | None = None,  # training batches from one line to the next; None: rows only
        samples: int = 4,  # of each dataset, to tell data of the same shapes apart; read for a second at most
    ):
        super().__init__(every)
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
            raise ValueError(f"`samples={samples!r}`: pass how many samples of a dataset are read, 0 for none.")
        self.path, self.samples = Path(path), samples
        self.record: dict[str, Any] = {}  # the first line of the last fit
        self.seconds = 0.0  # of the last fit, up to its end or to where it was stopped
        self.log = BlockFile(opening='{"kind": "run",')
        self._fname: str | None = None
        self._began = 0.0

    def begin(self) -> None:
        self._began, self._fname = time.perf_counter(), None
        if self.learn._resuming is None:
            self.seconds = 0.0
            self._begin_file()

    def _begin_file(self) -> None:
        now = datetime.now().astimezone()
        if self._fname is None:
            self._fname = f"{now:%Y-%m-%dT%H-%M-%S}-{secrets.token_hex(3)}.jsonl"
            self._open()
        about = {"id": self._fname.removesuffix(".jsonl"), "at": now.isoformat(timespec="seconds")}
        self.record = {"kind": "run", **about, **description_of_run(self.learn, self.samples)}
        self.log.begin(json_line(self.record), append=True)

    def _open(self) -> None:
        self.log.open(self.learn.path / self.path / str(self._fname))

    def write_step(self, step: int, numbers: dict[str, float]) -> None:
        self._write({"kind": "step", "step": step, **numbers})

    def write_row(self, step: int, row: dict[str, Any]) -> None:
        self._write({"kind": "row", "step": step, **row})

    def _write(self, fields: dict[str, Any]) -> None:
        if self.log.place is None:  # added to a fit that is resumed, or the file is gone
            self._begin_file()
        self.log.write(json_line(fields))

    def end(self, how: str) -> None:
        self.seconds = self._seconds()
        error = sys.exception() if how == "error" else None
        said = None if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            if self.log.place is not None:
                self.log.write(json_line({"kind": "end", "how": how, "error": said, "seconds": self.seconds}))
        finally:
            self.log.close()

    def _seconds(self) -> float:
        return round(self.seconds + time.perf_counter() - self._began, 3)

    def state_dict(self) -> dict[str, Any]:
        seconds = self._seconds() if self._is_open else self.seconds
        return {**super().state_dict(), "place": self.log.place, "fname": self._fname, "seconds": seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        place, self._fname = state.pop("place"), state.pop("fname")
        super().load_state_dict(state)
        if not self._is_open:
            self.log.place = place
        elif place is not None:
            self._open()
            self.log.go_on(place)
            if self.log.place is None:  # the file is gone: all rows are written again
                self.n_rows = 0
            else:
                at = datetime.now().astimezone().isoformat(timespec="seconds")
                self._write({"kind": "resumed", "at": at, "seconds": self.seconds})


def description_of_run(learn: Any, samples: int = 4) -> dict[str, Any]:
    """All that a fit is made of, in plain data: settings, callbacks, the loop, code, data, seeds, environment."""
    about = description(learn)
    device = about.pop("device")
    del about["callbacks"]  # here they have their settings with them
    more = {"loss": spelled(learn.loss_func), "opt_func": spelled(learn.opt_func), "groups": spelled(learn.opt.hypers)}
    return {
        "configuration": {**about, **more, "metrics": [m.name for m in learn.metrics]},
        "callbacks": [{"name": type(cb).__name__, "settings": settings_of(cb)} for cb in learn.cbs],
        "loop": loop_of(learn),
        "code": code_version(),
        "data": data_fingerprint(learn, samples),
        "seed": {
            "torch": torch.initial_seed(),
            "fit": learn._data_seed,
            "loaders": getattr(learn.dls, "seed", None),
        },
        "environment": {**environment(), "device": device},
    }


def loop_of(learn: Any) -> dict[str, list[str]]:
    """The callbacks that hear each event of a fit, in their order."""
    cbs = in_order([cb for cb in learn.cbs if cb.run and "fit" in cb.tasks])
    heard = [(repr(cb), _heard_by(cb)) for cb in cbs]
    found = {name: [cb for cb, events in heard if name in events] for name in EVENTS}
    return {name: cbs[::-1] if name.startswith("cleanup_") else cbs for name, cbs in found.items() if cbs}


def _heard_by(cb: Callback) -> set[str]:
    in_batches = cb.run_train or cb.run_valid
    return {n for n in handled_events(cb) if in_batches or n not in BATCH_EVENTS or n.startswith("cleanup_")}


def settings_of(cb: Callback) -> dict[str, Any]:
    """The arguments that a callback was made with; of `Callback(before_batch=f)` the functions.

    Where it does not keep one under its name, its public attributes that are no state.
    """
    own = {n: v for n, v in vars(cb).items() if not n.startswith("_") and n != "learn"}
    found = arguments_of(cb)
    wanted = [p.name for p in inspect.signature(type(cb)).parameters.values() if p.kind is not p.VAR_KEYWORD]
    functions = {n: spelled(v.__func__) for n, v in own.items() if n in EVENTS and isinstance(v, types.MethodType)}
    if found.keys() >= {*wanted}:
        return {**found, **functions}
    state = state_attributes(type(cb))
    return {**{n: spelled(v) for n, v in own.items() if n not in state and n not in EVENTS}, **found, **functions}


# The code


def code_version() -> dict[str, str | None]:
    """The version of this package, and the revision of the folder that the program runs in, where git has one."""
    return {"learnloop": _version(), "revision": _revision(os.getcwd(), int(time.monotonic() / ASKED_AGAIN))}


@lru_cache
def _version() -> str | None:
    try:
        return metadata.version("learnloop")
    except metadata.PackageNotFoundError:  # it runs from its source tree
        return None


@lru_cache(maxsize=1)
def _revision(folder: str, moment: int) -> str | None:
    """The commit, `-dirty` behind it where files have changed since; `moment` lets what is remembered grow old."""
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


# The data


def data_fingerprint(learn: Any, samples: int) -> list[dict[str, Any]]:
    """A dict for each loader: what it is, how much it holds, the shapes of a sample, a checksum of some of them."""
    names = {i: name for i, name in enumerate(names_of(learn.dls)) if name is not None}
    return [{"name": name, **_of_loader(learn._loader(i), samples)} for i, name in names.items()]


def _of_loader(dl: Any, samples: int) -> dict[str, Any]:
    dataset = getattr(dl, "dataset", dl if isinstance(dl, (list, tuple)) else None)
    n = length(dataset) if hasattr(dataset, "__getitem__") else None
    found = {
        "loader": type(dl).__name__,
        "batches": length(dl),
        "batch_size": getattr(dl, "batch_size", None),
        "dataset": None if dataset is None else type(dataset).__name__,
        "samples": n,
    }
    return found | (_of_samples(dataset, n, samples) if n and samples else {})


def _of_samples(dataset: Any, n: int, samples: int) -> dict[str, Any]:
    """Of samples spread over a dataset, read until a second has passed; one that cannot be read is no error here."""
    start, total, n_read, shape = time.perf_counter(), 0, 0, ""
    try:
        with preserved_randomness():
            _seed_host()  # augmentation draws the same each time
            for i in dict.fromkeys(k * (n - 1) // max(1, samples - 1) for k in range(samples)):
                if n_read and time.perf_counter() - start > SECONDS:
                    break
                sample = dataset[i]
                shape = shape or describe(sample)
                total, n_read = checksum(f"{total} {_content(sample)}".encode()), n_read + 1
    except Exception as error:
        return {"unread": type(error).__name__}
    return {"sample": shape, "checksum": f"{total:08x}", "n_read": n_read}


def _seed_host() -> None:
    """Only the generators of the host: torch's own function looks at every accelerator, which takes milliseconds."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)


def _content(sample: Any) -> Any:
    """What is in a sample, so that another one differs."""
    if isinstance(sample, dict):
        return {k: _content(v) for k, v in sample.items()}
    if isinstance(sample, (list, tuple)):
        return [_content(v) for v in sample]
    data = sample.detach().cpu().numpy() if isinstance(sample, torch.Tensor) else sample
    tobytes = getattr(data, "tobytes", None)  # arrays and images
    return spelled(data) if tobytes is None else checksum(tobytes())
