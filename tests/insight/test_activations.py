"""HookCallback and ActivationStats. Numbers of statistics are compared with fastai 2.8.12, or with torch by hand."""

import matplotlib
import pytest
import torch
from fastcore.basics import noop
from torch import nn

import learnloop as ll
from learnloop.testing import check_callback
from tests.resuming import assert_resumes_exactly

matplotlib.use("Agg")

import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))


def learner(*cbs, model=None):
    """Four training batches of 8 points, two of validation, in their order."""
    x = torch.linspace(-1, 1, 64).view(32, 2)
    y = x.sum(1, keepdim=True) * 2
    dls = ll.DataLoaders(ll.TensorLoader(x, y, bs=8), ll.TensorLoader(x[:16], y[:16], bs=8), device="cpu")
    cbs = [ll.TrainEvalCallback(), ll.Recorder(), *cbs]
    learn = ll.Learner(
        dls, network() if model is None else model, nn.MSELoss(), ll.SGD, lr=0.1, cbs=cbs, default_cbs=False
    )
    learn.logger = noop
    return learn


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


class Noting(ll.HookCallback):
    """Notes for each call the batch, the phase and the module."""

    heard = ()

    def before_fit(self):
        self.heard = []
        super().before_fit()

    def hook(self, m, i, o):
        self.heard.append((self.learn.train_iter, self.learn.training, type(m).__name__))


# HookCallback


def test_the_hook_is_called_for_each_module_with_parameters_in_every_batch():
    learn = learner(heard := Noting())
    learn.fit(1)
    assert heard.heard[:4] == [(0, True, "Linear"), (0, True, "Linear"), (1, True, "Linear"), (1, True, "Linear")]
    assert len(heard.heard) == 2 * (4 + 2)


def test_every_hooks_the_batches_that_it_names_and_no_other():
    """fastai's `every=n` hooks every batch: its hooks are never taken off, since `train_iter` has moved by then."""
    learn = learner(heard := Noting(every=3))
    counts = []
    learn.add_cb(ll.Callback(after_loss=lambda cb: counts.append((cb.training, n_hooks(cb.model)))))
    learn.fit(2)
    assert [batch for batch, _, _ in heard.heard] == [0, 0, 3, 3, 6, 6]
    train = [n for training, n in counts if training]
    assert train == [2, 0, 0, 2, 0, 0, 2, 0]
    assert [n for training, n in counts if not training] == [0, 0, 0, 0]


def test_after_the_fit_no_hook_is_left_unless_it_is_told_to():
    learn = learner(ll.HookCallback())
    learn.fit(1)
    assert n_hooks(learn.model) == 0
    stays = learner(cb := ll.HookCallback(remove_end=False))
    stays.fit(1)
    stays.fit(1)
    assert n_hooks(stays.model) == 2
    cb.hooks.remove()
    assert n_hooks(stays.model) == 0


@pytest.mark.parametrize("every", [None, 2])
def test_an_error_in_a_batch_leaves_no_hook(every):
    def fail(cb):
        raise ZeroDivisionError

    learn = learner(ll.HookCallback(every=every), ll.Callback(after_loss=fail))
    with pytest.raises(ZeroDivisionError):
        learn.fit(1)
    assert n_hooks(learn.model) == 0


def test_without_parameters_a_module_is_hooked_if_asked_for():
    learn = learner(heard := Noting(include_paramless=True))
    learn.fit(1)
    assert [kind for _, _, kind in heard.heard[:3]] == ["Linear", "ReLU", "Linear"]


def test_modules_may_be_one_or_several_of_the_model():
    model = network()
    for modules, kinds in ((model[1], ["ReLU"]), ([model[2], model[1]], ["ReLU", "Linear"])):
        learn = learner(heard := Noting(modules), model=model)
        learn.fit(1)
        assert [kind for batch, training, kind in heard.heard if training and batch == 0] == kinds


def test_a_function_may_stand_for_the_method():
    learn = learner(cb := ll.HookCallback(hook=lambda m, i, o: tuple(o.shape)))
    learn.fit(1)
    assert list(cb.hooks.stored) == [(8, 4), (8, 1)]


def test_backward_hooks_get_gradients():
    learn = learner(cb := ll.HookCallback(is_forward=False, hook=lambda m, i, o: o[0].shape))
    learn.fit(1)
    assert list(cb.hooks.stored) == [(8, 4), (8, 1)]


