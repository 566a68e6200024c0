"""Which batches a phase sees: from which position, with which key, and pass after pass in `fit(n_step=…)`."""

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from types import GeneratorType
from typing import Any

import torch

from learnloop.data.ahead import ahead
from learnloop.data.batches import describe
from learnloop.data.keyed import (
    Key,
    batches,
    end_workers,
    indices_of,
    is_keyed,
    is_list,
    mix,
    random_states,
    set_random_states,
)
from learnloop.data.loaders import title_of
from learnloop.loop.cancel import CancelException
from learnloop.loop.interrupt import uncut
from learnloop.loop.notes import add_note
from learnloop.loop.state import unplain

uncut(end_workers)

SAMPLE = 16  # batches of a training phase whose waiting is measured, and at most so many before them
_END = object()


def phase_batches(learn: Any, start: int) -> Iterator[Any]:
    """The batches of the phase that `learn` is in, from `start` on."""
    if _counts_updates(learn):
        stream = _stretch(learn)
    else:
        stream = _one_pass(learn, learn.dl, _pass_of_phase(learn), start, learn.training)
    return stream if learn._at_most is None else _first(stream, learn._at_most)


def place(learn: Any) -> tuple[Any, int, int]:
    """Where the batch in hand comes from: the loader, the number of the pass over it, the batch's number in that."""
    if _counts_updates(learn):
        return learn._passes.dl, learn._passes.number, learn._passes.taken - 1
    return learn.dl, _pass_of_phase(learn), learn.iter


def _counts_updates(learn: Any) -> bool:
    """Whether this is a training phase that goes pass after pass over its loader."""
    return learn.training and learn._passes is not None and not learn._depth


def _pass_of_phase(learn: Any) -> int:
    """The number of the pass that a phase is, where each phase is one."""
    return learn.epoch if learn.task == "fit" else 0


def sample_numbers(learn: Any, ahead: int) -> list[Any] | None:
    """The numbers of the samples in the batch in hand, or so many batches ahead; None where a loader does not tell."""
    dl, number, i = place(learn)
    order = indices_of(dl, key_of(learn, dl, number), getattr(learn.dls, "keyed", True))
    i = ahead - 1 if i is None else i + ahead
    if order is None or not 0 <= i < len(order):
        return None
    return order[i].tolist() if hasattr(order[i], "tolist") else list(order[i])


def key_of(learn: Any, dl: Any, number: int) -> Key:
    """The key of a pass over a loader in this run."""
    return Key(_seed_of(learn, dl), number)


def _one_pass(learn: Any, dl: Any, number: int, start: int, training: bool) -> Iterator[Any]:
    if is_list(dl) or is_keyed(dl, getattr(learn.dls, "keyed", True)):
        stream = batches(dl, key_of(learn, dl, number), start)
        device = learn._device  # one batch ahead moves no random number of the training: these follow their key
        return ahead(stream, device) if device is not None and device.type == "cuda" else stream
    return _read_again(learn, dl, start, training and learn.task == "fit")


def _seed_of(learn: Any, dl: Any) -> int:
    """The fit's seed, apart for training and every other loader."""
    seed = getattr(learn.dls, "seed", None)
    seed = learn._data_seed if seed is None else seed
    loaders = list(learn.dls) if hasattr(learn.dls, "__len__") else []
    return mix(seed, next((i for i, other in enumerate(loaders) if other is dl), len(loaders)))


def how_data_goes_on(learn: Any, state: dict[str, Any]) -> str:
    """What happens to the training data before the place at which a state was taken."""
    dl = learn._loader(0)
    if is_list(dl) or is_keyed(dl, getattr(learn.dls, "keyed", True)):
        return "nothing before it is read again"
    return "the loader goes on by its own state" if state["position"]["loader"] else "the data is read again up to it"


def loader_state(learn: Any) -> Any:
    """What the training loader says of its own place, where it can (`state_dict`, as torchdata's); else None.

    Between passes it is not asked: some begin one for the answer, others would go on after their end.
    """
    dl = learn.dl if learn.training else None
    if not hasattr(dl, "state_dict") or not hasattr(dl, "load_state_dict") or is_keyed(dl, False):
        return None
    return dl.state_dict()  # type: ignore[union-attr]


def _read_again(learn: Any, dl: Any, start: int, in_fit: bool) -> Iterator[Any]:
    """A loader that draws from the global generators: begun in the state of its first time, read up to `start`.

    One that has a state of its own goes on from there instead.
    """
    own = learn._resuming["position"]["loader"] if in_fit and start and learn._resuming is not None else None
    if own is not None:
        dl.load_state_dict(unplain(own))
        return iter(dl)
    if in_fit and learn._resuming is not None and learn._pass_random is not None:
        set_random_states(learn._pass_random)
    elif in_fit:
        learn._pass_random = random_states()
    stream = iter(dl)
    for _ in islice(stream, start):
        pass
    return stream


def _stretch(learn: Any) -> Iterator[Any]:
    """The batches of one epoch of `fit(n_step=…)`: until the next validation is due."""
    end = min((learn.epoch + 1) * learn.valid_every, learn.n_step)
    while learn.opt_iter < end:
        yield next(learn._passes)


def _first(stream: Iterator[Any], n: int) -> Iterator[Any]:
    """Copies of the first `n` batches: what a dry run changes in place may be the data itself."""
    try:
        for batch in islice(stream, n):
            yield copy.deepcopy(batch)
    finally:
        close(stream)


