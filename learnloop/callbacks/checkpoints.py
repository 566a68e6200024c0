"""Checkpoints: the whole run, written while it goes on, and read back by a process that repeats the call."""

import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

from fastcore.basics import noop

from learnloop.callbacks.journal import Journal
from learnloop.loop.callback import Callback
from learnloop.loop.interrupt import Sigterm
from learnloop.loop.passes import how_data_goes_on
from learnloop.loop.state import capture
from learnloop.stored import Stored, Writing, check_writable, new_run, newest_run, read_run

_SECONDS = {"s": 1, "min": 60, "h": 3600}
_TERMINATED = 128 + signal.SIGTERM
#: What is open during a fit only, and is left out of copies: each of these is there as None in the class.
_OPEN = ("_writing", "_journal", "_sigterm")


class Checkpoint(Callback):
    """Stores the whole run every so often, so that `fit(…, resume=True)` goes on exactly where the last file was.

    `Checkpoint("1ep")` after each epoch, `"500step"` every so many updates, `"10min"` (or `s`, `h`) by the clock; also
    at the end of a fit, and where Ctrl-C or SIGTERM stop it. SIGTERM then ends the process with 143. A file is complete
    or not there, has a checksum, and is read without running code from it. One folder is for one fit.

    The first file of a run is read back before the training goes on: where it cannot be written, the OSError leaves the
    fit, and `learn.resume()` goes on. Later ones are written by a thread, from a copy in host memory: where that fails,
    a warning names path and reason, the training goes on, and its end raises the OSError if the newest is missing.

    Batches come again as they came. A loader with a `state_dict` of its own is asked for it in the middle of a pass
    only: one that counts epochs by itself needs them told, `self.dl.epoch = self.epoch` in `before_train`.

    A journal beside the files has a line per batch, by which a resumed fit tells whether it repeats what was there.
    Cost: about 20 µs per batch for that line; one copy of the state per file, and a few milliseconds of its thread.
    """

    order = 1000  # when everybody else is done with the batch
    run_valid = False
    reads_only = acts_outside = True
    tasks = ("fit",)

    _writing: Writing | None = None  # the file on its way
    _journal: Journal | None = None
    _sigterm: Sigterm | None = None

    def __init__(
        self,
        every: str = "1ep",
        keep: int | None = 3,  # files to keep, the newest; None: all
        path: str | Path | None = None,  # the folder; None: `checkpoints` in the folder of the learner's models
    ):
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ValueError(f"`keep={keep!r}`: pass how many files to keep, 1 or more, or None for all.")
        self.every, self.keep, self.path = every, keep, path
        self.count, self.unit = parse_every(every)
        self.last: Path | None = None  # the newest file of this run
        self.run_id = ""  # of the run that was here last
        self.goes_on_from: Stored | None = None  # what the next fit resumes, if it does
        self._seed: int | None = None  # of the data in the last fit, by which its resume is known
        self._due_at = 0.0  # updates or seconds at which the next file is due
        self._error: OSError | None = None  # why the newest file is missing
        self._is_proven = False  # a file of this fit was read back

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return folder_of(self, self.learn)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OPEN}

    # The events

    def before_fit(self) -> None:
        """Begins a run, or goes on with the one that is resumed; OSError for a folder that cannot be written."""
        learn = self.learn
        _check_alone(self)
        check_writable(self.folder)
        self._begin_run(learn._resuming)
        done = {} if learn._resuming is None else learn._resuming["counters"]
        self._journal = Journal(self.folder / "journal", self.run_id, done.get("train_iter", 0)).open()
        self._set_due(done.get("opt_iter", 0))
        self._error, self._is_proven = None, False
        self._sigterm = Sigterm(learn).open()

    def _begin_run(self, resuming: dict[str, Any] | None) -> None:
        """Takes over the run that is gone on with: that of a file, or the one that was stopped here; else a new one."""
        stored, self.goes_on_from = self.goes_on_from, None
        if stored is not None and stored.state is resuming:
            self.run_id, self.last = stored.run, stored.path
        elif resuming is None or self._seed != self.learn._data_seed:
            self.run_id, self.last = new_run(), None
        self._seed = self.learn._data_seed

    def after_batch(self) -> None:
        learn = self.learn
        if self._journal is not None:
            self._journal.note(learn)
            if self._journal.is_repeated:
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
        if self.learn.interrupted and self.learn._point is not None:
            self._store(self.learn._point)

    def cleanup_fit(self) -> None:
        """Waits for the file that is being written; raises what kept it from being written, or ends the process."""
        sigterm, self._sigterm = self._sigterm, None
        try:
            self._finish_writing()
            self._close_journal()
        finally:
            if sigterm is not None:  # not before: a SIGTERM may still come while the last file is written
                sigterm.close()
        error, self._error = self._error, None
        if sigterm is not None and sigterm.was_sent:
            say(self.learn, f"SIGTERM: stopped; the same call with `resume=True` goes on from `{self.last}`")
            raise SystemExit(_TERMINATED)
        if error is not None and not self.learn.interrupted:
            raise error

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
        self._finish_writing()
        if self._journal is not None:
            self._journal.flush()
        is_first = not self._is_proven
        self._writing = Writing(self.folder, state, self.run_id, self.learn._phase, self.keep, is_first).start()
        if is_first or self.learn.interrupted:
            self._finish_writing()

    def _finish_writing(self) -> None:
        """Waits for the file that is on its way; raises where the first one failed, and warns where another did."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        error = self._error = writing.finish()
        if error is None:
            self.last, self._is_proven = writing.path, True
        elif writing.is_checked and not self.learn.interrupted:
            self._error, self.learn._point = None, writing.state
            error.add_note("The training is as it was when the file was due: `learn.resume()` goes on from there.")
            raise error
        else:
            warnings.warn(f"the checkpoint was not written: {error}", stacklevel=2)

    # The journal

    def _say_verdict(self) -> None:
        verdict = None if self._journal is None else self._journal.verdict()
        if verdict is not None:
            say(self.learn, verdict)

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.flush()
            self._say_verdict()
            self._journal.close()
            self._journal = None


def folder_of(cb: Checkpoint, learn: Any) -> Path:
    """Where the files of a Checkpoint on this learner lie."""
    return Path(learn.path) / learn.model_dir / "checkpoints" if cb.path is None else Path(cb.path)


def _check_alone(cb: Checkpoint) -> None:
    others = [c for c in cb.learn.cbs if isinstance(c, Checkpoint) and c is not cb]
    if any(folder_of(other, cb.learn) == cb.folder for other in others):
        raise ValueError(f"two Checkpoints would write to `{cb.folder}`. Give one of them another `path`.")


def parse_every(every: str) -> tuple[int, str]:
    """`(500, "step")` of "500step"."""
    found = re.fullmatch(r"\s*(\d+)\s*(ep|step|s|min|h)\s*", every) if isinstance(every, str) else None
    if found is None or int(found[1]) == 0:
        raise ValueError(f'`every={every!r}`: write "1ep", "500step", "10min", "30s" or "2h".')
    return int(found[1]), found[2]


# The checkpoint that a fit goes on from


def stored_for(learn: Any, cbs: list[Callback], resume: bool | str | Path) -> Stored | None:
    """The checkpoint that `fit(resume=…)` goes on from, told to the Checkpoint that goes on with it.

    None where there is none yet. Says in one line which of these it is.
    """
    checkpoint = next((cb for cb in reversed(cbs) if isinstance(cb, Checkpoint)), None)
    place = _place(learn, checkpoint, resume)
    stored = read_run(place) if place.is_file() else newest_run(place)
    if stored is not None:
        _check_not_its_own(learn, stored)
    if checkpoint is not None:
        checkpoint.goes_on_from = stored
    say(learn, _where_from(learn, place, stored))
    return stored


def _place(learn: Any, checkpoint: Checkpoint | None, resume: bool | str | Path) -> Path:
    """The file or folder to look at."""
    if not isinstance(resume, bool):
        if not Path(resume).exists():
            raise FileNotFoundError(f"there is no `{resume}` to resume. `resume=True` begins without a checkpoint.")
        return Path(resume)
    if checkpoint is None:
        raise ValueError(
            "`resume=True` looks in the folder of the Checkpoint among the callbacks, and there is none. Add "
            '`Checkpoint("1ep")` to the learner or to `cbs`, or pass `resume` the path of a file or folder.'
        )
    return folder_of(checkpoint, learn)


def _check_not_its_own(learn: Any, stored: Stored) -> None:
    """Refuses to take a fit that has ended in this process for the next one, which would then not be trained."""
    if learn._is_done and stored.state["counters"].get("_data_seed") == learn._data_seed:
        raise ValueError(
            f"the newest checkpoint, `{stored.path}`, is of the fit that this learner has just ended. Give each fit a "
            "folder of its own by `Checkpoint(path=…)`, or leave out `resume` to train anew."
        )


def _where_from(learn: Any, place: Path, stored: Stored | None) -> str:
    if stored is None:
        return f"no checkpoint in `{place}` yet: the fit begins at its start"
    where, n_epoch = stored.state["position"], stored.state["counters"]["n_epoch"]
    from_ = f"goes on from `{stored.path}`:"
    if where["stage"] == "fit" and where["epoch"] >= n_epoch:
        return f"{from_} that fit had come to its end"
    batch = where["batches"] if stored.state["counters"]["n_step"] is None else where["taken"]
    if where["stage"] == "train" and batch:
        return f"{from_} epoch {where['epoch']}, batch {batch}; {how_data_goes_on(learn, stored.state)}"
    return f"{from_} epoch {where['epoch']}{' (its validation)' if where['stage'] == 'validate' else ''}"


def say(learn: Any, text: str) -> None:
    """One line for the person who waits, where rows are shown too."""
    if learn.logger is not noop:
        print(text)
