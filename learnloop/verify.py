"""Whether a training can be resumed exactly: a part of it run twice, once through a stop, and compared bit for bit."""

import copy
import os
import pickle
import subprocess
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fastcore.basics import noop
from torch import Tensor
from torch.utils.data import DataLoader

from learnloop.callbacks.recorder import Recorder
from learnloop.data.batches import leaves
from learnloop.data.keyed import is_plain, length, preserved_randomness
from learnloop.data.once import like
from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelFitException
from learnloop.loop.state import capture
from learnloop.machine import default_pickle

#: What is compared of each batch, in the order in which one follows from the other, and what a difference means.
_MEANINGS = {
    "indices": "the sampler draws other samples: it keeps a state or a generator of its own. One that draws from the "
    "global generators, or has `set_epoch`, can be resumed",
    "batches": "the same samples come out otherwise: the dataset or the collate function has a generator of its own. "
    "Let it draw from the global ones of torch, numpy or python, which the loader seeds for each batch",
    "losses": "the same batches and weights give another loss: the model or the loss has randomness or state of its "
    "own, or a kernel is not deterministic (`set_seed(…, reproducible=True)` finds out)",
    "weights": "the same losses give other weights: the optimizer or a callback has state that is not stored, or the "
    "backward of a kernel is not deterministic (`set_seed(…, reproducible=True)` finds out)",
}


@dataclass
class ResumeReport:
    """What `verify_resume` found. True as a bool where everything came again bit for bit."""

    n_batch: int  # batches that were compared, after the stop
    stopped_at: int  # the batch before which it was stopped
    process: str  # where the second part ran
    compared: list[str]  # kinds of checksums
    differs: dict[str, int] = field(default_factory=dict)  # what is another -> from which batch on

    def __bool__(self) -> bool:
        return not self.differs

    def __str__(self) -> str:
        where = f"stopped before batch {self.stopped_at} and resumed in {self.process}"
        if self:
            return f"{where}: {self.n_batch} batches repeated bit for bit ({', '.join(self.compared)})"
        what, batch = next(iter(self.differs.items()))
        also = [name for name in self.differs if name != what]
        then = f" ({', '.join(also)} follow)" if also else ""
        return f"{where}: not exact. From batch {batch} on the {what} differ{then}: {_MEANINGS[what]}."

    __repr__ = __str__


class Trace(Callback):
    """Takes checksums of what each training batch was, and the state before batch `stop`; ends the fit after `end`."""

    order = 10_000
    reads_only = True
    tasks = ("fit",)

    def __init__(self, end: int, stop: int | None = None):
        self.end, self.stop = end, stop
        self.sums: dict[str, dict[int, int]] = {name: {} for name in _MEANINGS}
        self.state: dict[str, Any] | None = None

    def before_batch(self) -> None:
        learn = self.learn
        if not learn.training:
            return
        if learn.train_iter >= self.end:
            raise CancelFitException
        indices = _indices(learn)
        if indices is not None:
            self.sums["indices"][learn.train_iter] = checksum(repr(indices))
        self.sums["batches"][learn.train_iter] = checksum((learn.xb, learn.yb))

    def after_batch(self) -> None:
        learn = self.learn
        if not learn.training:
            return
        done = learn.train_iter - 1
        self.sums["losses"][done] = checksum(learn._finished_loss())
        self.sums["weights"][done] = checksum([p.detach() for p in learn._parameters()])
        if learn.train_iter == self.stop:
            learn.at_boundary(self._take)

    def _take(self) -> None:
        self.state = capture(self.learn)


def verify(learn: Any, n_batch: int, stop: int, cbs: Any) -> ResumeReport:
    """Trains copies of a learner: one for `n_batch` batches, another from its state before batch `stop` of them."""
    if learn.task is not None:
        raise RuntimeError("`verify_resume` was called while a run is active. Call it before or after that run.")
    if not 0 < stop < n_batch:
        raise ValueError(
            f"`stop={stop}` and `n_batch={n_batch}`: it stops after at least one batch and before the last."
        )
    with preserved_randomness(), TemporaryDirectory() as folder:
        copied = _copy(learn, cbs, Path(folder))
        try:
            first, second, process = _in_processes(copied, n_batch, stop, Path(folder))
        except _Unable as reason:
            first = _trained(copy.deepcopy(copied), n_batch, stop)
            second = _trained(copied, n_batch, None, _state_of(first, stop))
            process = f"this process (a fresh one could not make the learner: {reason})"
    differs = _differences(first.sums, second.sums, stop)
    compared = [name for name, sums in first.sums.items() if sums]
    return ResumeReport(sum(n >= stop for n in first.sums["losses"]), stop, process, compared, differs)


def _differences(first: dict[str, dict[int, int]], second: dict[str, dict[int, int]], stop: int) -> dict[str, int]:
    """From which batch on each kind of checksum is another; the cause before what follows from it."""
    wrong = {name: [n for n, s in first[name].items() if n >= stop and second[name].get(n) != s] for name in _MEANINGS}
    found = {name: min(batches) for name, batches in wrong.items() if batches}
    return dict(sorted(found.items(), key=lambda item: item[1]))


