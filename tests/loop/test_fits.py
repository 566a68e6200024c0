"""Ctrl-C and `resume()`: whatever a fit is made of, and wherever it is stopped, it ends as if it had not been."""

import io
import random
import signal
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from learnloop import (
    Callback,
    CancelStepException,
    DataLoaders,
    Learner,
    Recorder,
    TensorLoader,
    TrainEvalCallback,
    accuracy,
)
from learnloop.data.keyed import random_states
from learnloop.loop.fits import FitCall, run_dry, run_fit, run_trial
from tests.toys import Heard, raise_at, weights

X, Y = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 2


class Noisy(Dataset):
    """Samples that differ every time they are read, by the generators of torch, numpy and python."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(4) + 0.1 * np.random.randn() + 0.1 * random.random(), Y[i]


class Stream(IterableDataset):
    """Shuffled samples with noise, drawn from the global generators as they come."""

    def __iter__(self):
        for i in torch.randperm(len(X)):
            yield X[i] + 0.1 * torch.randn(4), Y[i]


class Foreign:
    """Batches from no loader of torch's or ours, drawn from the global generators."""

    def __iter__(self):
        for idx in torch.randperm(len(X)).split(6):
            yield X[idx] + 0.1 * torch.randn(1) + 0.1 * np.random.randn(), Y[idx]


def noisy_collate(samples):
    xb, yb = default_collate(samples)
    return xb + 0.1 * torch.rand(1) + 0.1 * np.random.rand() + 0.1 * random.random(), yb


def tensors(**kwargs):
    return DataLoaders(TensorLoader(X, Y, bs=6, shuffle=True), TensorLoader(X, Y, bs=10), **kwargs)


def torch_loaders(**kwargs):
    loader = partial(DataLoader, Noisy(), collate_fn=noisy_collate, **kwargs)
    return DataLoaders(loader(batch_size=6, shuffle=True), loader(batch_size=10))


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


class StopAt(Callback):
    """Presses Ctrl-C at an event of each fit, by its number from `before_fit`: first in the fit, then when resumed."""

    order = 1000

    def __init__(self, *numbers):
        self.numbers, self.seen = iter(numbers), []

    def __call__(self, event_name):
        if event_name == "before_fit":
            self.seen, self.number = [], next(self.numbers, None)
        self.seen.append(event_name)
        if self.learn.task == "fit" and len(self.seen) - 1 == self.number:
            signal.raise_signal(signal.SIGINT)


class Accumulate(Callback):
    """Steps every second batch only, and drops an open window where the phase ends."""

    _stateattrs = ("count",)

    def __init__(self):
        self.count = 0

    def before_step(self):
        self.count += 1
        if self.count % 2:
            raise CancelStepException

    def after_cancel_step(self):
        self.kept = [p.grad for p in self.learn.model.parameters()]

    def after_batch(self):
        if self.training and not self.stepped:
            for p, grad in zip(self.learn.model.parameters(), self.kept, strict=True):
                p.grad = grad

    def cleanup_train(self):
        self.learn.opt.zero_grad()
        self.count, self.kept = 0, None


class Counting(Callback):
    """State of every kind, moved by training and validation, with draws from the global generators."""

    _stateattrs = ("total", "seen", "rng")

    def before_fit(self):
        self.total, self.seen, self.rng = 0, [], np.random.default_rng(0)

    def after_batch(self):
        self.total += 1
        self.seen.append((self.training, float(self.rng.random()), float(torch.rand(1)), np.random.randn()))

    def after_epoch(self):
        self.seen.append(("epoch", random.random()))


class Case:
    """A learner to be made anew for each run, and the fit that it runs."""

    def __init__(self, dls=tensors, fit=lambda learn: learn.fit(2), cbs=lambda: [], **kwargs):
        self.dls, self.fit, self.cbs, self.kwargs = dls, fit, cbs, kwargs

    def learner(self, *stops):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        cbs = [TrainEvalCallback(), Recorder(train_metrics=True), *self.cbs(), StopAt(*stops)]
        learn = Learner(
            self.dls(), model(), nn.CrossEntropyLoss(), metrics=accuracy, cbs=cbs, default_cbs=False, **self.kwargs
        )
        learn.logger = lambda row: None
        return learn

    def run(self, *stops):
        """The learner after a fit that was stopped at these events, and resumed each time."""
        learn = self.learner(*stops)
        go_on = partial(self.fit, learn)
        for _ in stops:
            with pytest.raises(KeyboardInterrupt):
                go_on()
            go_on = learn.resume
        go_on()
        return learn


