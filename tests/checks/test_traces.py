"""What a run and a callback must leave as it was, and who is not blamed for a difference."""

import threading

from learnloop.checks.traces import changed, traces, traces_after
from tests.toys import learner


class Waiting:
    """A thread and an open file, until `end`."""

    def __init__(self, path):
        self.is_over, self.file = threading.Event(), open(path, "w")  # noqa: SIM115
        self.thread = threading.Thread(target=self.is_over.wait, daemon=True)
        self.thread.start()

    def end(self):
        self.is_over.set()
        self.thread.join()
        self.file.close()


def test_a_thread_and_a_file_that_stay_are_named(tmp_path):
    learn = learner()
    before = traces(learn)
    left = Waiting(tmp_path / "log")
    try:
        assert changed(before, traces_after(before, learn)) == ["the number of threads", "the number of open files"]
    finally:
        left.end()
    assert changed(before, traces_after(before, learn)) == []


def test_what_others_had_begun_may_end_meanwhile(tmp_path):
    learn, of_others = learner(), Waiting(tmp_path / "log")
    before = traces(learn)
    of_others.end()
    assert changed(before, traces_after(before, learn)) == []


def test_a_callback_that_stays_and_a_loss_that_was_replaced_are_named():
    learn = learner()
    before = traces(learn)
    learn.loss_func = lambda pred, y: pred.sum()
    assert changed(before, traces_after(before, learn)) == ["`learn.loss_func`"]
