"""Files of a whole run: whole or refused, the newest good one found, whatever the disk and others did to them."""

import hashlib
import io
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from learnloop import FileDamaged
from learnloop.loop.state import same
from learnloop.stored import Writing, check_writable, newest_run, next_path, read_run, runs_in, write_run
from tests.toys import learner

ROOT = Path(__file__).parents[1]


def fitted():
    learn = learner()
    learn.fit(1)
    return learn


STATE = fitted().state_dict()


def written(folder, *names):
    """The paths of files with these numbers and runs."""
    paths = [folder / f"{name}.ckpt" for name in names]
    for path in paths:
        write_run(path, STATE, path.stem[7:], phase=0)
    return paths


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def sealed(data):
    """The data with a right checksum behind it, as whoever forges a file would write."""
    return data + b"learnloop-sha256" + hashlib.sha256(data).digest()


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# One file


def test_a_run_comes_back_to_the_bit(tmp_path):
    path = tmp_path / "000000-ab.ckpt"
    write_run(path, STATE, "ab", phase=1)
    stored = read_run(path)
    assert (stored.path, stored.run, stored.phase) == (path, "ab", 1)
    assert same(stored.state, STATE)


def test_the_file_is_one_of_torch_with_its_sha256_at_the_end(tmp_path):
    (path,) = written(tmp_path, "000000-ab")
    data = path.read_bytes()
    assert torch.load(path, weights_only=True)["format"] == "learnloop checkpoint"
    assert data == sealed(data[: -16 - 32])


def test_large_and_small_tensors_come_back_together(tmp_path):
    state = {**STATE, "kept": {f"{n}": torch.arange(n) for n in (1, 200_000, 3, 131_072, 100_000, 60_000)}}
    path = tmp_path / "000000-ab.ckpt"
    write_run(path, state, "ab", phase=0)
    assert same(read_run(path).state, state)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    (path,) = written(tmp_path, "000000-ab")
    data = path.read_bytes()
    rng = random.Random(0)
    for size in [0, 1, 47, 48, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))]:
        path.write_bytes(data[:size])
        with pytest.raises(FileDamaged, match=r"000000-ab\.ckpt` is cut short or damaged"):
            read_run(path)


