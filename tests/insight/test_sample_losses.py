"""SampleLosses: which sample had which loss. Compared with losses that torch gives sample by sample."""

import matplotlib
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Sampler, TensorDataset

import learnloop as ll
from learnloop.testing import check_callback, toy_learner
from tests.resuming import assert_resumes_exactly

matplotlib.use("Agg")

import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


N = 20


def data():
    x = torch.linspace(-1, 1, 2 * N).view(N, 2)
    return x, x.sum(1, keepdim=True) ** 2


def learner(train, *cbs, lr=0.0, **kwargs):
    """With a rate of 0 the losses of an epoch are those of the model as it is."""
    torch.manual_seed(0)
    dls = ll.DataLoaders(train, device="cpu")
    learn = toy_learner(model=nn.Linear(2, 1), cbs=list(cbs), lr=lr, **kwargs)
    learn.dls = dls
    return learn


def of_each(learn):
    x, y = data()
    with torch.no_grad():
        return F.mse_loss(learn.model(x), y, reduction="none").flatten()


def train_loader(kind):
    x, y = data()
    if kind == "ours":
        return ll.TensorLoader(x, y, bs=6, shuffle=True)
    if kind == "ours, in order":
        return ll.TensorLoader(x, y, bs=6)
    if kind == "torch":
        return DataLoader(TensorDataset(x, y), 6, shuffle=True)
    if kind == "torch, with a generator":
        return DataLoader(TensorDataset(x, y), 6, shuffle=True, generator=torch.Generator().manual_seed(3))
    return [(x[i : i + 6], y[i : i + 6]) for i in range(0, N, 6)]


@pytest.mark.parametrize("kind", ["ours", "ours, in order", "torch", "torch, with a generator", "a list"])
def test_every_sample_has_its_own_loss_in_every_epoch(kind):
    learn = learner(train_loader(kind), losses := ll.SampleLosses())
    learn.fit(3)
    assert losses.epochs == [0, 1, 2]
    torch.testing.assert_close(losses.losses, of_each(learn).expand(3, N))


def test_losses_are_those_of_the_model_as_it_was_at_that_batch():
    x, y = data()
    learn = learner(ll.TensorLoader(x, y, bs=5), losses := ll.SampleLosses(), lr=0.1)
    found = []
    learn.add_cb(ll.Callback(after_pred=lambda cb: found.append(F.mse_loss(cb.pred.detach(), cb.y, reduction="none"))))
    learn.fit(1)
    assert losses.losses[0].tolist() == torch.cat(found).flatten().tolist()


def test_a_sample_that_did_not_come_has_none():
    x, y = data()
    learn = learner(ll.TensorLoader(x, y, bs=6, drop_last=True), losses := ll.SampleLosses())
    learn.fit(1)
    assert losses.losses.shape == (1, 18)
    shuffled = learner(ll.TensorLoader(x, y, bs=6, drop_last=True, shuffle=True), losses := ll.SampleLosses())
    shuffled.fit(1)
    assert losses.losses.isfinite().sum() == 18


def test_samples_drawn_by_weight_may_come_several_times():
    weights = torch.zeros(N)
    weights[[3, 7]] = 1.0
    learn = learner(train_loader("ours"), losses := ll.SampleLosses(), ll.WeightedSampling(weights))
    learn.fit(1)
    seen = losses.losses[0].isfinite().nonzero().flatten().tolist()
    assert seen == [3, 7]
    torch.testing.assert_close(losses.losses[0][[3, 7]], of_each(learn)[[3, 7]])


def test_counted_by_steps_the_numbers_are_right_too():
    learn = learner(train_loader("torch"), losses := ll.SampleLosses())
    learn.fit(n_step=7, valid_every=3)
    assert losses.epochs == [0, 1, 2]
    for row in losses.losses:
        seen = row.isfinite()
        torch.testing.assert_close(row[seen], of_each(learn)[seen])


def test_a_cancelled_batch_counts_if_its_loss_was_there():
    def cancel(cb):
        if cb.learn.train_iter == 0:
            raise ll.CancelBatchException

    learn = learner(train_loader("ours, in order"), losses := ll.SampleLosses(), ll.Callback(before_batch=cancel))
    learn.fit(1)
    assert losses.losses[0].isfinite().tolist() == [False] * 6 + [True] * 14


class Odd(Sampler):
    def __init__(self):
        self.n = 0

    def __iter__(self):
        self.n += 1
        return iter(range(N) if self.n % 2 else range(N - 1, -1, -1))

    def __len__(self):
        return N


@pytest.mark.parametrize(
    "loader",
    [
        lambda ds: DataLoader(ds, 6, sampler=Odd()),
        lambda ds: DataLoader(ds, batch_sampler=type("Own", (BatchSampler,), {})(Odd(), 6, False)),
        lambda ds: type("Stream", (), {"__iter__": lambda self: iter([ds[:]])})(),
    ],
)
def test_a_loader_that_does_not_tell_is_an_error_that_says_what_to_do(loader):
    learn = learner(loader(TensorDataset(*data())), ll.SampleLosses())
    with pytest.raises(ValueError, match=r"does not tell\. Pass a function that does"):
        learn.fit(1)


