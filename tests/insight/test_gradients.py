"""GradientStats: norms and ratios, compared with those taken by hand."""

import math

import matplotlib
import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.testing import check_callback, toy_learner
from tests.resuming import assert_resumes_exactly

matplotlib.use("Agg")

import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


class ByHand(ll.Callback):
    """Norms of gradients and of updates of every layer, from plain torch."""

    order = 95
    found = ()

    def before_fit(self):
        self.found = []

    def before_step(self):
        layers = [m for m in self.model.modules() if len(list(m.parameters(recurse=False)))]
        self.layers = layers
        self.gradients = [flat(p.grad for p in m.parameters()).norm().item() for m in layers]
        self.weights = [flat(m.parameters()).clone() for m in layers]

    def after_step(self):
        moved = [flat(m.parameters()) - w for m, w in zip(self.layers, self.weights, strict=True)]
        ratios = [(d.norm() / w.norm()).item() for d, w in zip(moved, self.weights, strict=True)]
        self.found.append((self.gradients, ratios))


@pytest.mark.parametrize("cbs", [[], [ll.GradientClip]])
@pytest.mark.parametrize("opt_func", [ll.SGD, ll.Adam, torch.optim.AdamW])
def test_norms_and_ratios_are_those_taken_by_hand(opt_func, cbs):
    learn = toy_learner(cbs=[stats := ll.GradientStats(), by_hand := ByHand(), *cbs], opt_func=opt_func, lr=0.01)
    learn.fit(1)
    assert stats.names == ["0", "2"]
    assert stats.iters == [0, 1, 2, 3]
    for i, name in enumerate(stats.names):
        assert stats.norms[name] == pytest.approx([gradients[i] for gradients, _ in by_hand.found], rel=1e-5)
        assert stats.ratios[name] == pytest.approx([ratios[i] for _, ratios in by_hand.found], rel=1e-4)


def test_with_plain_descent_the_ratio_is_the_rate_times_the_gradient_by_the_weights():
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    learn = toy_learner(model=model, cbs=[stats := ll.GradientStats()], lr=0.5)
    learn.fit(n_step=1)
    (name,) = stats.names
    assert name == "Linear"
    assert stats.ratios[name] == pytest.approx([0.5 * stats.norms[name][0] / math.sqrt(18)])


def test_every_counts_updates():
    learn = toy_learner(cbs=[stats := ll.GradientStats(every=3)])
    learn.fit(2)
    assert stats.iters == [0, 3, 6]


def test_accumulated_gradients_count_once_per_update():
    learn = toy_learner(cbs=[stats := ll.GradientStats(), ll.GradientAccumulation(16)])
    learn.fit(1)
    assert stats.iters == [0, 1]


def test_a_cancelled_step_counts_for_nothing():
    def cancel(cb):
        if cb.learn.train_iter == 1:
            raise ll.CancelStepException

    cancels = ll.Callback(before_step=cancel)
    cancels.order = 100
    learn = toy_learner(cbs=[stats := ll.GradientStats(), cancels])
    learn.fit(1)
    assert stats.iters == [0, 1, 2]


def test_a_frozen_layer_has_no_numbers():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    learn = toy_learner(model=model, cbs=[stats := ll.GradientStats()])
    learn.fit(n_step=1)
    assert math.isnan(stats.norms["0"][0]) and math.isnan(stats.ratios["0"][0])
    assert stats.norms["1"][0] > 0


def test_gradients_that_are_infinite_or_no_number_are_seen():
    def spoil(cb):
        cb.model[0].bias.grad[0] = math.inf if cb.learn.opt_iter == 0 else math.nan

    learn = toy_learner(cbs=[stats := ll.GradientStats(), ll.Callback(before_step=spoil)])
    learn.fit(n_step=2)
    first, second = stats.norms["0"]
    assert math.isinf(first) and math.isnan(second)


def test_shared_weights_belong_to_the_first_layer_that_has_them():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    learn = toy_learner(model=model, cbs=[stats := ll.GradientStats()])
    learn.fit(n_step=1)
    assert stats.names == ["0", "2"]


def test_before_the_first_update_there_is_nothing_to_plot():
    assert (ll.GradientStats().norms, ll.GradientStats().ratios) == ({}, {})
    with pytest.raises(RuntimeError, match="no update was measured yet"):
        ll.GradientStats().plot()


def test_the_plot_shows_norms_and_ratios_of_every_layer():
    learn = toy_learner(cbs=[stats := ll.GradientStats()])
    learn.fit(1)
    norms, ratios = stats.plot().axes
    assert [list(line.get_ydata()) for line in norms.lines] == list(stats.norms.values())
    assert [list(line.get_ydata()) for line in ratios.lines[:2]] == list(stats.ratios.values())
    assert [ax.get_yscale() for ax in (norms, ratios)] == ["log", "log"]
    assert [t.get_text() for t in ratios.get_legend().get_texts()] == ["0", "2"]


@pytest.mark.parametrize("every", [0, True, 1.5])
def test_every_is_a_positive_whole_number(every):
    with pytest.raises(ValueError, match="pass a whole number of updates, 1 or more"):
        ll.GradientStats(every)


def test_it_keeps_the_promises_of_callbacks():
    check_callback(ll.GradientStats)


def test_a_resumed_fit_has_all_numbers():
    assert_resumes_exactly(lambda: toy_learner(cbs=ll.GradientStats(every=2)), every=5)


def test_it_only_reads():
    assert ll.GradientStats.reads_only
    found = []
    for cbs in ([], [ll.GradientStats()]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        learn = toy_learner(model=model, cbs=cbs, opt_func=ll.Adam)
        learn.fit(2)
        found.append(([t.tolist() for t in model.state_dict().values()], torch.get_rng_state().tolist()))
    assert found[0] == found[1]
