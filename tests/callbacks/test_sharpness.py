"""SAM, compared with loops written by hand after the papers' algorithms, and with one big batch."""

import warnings

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.callbacks.sharpness import ascent
from learnloop.testing import EventLog, check_callback, toy_learner
from tests.resuming import assert_resumes_exactly

LR, RHO = 0.1, 0.2


def samples(n=32):
    t = torch.linspace(-1, 1, n)[:, None]
    return torch.cat([t, t**2], 1), 2 * t - t**2 + 0.5


def network(*middle):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 4), *middle, nn.Tanh(), nn.Linear(4, 1))


def batches(sizes=(8, 8, 8, 8)):
    x, y = samples(sum(sizes))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def learner(*cbs, model=None, sizes=(8, 8, 8, 8), opt_func=ll.SGD, loss_func=None):
    dls = ll.DataLoaders(batches(sizes), device="cpu")
    model = network() if model is None else model
    cbs = [ll.TrainEvalCallback(), ll.Recorder(), *cbs]
    learn = ll.Learner(dls, model, loss_func or nn.MSELoss(), opt_func, LR, cbs=cbs, default_cbs=False)
    learn.logger = lambda row: None
    return learn


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def trained(learn, n_epoch=1, seed=0):
    torch.manual_seed(seed)
    learn.fit(n_epoch)
    return weights(learn.model)


def by_hand(windows, adaptive=False, max_norm=None, dtype=None, scale=1.0, rho=RHO):
    """Algorithm 1 of Foret et al., with the norm of Kwon et al. if adaptive; a window is a list of batches."""
    model = network().train()
    params = list(model.parameters())

    def gradient(window):
        n = sum(len(x) for x, _ in window)
        total = [torch.zeros_like(p) for p in params]
        for x, y in window:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = nn.functional.mse_loss(model(x).float(), y)
            for t, g in zip(total, torch.autograd.grad(loss * scale, params), strict=True):
                t += g / scale * len(x) / n
        return total

    for window in windows:
        grads, old = gradient(window), weights(model)
        with torch.no_grad():
            sizes = [w.abs() if adaptive else torch.ones_like(w) for w in old]
            norm = torch.stack([(s * g).norm() for s, g in zip(sizes, grads, strict=True)]).norm()
            for p, s, g in zip(params, sizes, grads, strict=True):
                p += rho * s**2 * g / norm
        second = gradient(window)
        if max_norm is not None:
            norm = torch.stack([g.norm() for g in second]).norm()
            second = [g * min(1.0, max_norm / norm) for g in second]
        with torch.no_grad():
            for p, w, g in zip(params, old, second, strict=True):
                p.copy_(w - LR * g)
    return weights(model)


def assert_close(found, expected, atol=1e-6):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# Numbers


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_trains_as_a_loop_written_by_hand(adaptive):
    found = trained(learner(ll.SAM(RHO, adaptive)))
    assert_close(found, by_hand([[batch] for batch in batches()], adaptive))


def test_the_way_uphill_is_as_long_as_rho():
    weights, grads = [torch.tensor([2.0, -1.0])], [torch.tensor([3.0, 4.0])]
    assert torch.allclose(ascent(weights, grads, 0.5)[0], torch.tensor([0.3, 0.4]))
    assert torch.allclose(ascent(weights, [1000 * grads[0]], 0.5)[0], torch.tensor([0.3, 0.4]))


def test_adaptive_the_way_is_measured_in_sizes_of_the_weights():
    weights, grads = [torch.tensor([2.0, -1.0])], [torch.tensor([4.0, 6.0])]  # |w g| = (8, 6), 10 long
    assert torch.allclose(ascent(weights, grads, 0.5, adaptive=True)[0], torch.tensor([0.8, 0.3]))


def test_a_gradient_of_zero_moves_nothing():
    assert ascent([torch.ones(2)], [torch.zeros(2)], 0.5)[0].tolist() == [0, 0]


def test_clipping_acts_on_the_second_gradient():
    found = trained(learner(ll.GradientClip(0.1), ll.SAM(RHO)))
    assert_close(found, by_hand([[batch] for batch in batches()], max_norm=0.1))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (6, 6, 6, 6, 6)])  # the second: windows of 18 and 12, not of 16
def test_under_accumulation_it_is_that_of_one_big_batch(sizes, adaptive):
    found = trained(learner(ll.SAM(RHO, adaptive), ll.GradientAccumulation(16), sizes=sizes))
    big = (16, 16) if sizes[0] == 8 else (18, 12)
    assert_close(found, by_hand([[batch] for batch in batches(big)], adaptive))


def test_the_whole_window_is_gone_over_where_a_loader_does_not_say_which_batch_is_the_last():
    learn = learner(ll.SAM(RHO), ll.GradientAccumulation(16))
    learn.dls = ll.DataLoaders(Unsized(batches((8, 8, 8))), device="cpu")
    found = trained(learn)  # the last window is stepped in `after_train`
    assert_close(found, by_hand([[b] for b in zip(*(t.split((16, 8)) for t in samples(24)), strict=True)]))


class Unsized:
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_in_bfloat16_it_is_that_of_a_loop_under_autocast():
    found = trained(learner(ll.SAM(RHO), ll.MixedPrecision("bf16")))
    assert_close(found, by_hand([[batch] for batch in batches()], dtype=torch.bfloat16), atol=1e-5)


