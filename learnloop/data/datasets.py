"""Real data at hand: digits inside the package, Fashion-MNIST from disk or from the network."""

import gzip
import hashlib
import os
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from http.client import HTTPException, HTTPResponse
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["LabelledImages", "digits", "fashion_mnist"]


class LabelledImages(NamedTuple):
    """Images and their classes, in a training and a validation set; unpacks as a tuple of four."""

    x_train: Tensor  # float32 of shape (n, 1, height, width), 0 is the background and 1 full ink
    y_train: Tensor  # int64 of shape (n,), the class of each image
    x_valid: Tensor
    y_valid: Tensor

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self._asdict().items())
        return f"{type(self).__name__}({shapes})"


def digits() -> LabelledImages:
    """The UCI handwritten digits, shipped with the package: 1,438 images to train on, 359 to validate.

    Images of shape (1, 8, 8), ten classes 0 to 9. The split is the same in every process and on
    every machine, and leaves all random generators alone.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
    Repository (https://doi.org/10.24432/C50P49), licensed CC BY 4.0; see `digits.LICENSE.txt`.
    """
    with resources.files("learnloop.data").joinpath("digits.csv.gz").open("rb") as packed, gzip.open(packed) as rows:
        table = torch.from_numpy(np.loadtxt(rows, delimiter=",", dtype=np.int64))
    x, y = (table[:, :64] / 16).reshape(-1, 1, 8, 8), table[:, 64].contiguous()
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(y)))  # RandomState: its stream is frozen for good
    valid, train = order[: len(y) // 5], order[len(y) // 5 :]
    return LabelledImages(x[train], y[train], x[valid], y[valid])


_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"  # the address has no https; checksums guard
_FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_FASHION_SHA256 = {  # of the idx files once decompressed: the .gz around them differs between sources
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def fashion_mnist(
    path: str | os.PathLike[str] | None = None,  # the only folder to look in and to download to
    download: bool = True,  # False: only what is on disk
) -> LabelledImages:
    """Fashion-MNIST: 60,000 images of clothes to train on, 10,000 to validate, each of shape (1, 28, 28).

    Looks for its four idx files, plain or gzipped, in `$LEARNLOOP_DATA/fashion-mnist` (else
    `learnloop/fashion-mnist` in the user's cache), then where Debian's `dataset-fashion-mnist` puts
    them. What is missing is downloaded (30 MB) to the first of these. Takes 0.2 GB of memory.

    Raises FileNotFoundError for a missing file where `download` is off, another OSError where it
    cannot be downloaded or where what is there is damaged.

    Source: H. Xiao, K. Rasul, R. Vollgraf, https://github.com/zalandoresearch/fashion-mnist (MIT licence).
    """
    folders = [_cache_folder("fashion-mnist"), _FASHION_DEBIAN] if path is None else [Path(path).expanduser()]
    content = {name: _fashion_file(name, folders, download) for name in _FASHION_SHA256}
    return LabelledImages(
        _idx_images(content["train-images-idx3-ubyte"]),
        _idx_labels(content["train-labels-idx1-ubyte"]),
        _idx_images(content["t10k-images-idx3-ubyte"]),
        _idx_labels(content["t10k-labels-idx1-ubyte"]),
    )


def _cache_folder(dataset: str) -> Path:
    """Where the downloads of `dataset` are kept for this user."""
    if own := os.environ.get("LEARNLOOP_DATA"):
        return Path(own).expanduser() / dataset
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "learnloop" / dataset


def _fashion_file(name: str, folders: list[Path], download: bool) -> bytes:
    """The content of the idx file `name`: from the first of `folders` that has it, else downloaded to the first."""
    file = _find(name, folders)
    if file is None:
        return _download_fashion(name, folders, download)
    try:
        return read_verified(file, _FASHION_SHA256[name])
    except OSError as error:
        raise OSError(f"{file} is no Fashion-MNIST: {error}. Delete it and try again.") from error


def _find(name: str, folders: Iterable[Path]) -> Path | None:
    """The first file called `name` or `name`.gz in `folders`."""
    candidates = (folder / file for folder in folders for file in (name, f"{name}.gz"))
    return next((file for file in candidates if file.is_file()), None)


def _download_fashion(name: str, folders: list[Path], download: bool) -> bytes:
    """The content of the idx file `name` after its download to the first of `folders`, or how to come by it."""
    missing = f"`{name}` of Fashion-MNIST is not in {' or '.join(map(str, folders))}"
    advice = f"Run `apt-get install dataset-fashion-mnist`, or put the four idx files into {folders[0]}."
    if len(folders) == 1:  # a folder of the user's own: the Debian package would not be seen
        advice = f"Put the four idx files into {folders[0]}, or leave `path` out."
    if not download:
        raise FileNotFoundError(f"{missing}, and `download` is off. {advice}")
    url = f"{_FASHION_URL}/{name}.gz"
    try:
        return fetch(url, folders[0] / f"{name}.gz", _FASHION_SHA256[name])
    except (OSError, HTTPException) as error:
        raise OSError(f"{missing}, and cannot be downloaded from {url}: {error}. {advice}") from error


def fetch(
    url: str,
    file: Path,  # written when complete and right, else not at all
    sha256: str,  # of the content, unpacked where `file` ends with .gz
) -> bytes:
    """Download `url` into `file` with a progress bar and return the content, unpacked; makes folders as needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".download-") as folder:  # same disk: rename is atomic
        part = Path(folder) / file.name
        with urllib.request.urlopen(url, timeout=30) as response, part.open("wb") as out:
            for chunk in _shown(response, file.name):
                out.write(chunk)
        content = read_verified(part, sha256)
        part.replace(file)
    return content


def read_verified(
    file: Path,
    sha256: str,  # of the content, unpacked where `file` ends with .gz
) -> bytes:
    """The content of `file`, unpacked where it ends with .gz; an OSError where it is not the one expected."""
    content = file.read_bytes()
    if file.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise OSError(f"its content cannot be unpacked ({error})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise OSError(f"its content has sha256 {found}, not {sha256}")
    return content


def _shown(response: HTTPResponse, name: str, size: int = 1 << 18) -> Iterator[bytes]:
    """The body of `response` in chunks of `size` bytes, under a progress bar where somebody can see one."""
    from fastcore.imports import IN_NOTEBOOK

    chunks = iter(lambda: response.read(size), b"")
    if not (IN_NOTEBOOK or sys.stdout.isatty()):
        yield from chunks
        return
    from fastprogress import progress_bar

    n_chunks = -(-int(response.headers.get("Content-Length") or 0) // size) or "noinfer"
    print(f"downloading {name}")
    yield from progress_bar(chunks, total=n_chunks)


def _idx_images(content: bytes) -> Tensor:
    """Images of an idx file, behind a header of 16 bytes; (n, 1, 28, 28)."""
    pixels = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return torch.from_numpy(pixels.astype(np.float32)).div_(255)


def _idx_labels(content: bytes) -> Tensor:
    """Labels of an idx file, behind a header of 8 bytes; (n,)."""
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=8).astype(np.int64))
