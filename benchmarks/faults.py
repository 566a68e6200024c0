"""Faults that a checkpoint must survive: kills at random moments, damaged and hostile files, disks that are full.

    python benchmarks/faults.py [--kills 100] [--files 30]

Each trial trains a small network on the digits in a process of its own, forked from this one, which has imported torch
already. It fails (exit status 1) unless every training ends bit for bit as one that nothing happened to.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from learnloop import Checkpoint, DataLoaders, Learner, Recorder, TrainEvalCallback, accuracy
from learnloop.data.datasets import digits
from learnloop.data.keyed import random_states
from learnloop.stored import _MARK, read_run, runs_in

DATA = digits()
N = 640  # digits to train on: ten batches an epoch, so that a training takes a fraction of a second
SECONDS = 20  # after which a child that should have ended is taken for stuck


class Noisy(Dataset):
    """Digits with noise from the generators of torch, numpy and python."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        self.x, self.y = x.flatten(1), y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[i] + 0.1 * torch.randn(64) + 0.1 * np.random.randn() + 0.1 * random.random(), self.y[i]


def make_learner() -> Learner:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    train = DataLoader(Noisy(DATA.x_train[:N], DATA.y_train[:N]), 64, shuffle=True)
    valid = DataLoader(Noisy(DATA.x_valid[:128], DATA.y_valid[:128]), 128)
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10))
    cbs = [TrainEvalCallback(), Recorder()]
    dls = DataLoaders(train, valid)
    learn = Learner(dls, model, nn.CrossEntropyLoss(), metrics=accuracy, cbs=cbs, default_cbs=False)
    learn.logger = lambda row: None
    return learn


def train(folder: Path | None, meanwhile: Callable[[Checkpoint], Any] = lambda cb: None) -> str:
    """A digest of everything that came out; with a folder it stores checkpoints there and goes on from them."""
    learn = make_learner()
    cbs = []
    if folder is not None:
        cbs = [Checkpoint("3step", keep=2, path=folder)]
        meanwhile(cbs[0])
    with contextlib.redirect_stdout(io.StringIO()):
        learn.fit_one_cycle(3, 0.01, cbs=cbs, resume=folder is not None)
    return digest(learn)


def digest(learn: Learner) -> str:
    weights = [p.tolist() for p in learn.model.state_dict().values()]
    record = [list(map(list, learn.recorder.values)), learn.recorder.raw_losses, learn.recorder.lrs]
    whole = repr([weights, learn.opt.state_dict(), record, random_states()])
    return hashlib.sha256(whole.encode()).hexdigest()


# Processes


def forked(work: Callable[[], Any]) -> int:
    """The id of a child that does some work and ends."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def ended(child: int) -> int:
    """Waits for a child and returns its exit status, negative for a signal."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -int(signal.SIGALRM)


def outcome_of(folder: Path | None, result: Path) -> str:
    """What a training in a child comes to, or how it failed."""
    status = ended(forked(lambda: result.write_text(train(folder))))
    return result.read_text() if status == 0 else f"ended with {status}"


# Kills


def kill_trials(count: int, rng: random.Random) -> tuple[dict[str, int], bool]:
    """Trainings killed once each and resumed; half of them while a file is being written."""
    found = {"kills": 0, "in the middle of a write": 0, "before the first file": 0, "bit-identical": 0, "unreadable": 0}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        whole = outcome_of(None, place / "whole")
        began = time.monotonic()
        is_same = outcome_of(place / "calm", place / "result") == whole  # a checkpoint changes nothing
        seconds = time.monotonic() - began
        for n in range(100 * count):
            if found["kills"] == count:
                break
            killed(place / f"run{n}", seconds, n % 2 == 1, rng, whole, found)
    return found, is_same and found["bit-identical"] == count and not found["unreadable"]


def killed(place: Path, seconds: float, in_write: bool, rng: random.Random, whole: str, found: dict[str, int]) -> None:
    """One trial; a kill that came after the end of the training is not counted."""
    folder, result = place / "checkpoints", place / "result"
    place.mkdir()
    child = forked(lambda: train(folder))
    time.sleep(rng.uniform(0, seconds))
    if in_write:
        wait_for_a_write(folder, child)
    os.kill(child, signal.SIGKILL)
    if ended(child) != -signal.SIGKILL:
        return
    found["kills"] += 1
    found["in the middle of a write"] += any(folder.glob(".*.tmp"))
    found["before the first file"] += not runs_in(folder)
    for path in runs_in(folder):
        try:
            read_run(path)
        except ValueError as error:
            print(error)
            found["unreadable"] += 1
    found["bit-identical"] += outcome_of(folder, result) == whole


def wait_for_a_write(folder: Path, child: int) -> None:
    """Until there is a file that is being written, or the child has ended."""
    while not any(folder.glob(".*.ckpt.*.tmp")):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return


# Files


class Runs:
    """What a hostile file holds: reading it without care makes `marker`."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def sealed(data: bytes) -> bytes:
    """The data with a right checksum behind it, as whoever forges a file would write."""
    return data + _MARK + hashlib.sha256(data).digest()


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def zip_bomb(size: int) -> bytes:
    """An archive like those of `torch.save` in which zeros are compressed by a thousand."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"format": "learnloop checkpoint"}, 2))
        with archive.open("archive/data/0", "w", force_zip64=True) as part:
            for _ in range(size >> 20):
                part.write(bytes(1 << 20))
    return file.getvalue()


