"""Checks of the data, and of the model on it: each takes a subject and returns a finding."""

import hashlib
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from learnloop.callbacks.sampling import WeightedSampling
from learnloop.data.batches import find_bs, leaves, split
from learnloop.data.keyed import Key, batches, indices_of, is_list, is_plain, length, preserved_randomness
from learnloop.data.loaders import TensorLoader, known_n_inp
from learnloop.data.once import once, samples_at
from learnloop.data.show import nth
from learnloop.insight.findings import FAULT, OK, WARNING, Finding, NotApplicable
from learnloop.insight.subject import Subject
from learnloop.insight.trials import Probe, Ready, check_readable, evaluate, read, train
from learnloop.loop.passes import close

HELD_OUT = 512  # validation samples on which a short fit is scored
UPDATES = 120  # of a short fit
LOOKED_AT = 20_000  # samples of each set that are compared
READ = 20  # batches whose reading is timed
SLOW = 2e-3  # seconds for a batch below which no loader is slow


def _valid(subject: Subject) -> Any:
    dl = subject.learn._loader(1)
    if dl is None:
        raise NotApplicable("there is no validation set.")
    return dl


def evaluation_repeats(subject: Subject) -> Finding:
    """The same samples give the same loss twice, whatever the random generators say."""
    learn = subject.learn
    loader = once(_valid(subject))[0]
    first, second = (read(learn, loader, 2, seed) for seed in (1, 2))
    if hash_of(list(first)) != hash_of(list(second)):
        text = "the validation loader gives other samples, or the same ones changed, the second time."
        return Finding(FAULT, text, None, "Leave augmentation, shuffling and sampling to the training set.")
    losses = [[loss for _, loss in evaluate(learn, first, seed)] for seed in (1, 2)]
    if None in losses[0]:
        raise NotApplicable("the validation batches have no loss.")
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    if apart > 1e-5 * max(1e-12, *map(abs, losses[0])):
        text = f"the same validation batch has the losses {losses[0][0]:.6g} and {losses[1][0]:.6g}."
        advice = "Something is random in eval mode: `F.dropout` without `training=self.training`, noise, sampling."
        return Finding(FAULT, text, apart, advice)
    return Finding(OK, f"{len(losses[0])} validation batches have the same loss twice.", apart)


def learning(subject: Subject) -> Finding:
    """After a short fit, predictions for held-out samples fit their own targets better than shuffled ones."""
    learn = subject.learn
    if learn.loss_func is None:
        raise NotApplicable("the model makes its own loss, which cannot be asked about other targets.")
    check_readable(learn._loader(0))
    held_out = _spread(learn, _valid(subject))
    if not all(isinstance(y, Tensor) for y in _targets(learn, held_out[0])):
        raise NotApplicable("the targets are no tensors, which could be shuffled.")
    scores: list[float] = []

    def score(learn: Any) -> None:
        if not learn.training:
            scores.extend(_losses_of_shuffled(learn))

    probe = Probe(subject.seconds, after_loss=score)
    losses = train(learn, None, UPDATES, probe, 3e-3, then=lambda: learn._do_epoch_validate(dl=held_out))
    own, shuffled = scores[0], torch.tensor(scores[1:], dtype=torch.float64)
    apart = float((shuffled.mean() - own) / shuffled.std().clamp(min=1e-12))
    text = f"after {len(losses)} updates, held-out samples have a loss of {own:.4g} with their own targets"
    text += f" and {shuffled.mean():.4g} with shuffled ones."
    # What a model learns by heart says a little about others by chance, so a gain must be more than certain.
    if apart > 4 and shuffled.mean() - own > 0.1 * abs(shuffled.mean()):
        return Finding(OK, text, apart)
    advice = (
        "Targets may belong to other samples (sorted or shuffled apart from them), or inputs say nothing about them."
    )
    return Finding(FAULT if apart <= 4 and len(losses) >= UPDATES else WARNING, text, apart, advice)


