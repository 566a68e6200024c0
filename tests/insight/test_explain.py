"""The dry run: what it says of every callback, compared with a table written by hand from their code."""

import random
import re
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from fastcore.basics import noop
from fastcore.foundation import L
from torch import Tensor, nn

import learnloop as ll
from learnloop import Callback
from learnloop.data import transforms
from learnloop.loop.state import capture, same
from learnloop.testing import toy_learner
from tests.toys import Noise, Shrink

PARAMS, BUFFERS = "parameters", "buffers"
#: What each public callback writes, by event, in a fit of two epochs: written by hand, from what its code says.
WRITES = {
    "ActivationStats": {"before_fit": ["hooks"], "after_fit": ["hooks"]},
    "BatchTransform": {"before_batch": ["random state", "xb"]},
    "BnFreeze": {"before_train": ["model.training"], "cleanup_train": ["model.training"]},
    "CSVLogger": {},
    "Callback": {},
    "ChannelsLast": {"before_fit": [PARAMS]},
    "Checkpoint": {},
    "CollectDataCallback": {},
    "Compile": {"before_fit": ["model.forward"], "cleanup_fit": ["model.forward"]},
    "CutMix": {"before_train": ["loss_func"], "before_batch": ["random state", "xb"], "after_train": ["loss_func"]},
    "EMA": {e: [BUFFERS, PARAMS] for e in ("before_validate", "cleanup_validate", "after_fit")},
    "EarlyStoppingCallback": {},
    "FetchPredsCallback": {},
    "FreezeUntil": {"before_epoch": ["requires_grad"]},
    "GatherPredsCallback": {},
    "GradientAccumulation": {"before_backward": ["loss_grad"], "before_step": ["gradients"]},
    "GradientClip": {"before_step": ["gradients"]},
    "GradientStats": {},
    "HookCallback": {"before_fit": ["hooks"], "after_fit": ["hooks"]},
    "JSONLLogger": {},
    "LRFinder": {
        "before_batch": ["opt.lr"],
        "after_fit": ["recorder.hps"],
        "cleanup_fit": [BUFFERS, "opt.lr", PARAMS, "random state"],
    },
    "MCDropoutCallback": {e: ["model.training", "random state"] for e in ("before_validate", "cleanup_validate")},
    "MicroBatch": {},  # as long as memory does not run out
    "MixHandler": {"before_train": ["loss_func"], "after_train": ["loss_func"]},
    "MixUp": {"before_train": ["loss_func"], "before_batch": ["random state", "xb"], "after_train": ["loss_func"]},
    "MixedPrecision": {
        "before_fit": ["gradients", "scaler"],
        "before_batch": ["autocast"],
        "after_pred": ["pred"],
        "after_loss": ["autocast"],
        "before_backward": ["loss_grad"],
        "before_step": ["gradients"],
        "cleanup_fit": ["gradients", "scaler"],
    },
    "ModelResetter": {e: ["model.hidden"] for e in ("before_train", "before_validate", "after_fit")},
    "Notify": {},
    "OverfitBatch": {"before_batch": ["xb", "yb"]},
    "ParamScheduler": {"before_batch": ["opt.lr"], "after_fit": ["recorder.hps"]},
    "ProgressCallback": {"before_fit": ["logger"], "cleanup_fit": ["logger"]},
    "ProgressiveResize": {"before_batch": ["xb"]},
    "RNNCallback": {"after_pred": ["pred"]},
    "RNNRegularizer": {"after_loss": ["loss_grad"]},
    "Recorder": {"after_validate": ["final_record"], "after_epoch": ["final_record"]},
    "ReduceLROnPlateau": {"after_epoch": ["opt.lr"]},
    "SWA": {e: [BUFFERS, PARAMS] for e in ("before_validate", "cleanup_validate", "after_fit")},
    "SampleLosses": {},
    "SaveModelCallback": {"after_epoch": ["a file"], "after_fit": [PARAMS]},
    "ScheduleFreeCallback": {e: ["opt.train_mode", PARAMS] for e in ("before_train", "cleanup_train")},
    "ShortEpochCallback": {},
    "ShowGraphCallback": {},
    "SkipToEpoch": {},
    "TerminateOnNaNCallback": {},
    "TrackerCallback": {},
    "TrainEvalCallback": {e: ["model.training"] for e in ("before_train", "before_validate", "cleanup_fit")},
    "WeightedSampling": {"before_fit": ["dls"], "cleanup_fit": ["dls"]},
    "ProfileCallback": {},
    "RunRecord": {},
    "SAM": {"before_step": [BUFFERS, "gradients", PARAMS, "pred", "xb", "yb"]},
    "SpikeGuard": {},  # as long as there is no spike
}
#: The cancel exceptions that they raise there.
CANCELS = {
    "EarlyStoppingCallback": {"after_epoch": ["CancelFitException"]},
    "GradientAccumulation": {"before_step": ["CancelBatchException"]},
    "LRFinder": {"before_validate": ["CancelValidException"]},
    "ShortEpochCallback": {"after_batch": ["CancelTrainException", "CancelValidException"]},
    "SkipToEpoch": {"before_epoch": ["CancelEpochException"]},
}
#: How to make those that need arguments, or would do nothing in two short epochs.
MAKERS = {
    "BatchTransform": lambda: ll.BatchTransform(transforms.flip),
    "EarlyStoppingCallback": lambda: ll.EarlyStoppingCallback(min_delta=1e9),  # nothing is ever better
    "FreezeUntil": lambda: ll.FreezeUntil(1),
    "GradientAccumulation": lambda: ll.GradientAccumulation(6),  # of batches of 4, so that two are more than enough
    "ParamScheduler": lambda: ll.ParamScheduler({"lr": ll.SchedCos(0.1, 0.01)}),
    "ProgressiveResize": lambda: ll.ProgressiveResize(multiple=2),
    "RNNRegularizer": lambda: ll.RNNRegularizer(1.0, 1.0),
    "ReduceLROnPlateau": lambda: ll.ReduceLROnPlateau(min_delta=1e9),
    "SWA": lambda: ll.SWA(0),
    "SkipToEpoch": lambda: ll.SkipToEpoch(1),
    "WeightedSampling": lambda: ll.WeightedSampling([1.0, 2.0] * 8),
}
RECURRENT = ("ModelResetter", "RNNCallback", "RNNRegularizer")


