"""The loop's own work: counters, the record, backward and step, and what is kept alive at the end."""

import copy
import gc
import weakref
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from fastcore.basics import noop
from torch import nn

from learnloop import (
    Adam,
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    DataLoaders,
    Learner,
    Recorder,
    TrainEvalCallback,
)
from learnloop.loop.events import EVENTS
from tests.toys import Heard, Once, learner, loaders, raise_at, raising, tensor_loader, weights


def seen_at(event_name, *names, cbs=(), n_epoch=2, dls=None, **kwargs):
    """What the named attributes of the learner are, each time an event fires."""
    rows = []
    look = Callback(**{event_name: lambda cb: rows.append(tuple(getattr(cb.learn, n, "absent") for n in names))})
    learner([*cbs, look], dls=dls, **kwargs).fit(n_epoch)
    return rows


# Counters


def test_there_is_no_dl_before_the_first_fit():
    assert not hasattr(learner(), "dl")


def test_before_the_first_fit_nothing_is_done():
    learn = learner()
    assert (learn.epoch, learn.n_epoch, learn.train_iter, learn.opt_iter, learn.pct_train) == (0, 1, 0, 0, 0.0)
    assert (learn.n_step, learn.valid_every) == (None, 0)
    assert not learn.stepped and not learn.interrupted and not learn.training
    position = learn.state_dict()["position"]
    assert (position["stage"], position["epoch"], position["batches"]) == ("fit", 0, 0)


def test_a_batch_by_hand_moves_no_progress():
    learn = learner()
    learn.create_opt()
    learn.training = True
    learn.one_batch(0, learn.dls.one_batch())
    assert (learn.train_iter, learn.opt_iter, learn.pct_train) == (1, 1, 0.0)
    learn.pct_train = 0.5
    learn.one_batch(1, learn.dls.one_batch())
    assert learn.pct_train == 0.5


def test_a_fit_that_counts_updates_goes_pass_after_pass_over_its_loader():
    learn = learner(dls=loaders(2, None))
    learn.fit(n_step=5)
    assert (learn.opt_iter, learn.train_iter, learn.pct_train) == (5, 5, 1.0)


def test_pct_train_begins_at_its_part_in_each_stretch_of_a_fit_that_counts_updates():
    seen = []
    learn = learner(Callback(before_train=lambda cb: seen.append((cb.pct_train, cb.learn.opt_iter))))
    learn.fit(n_step=4, valid_every=2)
    assert seen == [(0.0, 0), (0.5, 2)]


def test_a_loader_with_more_batches_than_it_says_leads_pct_train_no_further_than_the_end_of_the_epoch():
    class Says2(Watched):
        def __len__(self):
            return 2

    rows = seen_at("after_batch", "pct_train", dls=DataLoaders(Says2(3), device="cpu"))
    assert rows == [(0.25,), (0.5,), (0.5,), (0.75,), (1.0,), (1.0,)]


def test_a_phase_without_any_batch_is_an_error():
    with pytest.raises(ValueError, match="the training loader yielded no batch in epoch 0"):
        learner(dls=DataLoaders(Watched(0), device="cpu")).fit(1)


def test_a_validation_without_a_loader_is_an_error():
    with pytest.raises(ValueError, match="there is no validation loader"):
        learner(dls=loaders(2, None)).validate()


def test_a_training_without_any_target_warns_that_it_trained_nothing():
    with pytest.warns(UserWarning, match="nothing was trained: there is no loss"):
        learner(dls=DataLoaders([torch.ones(2, 1)], device="cpu")).fit(1)


def test_in_before_fit_the_counters_are_at_their_start():
    names = ("epoch", "n_epoch", "training", "train_iter", "opt_iter", "pct_train", "task", "stepped", "interrupted")
    assert seen_at("before_fit", *names) == [(0, 2, False, 0, 0, 0.0, "fit", False, False)]


def test_epoch_counts_from_0_and_is_kept_after_the_fit():
    assert seen_at("before_epoch", "epoch") == [(0,), (1,)]
    learn = learner()
    learn.fit(3)
    assert (learn.epoch, learn.n_epoch) == (2, 3)


def test_the_fit_begins_at_start_epoch():
    heard = Heard(["before_epoch"])
    learn = learner([heard, Callback(before_epoch=lambda cb: epochs.append((cb.epoch, cb.pct_train)))])
    epochs = []
    learn.fit(4, start_epoch=2)
    assert [epoch for epoch, _ in epochs] == [2, 3] and learn.train_iter == 4


