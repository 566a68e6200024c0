"""`learn.check()`: it finds planted faults, is silent on what is good, and leaves the learner as it was."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

import learnloop as ll
from learnloop.insight.check import CHECKS
from learnloop.loop.state import capture, same
from learnloop.testing import toy_learner

DIGITS = ll.datasets.digits()


def mlp(*more):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 10), *more)


def cnn():
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def digits(model=None, train=None, valid=None, loss_func=None, shuffle=True, **kwargs):
    """A learner on the digits, or on other data in their place."""
    x, y, x_valid, y_valid = DIGITS
    train, valid = train or (x, y), valid or (x_valid, y_valid)
    torch.manual_seed(0)
    dls = ll.DataLoaders(ll.TensorLoader(*train, bs=64, shuffle=shuffle), ll.TensorLoader(*valid, bs=256), device="cpu")
    return ll.Learner(dls, mlp() if model is None else model(), loss_func or nn.CrossEntropyLoss(), **kwargs)


def regression(model=None, shift=0.0, squeeze=False, loss_func=None):
    """A learner on a linear function of five numbers, with noise, read by torch's own loaders."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=g)
    y = shift + x @ torch.randn(5, 1, generator=g) + 0.1 * torch.randn(600, 1, generator=g)
    train, valid = random_split(TensorDataset(x, y[:, 0] if squeeze else y), [500, 100], generator=g)
    dls = ll.DataLoaders(DataLoader(train, 32, shuffle=True), DataLoader(valid, 50), device="cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 1)) if model is None else model
    return ll.Learner(dls, model, loss_func or nn.MSELoss())


class Net(nn.Module):
    """Two layers with something between them that a subclass changes."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 10)

    def forward(self, x):
        return self.last(self.between(F.relu(self.norm(self.first(x.flatten(1))))))

    def between(self, x):
        return x


class Detached(Net):
    def between(self, x):
        return x.detach()


class DropsAlways(Net):
    def between(self, x):
        return F.dropout(x, 0.3)


class NormalizesOverBatch(Net):
    def between(self, x):
        return (x - x.mean(0)) / (x.std(0) + 1e-3)


class FrozenStatistics(Net):
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


def with_permuted_labels():
    y = DIGITS.y_train[torch.randperm(len(DIGITS.y_train), generator=torch.Generator().manual_seed(1))]
    return digits(train=(DIGITS.x_train, y))


def with_a_leak():
    x, y = torch.cat([DIGITS.x_train, DIGITS.x_valid[:100]]), torch.cat([DIGITS.y_train, DIGITS.y_valid[:100]])
    return digits(train=(x, y))


def unshuffled_and_sorted():
    order = DIGITS.y_train.argsort(stable=True)
    return digits(train=(DIGITS.x_train[order], DIGITS.y_train[order]), shuffle=False)


class Noisy(Dataset):
    """The digits for validation, with noise that augments them."""

    def __len__(self):
        return len(DIGITS.y_valid)

    def __getitem__(self, i):
        return DIGITS.x_valid[i] + 0.1 * torch.randn(1, 8, 8), DIGITS.y_valid[i]


def augmented_in_validation():
    learn = digits()
    learn.dls.loaders[1] = DataLoader(Noisy(), 64)
    return learn


#: A fault that people make -> how the learner is made, and what is found, by check.
PLANTED = {
    "a detached layer": (lambda: digits(Detached), {"gradients": "fault"}),
    "labels permuted against the inputs": (with_permuted_labels, {"learning": "warning"}),
    "batch norm in eval mode while training": (lambda: digits(FrozenStatistics), {"modes": "fault"}),
    "validation samples in the training set": (with_a_leak, {"no leak": "fault"}),
    "sorted training data that nobody shuffles": (unshuffled_and_sorted, {"shuffled": "fault"}),
    "softmax twice": (
        lambda: digits(lambda: mlp(nn.Softmax(1))),
        {"outputs fit the loss": "fault", "one batch": "fault"},
    ),
    "dropout in eval mode": (lambda: digits(DropsAlways), {"evaluation repeats": "fault"}),
    "samples normalised over the batch": (lambda: digits(NormalizesOverBatch), {"samples apart": "fault"}),
    "augmentation of the validation set": (augmented_in_validation, {"evaluation repeats": "fault"}),
    "targets broadcast against predictions": (
        lambda: regression(squeeze=True),
        {"outputs fit the loss": "fault", "one batch": "fault"},
    ),
    "targets far from 0": (lambda: regression(shift=1000.0), {"loss at start": "warning", "one batch": "fault"}),
    "an order that never changes": (lambda: digits(shuffle=False), {"shuffled": "warning"}),
}


@pytest.mark.filterwarnings("ignore:Using a target size")  # torch sees the shapes too
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault):
    make, found = PLANTED[fault]
    report = make().check()
    problems = {name: finding.verdict for name, finding in report.problems.items()}
    assert {name: problems.get(name) for name in found} == found, report
    assert len(problems) <= 3, report  # nothing points elsewhere


GOOD = {"an MLP on digits": digits, "a CNN on digits": lambda: digits(cnn), "a regression": regression}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_set_up_leaves_it_silent(name):
    report = GOOD[name]().check()
    assert report and not report.problems, report
    assert list(report) == list(CHECKS)


def test_a_trained_model_is_good_too():
    learn = digits()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 0.01)
    report = learn.check()
    assert report, report
    assert "has learned already" in report["loss at start"].text


# Nothing stays


def test_weights_optimizer_counters_record_modes_and_random_states_are_as_they_were():
    learn = digits(cnn, metrics=ll.accuracy, cbs=[ll.MixUp(), ll.EMA(), stats := ll.GradientStats()])
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 0.01)
    learn.model[0].eval()
    opt, cbs, names = learn.opt, list(learn.cbs), set(vars(learn))
    before, history, rows = capture(learn), list(learn.recorder.history), list(stats.iters)
    learn.check()
    assert same(capture(learn), before)
    assert learn.opt is opt and list(learn.cbs) == cbs and set(vars(learn)) == names
    assert (learn.recorder.history, stats.iters) == (history, rows)


def test_a_learner_that_has_not_trained_has_no_optimizer_afterwards_either():
    learn = digits()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    learn.check()
    assert learn.opt is None and "final_record" not in vars(learn)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_the_losses_of_the_finder_can_still_be_shown():
    learn = digits()
    with learn.no_bar():
        learn.lr_find(num_it=20, show_plot=False)
    losses = [float(loss) for loss in learn.recorder.losses]
    learn.check(only="gradients")
    assert [float(loss) for loss in learn.recorder.losses] == losses


def test_a_training_after_it_is_the_training_without_it():
    def trained(check):
        learn = digits(cnn)
        if check:
            learn.check()
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

    assert torch.equal(trained(True), trained(False))


def test_an_error_of_the_model_is_kept_and_nothing_stays_of_that_check():
    def fail(x):
        raise ArithmeticError("as planted")

    learn = digits(lambda: mlp(nn.Identity()))
    learn.model[-1].forward = fail
    report = learn.check(only=["gradients", "no leak"])
    assert report["gradients"].verdict == "could not run"
    assert isinstance(report["gradients"].error, ArithmeticError)
    assert report["no leak"].verdict == "ok"
    assert not report and learn.task is None and learn.opt is None


# Other data, other models


class OfKeys(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.number = nn.Linear(64, 10), nn.Linear(1, 10)

    def forward(self, image, number):
        return self.image(image.flatten(1)) + self.number(number)


def keyed_samples(x, y):
    return [{"image": x[i], "number": torch.ones(1), "label": y[i]} for i in range(len(y))]


def test_mapping_batches():
    x, y, x_valid, y_valid = DIGITS
    train, valid = keyed_samples(x[:640], y[:640]), keyed_samples(x_valid, y_valid)
    torch.manual_seed(0)
    dls = ll.DataLoaders(DataLoader(train, 64, shuffle=True), DataLoader(valid, 64), device="cpu")
    report = ll.Learner(dls, OfKeys(), nn.CrossEntropyLoss()).check(skip="loader speed")  # that of plain dicts is low
    assert report, report
    assert report["no leak"].text == "0 of 359 validation inputs are among 640 training inputs."


class OfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, a, b):
        return self.a(a.flatten(1)) + self.b(b.flatten(1))


def test_several_inputs():
    x, y, x_valid, y_valid = DIGITS
    report = digits(OfTwo, train=(x, x.flip(2), y), valid=(x_valid, x_valid.flip(2), y_valid)).check()
    assert report, report


def test_several_labels():
    targets = [F.one_hot(y, 10).float() for y in (DIGITS.y_train, DIGITS.y_valid)]
    kwargs = {"train": (DIGITS.x_train, targets[0]), "valid": (DIGITS.x_valid, targets[1])}
    report = digits(loss_func=nn.BCEWithLogitsLoss(), **kwargs).check()
    assert report, report
    assert report["loss at start"].number == pytest.approx(0.693, abs=0.05)  # log 2
    twice = digits(lambda: mlp(nn.Sigmoid()), loss_func=nn.BCEWithLogitsLoss(), **kwargs).check(
        only="outputs fit the loss"
    )
    assert twice["outputs fit the loss"].verdict == "fault"


def test_a_model_without_parameters():
    learn = toy_learner(model=lambda x: x.sum(1, keepdim=True))
    report = learn.check()
    na = {name for name in report if report[name].verdict == "not applicable"}
    assert {"gradients", "modes", "one batch", "learning", "loader speed", "loss at start"} <= na
    assert {f.verdict for f in report.findings.values()} <= {"ok", "warning", "not applicable"}


def test_without_a_validation_set():
    learn = digits()
    learn.dls.loaders.pop()
    report = learn.check()
    na = {name for name in report if report[name].verdict == "not applicable"}
    assert na == {"evaluation repeats", "no leak", "learning"}


def test_an_iterator_is_not_read():
    batches = iter([(torch.zeros(4, 1), torch.zeros(4, 1))] * 3)
    learn = ll.Learner(ll.DataLoaders(batches, device="cpu"), nn.Linear(1, 1), F.mse_loss)
    assert {f.verdict for f in learn.check().findings.values()} == {"not applicable"}
    assert len(list(batches)) == 3


# Choosing


def test_only_and_skip_name_checks():
    learn = digits()
    assert list(learn.check(only=["no leak", "gradients"])) == ["gradients", "no leak"]
    assert list(learn.check(only="gradients")) == ["gradients"]
    assert "learning" not in learn.check(skip=["learning", "one batch", "no leak"])


def test_an_unknown_check_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no check 'gradient'.* Did you mean 'gradients'\?"):
        digits().check(skip="gradient")


def test_during_a_run_it_is_refused():
    learn = digits(cbs=ll.Callback(before_fit=lambda cb: cb.learn.check()))
    with pytest.raises(RuntimeError, match="`check` was called while a run is active"):
        learn.fit(1)