def outcome(learn):
    """Everything that two runs must have in common to the bit."""
    counting = [cb for cb in learn.cbs if isinstance(cb, Counting)]
    return {
        "weights": [p.tolist() for p in learn.model.state_dict().values()],
        "opt": repr(learn.opt.state_dict()),
        "losses": learn.recorder.raw_losses,
        "rows": list(map(list, learn.recorder.values)),
        "lrs": learn.recorder.lrs,
        "hps": learn.recorder.hps,
        "counters": (learn.train_iter, learn.opt_iter, learn.epoch, learn.n_epoch),
        "state": [(cb.total, cb.seen) for cb in counting],
        "random": repr(random_states()),
    }


def all_stops(case):
    """The numbers of all events at which Ctrl-C can still be gone on from: up to the end of the last epoch."""
    seen = case.run().cbs[-1].seen
    return range(len(seen) - seen[::-1].index("cleanup_epoch"))


CASES = {
    "tensors": Case(),
    "torch loaders": Case(torch_loaders),
    "one cycle": Case(torch_loaders, lambda learn: learn.fit_one_cycle(2, 0.1)),
    "steps": Case(fit=lambda learn: learn.fit(n_step=9, valid_every=5)),
    "one cycle of steps": Case(torch_loaders, lambda learn: learn.fit_one_cycle(None, 0.1, n_step=6, valid_every=4)),
    "foreign loader": Case(lambda: DataLoaders(Foreign(), Foreign())),
    "steps of a foreign loader": Case(lambda: DataLoaders(Foreign()), lambda learn: learn.fit(n_step=7, valid_every=3)),
    "iterable dataset": Case(lambda: DataLoaders(DataLoader(Stream(), 6), DataLoader(Stream(), 10))),
    "tensors, not keyed": Case(lambda: tensors(keyed=False)),
    "torch loader, not keyed": Case(lambda: DataLoaders(DataLoader(Noisy(), 6, shuffle=True), keyed=False)),
    "a list of batches": Case(lambda: DataLoaders(list(tensors().train), list(tensors().valid))),
    "accumulation": Case(cbs=lambda: [Accumulate()]),
    "torch's optimizer": Case(opt_func=partial(torch.optim.SGD, momentum=0.9)),
}


def test_a_fit_stopped_at_any_event_and_resumed_ends_as_if_it_had_not_been_stopped():
    case = Case(torch_loaders, cbs=lambda: [Counting()])
    whole = outcome(case.run())
    for stop in all_stops(case):
        assert outcome(case.run(stop)) == whole, f"stopped at event {stop}"


@pytest.mark.parametrize("name", CASES)
def test_whatever_a_fit_is_made_of_it_goes_on_exactly(name):
    case = CASES[name]
    whole = outcome(case.run())
    for stop in all_stops(case)[::7]:
        assert outcome(case.run(stop)) == whole, f"stopped at event {stop}"


@pytest.mark.parametrize("name", ["torch loaders", "one cycle", "steps", "foreign loader", "accumulation"])
def test_a_second_and_a_third_stop_change_nothing(name):
    case = CASES[name]
    whole = outcome(case.run())
    for stop in all_stops(case)[:60:19]:
        assert outcome(case.run(stop, 3, 7)) == whole, f"stopped first at event {stop}"


@pytest.mark.parametrize("name", ["torch loaders", "one cycle", "steps of a foreign loader", "accumulation"])
def test_a_resumed_fit_may_be_stopped_again_before_it_has_come_to_its_place(name):
    case = CASES[name]
    whole = outcome(case.run())
    for stop in all_stops(case)[:60:19]:
        assert outcome(case.run(stop, 0, 1)) == whole, f"stopped first at event {stop}"


class Pressing:
    """A loader or dataset that presses Ctrl-C while it reads."""

    def __init__(self, of, at_read):
        self.of, self.left = of, at_read

    def press_when_due(self):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

    def __len__(self):
        return len(self.of)

    def __getitem__(self, i):
        self.press_when_due()
        return self.of[i]


class PressingStream(Pressing):
    def __iter__(self):
        for batch in self.of:
            self.press_when_due()
            yield batch