def test_another_model_is_hooked_in_the_next_fit():
    learn = learner(heard := Noting())
    learn.fit(1)
    learn.model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Flatten(), nn.Linear(2, 1))
    learn.add_cb(ll.Callback(before_batch=lambda cb: setattr(cb.learn, "xb", (cb.x[:, None],))))
    learn.fit(1, reset_opt=True)
    assert [kind for _, _, kind in heard.heard[:2]] == ["Conv1d", "Linear"]


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_is_a_positive_whole_number(every):
    with pytest.raises(ValueError, match="pass a whole number of batches, 1 or more, or None for all"):
        ll.HookCallback(every=every)


@pytest.mark.parametrize("kwargs", [{}, {"every": 2}, {"is_forward": False}])
def test_hook_callbacks_keep_the_promises_of_callbacks(kwargs):
    check_callback(lambda: ll.HookCallback(**kwargs))


# ActivationStats


def test_the_numbers_are_those_of_fastai():
    """`ActivationStats(with_hist=True)` of fastai 2.8.12 on the same network, data and rate, without shuffling."""
    learn = learner(stats := ll.ActivationStats(with_hist=True))
    learn.fit(1)
    mean, std, near_zero = stats.layer_stats(1)
    assert list(mean) == pytest.approx(FASTAI["mean"], rel=1e-4)
    assert list(std) == pytest.approx(FASTAI["std"], rel=1e-4)
    assert list(near_zero) == FASTAI["near_zero"]
    assert stats.hist(0)[:12].expm1().round().int().tolist() == FASTAI["hist"]
    assert stats.hist(0).shape == (40, 4)
    assert list(map(list, stats.layer_stats("2"))) == list(map(list, stats.layer_stats(-1)))


def test_stats_have_an_entry_per_batch_and_a_dict_per_layer():
    learn = learner(stats := ll.ActivationStats())
    learn.fit(2)
    assert (len(stats.stats), len(stats.stats[0])) == (8, 2)
    assert list(stats.stats[0][0]) == ["mean", "std", "near_zero"]
    assert stats.names == ["0", "2"]
    assert stats.iters == [0, 1, 2, 3, 4, 5, 6, 7]


def test_every_batch_it_means_is_kept():
    learn = learner(stats := ll.ActivationStats(every=3), every_batch := ll.ActivationStats())
    learn.fit(2)
    assert stats.iters == [0, 3, 6]
    assert list(stats.stats) == [every_batch.stats[i] for i in (0, 3, 6)]


def test_outputs_of_a_recurrent_layer_are_a_list():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x):
            return self.head(self.rnn(x[..., None])[0][:, -1])

    learn = learner(stats := ll.ActivationStats(), model=Last())
    learn.fit(1)
    of_rnn, of_head = stats.stats[0]
    assert (len(of_rnn), [*of_head]) == (3, ["mean", "std", "near_zero"])
    assert list(stats.layer_stats("rnn", output=2)[0]) == [batch[0][2]["mean"] for batch in stats.stats]
    assert list(stats.layer_stats("head")[0]) == [batch[1]["mean"] for batch in stats.stats]


def test_a_layer_that_does_not_run_has_none_and_nan():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = nn.Linear(2, 1), nn.Linear(2, 1), 0

        def forward(self, x):
            self.n += 1
            return self.a(x) + (self.b(x) if self.n % 2 == 0 else 0)

    learn = learner(stats := ll.ActivationStats(), model=Sometimes())
    learn.fit(1)
    assert [batch[1] is None for batch in stats.stats] == [True, False, True, False]
    assert [mean != mean for mean in stats.layer_stats("b")[0]] == [True, False, True, False]


def test_a_cancelled_batch_counts_with_what_ran_in_it():
    def cancel(cb):
        if cb.training and cb.learn.train_iter in (1, 2):
            raise ll.CancelBatchException

    learn = learner(stats := ll.ActivationStats(), ll.Callback(before_batch=cancel))
    learn.fit(1)
    assert stats.iters == [0, 3]


def test_validation_predictions_and_the_finder_leave_the_numbers_alone():
    learn = learner(stats := ll.ActivationStats())
    learn.fit(1)
    before = list(stats.stats)
    learn.validate()
    learn.get_preds()
    learn.lr_find(show_plot=False, num_it=6)
    assert list(stats.stats) == before


def test_a_validation_in_the_middle_of_a_batch_leaves_the_numbers_alone():
    learn, other = learner(stats := ll.ActivationStats()), learner(plain := ll.ActivationStats())
    learn.add_cb(ll.Callback(after_loss=lambda cb: cb.learn.validate() if cb.training else None))
    learn.fit(1)
    other.fit(1)
    assert list(stats.stats) == list(plain.stats)