def test_no_bit_can_be_flipped_unseen(tmp_path):
    (path,) = written(tmp_path, "000000-ab")
    data = path.read_bytes()
    for i in [0, len(data) - 1, len(data) - 40, *range(7, len(data), len(data) // 50)]:
        path.write_bytes(data[:i] + bytes([data[i] ^ 16]) + data[i + 1 :])
        with pytest.raises(FileDamaged, match="damaged"):
            read_run(path)


def test_something_behind_the_end_is_damage(tmp_path):
    (path,) = written(tmp_path, "000000-ab")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(FileDamaged):
        read_run(path)


class Marks:
    """Makes a file where it is unpickled without care."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("where", ["content", "state", "run"])
def test_no_code_of_a_file_is_run_though_its_checksum_is_right(tmp_path, where):
    code = Marks(tmp_path / "marker")
    whole = {"format": "learnloop checkpoint", "version": 1, "state": STATE, "run": "ab", "phase": 0}
    content = {"content": code, "state": {**whole, "state": {"model": [code]}}, "run": {**whole, "run": code}}[where]
    path = tmp_path / "000000-ab.ckpt"
    path.write_bytes(sealed(saved(content)))
    with pytest.raises(ValueError, match="which is code and no data: it was refused"):
        read_run(path)
    assert not (tmp_path / "marker").exists()


def test_a_bare_pickle_is_refused(tmp_path):
    path = tmp_path / "000000-ab.ckpt"
    path.write_bytes(sealed(pickle.dumps(Marks(tmp_path / "marker"))))
    with pytest.raises(ValueError, match="is no file of weights"):
        read_run(path)
    assert not (tmp_path / "marker").exists()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(50 << 20))
    path = tmp_path / "000000-ab.ckpt"
    path.write_bytes(sealed(file.getvalue()))
    with pytest.raises(FileDamaged, match="it would unpack to more than is in it"):
        read_run(path)


@pytest.mark.parametrize(
    "content",
    [{"weight": torch.ones(2)}, [1, 2], {"format": "learnloop checkpoint", "state": [1]}, {"format": "other"}],
)
def test_what_is_no_checkpoint_is_named_as_that(tmp_path, content):
    path = tmp_path / "mine.ckpt"
    path.write_bytes(sealed(saved(content)))
    with pytest.raises(ValueError, match=r"mine\.ckpt` is no checkpoint of a run. A file of weights is read by"):
        read_run(path)


def test_the_format_of_another_version_is_named(tmp_path):
    path = tmp_path / "mine.ckpt"
    path.write_bytes(sealed(saved({"format": "learnloop checkpoint", "version": 7, "state": {}})))
    with pytest.raises(ValueError, match="has the format 7, and this version reads 1"):
        read_run(path)


# A folder


def test_numbers_go_on_after_the_newest(tmp_path):
    assert next_path(tmp_path / "not_there", "ab").name == "000000-ab.ckpt"
    written(tmp_path, "000000-ab", "000007-ab")
    assert next_path(tmp_path, "cd").name == "000008-cd.ckpt"


def test_files_are_sorted_by_number_and_others_are_left_out(tmp_path):
    written(tmp_path, "999999-ab", "1000000-ab", "000002-cd")
    (tmp_path / "journal").touch()
    (tmp_path / "notes.ckpt").touch()
    (tmp_path / ".000003-ab.ckpt.a1b2.tmp").touch()
    assert [p.name for p in runs_in(tmp_path)] == ["000002-cd.ckpt", "999999-ab.ckpt", "1000000-ab.ckpt"]


def test_the_newest_file_is_read(tmp_path):
    paths = written(tmp_path, "000000-ab", "000001-ab")
    assert newest_run(tmp_path).path == paths[1]


def test_where_there_is_no_file_there_is_none(tmp_path):
    assert newest_run(tmp_path) is None
    assert newest_run(tmp_path / "not_there") is None


def test_a_damaged_newest_file_is_named_and_the_one_before_it_is_used(tmp_path):
    paths = written(tmp_path, "000000-ab", "000001-ab", "000002-ab")
    damage(paths[2])
    paths[1].write_bytes(b"")
    with pytest.warns(UserWarning) as warned:
        stored = newest_run(tmp_path)
    assert stored.path == paths[0]
    assert [f"`{path}` is cut short or damaged" in str(w.message) for path, w in zip(paths[:0:-1], warned, strict=True)]
    assert str(warned[0].message).endswith("The one before it is tried.")


def test_a_file_of_an_earlier_run_is_not_taken_for_one_of_this(tmp_path):
    paths = written(tmp_path, "000000-ab", "000001-cd")
    damage(paths[1])
    expected = r"none of the 1 checkpoints of the last run in .* an earlier run: `resume` takes the path of one"
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(FileDamaged, match=expected):
        newest_run(tmp_path)


def test_a_hostile_newest_file_stops(tmp_path):
    paths = written(tmp_path, "000000-ab", "000001-ab")
    paths[1].write_bytes(sealed(saved(Marks(tmp_path / "marker"))))
    with pytest.raises(ValueError, match="refused"):
        newest_run(tmp_path)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    written(tmp_path, "000000-ab")
    (tmp_path / ".000001-ab.ckpt.a1b2c3.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").touch()
    check_writable(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.tmp", "000000-ab.ckpt"]


def test_a_folder_in_which_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="no checkpoint could be written there") as caught:
        check_writable(tmp_path / "file" / "runs")
    assert caught.value.filename == str(tmp_path / "file" / "runs")


# Writing in a thread


def write(folder, keep=3, is_checked=False):
    writing = Writing(folder, STATE, "ab", 0, keep, is_checked).start()
    return writing, writing.finish()


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (3, [2, 3, 4]), (None, [0, 1, 2, 3, 4])])
def test_the_newest_files_stay(tmp_path, keep, left):
    for _ in range(5):
        _, error = write(tmp_path, keep)
        assert error is None
    assert [int(p.name[:6]) for p in runs_in(tmp_path)] == left


def test_a_checked_file_is_read_back(tmp_path):
    writing, error = write(tmp_path, is_checked=True)
    assert error is None
    assert same(read_run(writing.path).state, STATE)


def test_a_checked_file_that_does_not_come_back_as_it_was_is_taken_away_and_older_ones_stay(tmp_path):
    (former,) = written(tmp_path, "000000-ab")
    state = {**STATE, "random": Forgetful(STATE["random"])}
    writing = Writing(tmp_path, state, "ab", 0, 1, is_checked=True).start()
    assert "did not hold what was written to it" in str(writing.finish())
    assert runs_in(tmp_path) == [former]


class Forgetful(dict):
    """Data of which less is written than there is."""

    def __reduce__(self):
        return dict, ({},)


def test_what_stops_a_writing_is_an_oserror_that_names_the_path_and_older_files_stay(tmp_path):
    written(tmp_path, "000000-ab")
    writing = Writing(tmp_path, {"model": (lambda: 1)}, "ab", 0, 1, is_checked=False).start()
    error = writing.finish()
    assert isinstance(error, OSError)
    assert "000001-ab.ckpt` could not be written: " in str(error)
    assert isinstance(error.__cause__, (pickle.PicklingError, AttributeError))
    assert [p.name for p in tmp_path.iterdir()] == ["000000-ab.ckpt"]


def test_a_disk_that_is_full_half_way_leaves_the_older_file_and_no_half(tmp_path):
    written(tmp_path, "000000-ab")
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        _, error = write(tmp_path, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert (error.strerror.partition(";")[0], error.filename) == ("File too large", str(tmp_path / "000001-ab.ckpt"))
    assert [p.name for p in tmp_path.iterdir()] == ["000000-ab.ckpt"]
    assert same(newest_run(tmp_path).state, STATE)


@pytest.mark.timeout(180)
def test_kills_bad_files_and_full_disks_are_survived():
    """A short form of `make faults`; the figures in the README come from the long one."""
    code = [sys.executable, ROOT / "benchmarks" / "faults.py", "--kills", "5", "--files", "7"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(code, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-identical: 5" in done.stdout
    assert "refused with a clear error: 7" in done.stdout