def resumed_where_it_stopped(dls):
    """What a fit over these loaders comes to, with as many resumes as it takes."""
    learn = Case(lambda: dls).learner()
    try:
        learn.fit(2)
    except KeyboardInterrupt:
        learn.resume()
    return outcome(learn)


@pytest.mark.parametrize("at_read", [1, 5, 7, 20, 21, 33])
def test_ctrl_c_while_a_torch_loader_reads_is_gone_on_from_exactly(at_read):
    loader = partial(DataLoader, batch_size=6, shuffle=True, collate_fn=noisy_collate)
    whole = resumed_where_it_stopped(DataLoaders(loader(Noisy())))
    assert resumed_where_it_stopped(DataLoaders(loader(Pressing(Noisy(), at_read)))) == whole


@pytest.mark.parametrize("at_read", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("loader", [Foreign, lambda: DataLoader(Stream(), 6)])
def test_ctrl_c_while_a_foreign_loader_reads_is_gone_on_from_exactly(loader, at_read):
    whole = resumed_where_it_stopped(DataLoaders(loader()))
    assert resumed_where_it_stopped(DataLoaders(PressingStream(loader(), at_read))) == whole


def test_ctrl_c_in_a_validation_stops_after_that_batch_whatever_its_number_is():
    class First(Foreign):
        def __init__(self, n):
            self.n = n

        def __iter__(self):
            return islice(super().__iter__(), self.n)

    def press(cb):
        if not cb.training:
            seen.append(cb.iter)
            if cb.iter == 1:  # as many batches as were trained
                signal.raise_signal(signal.SIGINT)

    learn, seen = Case(lambda: DataLoaders(First(1), First(2))).learner(), []
    with pytest.raises(KeyboardInterrupt, match="in the validation of epoch 0"):
        learn.fit(1, cbs=Callback(after_pred=press))
    assert seen == [0, 1]


@pytest.mark.parametrize("persistent", [False, True])
def test_data_workers_change_nothing_and_are_gone_on_with_exactly(persistent):
    case = Case(partial(torch_loaders, num_workers=2, persistent_workers=persistent))
    stops = [n for n, event in enumerate(case.run().cbs[-1].seen) if event == "after_batch"]
    assert outcome(case.run(stops[1], stops[2])) == outcome(CASES["torch loaders"].run())


@pytest.mark.parametrize("stop", [0, 1, 12])
def test_a_foreign_loader_with_workers_of_its_own_is_gone_on_with_exactly(stop):
    steps = lambda learn: learn.fit(n_step=7, valid_every=3)  # noqa: E731
    case = Case(lambda: DataLoaders(DataLoader(Stream(), 6, num_workers=1)), steps)
    assert outcome(case.run(stop)) == outcome(case.run())


@pytest.mark.parametrize(("n_epoch", "start_epoch"), [(0, 0), (0, 1), (1, 1), (1, 3)])
def test_a_fit_without_an_epoch_to_train_stays_at_epoch_0(n_epoch, start_epoch):
    learn = Case().learner()
    learn.fit(n_epoch, start_epoch=start_epoch)
    assert (learn.epoch, learn.n_epoch, learn.train_iter) == (0, n_epoch, 0)


def test_a_fit_of_epochs_counts_no_updates_from_one_validation_to_the_next():
    learn = Case().learner()
    learn.fit(n_step=4, valid_every=2)
    learn.fit(1)
    assert (learn.n_step, learn.valid_every) == (None, 0)


def test_a_fit_of_updates_reads_what_a_fit_of_epochs_reads():
    def batches(**call):
        learn, seen = Case().learner(), []
        learn.fit(**call, cbs=Callback(after_batch=lambda cb: seen.append(cb.x.tolist()) if cb.training else None))
        return seen

    assert batches(n_step=8) == batches(n_epoch=2)


def test_a_second_fit_begins_at_the_beginning():
    learn = Case().learner()
    learn.fit(1)
    seen = []
    names = ("pct_train", "training", "iter", "train_iter", "opt_iter", "loss")
    learn.fit(1, cbs=Callback(before_fit=lambda cb: seen.append([getattr(cb, name) for name in names])))
    assert seen == [[0.0, False, None, 0, 0, 0.0]]


def test_a_learner_knows_whether_its_last_fit_has_come_to_its_end():
    learn, seen = Case().learner(30), []
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2)
    assert not learn._is_done
    learn.resume()
    assert learn._is_done
    learn.fit(1, cbs=Callback(before_fit=lambda cb: seen.append(cb.learn._is_done)))
    assert seen == [False] and learn._is_done
    with pytest.raises(ValueError, match="mine"):
        learn.fit(1, cbs=raise_at("before_epoch", ValueError("mine")))
    assert not learn._is_done