def test_gradients_can_be_looked_at_too():
    learn = learner(stats := ll.ActivationStats(is_forward=False))
    seen = []
    learn.add_cb(ll.Callback(before_backward=lambda cb: cb.pred.retain_grad()))
    learn.add_cb(ll.Callback(after_backward=lambda cb: seen.append(cb.pred.grad.mean().item())))
    learn.fit(1)
    assert list(stats.layer_stats(1)[0]) == pytest.approx(seen)


def test_one_value_deviates_by_nothing_and_an_empty_output_is_left_out():
    stats = ll.ActivationStats()
    assert [n.item() for n in stats._described(torch.tensor([0.05]))] == pytest.approx([0.05, 0.0, 1.0])
    stats.learn = type("Learn", (), {"training": True})()
    assert stats.hook(None, None, torch.empty(0, 3)) == []


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda s: s.layer_stats("3"), KeyError, "no layer `3` was looked at; there is 0, 2."),
        (lambda s: s.layer_stats(2), IndexError, "there is no layer 2: 2 were looked at"),
        (lambda s: s.hist(0), ValueError, r"ActivationStats\(with_hist=True\)"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_so(ask, error, message):
    learn = learner(stats := ll.ActivationStats())
    learn.fit(1)
    with pytest.raises(error, match=message):
        ask(stats)


def test_before_the_first_batch_there_is_nothing_to_see():
    with pytest.raises(RuntimeError, match="Train first"):
        ll.ActivationStats().layer_stats(0)


def test_plots_show_the_numbers():
    learn = learner(stats := ll.ActivationStats(with_hist=True, every=2))
    learn.fit(2)
    fig = stats.plot_layer_stats(0)
    assert [ax.get_ylabel() for ax in fig.axes] == ["mean", "std", "% near zero"]
    assert list(fig.axes[0].lines[0].get_xdata()) == [0, 2, 4, 6]
    assert list(fig.axes[2].lines[0].get_ydata()) == pytest.approx([100 * v for v in stats.layer_stats(0)[2]])
    assert [len(ax.lines) for ax in stats.plot_layer_stats().axes] == [2, 2, 2]
    (image,) = stats.color_dim(0).images
    assert torch.equal(torch.tensor(image.get_array().data).float(), stats.hist(0))
    assert [ax.get_title() for ax in stats.plot_hist().axes] == ["0", "2"]


def test_stats_keep_the_promises_of_callbacks():
    check_callback(lambda: ll.ActivationStats(with_hist=True))


def test_a_resumed_fit_has_all_statistics():
    assert_resumes_exactly(lambda: learner(ll.ActivationStats(with_hist=True)), every=5)


@pytest.mark.parametrize("make", [lambda: ll.ActivationStats(with_hist=True), lambda: ll.ActivationStats(every=2)])
def test_what_only_reads_says_so_and_leaves_the_training_alone(make):
    assert make().reads_only
    found = []
    for cbs in ([], [make()]):
        model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        learn = learner(*cbs, model=model)
        torch.manual_seed(3)
        for p in model.parameters():
            nn.init.uniform_(p)
        learn.fit(2)
        found.append(([t.tolist() for t in model.state_dict().values()], torch.get_rng_state().tolist()))
    assert found[0] == found[1]


#: Of fastai 2.8.12, as the test that reads them says.
FASTAI = {
    "mean": [-0.14274097979068756, -1.080566167831421, -0.4813006818294525, -0.08180400729179382],
    "std": [0.056772079318761826, 0.20667099952697754, 0.10346371680498123, 0.015715427696704865],
    "near_zero": [1.0, 1.0, 1.0, 1.0],
    "hist": [  # counts of the first layer's lowest 12 bins, a column per batch
        *([0, 0, 13, 9], [0, 1, 1, 5], [0, 3, 0, 0], [4, 3, 0, 0], [3, 1, 0, 0], [1, 0, 0, 0]),
        *([0, 0, 0, 0] for _ in range(6)),
    ],
}


# Wrong uses


@pytest.mark.parametrize("look", ["plot_layer_stats", "plot_hist"])
def test_before_a_fit_there_is_nothing_to_look_at(look):
    with pytest.raises(RuntimeError, match=r"^no batch was looked at yet\. Train first"):
        getattr(ll.ActivationStats(with_hist=True), look)()


@pytest.mark.parametrize(("modules", "shown"), [(3, "3"), ([nn.ReLU(), "body"], "'body'"), ("body", "'body'")])
def test_only_modules_are_hooked(modules, shown):
    with pytest.raises(
        TypeError, match=rf"^`modules` takes torch modules, such as `learn.model\[0\]`, and got {shown}.$"
    ):
        ll.HookCallback(modules=modules)
