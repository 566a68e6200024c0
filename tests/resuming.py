"""Ctrl-C at every event of a fit, and `resume()`: whether a learner ends as if it had not been stopped."""

import signal

import pytest
import torch

from learnloop import Callback


class StopAt(Callback):
    """Presses Ctrl-C at one event of the first fit, by its number from `before_fit`; None only counts them."""

    order = 1000

    def __init__(self, number):
        self.number, self.seen = number, []

    def __call__(self, event_name):
        self.seen.append(event_name)
        if event_name == "before_fit" and len(self.seen) > 1 and self.number is not None:
            self.number = None  # resumed
        if len(self.seen) - 1 == self.number:
            signal.raise_signal(signal.SIGINT)


def outcome(learn):
    """Everything that a resumed fit must have in common with a whole one, to the bit."""
    return {
        "weights": [t.tolist() for t in learn.model.state_dict().values()],
        "losses": learn.recorder.raw_losses,
        "rows": list(map(list, learn.recorder.values)),
        "counters": (learn.train_iter, learn.opt_iter, learn.epoch),
        "state": repr([cb.state_dict() for cb in learn.cbs if not isinstance(cb, StopAt)][2:]),
        "random": torch.get_rng_state().tolist(),
    }


def assert_resumes_exactly(make_learner, fit=lambda learn: learn.fit(2), every=1):
    """Stops a fit at every event (or every so many), resumes it and compares what came out.

    `make_learner` makes the same learner every time, with TrainEvalCallback and Recorder as its first callbacks.
    """
    whole, seen = _run(make_learner, fit, None)
    last = len(seen) - seen[::-1].index("cleanup_epoch")  # later there is nothing to go on with
    assert last > 20
    for number in range(0, last, every):
        resumed, _ = _run(make_learner, fit, number)
        assert resumed == whole, f"stopped in {seen[number]}, event {number}"


def _run(make_learner, fit, number):
    torch.manual_seed(0)
    learn, stop = make_learner(), StopAt(number)
    learn.add_cb(stop)
    stop.seen.clear()
    if number is None:
        fit(learn)
        return outcome(learn), stop.seen
    with pytest.raises(KeyboardInterrupt):
        fit(learn)
    learn.resume()
    return outcome(learn), stop.seen