def test_a_trial_trains_with_its_rate_and_is_undone_after_what_comes_then():
    learn, sizes, seen = Case().learner(), [], []
    before = weights(learn)
    heard = Heard(["before_epoch", "before_train", "before_validate"])
    batches = Callback(after_batch=lambda cb: sizes.append(len(cb.x)))
    call = FitCall(None, lr=0.5, n_step=6, cbs=[heard, batches]).checked(learn)
    then = lambda: seen.append((learn.epoch, learn.opt_iter, weights(learn).equal(before)))  # noqa: E731
    kept = run_trial(learn, "lr_find", call, then=then)
    assert heard.events == ["before_epoch", "before_train"] and seen == [(0, 6, False)]
    assert sizes == [6, 6, 6, 2, 6, 6] and kept.rates == [0.5] * 6 and len(kept) == 6
    assert weights(learn).equal(before) and learn.opt_iter == 0


def test_a_trial_may_train_on_another_loader():
    learn, sizes = Case().learner(), []
    call = FitCall(None, n_step=3, cbs=Callback(after_batch=lambda cb: sizes.append(len(cb.x))))
    run_trial(learn, "lr_find", call.checked(learn), TensorLoader(X, Y, bs=15))
    assert sizes == [15, 5, 15]


def test_a_trial_steps_with_the_optimizer_that_is_there():
    learn, seen = Case().learner(), []
    learn.create_opt()
    opt, call = learn.opt, FitCall(None, n_step=1, cbs=Callback(before_step=lambda cb: seen.append(cb.opt)))
    run_trial(learn, "lr_find", call)
    assert len(seen) == 1 and seen[0] is learn.opt is opt


def test_a_trial_of_a_learner_without_an_optimizer_leaves_a_fresh_one():
    learn, fresh = Case().learner(), Case().learner()
    fresh.create_opt()
    run_trial(learn, "lr_find", FitCall(None, lr=0.5, n_step=2).checked(learn))
    assert repr(learn.opt.state_dict()) == repr(fresh.opt.state_dict())


def test_what_waits_for_a_boundary_in_a_validation_waits_for_its_end():
    heard = []
    asks = Callback(
        before_validate=lambda cb: cb.learn.at_boundary(lambda: heard.append("acted")),
        after_validate=lambda cb: heard.append("after_validate"),
        after_epoch=lambda cb: heard.append("after_epoch"),
    )
    Case(cbs=lambda: [asks]).run()
    assert heard == ["after_validate", "after_epoch", "acted"] * 2


def test_what_is_asked_for_before_a_training_phase_waits_for_its_first_batch():
    heard = []
    asks = Callback(
        before_train=lambda cb: cb.learn.at_boundary(lambda: heard.append("acted")),
        after_batch=lambda cb: heard.append("after_batch") if cb.training and cb.iter < 2 else None,
    )
    Case(cbs=lambda: [asks], fit=lambda learn: learn.fit(1)).run()
    assert heard == ["after_batch", "acted", "after_batch"]


def test_outside_of_a_training_phase_a_state_stands_before_batch_0():
    learn = Case().learner()
    learn.create_opt()
    before = learn.state_dict()["position"]
    assert before == {"stage": "fit", "epoch": 0, "batches": 0, "pass": 0, "taken": 0, "loader": None}
    learn.fit(1)
    assert learn.state_dict()["position"] == {**before, "epoch": 1}


def test_in_a_training_phase_a_state_tells_the_place_of_a_loader_that_knows_it():
    class Knows(Foreign):
        def __iter__(self):
            for self.n, batch in enumerate(super().__iter__(), 1):
                yield batch

        def state_dict(self):
            return {"n": self.n}

        def load_state_dict(self, state):
            raise AssertionError("nothing is resumed here")

    learn, seen = Case(lambda: DataLoaders(Knows(), Knows())).learner(), []
    cb = Callback(after_batch=lambda cb: seen.append(cb.learn.state_dict()["position"]["loader"]))
    learn.fit(1, cbs=cb)
    assert seen == [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}, None, None, None, None]