def test_pct_train_begins_at_its_part_in_a_fit_with_start_epoch():
    learn = learner(Callback(before_train=lambda cb: seen.append(cb.pct_train)))
    seen = []
    learn.fit(4, start_epoch=2)
    assert seen == [0.5, 0.75]


def test_iter_counts_the_batches_of_a_phase_from_0():
    names = ("training", "iter", "n_iter")
    assert seen_at("before_batch", *names) == [(True, 0, 2), (True, 1, 2), (False, 0, 1)] * 2


def test_before_a_batch_the_counters_are_those_of_the_batches_done():
    names = ("training", "train_iter", "opt_iter", "pct_train")
    assert seen_at("before_batch", *names) == [
        (True, 0, 0, 0.0),
        (True, 1, 1, 0.25),
        (False, 2, 2, 0.5),
        (True, 2, 2, 0.5),
        (True, 3, 3, 0.75),
        (False, 4, 4, 1.0),
    ]


def test_in_after_batch_the_batch_is_counted():
    names = ("training", "iter", "train_iter", "opt_iter", "pct_train", "stepped")
    assert seen_at("after_batch", *names, n_epoch=1) == [
        (True, 0, 1, 1, 0.5, True),
        (True, 1, 2, 2, 1.0, True),
        (False, 0, 2, 2, 1.0, False),
    ]


def test_until_the_step_has_ended_nothing_is_counted():
    names = ("train_iter", "opt_iter", "pct_train", "stepped")
    start = [(0, 0, 0.0, False)]
    for name in ("after_pred", "after_loss", "before_backward", "after_backward", "before_step"):
        assert seen_at(name, *names, n_epoch=1, dls=loaders(1, None)) == start
    assert seen_at("after_step", *names, n_epoch=1, dls=loaders(1, None)) == [(0, 1, 0.0, True)]


def test_pct_train_is_set_to_the_epochs_part_before_before_train():
    """A training that was cut short does not leave it behind."""
    cancel = Callback(after_step=raising(CancelTrainException))
    rows = seen_at("before_train", "epoch", "pct_train", cbs=[cancel])
    assert rows == [(0, 0.0), (1, 0.5)]


def test_a_cancelled_batch_counts_as_a_batch_and_not_as_an_update():
    cbs = [raise_at("before_batch", CancelBatchException)]
    names = ("train_iter", "opt_iter", "pct_train", "stepped")
    assert seen_at("after_cancel_batch", *names, cbs=cbs, n_epoch=1) == [(0, 0, 0.0, False)]
    cbs = [raise_at("before_batch", CancelBatchException)]
    assert seen_at("after_batch", *names, cbs=cbs, n_epoch=1, dls=loaders(2, None)) == [
        (1, 0, 0.5, False),
        (2, 1, 1.0, True),
    ]


def test_a_cancelled_step_counts_no_update():
    cbs = [raise_at("before_step", CancelStepException)]
    rows = seen_at("after_step", "opt_iter", "stepped", cbs=cbs, n_epoch=1)
    assert rows == [(0, False), (1, True)]


def test_a_step_cancelled_after_its_normal_end_counts():
    cbs = [raise_at("after_step", CancelStepException)]
    assert seen_at("after_batch", "opt_iter", "stepped", cbs=cbs, n_epoch=1, dls=loaders(1, None)) == [(1, True)]


def test_who_steps_by_hand_adds_to_opt_iter():
    class ByHand(Callback):
        def before_step(self):
            self.learn.opt.step()
            self.learn.opt_iter += 1
            raise CancelStepException

    assert seen_at("after_batch", "opt_iter", cbs=[ByHand()], n_epoch=1, dls=loaders(2, None)) == [(1,), (2,)]


def test_steps_by_hand_lead_pct_train_no_further_than_the_end():
    def step(cb):
        cb.learn.opt_iter += 1

    seen = []
    look = Callback(after_step=step, after_batch=lambda cb: seen.append(cb.pct_train))
    learn = learner(look, dls=loaders(2, None))
    learn.fit(n_step=3)
    assert seen == [2 / 3, 1.0]


