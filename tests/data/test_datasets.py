"""What the datasets hand out, where they look for it, and what they say when it is not there."""

import gzip
import hashlib
import http.server
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from learnloop.data import datasets

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
needs_fashion_mnist = pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="needs Fashion-MNIST: apt-get install dataset-fashion-mnist"
)
CONTENT = b"four score and seven" * 50_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of its own and no Debian package."""
    monkeypatch.setenv("LEARNLOOP_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "_FASHION_DEBIAN", tmp_path / "debian")
    return tmp_path / "cache" / "fashion-mnist"


@pytest.fixture
def server(tmp_path):
    """The address of a web server over the returned folder."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()
        thread.join()


def closed_port():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as httpd:
        return f"http://127.0.0.1:{httpd.server_port}"


def test_digits_are_1438_images_to_train_on_and_359_to_validate():
    data = datasets.digits()
    assert data.x_train.shape == (1438, 1, 8, 8)
    assert data.y_train.shape == (1438,)
    assert data.x_valid.shape == (359, 1, 8, 8)
    assert data.y_valid.shape == (359,)


def test_digits_are_floats_from_0_to_1_and_classes_are_integers():
    data = datasets.digits()
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.float32, torch.int64)
    assert (data.x_train.min(), data.x_train.max()) == (0.0, 1.0)
    assert (data.x_train * 16 == (data.x_train * 16).round()).all()  # the file's whole numbers, no rounding


def test_every_digit_is_in_exactly_one_of_the_two_sets():
    data = datasets.digits()
    both = torch.bincount(torch.cat([data.y_train, data.y_valid])).tolist()
    assert both == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # the class counts that the UCI page gives
    assert torch.bincount(data.y_valid).tolist() == [27, 35, 36, 29, 30, 40, 44, 39, 38, 41]


def test_the_split_of_the_digits_is_always_the_same():
    assert datasets.digits().y_valid[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]
    assert datasets.digits().y_train[:10].tolist() == [8, 6, 5, 3, 4, 4, 4, 8, 8, 7]


def test_digits_leave_the_random_generators_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    datasets.digits()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_labelled_images_unpack_as_a_tuple_of_four():
    x_train, _, _, y_valid = datasets.digits()
    assert (len(x_train), len(y_valid)) == (1438, 359)


def test_the_repr_of_labelled_images_shows_shapes():
    assert repr(datasets.digits()) == (
        "LabelledImages(x_train (1438, 1, 8, 8), y_train (1438,), x_valid (359, 1, 8, 8), y_valid (359,))"
    )


def test_the_licence_of_the_digits_stands_beside_them():
    text = Path(datasets.__file__).with_name("digits.LICENSE.txt").read_text()
    assert "CC BY 4.0" in text
    assert "https://doi.org/10.24432/C50P49" in text