def test_a_dry_run_of_updates_goes_over_its_loader_as_often_as_it_must():
    learn, seen = Case(lambda: DataLoaders(TensorLoader(X, Y, bs=10), TensorLoader(X, Y, bs=20))).learner(), []
    cb = Callback(after_batch=lambda cb: seen.append((cb.training, len(cb.x), cb.pct_train)))
    run_dry(learn, FitCall(None, n_step=3, cbs=cb).checked(learn), n_batch=5, reassemble=lambda: None)
    assert seen == [(True, 10, 1 / 3), (True, 10, 2 / 3), (True, 10, 1.0), (False, 20, 1.0)]
    assert learn.opt_iter == 0


@pytest.mark.parametrize(
    ("n_epoch", "start_epoch", "first", "epochs"),
    [(5, 1, 1, [1, 4]), (1, 0, 0, [0]), (2, 2, 1, []), (2, 4, 1, []), (1, 1, 0, []), (0, 0, 0, [])],
)
def test_a_dry_run_sees_the_first_and_the_last_of_the_epochs_that_there_are(n_epoch, start_epoch, first, epochs):
    learn, begun, seen = Case().learner(), [], []
    cb = Callback(before_fit=lambda cb: begun.append(cb.epoch), before_epoch=lambda cb: seen.append(cb.epoch))
    call = FitCall(n_epoch, start_epoch=start_epoch, cbs=cb)
    run_dry(learn, call.checked(learn), n_batch=1, reassemble=lambda: None)
    assert seen == epochs and begun == [first]


def test_a_dry_run_sees_the_rates_of_its_call():
    learn, seen = Case().learner(), []
    learn.create_opt()
    cb = Callback(before_batch=lambda cb: seen.append(cb.opt.hypers[-1]["lr"]))
    run_dry(learn, FitCall(1, lr=0.5, cbs=cb).checked(learn), n_batch=2, reassemble=lambda: None)
    assert seen == [0.5] * 4
    assert learn.opt.hypers[-1]["lr"] != 0.5


def test_a_dry_run_refuses_a_state_that_no_fit_could_keep():
    class Unkept(Callback):
        _stateattrs = ("kept",)

        def before_fit(self):
            self.kept = {1, 2}

    learn, heard = Case().learner(), Heard(["before_epoch"])
    learn.create_opt()
    with pytest.raises(TypeError, match=r"`Unkept\.kept` is a set"):
        run_dry(learn, FitCall(1, cbs=[heard, Unkept()]).checked(learn), n_batch=1, reassemble=lambda: None)
    assert heard.events == []


def test_ctrl_c_while_a_keyed_loader_reads_stops_before_that_batch_whatever_loader_validates():
    class Presses(Noisy):
        read = 0

        def __getitem__(self, i):
            self.read += 1
            if self.read == len(X) + 7:  # the second batch of the second epoch
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(i)

    learn = Case(lambda: DataLoaders(DataLoader(Presses(), 6), Foreign())).learner()
    with pytest.raises(KeyboardInterrupt, match="before batch 1 of epoch 1"):
        learn.fit(2)


def test_a_learner_that_was_not_stopped_has_nothing_to_resume():
    with pytest.raises(RuntimeError, match="nothing to resume"):
        Case().learner().resume()


def test_a_fit_that_has_ended_cannot_be_resumed():
    learn = Case().run(30)
    with pytest.raises(RuntimeError, match="nothing to resume"):
        learn.resume()


def test_a_new_fit_forgets_where_the_last_one_was_stopped():
    learn = Case().learner(30)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2)
    learn.fit(1)
    with pytest.raises(RuntimeError, match="nothing to resume"):
        learn.resume()


def test_resume_brings_back_the_callbacks_that_came_for_the_fit():
    extra = Counting()
    learn = Case(fit=lambda learn: learn.fit(2, cbs=extra)).run(40)
    assert extra.total == 2 * (4 + 2)
    assert extra not in learn.cbs


def test_a_resume_that_does_not_fit_can_be_tried_again():
    learn = Case().learner(40)
    extra = Counting()
    with learn.added_cbs(extra), pytest.raises(KeyboardInterrupt):
        learn.fit(2)
    with pytest.raises(ValueError, match="callback Counting has a saved state but is not on the learner: add it"):
        learn.resume()
    learn.add_cb(extra)
    learn.resume()
    assert extra.total == 2 * (4 + 2)


