"""Writes fastai_traces.json: the events of fastai's fits of two epochs, plain and with each cancel at each event.

Not run by the tests. It needs fastai (written with 2.8.12): `python tests/data/make_fastai_traces.py`.
Two training and two validation batches of two samples. A key is `CancelException@event` with `/train` or `/validate`
for the events of a batch; the exception is raised where the event fires for the first time in that phase. The events
`after_cancel_X`, which a plain fit does not fire, are brought about by cancelling X in its `before_X`. A trace has one
letter per event (`letters`); what left the fit or the constructor stands after a space.
"""

import json
import string
from pathlib import Path

import fastai
from fastai.basics import (
    SGD,
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    DataLoader,
    DataLoaders,
    Learner,
    TrainEvalCallback,
    defaults,
    nn,
    tensor,
)
from fastai.losses import MSELossFlat

EVENTS = (
    *("after_create", "before_fit", "before_epoch", "before_train", "before_batch", "after_pred", "after_loss"),
    *("before_backward", "after_cancel_backward", "after_backward", "before_step", "after_cancel_step", "after_step"),
    *("after_cancel_batch", "after_batch", "after_cancel_train", "after_train", "before_validate"),
    *("after_cancel_validate", "after_validate", "after_cancel_epoch", "after_epoch", "after_cancel_fit", "after_fit"),
)
LETTERS = dict(zip(EVENTS, string.ascii_letters, strict=False))
IN_BOTH_PHASES = ("before_batch", "after_pred", "after_loss", "after_cancel_batch", "after_batch")
IN_BATCH = EVENTS[EVENTS.index("before_batch") : EVENTS.index("after_batch") + 1]
CANCELS = {
    "backward": CancelBackwardException,
    "batch": CancelBatchException,
    "epoch": CancelEpochException,
    "fit": CancelFitException,
    "step": CancelStepException,
    "train": CancelTrainException,
    "validate": CancelValidException,
}


class Trace(Callback):
    """Writes events down, and raises given exceptions, each once, at an event of a phase."""

    order = 0  # after TrainEvalCallback, which keeps `training`

    def __init__(self, raised):
        self.raised, self.letters, self.phase = raised, "", None

    def __call__(self, event_name):
        if event_name not in LETTERS:
            return
        self.letters += LETTERS[event_name]
        if event_name in ("before_train", "before_validate"):
            self.phase = event_name.removeprefix("before_")
        for place, exception in list(self.raised.items()):
            event, _, phase = place.partition("/")
            if event == event_name and phase in ("", self.phase):
                del self.raised[place]
                raise exception


def trace(raised):
    """The letters of one fit, and what left it."""
    batches = [(tensor([[0.0], [1.0]]), tensor([[0.0], [1.0]]))] * 2
    dls = DataLoaders(DataLoader(batches, bs=None), DataLoader(batches, bs=None), device="cpu")
    log, left = Trace(raised), ""
    try:
        learn = Learner(dls, nn.Linear(1, 1), MSELossFlat(), opt_func=SGD, lr=0.1, cbs=[TrainEvalCallback(), log])
        learn.fit(2)
    except Exception as error:
        left = " " + type(error).__name__
    return log.letters + left


def places():
    """Each event, those of a batch once per phase in which they fire."""
    for event in EVENTS:
        if event in IN_BATCH:
            yield f"{event}/train"
        if event in IN_BOTH_PHASES:
            yield f"{event}/validate"
        if event not in IN_BATCH:
            yield event


def scenario(exception, place):
    raised = {place: exception}
    if place.startswith("after_cancel_"):
        span, _, phase = place.removeprefix("after_cancel_").partition("/")
        raised[f"before_{span}" + (f"/{phase}" if phase else "")] = CANCELS[span]
    return trace(raised)


def main():
    defaults.callbacks = []  # no Recorder, no bar: they crash where a phase is cancelled before it begins
    traces = {"": trace({})}
    for exception in CANCELS.values():
        for place in places():
            traces[f"{exception.__name__}@{place}"] = scenario(exception, place)
    by_trace = {}
    for key, value in traces.items():
        by_trace.setdefault(value, []).append(key)
    data = {"fastai": fastai.__version__, "letters": {v: k for k, v in LETTERS.items()}, "traces": by_trace}
    Path(__file__).with_name("fastai_traces.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