def _losses_of_shuffled(learn: Any, n: int = 50) -> list[float]:
    """The loss with the targets as they are, then with `n` shuffles of them."""
    yb, bs = learn.yb, find_bs(learn.yb)
    orders = [torch.arange(bs), *(torch.randperm(bs) for _ in range(n))]
    shuffled = [tuple(y[order.to(y.device)] for y in yb) for order in orders]
    return [float(learn.loss_func(learn.pred, *targets)) for targets in shuffled]


def _spread(learn: Any, dl: Any) -> Ready:
    """Samples from all over a loader as one batch; its first batch where it cannot be asked for any."""
    n = length(getattr(dl, "dataset", None))
    if n and (isinstance(dl, TensorLoader) or (is_plain(dl) and dl.batch_sampler is not None)):
        return Ready([samples_at(dl, [i * n // min(n, HELD_OUT) for i in range(min(n, HELD_OUT))])], learn)
    return read(learn, dl, 1)


def shuffled(subject: Subject) -> Finding:
    """The training data come in another order in every epoch, and no batch is of one class."""
    learn, dl = subject.learn, subject.learn._loader(0)
    if any(isinstance(cb, WeightedSampling) for cb in learn.cbs):
        raise NotApplicable("WeightedSampling draws the samples.")
    if length(dl) == 1:
        raise NotApplicable("all training data are in one batch.")
    first, second = (read(learn, dl, 3, seed) for seed in (1, 2))
    same = _order(dl, 1) == _order(dl, 2) if _order(dl, 1) is not None else hash_of(first) == hash_of(second)
    purity, overall = _purity(learn, first), _purity(learn, _spread(learn, dl))
    if purity is not None and overall is not None and purity > overall + 0.3:
        text = f"{purity:.0%} of the targets in a batch are of one class, {overall:.0%} of all."
        return Finding(FAULT, text, purity, "Pass `shuffle=True` to the training loader: samples are sorted by target.")
    if same:
        text = "the batches are the same, in the same order, in every epoch."
        return Finding(WARNING, text, purity, "Pass `shuffle=True` to the training loader.")
    return Finding(OK, "another order in every epoch.", purity)


def _order(dl: Any, seed: int) -> list[list[int]] | None:
    """The numbers of the samples in the first batches of a pass."""
    if is_list(dl):
        return None
    with preserved_randomness():
        found = indices_of(dl, Key(seed, seed))
    return None if found is None else [[int(i) for i in indices] for indices in found[:3]]


def _purity(learn: Any, ready: Ready) -> float | None:
    """The part of a batch that its most frequent class makes, on average; None where targets are no classes."""
    parts = []
    for batch in ready:
        yb = _targets(learn, batch)
        y = yb[0] if len(yb) == 1 else None
        if not isinstance(y, Tensor) or y.is_floating_point() or y.ndim != 1 or len(y) < 8:
            return None
        parts.append(float(y.unique(return_counts=True)[1].max()) / len(y))
    return sum(parts) / len(parts) if parts else None


def _targets(learn: Any, batch: Any) -> tuple[Any, ...]:
    return split(batch, known_n_inp(learn.dls, learn._loader(0)), getattr(learn.dls, "targets", None))[1]


def no_leak(subject: Subject) -> Finding:
    """No input is in the training set and in the validation set."""
    learn, train_dl, valid_dl = subject.learn, subject.learn._loader(0), _valid(subject)
    told = _by_indices(train_dl, valid_dl)
    if told is not None:
        n_both, n, m = told
    else:
        loader = once(train_dl)[0]
        if hash_of(list(read(learn, loader, 1, 1))) != hash_of(list(read(learn, loader, 1, 2))):
            raise NotApplicable("training inputs change from one reading to the next, so none can be recognised.")
        seen, held_out = _hashes(learn, loader), _hashes(learn, once(valid_dl)[0])
        known = set(seen)
        n_both, n, m = sum(h in known for h in held_out), len(held_out), len(seen)
    text = f"{n_both} of {n:,} validation inputs are among {m:,} training inputs{_bound(n, m)}."
    if not n_both:
        return Finding(OK, text, 0)
    advice = "Split by what belongs together before anything is copied or augmented, and drop duplicates."
    return Finding(FAULT if n_both > 0.01 * n else WARNING, text, n_both, advice)


def _bound(n: int, m: int) -> str:
    return f" (the first {LOOKED_AT:,} of each set)" if LOOKED_AT in (n, m) else ""


def _by_indices(train_dl: Any, valid_dl: Any) -> tuple[int, int, int] | None:
    """(in both, in validation, in training) of two parts of one dataset; None where they are no such parts."""
    ours, theirs = getattr(train_dl, "dataset", None), getattr(valid_dl, "dataset", None)
    if not isinstance(train_dl, DataLoader) or not isinstance(valid_dl, DataLoader):
        return None
    if isinstance(ours, Subset) and isinstance(theirs, Subset) and ours.dataset is theirs.dataset:
        known = {int(i) for i in ours.indices}
        n_both = sum(int(i) in known for i in theirs.indices)
        return (n_both, len(theirs), len(known)) if n_both else None  # equal samples may still have two numbers
    return None


def _hashes(learn: Any, dl: Any) -> list[bytes]:
    """A hash of each input, of the first samples of a loader."""
    return list(islice(_each_hash(learn, dl), LOOKED_AT))


def _each_hash(learn: Any, dl: Any) -> Iterator[bytes]:
    n_batch = -(-LOOKED_AT // max(1, getattr(dl, "batch_size", None) or 1))
    for batch in read(learn, dl, n_batch):
        xb, yb = split(batch, known_n_inp(learn.dls, dl), getattr(learn.dls, "targets", None))
        ids = {id(y) for y in yb}
        inputs = [x for x in leaves(xb) if id(x) not in ids]
        for i in range(find_bs(batch)):
            yield hash_of([nth(x, i) for x in inputs])


def hash_of(value: Any) -> bytes:
    """A hash of every byte of the tensors in a batch, and of the text of what else is in it."""
    digest = hashlib.blake2b(digest_size=12)
    for leaf in leaves(value):
        if isinstance(leaf, Tensor):
            digest.update(str(tuple(leaf.shape)).encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.digest()


def loader_speed(subject: Subject) -> Finding:
    """Reading a batch takes less time than training on it."""
    learn, dl = subject.learn, subject.learn._loader(0)
    check_readable(dl)
    n_workers = getattr(dl, "num_workers", 0) if isinstance(dl, DataLoader) else 0
    times, step = _seconds_to_read(learn, dl, min(subject.seconds, 2.0)), _seconds_to_train(subject)
    # Workers deliver in bursts; without them the median is free of what else the machine does.
    loading = float(np.mean(times) if n_workers else np.median(times))
    waiting = loading if not n_workers else max(0.0, loading - step)
    part = waiting / max(waiting + step, 1e-12)
    text = f"{loading * 1e3:.3g} ms to read a batch, {step * 1e3:.3g} ms to train on it."
    if part <= 0.5 or waiting < SLOW:
        return Finding(OK, text, part)
    advice = "More workers, or faster reading." if n_workers else "Read in workers: `num_workers=…`; or read faster."
    return Finding(WARNING, f"{text} The model would wait {part:.0%} of the time.", part, advice)


def _seconds_to_read(learn: Any, dl: Any, longest: float) -> list[float]:
    """For each batch but the first, which may start workers."""
    ends: list[float] = []
    with preserved_randomness():
        stream = batches(dl, Key(0, 0)) if getattr(learn.dls, "keyed", True) else iter(dl)
        for _ in islice(stream, READ + 1):
            ends.append(time.perf_counter())
            if ends[-1] - ends[0] > longest:
                break
        close(stream)
    if len(ends) < 2:
        raise NotApplicable("the training loader has one batch only.")
    return [b - a for a, b in pairwise(ends)]


def _seconds_to_train(subject: Subject) -> float:
    """For a batch that lies ready: the median, the first ones left out."""
    ends: list[float] = []

    def note(learn: Any) -> None:
        if learn._device is not None and learn._device.type != "cpu":
            torch.accelerator.synchronize()
        ends.append(time.perf_counter())

    train(subject.learn, subject.ready(), 8, Probe(subject.seconds, after_batch=note))
    times = [b - a for a, b in pairwise(ends[1:])]
    if not times:
        raise NotApplicable(f"training on a few batches took longer than {subject.seconds:g} s.")
    return float(np.median(times))
