"""Checkpoints: the whole run, written while it goes on, and read back by a process that repeats the call."""

import os
import re
import secrets
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from fastcore.basics import noop
from torch import Tensor

from learnloop.callbacks.journal import Journal
from learnloop.loop.callback import Callback
from learnloop.loop.passes import how_data_goes_on
from learnloop.loop.state import capture
from learnloop.stored import SUFFIX, Stored, newest_run, next_path, read_run, runs_in, write_run

_SECONDS = {"s": 1, "min": 60, "h": 3600}
_TERMINATED = 128 + signal.SIGTERM


class Checkpoint(Callback):
    """Stores the whole run every so often, so that `fit(…, resume=True)` goes on exactly where the last file was.

    `Checkpoint("1ep")` after each epoch, `"500step"` every so many updates, `"10min"` (or `s`, `h`) by the clock; also
    at the end of a fit, and where Ctrl-C or SIGTERM stop it. SIGTERM then ends the process with 143. A file is complete
    or not there, has a checksum, and is read without running code from it. The first of a run is read back before the
    training goes on. Later ones are written by a thread, from a copy in host memory; where that fails, a warning names
    path and reason, the training goes on, and its end raises the OSError if the newest file is still missing.
    With it comes a journal with a line per batch, by which a resumed fit tells whether it repeats what was there.
    Cost per batch: 20 to 40 µs for that line; per checkpoint: one copy of the state.
    """

    order = 1000  # when everybody else is done with the batch
    run_valid = False
    reads_only = True
    tasks = ("fit",)

    def __init__(
        self,
        every: str = "1ep",
        keep: int | None = 3,  # files to keep, the newest; None: all
        path: str | Path | None = None,  # the folder; None: `checkpoints` in the folder of the learner's models
    ):
        self.every, self.keep, self.path = every, keep, path
        self.count, self.unit = parse_every(every)
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ValueError(f"`keep={keep!r}`: pass how many files to keep, 1 or more, or None for all.")
        self.last: Path | None = None  # the newest file of this run
        self.goes_on_from: Stored | None = None  # what the next fit resumes, if it does
        self.run_id = ""
        self._close()

    def _close(self) -> None:
        self._writing: _Writing | None = None
        self._journal: Journal | None = None
        self._error: OSError | None = None  # why the newest file could not be written
        self._due_at = 0.0  # updates or seconds at which the next one is due
        self._former: Any = None  # the handler of SIGTERM to put back
        self._is_terminated = self._is_checked = False

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return folder_of(self, self.learn)

    # The events

    def before_fit(self) -> None:
        """Begins a run, or goes on with the one that is resumed; refuses a folder that cannot be written."""
        learn, resumed, self.goes_on_from = self.learn, self.goes_on_from, None
        self._close()
        if resumed is not None:
            self.run_id, self.last = resumed.run, resumed.path
        elif learn._resuming is None or not self.run_id:
            self.run_id, self.last = secrets.token_hex(8), None
        counters = {} if learn._resuming is None else learn._resuming["counters"]
        _check_writable(self.folder)
        self._journal = Journal(self.folder / "journal", self.run_id, counters.get("train_iter", 0))
        self._set_due(counters.get("opt_iter", 0))
        self._listen()

    def after_batch(self) -> None:
        learn = self.learn
        if self._journal is not None:
            self._journal.note(learn)
            if self._journal.repeated and not self._journal.expected:
                self._say_verdict()
        if self.unit != "ep" and self._now(learn.opt_iter) >= self._due_at and (learn.stepped or self.unit != "step"):
            self._set_due(learn.opt_iter)
            learn.at_boundary(self.save)

    def after_epoch(self) -> None:
        learn = self.learn
        is_due = self.unit == "ep" and (learn.epoch + 1) % self.count == 0
        if is_due or learn.epoch == learn.n_epoch - 1:
            learn.at_boundary(self.save)

    def after_cancel_fit(self) -> None:
        point = self.learn._point
        if self.learn.interrupted and point is not None:
            self._store(point)

    def cleanup_fit(self) -> None:
        """Waits for the file that is being written; raises what kept it from being written, or ends the process."""
        self._stop_listening()
        if self._writing is not None:
            self._finish_writing()
        if self._journal is not None:
            self._say_verdict()
            self._journal.close()
        error, is_terminated = self._error, self._is_terminated
        if is_terminated:
            say(self.learn, f"SIGTERM: stopped; the same call with `resume=True` goes on from `{self.last}`")
        self._close()
        if error is not None:
            raise error
        if is_terminated:
            raise SystemExit(_TERMINATED)

    # When

    def _now(self, opt_iter: int) -> float:
        return opt_iter if self.unit == "step" else time.monotonic()

    def _set_due(self, opt_iter: int) -> None:
        now = self._now(opt_iter)
        if self.unit == "step":  # whole multiples, also after a resume
            self._due_at = (now // self.count + 1) * self.count
        else:
            self._due_at = now + self.count * _SECONDS.get(self.unit, 0)

    # Writing

    def save(self) -> None:
        """Stores the run as it is now; to be called where a fit can go on from, as `learn.at_boundary` does."""
        self._store(capture(self.learn))

    def _store(self, state: dict[str, Any]) -> None:
        if self._writing is not None:
            self._finish_writing()
        if self._journal is not None:
            self._journal.flush()
        self._writing = _Writing(self.folder, state, self.run_id, self.learn._phase, self.keep)
        if not self._is_checked:
            self._check_first(state)
        elif self.learn.interrupted:
            self._finish_writing()

    def _check_first(self, state: dict[str, Any]) -> None:
        """Reads the first file of a run back before it counts."""
        self._finish_writing()
        if self._error is not None:
            error, self._error = self._error, None
            self.learn._point = state  # nothing of the training is lost: `learn.resume()` goes on
            raise error
        if not same(read_run(self.last).state, state):  # type: ignore[arg-type]
            raise OSError(f"the checkpoint `{self.last}` does not hold what was written: is the disk all right?")
        self._is_checked = True

    def _finish_writing(self) -> None:
        writing, self._writing = self._writing, None
        self._error = writing.finish()  # type: ignore[union-attr]
        if self._error is None:
            self.last = writing.path  # type: ignore[union-attr]
        elif self._is_checked:
            warnings.warn(f"the checkpoint was not written, the training goes on: {self._error}", stacklevel=2)

    # SIGTERM, by which clusters announce that they take the machine away

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            self._former = signal.signal(signal.SIGTERM, self._terminate)

    def _stop_listening(self) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)
            self._former = None

    def _terminate(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a data worker that was forked meanwhile
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._is_terminated = True
        self.learn._stop_requested = True

    # Saying

    def _say_verdict(self) -> None:
        verdict = self._journal.verdict() if self._journal is not None else None
        if verdict is not None:
            self._journal.repeated = 0  # type: ignore[union-attr]
            say(self.learn, verdict)


class _Writing:
    """One file on its way to the disk, in a thread of its own."""

    def __init__(self, folder: Path, state: dict[str, Any], run: str, phase: int, keep: int | None):
        self.folder, self.keep = folder, keep
        self.path = next_path(folder)
        self.error: OSError | None = None
        self.thread = threading.Thread(target=self._write, args=(state, run, phase), name="learnloop checkpoint")
        self.thread.start()

    def _write(self, state: dict[str, Any], run: str, phase: int) -> None:
        try:
            write_run(self.path, state, run, phase)
            self._remove_old()
        except OSError as error:
            self.error = error
        except Exception as error:  # not of the disk, but the thread must not take it to its grave
            self.error = OSError(f"`{self.path}` could not be written: {error!r}")

    def _remove_old(self) -> None:
        for path in runs_in(self.folder)[: -self.keep] if self.keep is not None else ():
            path.unlink(missing_ok=True)

    def finish(self) -> OSError | None:
        """Waits for the thread; returns what went wrong."""
        self.thread.join()
        return self.error


def folder_of(cb: Checkpoint, learn: Any) -> Path:
    """Where the files of a Checkpoint on this learner lie."""
    return Path(learn.path) / learn.model_dir / "checkpoints" if cb.path is None else Path(cb.path)


def stored_for(learn: Any, cbs: list[Callback], resume: bool | str | Path) -> Stored | None:
    """The checkpoint that `fit(resume=…)` goes on from, told to the Checkpoint that goes on with it.

    None, and a line that says so, where there is none yet.
    """
    checkpoint = next((cb for cb in reversed(cbs) if isinstance(cb, Checkpoint)), None)
    if resume is True and checkpoint is None:
        raise ValueError(
            "`resume=True` looks in the folder of the Checkpoint among the callbacks, and there is none. Add "
            '`Checkpoint("1ep")` to the learner or to `cbs`, or pass `resume` the path of a file or folder.'
        )
    place = folder_of(checkpoint, learn) if checkpoint is not None and resume is True else Path(resume)  # type: ignore[arg-type]
    if resume is not True and not place.exists():
        raise FileNotFoundError(f"there is no checkpoint `{place}` to resume. Pass `resume=True` to begin without one.")
    stored = read_run(place) if place.is_file() else newest_run(place)
    if checkpoint is not None:
        checkpoint.goes_on_from = stored
    say(learn, _where_from(learn, place, stored))
    return stored


def _where_from(learn: Any, place: Path, stored: Stored | None) -> str:
    if stored is None:
        return f"no checkpoint in `{place}` yet: the fit begins at its start"
    where = stored.state["position"]
    if where["stage"] == "train" and where["batches"] + where["taken"]:
        batch = where["taken"] if stored.state["counters"]["n_step"] is not None else where["batches"]
        return f"goes on from `{stored.path}`: epoch {where['epoch']}, batch {batch}; {how_data_goes_on(learn, stored.state)}"
    part = " (its validation)" if where["stage"] == "validate" else ""
    return f"goes on from `{stored.path}`: epoch {where['epoch']}{part}"


def say(learn: Any, text: str) -> None:
    """One line for the person who waits, where rows are shown too."""
    if learn.logger is not noop:
        print(text)


def parse_every(every: str) -> tuple[int, str]:
    """`(500, "step")` of "500step"."""
    found = re.fullmatch(r"\s*(\d+)\s*(ep|step|s|min|h)\s*", every) if isinstance(every, str) else None
    if found is None or int(found[1]) == 0:
        raise ValueError(f'`every={every!r}`: write "1ep", "500step", "10min", "30s" or "2h".')
    return int(found[1]), found[2]


def same(a: Any, b: Any) -> bool:
    """Whether two states are the same to the bit, NaN included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def _bytes(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_writable(folder: Path) -> None:
    """OSError, before the first batch, where no file can be made in the folder."""
    probe = folder / f".{secrets.token_hex(6)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".*{SUFFIX}.*.tmp"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: no checkpoint could be written there", str(folder)) from error