# The learner, copied so that nothing of it moves


def _copy(learn: Any, cbs: Any, folder: Path) -> Any:
    """A learner that trains as this one does, shows nothing, writes into `folder`, and tells its batches' indices."""
    away = [cb for cb in learn.cbs if cb.reads_only and not isinstance(cb, Recorder)]
    with learn.removed_cbs(away):
        copied = copy.deepcopy(learn)
    copied.path, copied.logger, copied.create_mbar = folder, noop, False
    copied.add_cbs(copy.deepcopy(cbs))
    if hasattr(copied.dls, "loaders") and is_plain(copied.dls.train):
        copied.dls.loaders[0] = _told(copied.dls.train)
    return copied


class _Told:
    """A sampler that keeps the last order it gave."""

    def __init__(self, sampler: Any):
        self.inner = sampler
        self.order: list[Any] = []

    def __iter__(self) -> Any:
        self.order = list(self.inner)
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.inner, name)


def _told(dl: DataLoader) -> DataLoader:
    if dl.batch_sampler is None:
        return like(dl, batch_size=None, sampler=_Told(dl.sampler))
    return like(dl, batch_sampler=_Told(dl.batch_sampler))


def _told_by(dl: Any) -> _Told | None:
    if not isinstance(dl, DataLoader):
        return None
    sampler = dl.sampler if dl.batch_sampler is None else dl.batch_sampler
    return sampler if isinstance(sampler, _Told) else None


def _indices(learn: Any) -> Any:
    """The samples in the batch, where the loader is of torch."""
    told = _told_by(learn.dl)
    if told is None:
        return None
    return told.order[learn.iter if learn._passes is None else learn._passes.taken - 1]


# The two parts


def _trained(learn: Any, n_batch: int, stop: int | None, state: dict[str, Any] | None = None) -> Trace:
    """Trains up to batch `n_batch`, from `state` if that is given."""
    trace = Trace(n_batch, stop)
    if state is not None:
        _draw_once(learn.dls.train)
    n_iter = length(learn.dls.train)
    numbers = {"n_step": n_batch} if not n_iter else {"n_epoch": -(-n_batch // n_iter) + 1}
    with learn.added_cbs(trace):
        learn._fit_from(state, **numbers)
    return trace


def _draw_once(dl: Any) -> None:
    """Draws an order that nobody uses: a resumed process has drawn others before than the one that was stopped."""
    told = _told_by(dl)
    if told is not None:
        with preserved_randomness():
            list(told.inner)


def _state_of(trace: Trace, stop: int) -> dict[str, Any]:
    if trace.state is None:
        raise ValueError(f"the training ended before batch {stop}, so nothing could be resumed. Pass a smaller `stop`.")
    return trace.state


class _Unable(Exception):
    """The learner cannot be made in another process."""


def _in_processes(learn: Any, n_batch: int, stop: int, folder: Path) -> tuple[Trace, Trace, str]:
    """Both parts, each in a fresh process; the second knows only the learner as it was, and the state."""
    try:
        (folder / "learner").write_bytes(default_pickle().dumps(learn))
    except Exception as error:
        raise _Unable(str(error).partition("\n")[0]) from None
    first = _child(folder, n_batch, stop)
    _state_of(first, stop)
    return first, _child(folder, n_batch, None), "a fresh process"


def _child(folder: Path, n_batch: int, stop: int | None) -> Trace:
    settings = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), str(torch.get_default_dtype())
    code = f"from learnloop.verify import in_child; in_child({str(folder)!r}, {n_batch}, {stop}, {settings!r})"
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if done.returncode:
        raise _Unable((done.stderr.strip().splitlines() or ["it ended without a reason"])[-1])
    return pickle.loads((folder / "trace").read_bytes())


def in_child(folder: str, n_batch: int, stop: int | None, settings: tuple[int, bool, str]) -> None:
    """What a fresh process does: it makes the learner, trains its part, and leaves the trace."""
    threads, is_deterministic, dtype = settings
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(is_deterministic)
    torch.set_default_dtype(getattr(torch, dtype.removeprefix("torch.")))
    place = Path(folder)
    learn = pickle.loads((place / "learner").read_bytes())
    state = None if stop is not None else pickle.loads((place / "trace").read_bytes()).state
    trace = _trained(learn, n_batch, stop, state)
    (place / "trace").write_bytes(pickle.dumps(trace))


# Checksums


def checksum(value: Any) -> int:
    """32 bits over every byte of the tensors in a batch of any shape, and over the text of what else is in it."""
    crc = 0
    for leaf in leaves(value):
        if isinstance(leaf, Tensor):
            bits: Any = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            crc = zlib.crc32(bits, zlib.crc32(f"{leaf.dtype}{list(leaf.shape)}".encode(), crc))
        else:
            crc = zlib.crc32(repr(leaf).encode(), crc)
    return crc