def test_a_copy_taken_inside_of_a_fit_counts_updates_as_any_learner():
    copies = []
    take = Once("before_epoch", lambda cb: copies.append(copy.deepcopy(cb.learn)))
    learner(take).fit(1)
    assert copies[0].task is None and not copies[0].training
    copies[0].fit(n_step=5)
    assert copies[0].opt_iter == 5


def test_a_copy_sends_events_to_the_copies_of_the_callbacks():
    learn = learner(heard := Heard())
    heard.events.clear()
    copied = copy.deepcopy(learn)
    copied("before_fit")
    assert (copied.heard.events, heard.events) == (["before_fit"], [])


def test_every_fit_counts_from_the_start():
    learn = learner()
    learn.fit(2)
    learn.fit(1)
    assert (learn.train_iter, learn.opt_iter, learn.pct_train) == (2, 2, 1.0)


@pytest.mark.parametrize(
    ("event_name", "training", "n_iter", "name"),
    [("before_train", True, 2, "train"), ("before_validate", False, 1, "valid")],
)
def test_dl_its_name_n_iter_and_training_are_set_before_the_phase_begins(event_name, training, n_iter, name):
    dls = loaders()
    rows = seen_at(event_name, "dl", "dl_name", "n_iter", "training", dls=dls)
    assert rows == [(dls.train if training else dls.valid, name, n_iter, training)] * 2


def test_batch_is_what_the_loader_gave_until_it_is_done():
    batch = (torch.ones(2, 1), torch.ones(2, 1))
    dls = DataLoaders([batch], device="cpu")
    assert seen_at("after_batch", "batch", n_epoch=1, dls=dls)[0][0] is batch
    assert seen_at("after_train", "batch", n_epoch=1, dls=dls) == [(None,)]


def test_of_another_loader_set_in_before_train_n_iter_is_the_length():
    swap = Callback(before_train=lambda cb: setattr(cb.learn, "dl", tensor_loader(3)))
    assert seen_at("before_batch", "n_iter", "iter", n_epoch=1, cbs=[swap])[:3] == [(3, 0), (3, 1), (3, 2)]


def test_a_validation_that_a_callback_begins_by_itself_is_of_the_validation_set():
    names = []
    again = Callback(
        after_train=lambda cb: cb.learn._do_epoch_validate(), before_validate=lambda cb: names.append(cb.learn.dl_name)
    )
    learner(again).fit(1)
    assert names == ["valid", "valid"]


def test_another_loader_set_in_before_train_is_the_one_that_is_read():
    other = tensor_loader(5)
    change = Callback(before_train=lambda cb: setattr(cb.learn, "dl", other))
    learn = learner([change, heard := Heard(["before_batch"])], dls=loaders(2, None))
    learn.fit(1)
    assert len(heard.events) == 5 and learn.pct_train == 1.0


# The record


def record_of(*cbs, n_epoch=1, **kwargs):
    learn = learner([Recorder(), *cbs], **kwargs)
    learn.logger = lambda row: None
    learn.fit(n_epoch)
    return learn.recorder


def test_the_loss_and_the_rate_of_every_training_batch_are_kept():
    losses = []
    recorder = record_of(Callback(after_batch=lambda cb: losses.append(cb.loss.item())), n_epoch=2)
    trained = [loss for i, loss in enumerate(losses) if i not in (2, 5)]  # without the validations
    assert recorder.raw_losses == pytest.approx(trained)
    assert recorder.lrs == [0.1] * 4


def test_the_batch_is_recorded_after_after_cancel_batch_and_before_after_batch():
    lengths = []
    look = lambda cb: lengths.append(len(cb.learn.recorder.raw_losses))  # noqa: E731
    cbs = [raise_at("after_loss", CancelBatchException), Callback(after_cancel_batch=look, after_batch=look)]
    record_of(*cbs, dls=loaders(2, None))
    assert lengths == [0, 1, 2]


def test_a_batch_cancelled_before_its_loss_is_not_recorded():
    recorder = record_of(raise_at("after_pred", CancelBatchException), dls=loaders(3, None))
    assert len(recorder.raw_losses) == len(recorder.lrs) == 2


def test_of_a_cancelled_batch_a_loss_set_in_it_is_recorded():
    class Sets(Callback):
        def before_batch(self):
            self.learn.loss = torch.tensor(7.0)
            raise CancelBatchException

    assert record_of(Sets(), dls=loaders(2, None)).raw_losses == [7.0, 7.0]