def bad_files(good: bytes, marker: Path, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """`count` of them, of each kind about as many."""
    state = {"format": "learnloop checkpoint", "version": 1, "run": "x", "phase": 0, "state": Runs(marker)}
    bomb = zip_bomb(1 << 29)
    kinds: list[tuple[str, Callable[[], bytes]]] = [
        ("cut short", lambda: good[: rng.randrange(len(good))]),
        ("bits flipped", lambda: flipped(good, rng)),
        ("wrong format", lambda: rng.choice([b"", b"text", bytes(5000), saved({"weight": torch.ones(2)}), b"PK\3\4"])),
        ("wrong format, sealed", lambda: sealed(rng.choice([b"", b"text", saved([1]), saved({"format": "other"})]))),
        ("pickle that runs code", lambda: pickle.dumps(Runs(marker))),
        ("torch file that runs code, sealed", lambda: sealed(saved(rng.choice([Runs(marker), state])))),
        ("zip bomb, sealed", lambda: sealed(bomb)),
    ]
    for n in range(count):
        kind, make = kinds[n % len(kinds)]
        yield kind, make()


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed) if bytes(changed) != data else data[:-1]


def file_trials(count: int, rng: random.Random) -> tuple[dict[str, int], bool]:
    """Damaged and hostile files that a fit is to resume."""
    found = {"files": 0, "refused with a clear error": 0, "executed": 0, "more than 3 s or 200 MB": 0}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        ended(forked(lambda: train(place / "good")))
        good, marker, path = runs_in(place / "good")[-1].read_bytes(), place / "marker", place / "000000-bad.ckpt"
        for kind, data in bad_files(good, marker, count, rng):
            path.write_bytes(data)
            began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                make_learner().fit_one_cycle(3, 0.01, resume=path)
                print(f"{kind}: was read")
            except ValueError as error:
                found["refused with a clear error"] += str(path) in str(error)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
            found["files"] += 1
            found["executed"] += marker.exists()
            found["more than 3 s or 200 MB"] += time.monotonic() - began > 3 or grown > 200_000
    is_right = found["refused with a clear error"] == count and not found["executed"]
    return found, is_right and not found["more than 3 s or 200 MB"]


# Disks


def limit_files(cb: Checkpoint) -> None:
    """After the first file no other may grow beyond 64 KB in this process."""

    def limit(callback: Any) -> None:
        if cb.last is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    cb.after_step = lambda: limit(cb)


def fails_half_way(folder: Path, prepare: Callable[[Checkpoint], Any], result: Path) -> dict[str, Any]:
    """What is left where the disk took one file and no other: the error, and what a resume comes to."""

    def work() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                train(folder, prepare)
            except OSError as error:
                result.write_text(json.dumps([error.strerror, str(error.filename)]))

    ended(forked(work))
    reason, path = json.loads(result.read_text())
    kept = [read_run(path) for path in runs_in(folder)]
    half = [path.name for path in folder.glob(".*.tmp")]
    return {"error": f"{path}: {reason}", "older files that load": len(kept), "halves left": len(half)}


def disk_trials() -> tuple[dict[str, Any], bool]:
    """Writes that fail half-way: by a limit on the size of files, and on a full tmpfs where one can be mounted."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        whole = outcome_of(None, place / "whole")
        found["limit"] = fails_half_way(place / "limit", limit_files, place / "result")
        found["limit"]["resumed"] = outcome_of(place / "limit", place / "result") == whole
        with small_disk(place / "disk") as disk:
            if disk is not None:
                fill = disk / "fill"
                found["tmpfs"] = fails_half_way(disk / "runs", lambda cb: fill_disk(cb, fill), place / "result")
                fill.unlink()
                found["tmpfs"]["resumed"] = outcome_of(disk / "runs", place / "result") == whole
    is_right = [f["resumed"] and f["older files that load"] and not f["halves left"] for f in found.values()]
    if "tmpfs" not in found:
        found["tmpfs"] = "could not be mounted here"
    return found, all(is_right)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A disk of 2 MB in memory; None where this user may not mount one."""
    place.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True)
        is_there = done.returncode == 0
    except OSError:
        is_there = False
    try:
        yield place if is_there else None
    finally:
        if is_there:
            subprocess.run(["umount", place], check=True)


def fill_disk(cb: Checkpoint, fill: Path) -> None:
    """After the first file, fills the disk but for 64 KB."""

    def write() -> None:
        if cb.last is not None and not fill.exists():
            free = os.statvfs(fill.parent)
            fill.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - (1 << 16))))

    cb.after_step = write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--files", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(chosen.seed)
    is_right = True
    for title, trials in (
        ("kills", lambda: kill_trials(chosen.kills, rng)),
        ("files", lambda: file_trials(chosen.files, rng)),
        ("disks", disk_trials),
    ):
        began = time.monotonic()
        found, is_good = trials()
        is_right &= bool(is_good)
        print(f"{title} ({time.monotonic() - began:.0f} s): {'all right' if is_good else 'NOT RIGHT'}")
        for name, value in found.items():
            print(f"  {name}: {value}")
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
