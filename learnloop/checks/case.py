"""One case: the callback, or several together, that is checked, learners with and without it, and what it broke."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learnloop.checks.traces import kept_by_the_loop, numbers, outcome
from learnloop.data.keyed import random_states, set_random_states
from learnloop.learner import Learner
from learnloop.loop.callback import Callback
from learnloop.loop.dispatch import instances

N_EPOCH = 2  # of a fit that is disturbed: something must have been going on before


class Case:
    """Makes learners, the same every time, trains them, and collects what is broken of the promise at hand."""

    name = "?"

    def __init__(
        self,
        make: Callable[[], Any],  # a callback, or several that belong together
        make_learner: Callable[[], Learner],
        events: Sequence[str],  # at which something is raised
        folder: Path,  # where learners write
    ):
        self.make, self.make_learner, self.events, self.folder = make, make_learner, events, folder
        self.random = _seeded_states()
        self.n_runs = 0
        self.is_leaking, self.is_resumable = False, True
        self.broken: dict[str, list[str]] = {}
        self.numbers: list[float] | None = None  # losses and weights of a plain fit; None: it cannot train
        self.host_reads: float | None = None
        self.control = self.learner()  # one that never had it, after a fit
        self.without = self.fit(self.control)  # its numbers, or why it does not train without it
        self.known = {*vars(self.control), *kept_by_the_loop(self.control)}  # attributes that anybody may leave

    def learner(self) -> Learner:
        """A learner without the callback, the same every time."""
        set_random_states(self.random)
        torch.set_grad_enabled(True)  # whatever the one before has left
        learn = self.make_learner()
        learn.path = self.folder
        return learn

    def subjects(self) -> list[Callback]:
        """New instances of what is checked."""
        cbs = instances(self.make())
        self.name = " and ".join(type(cb).__name__ for cb in cbs)
        return cbs

    def breaks(self, what: str, where: str) -> None:
        """Notes what is broken, and where."""
        self.broken.setdefault(what, []).append(where)

    def run(self, run: Callable[[], Any], also: type[BaseException] = Exception) -> BaseException | None:
        """Runs something; an exception comes back without its frames, which would keep the batch."""
        self.n_runs += 1
        try:
            run()
        except (Exception, also) as error:
            return error.with_traceback(None)
        return None

    def resumed(self, state: dict[str, Any], beside: Sequence[Callback] = ()) -> tuple[BaseException | None, list[Any]]:
        """What was raised and what came out where a new learner with new instances goes on from a state."""
        learn, cbs = self.learner(), [*self.subjects(), *beside]
        for p in learn._parameters():
            p.data.neg_()  # what is taken from the weights before the state is there shows
        error = self.run(lambda: learn.add_cbs(cbs).load_state_dict(state)) or self.run(learn.resume)
        return error, outcome(learn)

    def fit(self, learn: Learner) -> list[float] | BaseException:
        """Trains from the learner's weights for one epoch; returns losses and weights, or what was raised."""
        set_random_states(self.random)
        error = self.run(partial(learn.fit, 1, reset_opt=True))
        return numbers(learn) if error is None else error


def _seeded_states() -> dict[str, Any]:
    random.seed(42)
    np.random.seed(42)
    torch.manual_seed(42)
    return random_states()