def test_a_loss_set_in_after_cancel_batch_is_recorded_too():
    class Sets(Callback):
        def before_batch(self):
            raise CancelBatchException

        def after_cancel_batch(self):
            self.learn.loss = torch.tensor(5.0)

    assert record_of(Sets(), dls=loaders(1, None)).raw_losses == [5.0]


def test_a_loss_that_a_callback_sets_to_a_number_is_recorded():
    sets = Callback(after_loss=lambda cb: setattr(cb.learn, "loss", 5.0))
    assert record_of(sets, dls=loaders(2, None)).raw_losses == [5.0, 5.0]


def test_beside_large_predictions_few_losses_are_kept_one_by_one():
    numbers = []
    look = Callback(after_batch=lambda cb: numbers.append(len(cb.learn._kept.losses)))
    model = nn.Linear(1, 65536)  # for two samples half a MiB of predictions
    learner(look, loaders(5, None), model, lambda pred, target: pred.mean()).fit(1)
    assert numbers == [1, 0, 1, 0, 1]


def test_before_there_is_an_optimizer_the_rate_that_is_recorded_is_0():
    learn = learner(Callback(after_loss=raising(CancelBatchException)))
    learn.training = True
    learn.one_batch(0, learn.dls.one_batch())
    assert learn._kept.rates == [0.0]


def test_no_graph_is_kept_in_the_record():
    learn = learner(dls=loaders(2, None))
    learn.fit(1)
    assert [loss.requires_grad for loss in learn._kept.losses] == [False, False]


# Backward and step


def test_a_fit_steps_down_the_gradient():
    learn = learner(dls=loaders(1, None))
    learn.model.weight.data.zero_(), learn.model.bias.data.zero_()
    learn.fit(1)
    # One batch: x = 0, 1 and y = 1, 3. The gradients of the mean squared error at 0 are -2·mean(x·y) = -3 and -4.
    assert learn.model.weight.item() == pytest.approx(0.3)
    assert learn.model.bias.item() == pytest.approx(0.4)


def test_a_fit_gives_the_weights_of_the_hand_written_loop():
    learn = learner(dls=loaders(3, 1), model=(model := nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))))
    twin = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    twin.load_state_dict(model.state_dict())
    opt = torch.optim.SGD(twin.parameters(), lr=0.1)
    learn.fit(2)
    for _ in range(2):
        for x, y in learn.dls.train:
            F.mse_loss(twin(x), y).backward()
            opt.step()
            opt.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_losses_of_a_seeded_fit_do_not_change():
    """The numbers are fastai 2.8.12's, of its Adam over the same batches from the same weights."""
    recorder = record_of(n_epoch=2, opt_func=Adam, lr=0.1, dls=loaders(3, 1))
    expected = [0.48160130, 1.77166367, 3.68140364, 0.14971720, 0.87815994, 2.10275173]
    assert recorder.raw_losses == pytest.approx(expected, rel=1e-5)


def test_in_training_gradients_are_enabled_and_in_validation_not():
    seen = []
    learner(Callback(after_pred=lambda cb: seen.append((cb.training, cb.pred.requires_grad)))).fit(1)
    assert seen == [(True, True), (True, True), (False, False)]


def test_the_weights_move_between_before_step_and_after_step():
    seen = []
    look = lambda cb: seen.append(weights(cb.learn))  # noqa: E731
    learner(Callback(before_step=look, after_step=look, after_batch=look), dls=loaders(1, None)).fit(1)
    assert not seen[0].equal(seen[1]) and seen[1].equal(seen[2])


def test_a_cancelled_backward_still_attempts_the_step():
    learn = learner(Callback(before_backward=raising(CancelBackwardException)))
    before = weights(learn)
    learn.fit(1)
    assert learn.opt_iter == 2 and weights(learn).equal(before)  # steps without gradients move nothing


def test_gradients_are_cleared_after_the_step_so_that_those_from_before_count():
    learn = learner(dls=loaders(1, None))
    learn.model.weight.data.zero_(), learn.model.bias.data.zero_()
    learn.model.weight.grad = torch.full((1, 1), 10.0)
    learn.fit(1)
    assert learn.model.weight.item() == pytest.approx(0.3 - 1.0)