class Net(nn.Module):
    """Something of everything: convolution, batch norm, dropout."""

    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(1, 2, 3, padding=1)
        self.body = nn.Sequential(conv, nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Recurrent(Net):
    """Returns three things and carries one along, as recurrent models do."""

    hidden: Tensor | None = None

    def forward(self, x):
        out = self.body(x)
        self.hidden = out.detach()
        return self.head(out), out[:, None].repeat(1, 3, 1), out

    def reset(self):
        self.hidden = None


def public_callbacks():
    found = {name: getattr(ll, name) for name in ll.__all__}
    return {name: cls for name, cls in found.items() if isinstance(cls, type) and issubclass(cls, Callback)}


def learner_with(name, path):
    """A learner with that callback, and what it cannot do without."""
    torch.manual_seed(0)
    x, y = torch.rand(16, 1, 4, 4), torch.arange(16) % 3
    dls = ll.DataLoaders(ll.TensorLoader(x, y, bs=4), ll.TensorLoader(x, y, bs=8), device="cpu")
    opt_func = ll.SGD
    if name == "ScheduleFreeCallback":
        opt_func = partial(pytest.importorskip("schedulefree").SGDScheduleFree, foreach=False)
    cb = MAKERS.get(name, getattr(ll, name))()
    others = [ll.TrainEvalCallback(), ll.Recorder(), *([ll.RNNCallback()] if name in RECURRENT else [])]
    cbs = [*(other for other in others if type(other) is not type(cb)), cb]
    learn = ll.Learner(
        *(dls, Recurrent() if name in RECURRENT else Net(), ll.CrossEntropyLossFlat(), opt_func, 0.01),
        **{"splitter": {"body.*": {}, "head.*": {}}, "train_bn": name != "BnFreeze", "path": path},
        **{"cbs": cbs, "default_cbs": False},
    )
    learn.logger = noop if name != "ProgressCallback" else print
    if name == "BnFreeze":
        learn.freeze()
    return learn


def picture(learn, path):
    """Everything that a learner is, what its callbacks keep, and what lies in its folder; as plain data."""
    states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    own = {n: v for n, v in vars(learn).items() if not n.endswith("_handlers") and not n.startswith(("_stop", "inter"))}
    return {
        "state": capture(learn),
        "class": type(learn),
        "attributes": comparable(own),
        **{f"callback {i}": comparable(vars(cb)) for i, cb in enumerate(learn.cbs)},
        **{f"module {name}": comparable(vars(m)) for name, m in learn.model.named_modules()},
        "random states": states,
        "files": sorted(str(p) for p in path.rglob("*")),
    }


def comparable(value, depth=5):
    """Containers with the bits of tensors; anything else by what it is."""
    if isinstance(value, Tensor):
        return [id(value), value.data_ptr(), value.stride(), value.tolist()]
    if isinstance(value, dict) and depth:
        return [(str(k), comparable(v, depth - 1)) for k, v in value.items()]
    if isinstance(value, (list, tuple, L)) and depth:
        return [type(value).__name__, *(comparable(v, depth - 1) for v in value)]
    return value if isinstance(value, (bool, int, str, type(None))) else repr(value)


@cache
def ran(name):
    """A dry run of a learner with that callback, and pictures of before and after."""
    with TemporaryDirectory() as folder:
        path = Path(folder)
        learn = learner_with(name, path)
        before = picture(learn, path)
        dry = learn.dry_run(2)
        return dry, before, picture(learn, path)


# Every callback of the library


def test_the_table_has_every_public_callback():
    assert set(WRITES) == set(public_callbacks())


@pytest.mark.parametrize("name", WRITES)
def test_it_names_the_writes_of_every_callback(name):
    dry, _, _ = ran(name)
    assert {event: list(writes) for event, writes in dry.writes.get(name, {}).items()} == WRITES[name]


@pytest.mark.parametrize("name", WRITES)
def test_it_names_the_cancels_of_every_callback(name):
    dry, _, _ = ran(name)
    cancels = {row.event: list(row.cancels) for row in dry.rows if row.callback == name and row.cancels}
    assert cancels == CANCELS.get(name, {})


@pytest.mark.parametrize("name", WRITES)
def test_it_leaves_a_learner_with_any_callback_as_it_was(name):
    _, before, after = ran(name)
    assert same(before.pop("state"), after.pop("state"))
    assert after == before


ACT_OUTSIDE = {"CSVLogger", "Checkpoint", "JSONLLogger", "Notify", "ProfileCallback", "RunRecord", "ShowGraphCallback"}


def test_who_acts_outside_is_listed_and_not_called():
    not_called = "not called, for it acts outside"
    found = {name for name in WRITES if any(row.note == not_called for row in ran(name)[0].rows)}
    assert found == {name for name, cls in public_callbacks().items() if cls.acts_outside} == ACT_OUTSIDE


def test_integrations_act_outside():
    from learnloop.callbacks.reports import Reports

    assert Reports.acts_outside


def test_predictions_that_go_to_a_folder_are_not_gathered(tmp_path):
    assert ll.GatherPredsCallback(save_preds=tmp_path / "preds").acts_outside
    toy_learner(cbs=ll.GatherPredsCallback(save_preds=tmp_path / "preds")).dry_run()
    assert list(tmp_path.iterdir()) == []


def test_what_every_fit_has_is_free_of_conflicts():
    learn = toy_learner(default_cbs=True)
    assert learn.dry_run(cbs=ll.ParamScheduler({"lr": ll.SchedCos(0.1, 0.01)})).conflicts == ()


# The verbs


class Late(Callback):
    """Wants to be first, and a law forbids it."""

    order, run_after = -50, Noise

    def before_batch(self):
        pass


def test_a_fit_can_be_a_dry_run():
    learn = toy_learner(cbs=Noise())
    assert learn.fit(3, dry_run=True).title == "dry run of fit(3): 2 batches of each phase, and nothing of it stays"
    assert learn.opt is None and learn.recorder.history == []


def test_a_fit_returns_nothing_else():
    assert toy_learner().fit(1) is None


def test_a_dry_run_of_one_cycle_shows_its_schedule_and_leaves_no_optimizer():
    learn = toy_learner()
    dry = learn.fit_one_cycle(2, dry_run=True)
    assert dry.writes["ParamScheduler"]["before_batch"] == ("opt.lr", "opt.mom")
    assert learn.opt is None


@pytest.mark.parametrize(
    "verb", [partial(ll.Learner.fit_flat_cos, n_epoch=1), partial(ll.Learner.fit_sgdr, n_cycles=1, cycle_len=1)]
)
def test_other_schedules_pass_it_through(verb):
    learn = toy_learner()
    assert verb(learn, dry_run=True).writes["ParamScheduler"]["before_batch"] == ("opt.lr",)
    assert learn.opt is None


def test_two_fits_in_one_call_are_refused():
    with pytest.raises(TypeError, match="makes two fits"):
        toy_learner().fine_tune(1, dry_run=True)


def test_a_fit_that_counts_updates_has_one_too():
    seen = []
    dry = toy_learner(cbs=Callback(before_validate=lambda cb: seen.append(cb.opt_iter))).dry_run(
        n_step=6, valid_every=3
    )
    assert dry.title == "dry run of fit(n_step=6): 2 batches of each phase, and nothing of it stays"
    assert seen == [2, 4]


def test_it_runs_the_first_and_the_last_epoch():
    seen = []
    toy_learner(cbs=Callback(before_epoch=lambda cb: seen.append((cb.epoch, cb.n_epoch)))).dry_run(5)
    assert seen == [(0, 5), (4, 5)]


def test_it_runs_two_batches_of_each_phase():
    seen = []
    toy_learner(cbs=Callback(before_batch=lambda cb: seen.append((cb.training, cb.iter)))).dry_run()
    assert seen == [(True, 0), (True, 1), (False, 0), (False, 1)]


def test_it_is_refused_inside_a_run():
    learn = toy_learner(cbs=Callback(before_epoch=lambda cb: cb.learn.dry_run()))
    with pytest.raises(RuntimeError, match="while a run is active"):
        learn.fit(1)


def test_callbacks_of_the_call_take_part_and_leave():
    learn = toy_learner()
    assert "Noise" in learn.dry_run(cbs=Noise()).writes
    assert [type(cb).__name__ for cb in learn.cbs] == ["TrainEvalCallback", "Recorder"]


# Rows


def rows_at(event, *cbs, **kwargs):
    return [row for row in toy_learner(cbs=cbs, default_cbs=False).dry_run(**kwargs).rows if row.event == event]


def test_a_row_says_who_where_why_when_and_what():
    (row,) = rows_at("before_batch", Noise())
    assert row == (
        *("before_batch", "Noise", "order 5", ("train",), ("fit", "lr_find", "validate", "predict"), ("xb",), ("xb",)),
        *((), ""),
    )


def test_rows_come_in_the_order_in_which_callbacks_run_with_the_law_that_moved_them():
    rows = rows_at("before_batch", Late(), Shrink(), Noise())
    assert [(row.callback, row.why) for row in rows] == [
        ("Noise", "order 5"),
        ("Late", "Late.run_after = Noise"),
        ("Shrink", "order 7"),
    ]


def test_cleanups_come_in_reverse():
    first, second = Callback(cleanup_fit=lambda cb: None), Callback(cleanup_fit=lambda cb: None)
    assert [row.callback for row in rows_at("cleanup_fit", first, second)] == ["Callback (2)", "Callback"]


def test_a_callback_of_another_task_takes_no_part():
    class Predicting(Callback):
        tasks = ("predict",)

        def before_batch(self):
            self.learn.xb = None

    (row,) = rows_at("before_batch", Predicting())
    assert (row.tasks, row.note) == (("predict",), "takes no part in a fit")


def test_who_comes_after_a_cancel_is_not_called():
    def skip(cb):
        raise ll.CancelBatchException

    rows = rows_at("before_batch", Callback(before_batch=skip), Noise())
    assert [(row.cancels, row.note) for row in rows] == [
        (("CancelBatchException",), ""),
        ((), "not called, for Callback cancels before"),
    ]


def test_an_event_that_did_not_fire_is_said_to():
    (row,) = rows_at("after_cancel_fit", Callback(after_cancel_fit=lambda cb: None))
    assert row.note == "did not fire"


def test_a_callback_that_another_one_adds_is_there():
    rows = rows_at("before_batch", Callback(before_fit=lambda cb: cb.learn.add_cb(Noise())))
    assert [(row.callback, row.writes) for row in rows] == [("Noise", ("xb",))]


# Showing

TEXT = """\
dry run of fit(1): 2 batches of each phase, and nothing of it stays

before_fit
    TrainEvalCallback      order -10                         -
    before_train
        TrainEvalCallback  order -10               train     writes model.training
      before_batch
          Noise            order 5                 train     writes xb
          Late             Late.run_after = Noise  both      -
          Shrink           order 7                 both      writes xb
    before_validate
        TrainEvalCallback  order -10               validate  writes model.training
cleanup_fit
    TrainEvalCallback      order -10                         writes model.training

conflicts:
  Noise and Shrink both write xb in before_batch; Shrink comes last"""


def shown():
    return toy_learner(cbs=[ll.TrainEvalCallback(), Late(), Shrink(), Noise()], default_cbs=False).dry_run()


def test_it_is_a_table_in_a_terminal():
    assert repr(shown()) == str(shown()) == TEXT


def test_without_conflicts_it_says_so():
    assert str(toy_learner().dry_run()).endswith("\n\nconflicts: none")


class Nesting(HTMLParser):
    """Checks that tags close in order; keeps the summaries and the text of each cell."""

    def __init__(self, text):
        super().__init__()
        self.open, self.summaries, self.cells, self.deepest = [], [], [], 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.deepest = max(self.deepest, self.open.count("details"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] == "summary":
            self.summaries.append(data.strip())
        elif self.open[-1] == "td":
            self.cells.append(data)


def test_it_is_folded_in_a_notebook():
    page = Nesting(shown()._repr_html_())
    assert page.summaries == [
        "dry run of fit(1): 2 batches of each phase, and nothing of it stays",
        "before_fit: TrainEvalCallback",
        "before_train: TrainEvalCallback",
        "before_batch: Noise, Late, Shrink",
        "before_validate: TrainEvalCallback",
        "cleanup_fit: TrainEvalCallback",
    ]
    assert page.deepest == 2 and "Late.run_after = Noise" in page.cells


def test_what_is_shown_in_a_notebook_is_escaped():
    Odd = type("<b>", (Callback,), {"before_fit": lambda self: None})
    assert "<b>" not in toy_learner(cbs=Odd()).dry_run()._repr_html_()


def test_the_data_say_what_each_writes_by_event():
    assert shown().writes == {
        "TrainEvalCallback": {e: ("model.training",) for e in ("before_train", "before_validate", "cleanup_fit")},
        "Noise": {"before_batch": ("xb",)},
        "Late": {},
        "Shrink": {"before_batch": ("xb",)},
    }


# Sentences


def test_an_event_is_told_in_sentences():
    learn = toy_learner(cbs=[Late(), Shrink(), Noise()])
    assert str(learn.explain("before_batch")) == (
        "before_batch: a batch is split into xb and yb and lies on the device. It fires in fit > epoch > train or "
        "validate > batch.\n"
        "1. Noise (order 5) hears it in train only, and writes xb.\n"
        "2. Late (Late.run_after = Noise) hears it, and writes nothing of the learner's.\n"
        "3. Shrink (order 7) hears it, and writes xb.\n"
        "Look out: Noise and Shrink both write xb in before_batch; Shrink comes last.\n"
        "CancelBatchException skips the rest of this batch: `after_cancel_batch`, `after_batch`, then the next batch.\n"
        "CancelValidException skips the rest of this validation phase: `after_cancel_validate`, `after_validate`.\n"
        "CancelTrainException skips the rest of this training phase: `after_cancel_train`, `after_train`, then "
        "validation.\n"
        "CancelEpochException skips the rest of this epoch: `after_cancel_epoch`, `after_epoch`, then the next epoch.\n"
        "CancelFitException ends the fit in an orderly way: `after_cancel_fit`, `after_fit`."
    )


def test_a_cancel_and_several_writes_are_told():
    learn = toy_learner(cbs=[ll.GradientAccumulation(12), ll.GradientClip()])
    assert str(learn.explain("before_step")).splitlines()[1:4] == [
        "1. GradientAccumulation (order 6) hears it in train only, and writes gradients and raises "
        "CancelBatchException.",
        "2. GradientClip (order 11) hears it in train only, and writes gradients.",
        "CancelStepException skips the optimizer's step: `after_cancel_step`, `after_step`; gradients are cleared all "
        "the same.",
    ]


def test_an_event_that_nobody_hears_is_told():
    lines = str(toy_learner().explain("cleanup_step")).splitlines()
    assert lines == [
        "cleanup_step: the step is over, whatever happened. It fires in fit > epoch > train > batch > step.",
        "No callback hears it.",
        "A cancel exception is an error here: the span is over, and nothing is left to skip.",
    ]


def test_at_the_end_of_a_span_its_cancel_does_nothing():
    lines = str(toy_learner().explain("after_fit")).splitlines()
    assert lines[-1] == "CancelFitException does nothing here: the span is over anyway."


def test_an_explanation_shows_itself_as_text():
    text = toy_learner().explain("after_fit")
    assert repr(text) == str(text) and text._repr_html_().startswith("<pre>after_fit: ")


def test_a_misspelt_event_is_refused():
    with pytest.raises(ValueError, match=re.escape("`before_bacth` is no event. Did you mean `before_batch`?")):
        toy_learner().explain("before_bacth")