@needs_fashion_mnist
def test_fashion_mnist_is_60000_images_to_train_on_and_10000_to_validate():
    data = datasets.fashion_mnist(DEBIAN)
    assert repr(data) == (
        "LabelledImages(x_train (60000, 1, 28, 28), y_train (60000,), x_valid (10000, 1, 28, 28), y_valid (10000,))"
    )
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.float32, torch.int64)
    assert (data.x_train.min(), data.x_train.max()) == (0.0, 1.0)
    assert data.y_train[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert torch.bincount(data.y_valid).tolist() == [1000] * 10


@needs_fashion_mnist
def test_fashion_mnist_is_found_where_debian_puts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LEARNLOOP_DATA", str(tmp_path))
    assert len(datasets.fashion_mnist(download=False).y_valid) == 10_000
    assert list(tmp_path.iterdir()) == []


@needs_fashion_mnist
def test_fashion_mnist_is_found_in_the_cache_also_unpacked(empty_cache):
    empty_cache.mkdir(parents=True)
    for packed in DEBIAN.glob("*.gz"):
        (empty_cache / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    assert len(datasets.fashion_mnist(download=False).y_valid) == 10_000


@needs_fashion_mnist
def test_fashion_mnist_is_downloaded_once(empty_cache, server, monkeypatch):
    url, folder = server
    monkeypatch.setattr(datasets, "_FASHION_URL", url)
    for packed in DEBIAN.glob("*.gz"):
        (folder / packed.name).symlink_to(packed)
    assert len(datasets.fashion_mnist().y_valid) == 10_000
    assert sorted(file.name for file in empty_cache.iterdir()) == [
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]
    monkeypatch.setattr(datasets, "_FASHION_URL", closed_port())
    assert len(datasets.fashion_mnist().y_valid) == 10_000


def test_without_download_a_missing_file_is_an_error_that_says_what_to_do(empty_cache):
    with pytest.raises(FileNotFoundError) as error:
        datasets.fashion_mnist(download=False)
    assert str(error.value) == (
        f"`train-images-idx3-ubyte` of Fashion-MNIST is not in {empty_cache} or {datasets._FASHION_DEBIAN}, "
        "and `download` is off. Run `apt-get install dataset-fashion-mnist`, "
        f"or put the four idx files into {empty_cache}."
    )


def test_an_unreachable_network_is_an_error_that_says_what_to_do(empty_cache, monkeypatch):
    monkeypatch.setattr(datasets, "_FASHION_URL", closed_port())
    with pytest.raises(OSError, match=r"cannot be downloaded from .*Connection refused.*Run `apt-get") as error:
        datasets.fashion_mnist()
    assert "\n" not in str(error.value)
    assert list(empty_cache.iterdir()) == []


def test_a_folder_of_the_users_own_is_the_only_one_looked_in(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"is not in {tmp_path}, .* or leave `path` out"):
        datasets.fashion_mnist(tmp_path, download=False)


def test_a_damaged_file_is_named_and_not_used(empty_cache):
    empty_cache.mkdir(parents=True)
    damaged = empty_cache / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(gzip.compress(b"no images"))
    with pytest.raises(OSError, match=rf"{damaged} is no Fashion-MNIST: its content has sha256 .* Delete it"):
        datasets.fashion_mnist()
    damaged.write_bytes(b"<html>")
    with pytest.raises(OSError, match=rf"{damaged} is no Fashion-MNIST: its content cannot be unpacked"):
        datasets.fashion_mnist()


def test_the_cache_is_in_the_users_cache_folder(monkeypatch):
    monkeypatch.delenv("LEARNLOOP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert datasets._cache_folder("fashion-mnist") == Path("/xdg/learnloop/fashion-mnist")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert datasets._cache_folder("fashion-mnist") == Path.home() / ".cache/learnloop/fashion-mnist"


def test_fetch_writes_the_file_as_sent_and_returns_its_content_unpacked(server, tmp_path):
    url, folder = server
    packed = gzip.compress(CONTENT)
    (folder / "text.gz").write_bytes(packed)
    assert datasets.fetch(f"{url}/text.gz", tmp_path / "new" / "text.gz", SHA256) == CONTENT
    assert (tmp_path / "new" / "text.gz").read_bytes() == packed


def test_fetch_leaves_nothing_behind_when_the_checksum_is_wrong(server, tmp_path):
    url, folder = server
    (folder / "text").write_bytes(b"something else")
    with pytest.raises(OSError, match=f"sha256 .*, not {SHA256}"):
        datasets.fetch(f"{url}/text", tmp_path / "new" / "text", SHA256)
    assert list((tmp_path / "new").iterdir()) == []


def test_fetch_leaves_nothing_behind_when_the_connection_breaks(tmp_path):
    class Breaks(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(gzip.compress(CONTENT)[:-100])

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Breaks) as httpd:
        thread = threading.Thread(target=httpd.handle_request)
        thread.start()
        with pytest.raises(OSError, match="cannot be unpacked"):
            datasets.fetch(f"http://127.0.0.1:{httpd.server_port}/text.gz", tmp_path / "text.gz", SHA256)
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_fetch_prints_nothing_where_nobody_sees_a_bar(server, tmp_path, capsys):
    url, folder = server
    (folder / "text").write_bytes(CONTENT)
    datasets.fetch(f"{url}/text", tmp_path / "text", SHA256)
    assert capsys.readouterr() == ("", "")


def test_fetch_shows_a_bar_in_a_terminal(server, tmp_path, capsys, monkeypatch):
    url, folder = server
    (folder / "text").write_bytes(CONTENT)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    datasets.fetch(f"{url}/text", tmp_path / "text", SHA256)
    shown = capsys.readouterr().out
    assert "downloading text\n" in shown
    assert "100.00% [4/4 00:00<00:00]" in shown


def test_datasets_imports_neither_fastprogress_nor_matplotlib():
    code = "import sys; import learnloop.data.datasets; print({'fastprogress', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