@pytest.mark.parametrize("what", ["frozen", "no parameters", "a function"])
def test_without_a_trainable_parameter_backward_and_step_are_skipped(what):
    heard = Heard()
    model = {"frozen": nn.Linear(1, 1).requires_grad_(False), "no parameters": nn.Identity(), "a function": abs}[what]
    learn = learner(heard, model=model)
    learn.fit(1)
    assert not [e for e in heard.events if "backward" in e or "step" in e]
    assert heard.events.count("after_batch") == 3 and (learn.train_iter, learn.opt_iter) == (2, 0)


def test_a_model_that_is_frozen_and_thawed_trains_again():
    learn = learner(model=nn.Linear(1, 1).requires_grad_(False), dls=loaders(1, None))
    learn.fit(1)
    learn.model.requires_grad_(True)
    before = weights(learn)
    learn.fit(1, reset_opt=True)
    assert not weights(learn).equal(before)


def test_a_frozen_model_with_a_loss_that_has_a_graph_trains_what_the_loss_has():
    temperature = nn.Parameter(torch.ones(()))
    heard = Heard(["after_backward"])

    def loss(pred, target):
        return F.mse_loss(pred, target) * temperature

    learn = learner(heard, model=nn.Linear(1, 1).requires_grad_(False), loss_func=loss)
    learn.fit(1)
    assert len(heard.events) == 2


def test_an_optimizer_exists_from_before_fit_on():
    seen = []
    learn = learner(Callback(before_fit=lambda cb: seen.append(cb.learn.opt)))
    assert learn.opt is None
    learn.fit(1)
    learn.fit(1)
    assert seen[0] is learn.opt and seen[1] is learn.opt
    learn.fit(1, reset_opt=True)
    assert seen[2] is not seen[1]


# Nothing is kept alive


class Watched:
    """A loader that knows whether its last pass was closed."""

    def __init__(self, n_batch, error=None):
        self.n_batch, self.error, self.open, self.passes = n_batch, error, 0, 0

    def __iter__(self):
        self.open, self.passes = self.open + 1, self.passes + 1
        try:
            for i in range(self.n_batch):
                yield torch.full((2, 1), float(i)), torch.ones(2, 1)
            if self.error is not None:
                raise self.error
        finally:
            self.open -= 1


class Refs(Callback):
    """Weak references to what a batch brings."""

    order = -10

    def __init__(self):
        self.refs = []

    def after_loss(self):
        learn = self.learn
        for thing in (*learn.xb, *learn.yb, learn.pred, learn.loss_grad):
            self.refs.append(weakref.ref(thing))

    def alive(self):
        return sum(ref() is not None for ref in self.refs)


ENDS = {
    "normal": (None, None),
    "cancelled fit": (lambda: raise_at("after_batch", CancelFitException), None),
    "cancelled epoch": (lambda: raise_at("after_batch", CancelEpochException), None),
    "cancelled batch": (lambda: raise_at("before_backward", CancelBatchException), None),
    "cancelled validation batch": (lambda: raise_at("after_loss", CancelBatchException, training=False), None),
    "error": (lambda: raise_at("after_loss", ValueError("x")), ValueError),
    "error in backward": (lambda: raise_at("before_backward", ValueError("x")), ValueError),
    "error in validation": (lambda: raise_at("after_loss", ValueError("x"), training=False), ValueError),
    "error in after_fit": (lambda: raise_at("after_fit", ValueError("x")), ValueError),
    "error in a cleanup": (lambda: raise_at("cleanup_batch", ValueError("x")), ValueError),
    "two errors": (lambda: [raise_at(e, ValueError("x")) for e in ("after_loss", "cleanup_batch")], ValueError),
    "interrupt": (lambda: raise_at("after_loss", KeyboardInterrupt()), KeyboardInterrupt),
    "wrong cancel": (lambda: raise_at("after_epoch", CancelTrainException), CancelTrainException),
}


def run_to(end, run="fit", hold=False):
    """Runs a learner to one of ENDS without garbage collection; returns what is still alive, and the loaders."""
    make, error = ENDS[end]
    made = [] if make is None else make()
    refs, train, valid = Refs(), Watched(2), Watched(2)
    learn = learner([refs, *(made if isinstance(made, list) else [made])], dls=DataLoaders(train, valid, device="cpu"))
    gc.disable()
    held = None
    try:
        try:
            learn.fit(2) if run == "fit" else learn.validate()
        except BaseException as left:
            assert type(left) is error, left
            held = left if hold else None
            del left
        alive = refs.alive()
    finally:
        gc.enable()
    assert refs.refs
    del held
    return alive, learn, train, valid