def test_a_resume_undoes_what_was_changed_between():
    case = Case()
    learn = case.learner(40)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2)
    for p in learn.model.parameters():
        p.data.zero_()
    learn.opt.set_hyper("lr", 5.0)
    torch.manual_seed(99)
    learn.resume()
    assert outcome(learn) == outcome(case.run())


def test_a_stop_in_a_validation_begins_it_again():
    learn = Case().learner()
    losses = []
    learn.add_cb(Callback(after_batch=lambda cb: None if cb.training else losses.append(float(cb.loss))))
    stop = Callback(after_batch=lambda cb: cb.training or cb.interrupted or signal.raise_signal(signal.SIGINT))
    with learn.added_cbs(stop), pytest.raises(KeyboardInterrupt):
        learn.fit(1)
    learn.resume()
    assert losses == [losses[0], losses[0], losses[2]]


# Through a file, into another learner


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stopped_at(case, stop):
    learn = case.learner(stop)
    with pytest.raises(KeyboardInterrupt):
        case.fit(learn)
    return learn


@pytest.mark.parametrize("name", ["torch loaders", "steps", "foreign loader", "accumulation"])
def test_another_learner_goes_on_from_the_state_of_a_stop(name):
    case = CASES[name]
    whole = outcome(case.run())
    for stop in all_stops(case)[::11]:
        state = through_a_file(stopped_at(case, stop).state_dict())
        other = case.learner()
        torch.manual_seed(1234)
        other.load_state_dict(state)
        other.resume()
        assert outcome(other) == whole, f"stopped at event {stop}"


def test_a_call_that_repeats_one_of_another_process_must_be_the_same():
    state, other = stopped_at(Case(), 50).state_dict(), Case().learner()
    with pytest.raises(ValueError, match="another fit: `n_epoch=2` then and `n_epoch=3` now"):
        run_fit(other, FitCall(3, repeats=True).checked(other), state)
    run_fit(other, FitCall(2, repeats=True).checked(other), state)
    assert other.train_iter == 2 * 4


def test_a_state_that_was_loaded_is_given_on_as_it_is():
    state = stopped_at(CASES["torch loaders"], 50).state_dict()
    other = CASES["torch loaders"].learner()
    other.load_state_dict(state)
    assert repr(other.state_dict()) == repr(state)


def test_the_state_of_a_learner_whose_weights_were_changed_after_a_stop_has_the_changed_weights():
    learn = stopped_at(Case(), 50)
    with torch.no_grad():
        learn.model[0].bias.fill_(7.0)
    assert learn.state_dict()["model"]["0.bias"].tolist() == [7.0] * 8


def test_a_plain_fit_after_loading_starts_at_batch_0():
    state = stopped_at(Case(), 60).state_dict()
    other = Case().learner()
    other.load_state_dict(state)
    batches = []
    other.add_cb(Callback(before_batch=lambda cb: batches.append((cb.epoch, cb.iter)) if cb.training else None))
    other.fit(1)
    assert batches == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert other.train_iter == 4


def test_loading_forgets_the_callbacks_of_an_earlier_fit():
    state = stopped_at(Case(), 60).state_dict()
    other = Case(fit=lambda learn: learn.fit(1, cbs=extra)).learner()
    extra = Counting()
    other.fit(1, cbs=extra)
    other.load_state_dict(state)
    extra.total = 0
    other.resume()
    assert extra.total == 0


def test_the_state_of_a_learner_that_was_never_fitted_is_nothing_to_resume():
    state = Case().learner().state_dict()
    other = Case().learner()
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="nothing to resume"):
        other.resume()
    assert (other.n_epoch, other.train_iter) == (1, 0)


def test_a_state_taken_in_after_epoch_goes_on_without_a_row_twice():
    states = []
    case = Case(torch_loaders)
    learn = case.learner()
    learn.add_cb(Callback(after_epoch=lambda cb: states.append(cb.learn.state_dict())))
    learn.fit(2)
    other = case.learner()
    other.load_state_dict(states[0])
    other.resume()
    whole = case.run()
    assert list(map(list, other.recorder.values)) == list(map(list, whole.recorder.values))
    assert outcome(other)["weights"] == outcome(whole)["weights"]