def test_in_float16_the_scale_of_the_loss_changes_nothing():
    found = trained(learner(ll.SAM(RHO), ll.MixedPrecision("fp16", init_scale=2.0**10)))
    expected = by_hand([[batch] for batch in batches()], dtype=torch.float16, scale=2.0**10)
    assert_close(found, expected, atol=1e-5)


def test_with_mixed_precision_accumulation_and_clipping_at_once():
    cbs = [
        ll.GradientClip(0.5),
        ll.MixedPrecision("fp16", init_scale=2.0**10),
        ll.SAM(RHO),
        ll.GradientAccumulation(16),
    ]
    windows = [batches()[:2], batches()[2:]]
    expected = by_hand(windows, max_norm=0.5, dtype=torch.float16, scale=2.0**10)
    assert_close(trained(learner(*cbs)), expected, atol=1e-4)


def test_a_gradient_that_is_not_finite_is_left_to_mixed_precision():
    mixed = ll.MixedPrecision("fp16", init_scale=2.0**126)
    learn = learner(ll.SAM(RHO), mixed, ll.TerminateOnNaNCallback(), sizes=(8, 8))
    before = weights(learn.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learn.fit(1)
    assert mixed.n_skipped == 2 and learn.train_iter == 2
    assert_close(weights(learn.model), before, atol=0)


# What it leaves alone


def test_with_a_distance_of_zero_nothing_changes_to_the_bit():
    """Masks of dropout, statistics of batch norm, mixtures and windows are those of the first pass."""

    def run(*cbs):
        model = network(nn.BatchNorm1d(4), nn.Dropout(0.5))
        learn = learner(*cbs, ll.MixUp(), ll.GradientAccumulation(16), model=model, opt_func=ll.Adam)
        trained(learn, 2)
        return [*learn.model.state_dict().values(), torch.get_rng_state()], learn.recorder.raw_losses

    (found, losses), (expected, expected_losses) = run(ll.SAM(0.0)), run()
    assert all(map(torch.equal, found, expected))
    assert losses == expected_losses


def test_the_record_and_the_running_statistics_are_those_of_the_first_pass():
    def first_batch(*cbs):
        learn = learner(*cbs, model=network(nn.BatchNorm1d(4)), sizes=(8,))
        trained(learn)
        return learn.recorder.raw_losses, learn.model[1].state_dict()

    (losses, found), (expected_losses, expected) = first_batch(ll.SAM(RHO)), first_batch()
    assert losses == expected_losses
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(found[name], expected[name])


def test_the_second_pass_fires_after_pred_after_loss_and_the_backward_span():
    log = EventLog(cleanups=False, order=-1000)
    learn = learner(log, ll.SAM(RHO), sizes=(8,))
    learn.fit(1)
    start, end = log.events.index("before_batch"), log.events.index("after_batch")
    assert " ".join(log.events[start:end]) == (
        "before_batch after_pred after_loss before_backward after_backward before_step after_step"
    )  # a log only reads, and hears each batch once
    log.events.clear()
    log.reads_only = False
    learn.fit(1)
    start, end = log.events.index("before_batch"), log.events.index("after_batch")
    assert " ".join(log.events[start:end]) == (
        "before_batch after_pred after_loss before_backward after_backward before_step "
        "after_pred after_loss before_backward after_backward after_step"
    )


def test_an_error_in_the_second_pass_leaves_the_weights_where_they_were():
    calls = []

    def loss_func(pred, y):
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("mine")
        return nn.functional.mse_loss(pred, y)

    learn = learner(ll.SAM(RHO), loss_func=loss_func)
    seen = []
    learn.add_cb(ll.Callback(before_batch=lambda cb: seen.append(weights(cb.learn.model))))
    with pytest.raises(ValueError, match="mine"):
        learn.fit(1)
    assert len(seen) == 2
    assert_close(weights(learn.model), seen[1], atol=0)


def test_a_cancel_in_the_second_pass_leaves_the_first_gradient():
    seen = []

    class Cancels(ll.Callback):
        order = 1000

        def after_backward(self):
            seen.append([p.grad.clone() for p in self.learn.model.parameters()])
            if len(seen) == 2:
                raise ll.CancelBatchException

    learn = learner(ll.SAM(RHO), Cancels(), sizes=(8,))
    learn.fit(1)
    assert len(seen) == 2
    assert_close([p.grad for p in learn.model.parameters()], seen[0], atol=0)
    assert_close(weights(learn.model), weights(network()), atol=0)


def test_a_cancelled_backward_pass_is_not_in_the_window():
    def cancel(cb):
        if cb.learn.train_iter == 1:
            raise ll.CancelBackwardException

    learn = learner(ll.Callback(before_backward=cancel), ll.SAM(RHO), ll.GradientAccumulation(24))
    found = trained(learn)
    kept = [batches()[i] for i in (0, 2, 3)]
    assert_close(found, by_hand([kept]))


# As a callback


def test_it_resumes_exactly_inside_a_window():
    def make():
        return toy_learner(model=network(nn.Dropout(0.2)), cbs=[ll.SAM(RHO), ll.GradientAccumulation(24), ll.MixUp()])

    assert_resumes_exactly(make, every=9)


def test_it_keeps_every_promise():
    check_callback(ll.SAM, events=("before_backward", "before_step"))


@pytest.mark.parametrize("rho", [-0.1, float("nan")])
def test_a_distance_that_is_none_is_refused(rho):
    with pytest.raises(ValueError, match="it is a distance; pass 0 or more"):
        ll.SAM(rho)


def test_two_of_them_are_refused():
    with pytest.raises(ValueError, match="would each move the weights"):
        learner(ll.SAM(), ll.SAM()).fit(1)