@pytest.mark.parametrize("end", ENDS)
def test_after_any_end_of_a_fit_no_batch_prediction_or_graph_is_alive_and_no_cycle_holds_one(end):
    alive, learn, _, _ = run_to(end)
    assert alive == 0
    assert (learn.dl, learn.batch, learn.xb, learn.yb, learn.pred) == (None, None, (None,), (None,), None)
    assert learn.x is None and learn.y is None and learn.loss is None
    assert learn._validation_start is None and learn._pass_random is None  # states taken on the way


@pytest.mark.parametrize("end", [end for end, (_, error) in ENDS.items() if error is not None])
def test_also_while_the_error_and_its_frames_are_kept(end):
    assert run_to(end, hold=True)[0] == 0


def test_a_loss_that_a_callback_sets_with_its_graph_is_recorded_without():
    def replace(cb):
        cb.learn.loss = cb.learn.loss_grad * 2

    learn = learner([Callback(after_loss=replace, after_backward=raising(CancelBatchException))])
    learn.fit(1)
    assert len(learn._kept.losses) > 0
    assert not any(loss.requires_grad for loss in learn._kept.losses)


def holding(event_name, make):
    """A callback whose frame holds what there is of the batch when it raises an exception."""

    def action(cb):
        held = cb.learn.xb, cb.learn.pred
        raise make() if held else None

    return Once(event_name, action)


@pytest.mark.parametrize(
    "events", ["after_loss", "cleanup_batch", "after_loss cleanup_batch", "cleanup_batch cleanup_fit"]
)
@pytest.mark.parametrize("error", [ValueError, CancelFitException, CancelBatchException, KeyboardInterrupt])
def test_no_cycle_holds_the_frames_of_an_exception_that_is_over(events, error):
    refs = Refs()
    cbs = [refs, *(holding(event_name, error) for event_name in events.split())]
    learn = learner(cbs, dls=DataLoaders(Watched(2), device="cpu"))
    gc.disable()
    try:
        with suppress(ValueError, RuntimeError, KeyboardInterrupt):
            learn.fit(1)
        assert refs.refs and refs.alive() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("end", ENDS)
def test_after_any_end_of_a_fit_every_pass_over_a_loader_is_closed(end):
    _, _, train, valid = run_to(end)
    assert train.passes and (train.open, valid.open) == (0, 0)


@pytest.mark.parametrize("end", ["normal", "error in validation", "cancelled validation batch"])
def test_after_a_validate_nothing_is_alive_either(end):
    alive, learn, train, valid = run_to(end, run="validate")
    assert alive == 0 and valid.open == 0 and train.passes == 0
    assert learn.pred is None and learn.xb == (None,)


def test_a_generator_is_closed_when_its_phase_ends_not_when_the_fit_ends():
    train, seen = Watched(5), []
    look = Callback(before_batch=lambda cb: seen.append(train.open), after_train=lambda cb: seen.append(train.open))
    learner([raise_at("after_batch", CancelTrainException), look], dls=DataLoaders(train, device="cpu")).fit(1)
    assert seen == [1, 0]


def test_an_optimizer_that_is_replaced_after_a_fit_is_let_go():
    learn = learner()
    learn.fit(1)
    former = weakref.ref(learn.opt)
    learn.create_opt()
    gc.collect()
    assert former() is None


class Endless:
    """A pass that knows whether it was closed, over a loader that keeps it."""

    is_closed = False

    def __iter__(self):
        return self

    def __next__(self):
        return torch.ones(2, 1), torch.ones(2, 1)

    def close(self):
        self.is_closed = True


def test_after_a_fit_that_counts_updates_its_pass_is_closed_and_the_next_fit_begins_one():
    learn = learner(dls=DataLoaders(train := Endless(), device="cpu"))
    learn.fit(n_step=3)
    assert train.is_closed
    learn.dls = loaders(2, None)
    learn.fit(1)
    assert learn.train_iter == 2


def test_during_the_fit_the_batch_before_is_let_go():
    refs, counts = Refs(), []
    look = Callback(before_batch=lambda cb: counts.append(refs.alive()))
    learner([refs, look], dls=DataLoaders(Watched(4), device="cpu")).fit(1)
    assert counts == [0, 0, 0, 0]


