"""How much memory a million predictions take on their way to a folder: the process's peak above what it had before."""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import learnloop as ll

LIMIT = 200  # MB


class Made(Dataset):
    """Samples made when they are read, so that the data itself takes no memory."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        rows = torch.tensor(indices, dtype=torch.float32)[:, None].expand(-1, 10).sin()
        return [(row, i % 10) for row, i in zip(rows, indices, strict=True)]


def peak() -> float:
    """The most memory that this process has had, in MB."""
    n = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return n / (1024**2 if sys.platform == "darwin" else 1024)


def stream(learn: ll.Learner, n: int, bs: int, folder: Path) -> int:
    """Streams predictions and targets of `n` samples to a folder; returns the bytes written."""
    loader = DataLoader(Made(n), batch_size=bs)
    learn.get_preds(
        dl=loader, save_preds=folder / "preds", save_targs=folder / "targets", with_preds=False, with_targs=False
    )
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description="Streams predictions to a folder and measures the memory.")
    parser.add_argument("--n", type=int, default=1_000_000, help="predictions, default a million")
    parser.add_argument("--classes", type=int, default=100, help="numbers in each of them, default 100")
    parser.add_argument("--bs", type=int, default=1000, help="samples per batch, default 1000")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learn = ll.Learner(ll.DataLoaders([]), nn.Linear(10, options.classes), nn.CrossEntropyLoss())
    with tempfile.TemporaryDirectory() as folder, learn.no_bar():
        stream(learn, 2 * options.bs, options.bs, Path(folder) / "first")  # what torch loads on first use
        before, began = peak(), time.perf_counter()
        written = stream(learn, options.n, options.bs, Path(folder) / "all")
        seconds, grown = time.perf_counter() - began, peak() - before
    print(f"{options.n:,} predictions of {options.classes} numbers: {written / 1e6:.0f} MB written in {seconds:.1f} s")
    print(f"memory above the start, at the peak: {grown:.0f} MB (limit {LIMIT})")
    sys.exit(grown > LIMIT)


if __name__ == "__main__":
    main()