class Passes:
    """Pass after pass over the training loader, without end."""

    def __init__(self, learn: Any, dl: Any, number: int = 0, start: int = 0):
        self.learn, self.dl, self.number, self.taken = learn, dl, number, start
        self.used = (number, start)  # the place after the last batch that was counted
        self.steps_before = learn.opt_iter if start == 0 else -1  # a pass begun in the middle proves nothing
        self.stream = _one_pass(learn, dl, number, start, training=True)

    def __next__(self) -> Any:
        while True:
            try:
                batch = next(self.stream)
            except StopIteration:
                self._begin_next()
                continue
            self.taken += 1
            return batch

    def _begin_next(self) -> None:
        if self.learn.opt_iter == self.steps_before:
            verb = "fit(n_step=…)" if self.learn.task == "fit" else self.learn.task
            stepless = "which callback cancels the step, and that there are targets, and parameters to train"
            empty = "that the loader is not empty, and that it can be iterated more than once"
            raise RuntimeError(
                f"a whole pass over the training loader ({self.taken} batches) made no update, so "
                f"`{verb}` would never end. Check {stepless if self.taken else empty}."
            )
        self.close()
        self.number, self.taken, self.steps_before = self.number + 1, 0, self.learn.opt_iter
        self.stream = _one_pass(self.learn, self.dl, self.number, 0, training=True)

    def mark(self) -> None:
        """The batch handed out last is done: a resume begins after it."""
        self.used = (self.number, self.taken)

    def close(self) -> None:
        close(self.stream)


@contextmanager
def opened(learn: Any, start: int) -> Iterator[Iterator[Any]]:
    """The phase's batches, closed at its end; a loader that fails after Ctrl-C was stopped by it."""
    stream, learn.iter = None, start - 1 if start else None
    try:
        stream = phase_batches(learn, start)
        yield _sampled(learn, stream, start) if learn.training and learn.task == "fit" and not learn._depth else stream
    except Exception as error:
        if learn.batch is None and learn._resuming is None and not isinstance(error, CancelException):
            if learn._stop_requested:
                learn._stop_here()
            add_note(error, learn, f"{_title(learn)}, on its way to the next batch,", ahead=True)
        raise
    finally:
        close(stream)


def _sampled(learn: Any, stream: Iterator[Any], start: int) -> Iterator[Any]:
    """The same batches; in the middle of the phase it is measured how long some of them were waited for.

    Outside of that window a batch passes through `chain` and `islice` alone, which are written in C.
    """
    left = None if learn.n_iter is None else max(0, learn.n_iter - start)
    before = SAMPLE if left is None else min(SAMPLE, left // 2)
    if isinstance(stream, GeneratorType):
        n = SAMPLE
    elif left is None:
        return stream  # it would be asked for one batch more after its end, where some begin anew
    else:
        n = min(SAMPLE, left - before)
    return chain(islice(stream, before), _timed(learn, islice(stream, n)), stream)


def _timed(learn: Any, stream: Iterator[Any]) -> Iterator[Any]:
    begin, first = time.perf_counter(), _mark(learn._device)
    waited, n = 0.0, 0
    while True:
        asked = time.perf_counter()
        batch = [next(stream, _END)]
        waited += time.perf_counter() - asked
        if batch[0] is _END:
            break
        n += 1
        yield batch.pop()  # kept by no name here
    if n:
        learn._waits.append((waited, time.perf_counter() - begin, n, first, _mark(learn._device)))


def _mark(device: torch.device | None) -> torch.cuda.Event | None:
    """A place in the work of a GPU, which works off what the loop has handed it long before; nothing waits for it."""
    if device is None or device.type != "cuda":
        return None
    mark = torch.cuda.Event(enable_timing=True)
    mark.record(torch.cuda.current_stream(device))
    return mark


def waits(learn: Any) -> list[tuple[float, float, int]]:
    """Of samples of a fit's batches: seconds waited for the loader, seconds passed, how many; waits for the device."""
    found = []
    for waited, passed, n, first, last in learn._waits:
        if last is not None:
            last.synchronize()
            passed = max(passed, first.elapsed_time(last) / 1000)
        found.append((waited, passed, n))
    return found


@uncut
def close(stream: Any) -> None:
    """Ends a generator, or the workers of a torch loader that are not meant to live on."""
    if hasattr(stream, "close"):
        stream.close()
    elif not getattr(stream, "_persistent_workers", False):
        end_workers(stream)


def warn_without_targets(learn: Any) -> None:
    """Warns at the end of a training phase without any loss, whose batches had no targets: it trained nothing."""
    if learn.training and not len(learn.yb) and not len(learn._kept) and not learn.opt_iter:
        warnings.warn(
            f"nothing was trained: there is no loss, because batches like {describe(learn.xb)} have no targets. "
            "Say where they are: `DataLoaders(…, targets=…)` names the keys of a mapping, `n_inp=…` splits a tuple.",
            stacklevel=2,
        )


def check_not_empty(learn: Any) -> None:
    """ValueError for a phase that had no batch, unless no update was due in it."""
    if learn.training and learn._passes is not None:
        return
    raise ValueError(
        f"{_title(learn)} yielded no batch in epoch {learn.epoch}: the {type(learn.dl).__name__} is empty, or an "
        "iterator that can be read only once. Pass a loader that can be iterated every epoch."
    )


def _title(learn: Any) -> str:
    return title_of("train" if learn.training else learn.dl_name)