def test_in_after_fit_and_cleanup_fit_the_last_batch_is_still_there():
    seen = []
    look = lambda cb: seen.append((cb.learn.pred is not None, cb.learn.xb[0] is not None, cb.learn.task))  # noqa: E731
    learner(Callback(after_fit=look, cleanup_fit=look)).fit(1)
    assert seen == [(True, True, "fit")] * 2


def test_a_callback_of_the_fit_is_there_until_its_end():
    heard = Heard()
    learn = learner(Callback(cleanup_fit=lambda cb: seen.append((list(cb.learn.cbs), heard.run))))
    seen = []
    heard.run = False
    learn.fit(1, cbs=heard)
    assert seen == [([learn.cbs[0], heard], False)]
    assert heard not in learn.cbs and heard.events[-1] == "cleanup_fit"


@pytest.mark.parametrize("event_name", [e for e in EVENTS if not e.startswith("after_cancel_") and e != "after_create"])
def test_after_an_error_at_any_event_the_learner_is_usable(event_name):
    learn = learner([TrainEvalCallback(), raise_at(event_name, ValueError("x"))])
    with pytest.raises(ValueError):
        learn.fit(1)
    assert learn.task is None
    learn.fit(1)
    assert (learn.train_iter, learn.pct_train) == (2, 1.0)


def test_a_callback_whose_state_cannot_be_stored_ends_a_fit_before_its_first_epoch():
    class Keeps(Callback):
        _stateattrs = ("kept",)

        def before_fit(self):
            self.kept = print

    learn = learner([heard := Heard(), Keeps()])
    heard.events.clear()
    with pytest.raises(TypeError, match=r"`Keeps\.kept`"):
        learn.fit(1)
    assert heard.events == ["before_fit", "cleanup_fit"]


def test_fit_inside_fit_raises_and_leaves_the_outer_one_to_go_on():
    errors = []

    def inner(cb):
        with pytest.raises(RuntimeError, match="`fit` was called while a run is active") as caught:
            cb.learn.fit(1, cbs=Heard())
        errors.append(caught.value)

    learn = learner(Once("after_pred", inner))
    learn.fit(1)
    assert errors and learn.train_iter == 2 and len(learn.cbs) == 1


# The steps of a batch, which the loop writes out where nobody has replaced one


STEPS = ["_forward", "_predict", "_compute_loss", "_do_grad_opt", "_backward", "_step"]


@pytest.mark.parametrize("steps", [*([step] for step in STEPS), STEPS], ids=lambda steps: " ".join(steps))
def test_steps_that_a_subclass_replaces_are_run(steps):
    class Mine(Learner):
        pass

    def replaced(step):
        def mine(self):
            calls.append(step)
            getattr(super(Mine, self), step)()

        return mine

    for step in steps:
        setattr(Mine, step, replaced(step))
    calls, learn = [], learner(cls=Mine)
    learn.fit(1)
    counts = {"_forward": 3, "_predict": 3, "_compute_loss": 3, "_do_grad_opt": 2, "_backward": 2, "_step": 2}
    assert {step: calls.count(step) for step in steps} == {step: counts[step] for step in steps}


def test_a_step_that_a_subclass_replaces_is_run_in_a_batch_by_hand_too():
    class Mine(Learner):
        def _predict(self):
            self.pred = self.x * 0

    learn = learner(cls=Mine)
    learn.one_batch(0, learn.dls.one_batch())
    assert learn.pred.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_is_replaced_on_a_learner_in_the_middle_of_a_phase_is_run_from_the_next_batch_on(step):
    calls = []

    def replace(cb):
        stock = getattr(cb.learn, step)
        setattr(cb.learn, step, lambda: (calls.append(cb.learn.iter), stock()))

    learn = learner(Once("after_batch", replace))
    learn.fit(1)
    assert calls[0] == 1 and getattr(learn, step)


def weights_and_trace(replaced, *cbs):
    heard = Heard(["after_pred", "after_loss", "after_batch", "after_fit"])
    learn = learner([Recorder(), heard, *cbs])
    learn.logger = noop
    if replaced:
        stock = learn._forward
        learn._forward = lambda: stock()
    learn.fit(2)
    return [p.tolist() for p in learn.model.parameters()], learn.recorder.raw_losses, learn.opt_iter, heard.events


