"""The journal of batches: what a line holds, what a killed process leaves, what a resumed fit says about it."""

import random
import signal
import struct

import numpy as np
import pytest
import torch

from learnloop import Callback, CancelBatchException, Checkpoint
from learnloop.callbacks.journal import Journal, random_checksum
from learnloop.stored import runs_in
from learnloop.testing import toy_learner

LINE = struct.Struct("<qIII")


def lines(folder):
    """What stands in the journal of a folder, after the name of the run."""
    return list(LINE.iter_unpack((folder / "journal").read_bytes()[16:]))


def trained(folder, *cbs, every="9ep", n_epoch=2, **kwargs):
    learn = toy_learner(cbs=[Checkpoint(every, keep=None, path=folder), *cbs])
    learn.logger = lambda row: None
    learn.fit(n_epoch, **kwargs)
    return learn


def stop_after(n):
    """Ends the fit by Ctrl-C after so many batches; a callback that only reads."""
    cb = Callback(after_batch=lambda cb: signal.raise_signal(signal.SIGINT) if cb.train_iter == n else None)
    cb.reads_only = True
    return cb


def killed(folder, stored, done):
    """The folder of a process that stored after some batches, and was killed after some more."""
    with pytest.raises(KeyboardInterrupt):
        trained(folder, stop_after(done), every=f"{stored}step")
    runs_in(folder)[-1].unlink()  # the one that Ctrl-C left


def test_each_training_batch_has_a_line_of_twenty_bytes_after_the_name_of_the_run(tmp_path):
    learn = trained(tmp_path)
    (checkpoint,) = [cb for cb in learn.cbs if isinstance(cb, Checkpoint)]
    assert (tmp_path / "journal").read_bytes()[:16] == checkpoint.run_id.encode().ljust(16)
    assert (tmp_path / "journal").stat().st_size == 16 + 8 * 20
    assert [n for n, *_ in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_another_run_begins_another_journal(tmp_path):
    trained(tmp_path)
    first = lines(tmp_path)
    trained(tmp_path)
    assert [n for n, *_ in lines(tmp_path)] == [n for n, *_ in first]


def test_two_runs_from_the_same_seed_have_the_same_lines(tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        trained(tmp_path / name)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_a_line_changes_with_the_random_states_of_torch_numpy_and_python():
    seen = {random_checksum()}
    for draw in (lambda: torch.rand(1), np.random.rand, random.random):
        draw()
        seen.add(random_checksum())
    assert len(seen) == 4


def test_a_resumed_fit_says_how_many_batches_it_repeated(tmp_path, capsys):
    killed(tmp_path, stored=2, done=5)
    capsys.readouterr()
    trained(tmp_path, resume=True)
    assert capsys.readouterr().out.splitlines()[1:] == ["resume verified: 1 batch repeated bit for bit"]
    assert [n for n, *_ in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_line_is_said_once_all_of_them_came_again(tmp_path, capsys):
    killed(tmp_path, stored=3, done=5)
    capsys.readouterr()
    trained(tmp_path, Callback(after_batch=lambda cb: print(cb.train_iter) if cb.training else None), resume=None)
    shown = capsys.readouterr().out.splitlines()
    assert shown == [str(n) for n in range(1, 9)]  # a new run has nothing to repeat


def test_a_fit_that_is_stopped_again_says_how_far_it_came(tmp_path, capsys):
    killed(tmp_path, stored=3, done=7)
    for path in runs_in(tmp_path)[1:]:
        path.unlink()
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, stop_after(5), resume=True)
    assert "resume verified: 2 batches repeated bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "what", "batch"),
    [
        (lambda cb: torch.rand(1), "a random state", 15),  # the generators are looked at in every sixteenth batch
        (lambda cb: setattr(cb.learn, "loss", cb.loss * 2), "the loss", 4),
    ],
)
def test_a_batch_that_comes_otherwise_is_named(change, what, batch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, stop_after(19), every="2step", n_epoch=5)
    for path in runs_in(tmp_path)[1:]:
        path.unlink()
    other = Callback(after_loss=lambda cb: change(cb) if cb.training and cb.train_iter == 4 else None)
    other.reads_only = True
    expected = rf"differs from the one before: {what} is another in training batch {batch}. `learn.verify_resume\(\)`"
    with pytest.warns(UserWarning, match=expected):
        trained(tmp_path, other, resume=True, n_epoch=5)


def test_data_at_another_place_is_named(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b"ab".ljust(16) + LINE.pack(1, 0, 0, 0))
    journal = Journal(path, "ab", 0).open()
    toy_learner().fit(1, cbs=Callback(after_batch=lambda cb: journal.note(cb.learn) if cb.training else None))
    with pytest.warns(UserWarning, match="the place in the data is another in training batch 0"):
        journal.flush()
    journal.close()


def test_lines_are_written_sixteen_at_a_time(tmp_path):
    sizes = []
    look = Callback(after_batch=lambda cb: cb.training and sizes.append((tmp_path / "journal").stat().st_size))
    look.order = 2000
    trained(tmp_path, look, n_epoch=5)
    assert [(size - 16) // 20 for size in sizes] == [0] * 15 + [16] * 5


def test_the_generators_are_in_every_sixteenth_line(tmp_path):
    trained(tmp_path, n_epoch=5)
    assert [n for n, _, states, _ in lines(tmp_path) if states] == [16]


def test_a_line_that_a_kill_cut_is_written_anew(tmp_path):
    killed(tmp_path, stored=2, done=5)
    whole = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(whole[:-7])
    trained(tmp_path, resume=True)
    assert [n for n, *_ in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (tmp_path / "journal").read_bytes()[: len(whole)] == whole


def test_a_journal_that_is_gone_is_begun_anew(tmp_path):
    killed(tmp_path, stored=2, done=5)
    (tmp_path / "journal").unlink()
    trained(tmp_path, resume=True)
    assert [n for n, *_ in lines(tmp_path)] == [5, 6, 7, 8]


def test_a_journal_that_cannot_be_written_is_left_out_with_a_warning(tmp_path):
    (tmp_path / "journal").mkdir()
    with pytest.warns(UserWarning, match=r"journal` could not be written: Is a directory. It is left out"):
        learn = trained(tmp_path)
    assert learn.train_iter == 8 and len(runs_in(tmp_path)) == 1


def test_a_cancelled_batch_has_a_line_too(tmp_path):
    def skip(cb):
        if cb.training and cb.iter == 1:
            raise CancelBatchException

    trained(tmp_path, Callback(before_batch=skip))
    assert [(n, loss) for n, _, _, loss in lines(tmp_path) if n in (2, 6)] == [(2, 0), (6, 0)]


def test_a_loss_per_sample_is_noted_by_its_mean(tmp_path):
    per_sample = Callback(after_loss=lambda cb: setattr(cb.learn, "loss", torch.tensor([1.0, 3.0])))
    one = Callback(after_loss=lambda cb: setattr(cb.learn, "loss", torch.tensor(2.0)))
    trained(tmp_path / "a", per_sample)
    trained(tmp_path / "b", one)
    assert [line[3] for line in lines(tmp_path / "a")] == [line[3] for line in lines(tmp_path / "b")]