def test_loaders_left_as_they_are_do_not_tell():
    learn = learner(train_loader("torch"), ll.SampleLosses())
    learn.dls = ll.DataLoaders(train_loader("torch"), keyed=False, device="cpu")
    with pytest.raises(ValueError, match="does not tell"):
        learn.fit(1)


def test_a_function_may_tell():
    x, y = data()
    numbers = torch.arange(N)
    dl = DataLoader(TensorDataset(x, numbers, y), 6, sampler=Odd())
    learn = learner(dl, losses := ll.SampleLosses(indices=lambda cb: cb.xb[1]))
    learn.add_cb(ll.Callback(before_batch=lambda cb: None))
    learn.model = type("First", (nn.Linear,), {"forward": lambda self, x, i: nn.Linear.forward(self, x)})(2, 1)
    learn.fit(2)
    with torch.no_grad():
        expected = F.mse_loss(learn.model(x, None), y, reduction="none").flatten()
    torch.testing.assert_close(losses.losses, expected.expand(2, N))


def test_a_batch_of_another_size_is_an_error():
    def half(cb):
        cb.learn.xb, cb.learn.yb = (cb.x[:3],), (cb.y[:3],)

    learn = learner(train_loader("ours"), ll.SampleLosses(), ll.Callback(before_batch=half))
    with pytest.raises(ValueError, match="the batch has 3 samples, and 6 numbers came for it"):
        learn.fit(1)


def test_a_loss_of_the_models_own_is_none_per_sample():
    learn = learner(train_loader("ours"), ll.SampleLosses(), loss_func=None)
    with pytest.raises(ValueError, match="the model reduces its own"):
        learn.fit(1)


def test_mixed_samples_have_no_loss_of_their_own():
    x, y = torch.rand(8, 2), torch.arange(8) % 2
    learn = learner(ll.TensorLoader(x, y, bs=4), ll.SampleLosses(), ll.MixUp())
    learn.model, learn.loss_func = nn.Linear(2, 2), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"\[MixUp\] mixes samples, which then have no loss of their own"):
        learn.fit(1)
    assert learn.iter is None  # before the first batch


# Suspicious ones


def test_wrong_labels_are_the_most_suspicious():
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    y = (x[:, 0] > 0).long()
    wrong = [11, 42, 77, 130]
    y[wrong] = 1 - y[wrong]
    x[wrong, 0] = x[wrong, 0].sign() * 3
    dls = ll.DataLoaders(ll.TensorLoader(x, y, bs=20, shuffle=True), device="cpu")
    learn = toy_learner(model=nn.Linear(2, 2), loss_func=nn.CrossEntropyLoss(), cbs=[losses := ll.SampleLosses()])
    learn.dls = dls
    learn.fit(5)
    scores, idxs = losses.suspicious(4)
    assert sorted(idxs.tolist()) == wrong
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    titles = [ax.get_title().split("\n")[0] for ax in losses.plot_suspicious(4).axes]
    assert titles == [f"{i}: {y[i]}" for i in idxs.tolist()]


def test_a_score_is_the_mean_distance_from_the_means_of_the_epochs():
    losses = ll.SampleLosses()
    nan = torch.nan
    losses._rows = [torch.tensor([1.0, 3.0]), torch.tensor([nan, 1.0, 2.0])]
    scores, idxs = losses.suspicious()
    assert idxs.tolist() == [2, 1, 0]
    assert scores.tolist() == [0.5, 0.25, -1.0]


def test_before_a_training_there_is_nothing_to_suspect():
    with pytest.raises(RuntimeError, match="no loss was seen yet"):
        ll.SampleLosses().suspicious()
    with pytest.raises(RuntimeError, match="on no learner any more"):
        ll.SampleLosses().plot_suspicious()


# Promises


def test_it_keeps_the_promises_of_callbacks():
    check_callback(ll.SampleLosses)


def test_a_resumed_fit_has_all_losses():
    assert_resumes_exactly(lambda: toy_learner(cbs=ll.SampleLosses()), every=5)


def noisy(pred, y, reduction="mean"):
    loss = (pred - y) ** 2 + torch.rand(len(pred), 1)
    return loss.mean() if reduction == "mean" else loss


@pytest.mark.parametrize("loss_func", [nn.MSELoss(), noisy])
def test_it_only_reads_even_where_the_loss_draws_random_numbers(loss_func):
    assert ll.SampleLosses.reads_only
    found = []
    for cbs in ([], [ll.SampleLosses()]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        learn = toy_learner(model=model, cbs=cbs, loss_func=loss_func)
        learn.fit(2)
        found.append(([t.tolist() for t in model.state_dict().values()], torch.get_rng_state().tolist()))
    assert found[0] == found[1]