def cancelled_in_backward():
    """The gradient of the second batch is cancelled from inside of torch's backward pass."""

    def hook(cb):
        def cancel(grad):
            if cb.learn.iter == 1:
                raise CancelBackwardException

        cb.learn.pred.register_hook(cancel)

    return Callback(after_pred=lambda cb: hook(cb) if cb.training else None)


def cancelled_in_the_step():
    def step(learn, stock):
        if learn.iter == 1:
            raise CancelStepException
        stock()

    def replace(cb):
        stock = cb.opt.step
        cb.opt.step = lambda: step(cb.learn, stock)

    return Callback(before_fit=replace)


def who_comes_in_backward():
    """Hears `after_backward` and both ends of the step, though nobody heard the beginning of the backward pass."""

    def hook(cb):
        cb.learn.pred.register_hook(lambda grad: cb.learn.add_cb(Late()) and None)

    return Once("after_pred", hook)


class Late(Callback):
    def __init__(self):
        self.heard = []

    def after_backward(self):
        self.heard.append("after_backward")

    def before_step(self):
        self.heard.append("before_step")


@pytest.mark.parametrize("make", [cancelled_in_backward, cancelled_in_the_step, who_comes_in_backward])
def test_written_out_the_steps_do_the_same(make):
    assert weights_and_trace(False, make()) == weights_and_trace(True, make())


@pytest.mark.parametrize("replaced", [False, True])
def test_who_comes_in_the_backward_pass_hears_its_end_and_the_step(replaced):
    learn = learner(who_comes_in_backward())
    if replaced:
        stock = learn._step
        learn._step = lambda: stock()
    learn.fit(1)
    assert learn.late.heard == ["after_backward", "before_step"] * 2


# Places from which a fit can go on


def test_the_last_such_place_is_the_beginning_of_the_epoch_of_its_training_or_of_its_validation():
    def look(cb, event_name):
        position = cb.learn._position()
        found.append((event_name, position["stage"], position["epoch"]))

    names = ["before_epoch", "before_train", "after_train", "before_validate", "after_epoch", "after_fit"]
    cbs = [Callback(**{name: lambda cb, name=name: look(cb, name)}) for name in names]
    found = []
    learner(cbs, dls=loaders(1, 1)).fit(2)
    assert found == [
        *(("before_epoch", "fit", 0), ("before_train", "epoch", 0), ("after_train", "train", 0)),
        *(("before_validate", "validate", 0), ("after_epoch", "validate", 0)),
        *(("before_epoch", "fit", 1), ("before_train", "epoch", 1), ("after_train", "train", 1)),
        *(("before_validate", "validate", 1), ("after_epoch", "validate", 1), ("after_fit", "fit", 2)),
    ]


@pytest.mark.parametrize(
    ("event_name", "start_epoch", "places"),
    [
        ("before_fit", 0, [("fit", 0, 0)]),
        ("before_fit", 1, [("fit", 1, 0)]),
        ("after_loss", 0, [("train", 0, 1), ("train", 0, 2), ("fit", 1, 0)]),  # which validates too
        ("after_epoch", 0, [("fit", 1, 0), ("fit", 2, 0)]),
    ],
)
def test_what_waits_for_such_a_place_is_called_before_the_next_epoch_or_training_batch(event_name, start_epoch, places):
    def wait(cb):
        learn = cb.learn
        learn.at_boundary(lambda: found.append(tuple(learn._position()[n] for n in ("stage", "epoch", "batches"))))

    found = []
    learner(Callback(**{event_name: wait})).fit(2, start_epoch=start_epoch)
    assert found[: len(places)] == places and len(found) == (6 if event_name == "after_loss" else len(places))


def test_what_waited_in_a_fit_that_an_error_ended_is_not_called_in_the_next_one():
    def wait(cb):
        cb.learn.at_boundary(lambda: found.append("called"))
        raise ValueError

    found, learn = [], learner(Once("after_loss", wait))
    with pytest.raises(ValueError):
        learn.fit(1)
    learn.fit(1)
    assert found == []


def test_in_a_fit_that_counts_updates_the_place_is_the_pass_over_the_loader_and_the_batches_taken_from_it():
    def wait(cb):
        learn = cb.learn
        learn.at_boundary(lambda: found.append((learn._position()["pass"], learn._position()["taken"])))

    found = []
    learner(Callback(after_loss=wait), dls=loaders(2, None)).fit(n_step=3)
    assert found == [(0, 1), (0, 2), (1, 1)]
