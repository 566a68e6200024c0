"""GradientAccumulation and GradientClip.

Numbers are compared with one big batch, with torch's own clipping in a loop written by hand, or with fastai 2.8.12 run
on the same data where a line says so.
"""

import math
import re

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.testing import EventLog, check_callback, toy_learner
from tests.resuming import assert_resumes_exactly


class NoLength:
    """Batches of a loader that does not say how many there are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def line():
    model = nn.Linear(2, 1)
    model.weight.data[:] = torch.tensor([[0.3, -0.2]])
    model.bias.data[:] = 0.1
    return model


def samples(n=32):
    t = torch.linspace(-1, 1, n)[:, None]
    return torch.cat([t, t**2], 1), 2 * t - t**2 + 0.5


def learner(sizes, *cbs, wrap=list, model=None, **kwargs):
    """A line over batches of the given sizes, in order."""
    x, y = samples(sum(sizes))
    dls = ll.DataLoaders(wrap(list(zip(x.split(sizes), y.split(sizes), strict=True))), device="cpu")
    model = line() if model is None else model
    options = {"opt_func": ll.SGD, "lr": 0.1, "default_cbs": False, **kwargs}
    learn = ll.Learner(dls, model, nn.MSELoss(), cbs=[ll.TrainEvalCallback(), ll.Recorder(), *cbs], **options)
    learn.logger = lambda row: None
    return learn


def numbers(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()]).tolist()


def trained(learn, n_epoch=1, **kwargs):
    learn.fit(n_epoch, **kwargs)
    return numbers(learn)


def same(weights):
    return pytest.approx(weights, abs=1e-6, rel=0)


def note(seen, name):
    """A callback that keeps a value of the learner at each step."""
    return ll.Callback(after_step=lambda cb: seen.append(getattr(cb.learn, name)))


# GradientAccumulation


@pytest.mark.parametrize("opt_func", [ll.SGD, ll.Adam])
@pytest.mark.parametrize(
    ("sizes", "n_acc", "windows"),
    [
        ([8] * 4, 16, [16, 16]),  # divides evenly
        ([8] * 4, 8, [8] * 4),  # every batch is a window
        ([8] * 4, 3, [8] * 4),  # and more than one
        ([6] * 5, 16, [18, 12]),  # more than was asked for, and less at the end of the epoch
        ([10, 10, 10, 2], 20, [20, 12]),
        ([3, 7, 1, 5, 8], 10, [10, 14]),  # of different sizes
        ([4] * 3, 100, [12]),  # larger than the data
    ],
)
def test_a_window_is_one_big_batch_of_its_samples(sizes, n_acc, windows, opt_func):
    accumulated = learner(sizes, ll.GradientAccumulation(n_acc), opt_func=opt_func)
    big = learner(windows, opt_func=opt_func)
    assert trained(accumulated, 2) == same(trained(big, 2))
    assert accumulated.opt_iter == big.opt_iter == 2 * len(windows)


def test_where_batches_divide_evenly_the_numbers_are_those_of_fastai():
    learn = learner([8] * 4, ll.GradientAccumulation(16))
    assert trained(learn, 2) == same([0.7705927491188049, -0.22425878047943115, 0.2131708860397339])  # fastai's
    fastai = [2.185830593109131, 1.137316346168518, 1.0354251861572266, 1.2318631410598755]
    assert [float(loss) for loss in learn.recorder.losses[:4]] == pytest.approx(fastai, abs=3e-6)


@pytest.mark.parametrize("sizes", [[6] * 5, [10, 10, 2], [3]])
def test_the_last_window_is_stepped_where_the_loader_does_not_say_which_batch_is_the_last(sizes):
    known, unknown = (learner(sizes, ll.GradientAccumulation(12), wrap=wrap) for wrap in (list, NoLength))
    assert trained(unknown, 2) == trained(known, 2)
    assert unknown.opt_iter == known.opt_iter


def test_the_step_after_the_phase_is_heard_and_counted_like_any_other():
    log = EventLog("opt_iter", "stepped", cleanups=False, order=7)
    learner([4, 4], ll.GradientAccumulation(100), log, wrap=NoLength).fit(1)
    assert log.events[-5:] == [
        *[("before_step", 0, False), ("after_step", 1, True), ("after_train", 1, True)],
        *[("after_epoch", 1, True), ("after_fit", 1, True)],
    ]


def test_a_batch_that_only_gathers_is_cancelled_before_its_step():
    log = EventLog(cleanups=False, order=7)
    learner([4, 4], ll.GradientAccumulation(8), log).fit(1)
    batch = "before_batch after_pred after_loss before_backward after_backward"
    log.check(f"""
        after_create before_fit before_epoch before_train
        {batch} after_cancel_batch after_batch
        {batch} before_step after_step after_batch
        after_train after_epoch after_fit
    """)


def test_recorded_losses_are_those_of_the_batches():
    def losses(*cbs):
        learn = learner([3, 5, 4], *cbs, lr=0.0)
        learn.fit(1)
        return learn.recorder.raw_losses

    assert losses(ll.GradientAccumulation(6)) == losses()


def test_a_loss_that_callbacks_change_is_gathered_as_they_left_it():
    def penalty(cb):
        cb.learn.loss_grad = cb.learn.loss_grad + cb.model.weight.square().sum()

    def learn(sizes, *cbs):
        return learner(sizes, ll.Callback(after_loss=penalty), *cbs)

    assert trained(learn([4, 4], ll.GradientAccumulation(8))) == same(trained(learn([8])))


@pytest.mark.parametrize("error", [ll.CancelBackwardException, ll.CancelBatchException])
@pytest.mark.parametrize("order", [0, 9])
def test_a_batch_without_a_backward_pass_is_not_counted(error, order):
    def skip_second(cb):
        if cb.iter == 1:
            raise error

    skip = ll.Callback(before_backward=skip_second)
    skip.order = order
    learn = learner([4] * 4, ll.GradientAccumulation(8), skip)
    without = learner([4] * 4, ll.GradientAccumulation(8))
    without.dls = ll.DataLoaders([b for i, b in enumerate(learn.dls.train) if i != 1], device="cpu")
    assert trained(learn) == same(trained(without))
    assert (learn.opt_iter, learn.gradient_accumulation.count) == (2, 0)


def test_a_batch_that_is_left_after_its_backward_pass_is_counted():
    def leave_second(cb):
        if cb.iter == 1:
            raise ll.CancelBatchException

    leave = ll.Callback(after_backward=leave_second)
    leave.order = -9
    learn, big = learner([4] * 4, ll.GradientAccumulation(8), leave), learner([12, 4])
    assert trained(learn) == same(trained(big))
    assert learn.opt_iter == 2


def test_added_in_the_middle_of_a_phase_it_gathers_from_there_on():
    add = ll.Callback(after_batch=lambda cb: cb.learn.add_cb(ll.GradientAccumulation(8)) if cb.iter == 1 else None)
    assert trained(learner([4] * 6, add)) == same(trained(learner([4, 4, 8, 8])))


def test_where_another_callback_cancels_the_batch_at_the_step_the_window_goes_on():
    seen = []

    def cancel_once(cb):
        if cb.iter == 1:
            raise ll.CancelBatchException

    cancel = ll.Callback(before_step=cancel_once)
    cancel.order = 20
    learn = learner([3, 4, 5], ll.GradientAccumulation(6), cancel, note(seen, "iter"))
    assert trained(learn) == same(trained(learner([12])))
    assert seen == [2]


def test_a_cancelled_step_clears_the_window():
    def cancel_first(cb):
        if cb.iter == 1:
            raise ll.CancelStepException

    for order in (0, 20):  # before the accumulation hears of the step, and after
        cancel = ll.Callback(before_step=cancel_first)
        cancel.order = order
        learn = learner([4] * 4, ll.GradientAccumulation(8), cancel)
        later = learner([4] * 4, ll.GradientAccumulation(8))
        later.dls = ll.DataLoaders(list(learn.dls.train)[2:], device="cpu")
        assert trained(learn) == trained(later)


@pytest.mark.parametrize("error", [ll.CancelTrainException, ll.CancelEpochException, ll.CancelFitException, ValueError])
def test_a_window_that_is_cut_is_dropped_and_leaks_into_no_later_fit(error):
    def cut(cb):
        if cb.learn.train_iter == 3:
            raise error

    learn = learner([4] * 4, ll.GradientAccumulation(8))
    fresh = learner([8])
    try:
        learn.fit(1, cbs=ll.Callback(after_batch=cut))
    except ValueError:
        pass
    fresh.dls = ll.DataLoaders([tuple(map(torch.cat, zip(*list(learn.dls.train)[:2], strict=True)))], device="cpu")

    assert learn.opt_iter == 1
    assert [p.grad for p in learn.model.parameters()] == [None, None]
    assert numbers(learn) == same(trained(fresh))
    assert trained(learn) == same(trained(learner([8, 8], model=fresh.model)))


def test_taken_off_in_the_middle_of_a_window_it_leaves_no_gradient():
    grads = []

    def take_off(cb):
        cb.learn.remove_cb(ll.GradientAccumulation)
        grads.extend(p.grad for p in cb.model.parameters())

    learner([4] * 4, ll.GradientAccumulation(100), ll.Callback(after_batch=take_off)).fit(1)
    assert grads[:2] == [None, None]


def test_a_fit_by_steps_counts_updates_and_windows_go_on_over_passes():
    by_steps = learner([4] * 3, ll.GradientAccumulation(8))
    by_steps.fit(n_step=3, valid_every=2)
    x, y = samples(12)
    order = [(a, b) for a, b in zip(x.split(4), y.split(4), strict=True)]
    windows = [(order[i], order[j]) for i, j in ((0, 1), (2, 0), (1, 2))]
    big = learner([8] * 3)
    big.dls = ll.DataLoaders([tuple(map(torch.cat, zip(*w, strict=True))) for w in windows], device="cpu")

    assert numbers(by_steps) == same(trained(big))
    assert (by_steps.opt_iter, by_steps.train_iter) == (3, 6)


def test_the_count_is_of_the_targets_or_of_the_inputs_where_there_are_none():
    counts = []
    learn = learner([4, 4], ll.GradientAccumulation(8))
    learn.loss_func = None
    learn.dls = ll.DataLoaders([(x,) for x, _ in learn.dls.train], device="cpu")

    def loss(cb):
        cb.learn.loss_grad, cb.learn.yb = cb.pred.square().mean(), ()
        cb.learn.yb = (torch.zeros(len(cb.x)),)

    learn.add_cb(ll.Callback(after_loss=loss, after_backward=lambda cb: cb.learn.__setattr__("yb", ())))
    learn.add_cb(ll.Callback(after_batch=lambda cb: counts.append(cb.learn.gradient_accumulation.count)))
    learn.fit(1)
    assert counts == [4, 0]


def test_a_model_without_anything_to_train_is_let_be():
    model = line()
    for p in model.parameters():
        p.requires_grad_(False)
    learn = learner([4] * 2, ll.GradientAccumulation(8), model=model)
    learn.fit(1)
    assert learn.opt_iter == 0


@pytest.mark.parametrize("wrap", [list, NoLength])
def test_a_fit_stopped_in_the_middle_of_a_window_goes_on_exactly(wrap):
    def make():
        return learner([4, 3, 5, 2], ll.GradientAccumulation(9), ll.GradientClip(0.1), wrap=wrap)

    assert_resumes_exactly(make)


def test_a_fit_by_steps_stopped_in_the_middle_of_a_window_goes_on_exactly():
    assert_resumes_exactly(
        lambda: learner([4, 3, 5], ll.GradientAccumulation(9)), lambda learn: learn.fit(n_step=3, valid_every=2)
    )


@pytest.mark.parametrize(("n_acc", "error"), [(0, ValueError), (-4, ValueError), (2.5, TypeError), (True, TypeError)])
def test_a_number_of_samples_that_makes_no_window_is_refused(n_acc, error):
    with pytest.raises(error, match=re.escape(f"`n_acc={n_acc}`")):
        ll.GradientAccumulation(n_acc)


@pytest.mark.parametrize("n_acc", [12, 100])
def test_accumulation_keeps_every_promise(n_acc):
    check_callback(lambda: ll.GradientAccumulation(n_acc), lambda: toy_learner(n_train=24, n_valid=8))


# GradientClip


def clipped_by_hand(sizes, clip, n_epoch=1):
    """The loop written by hand with torch's functions."""
    model, (x, y) = line(), samples(sum(sizes))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(n_epoch):
        for xb, yb in zip(x.split(sizes), y.split(sizes), strict=True):
            nn.functional.mse_loss(model(xb), yb).backward()
            clip(list(model.parameters()))
            opt.step()
            opt.zero_grad()
    return [*model.weight.flatten().tolist(), *model.bias.tolist()]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_the_norm_of_all_gradients_is_clipped_as_torch_does_it(norm_type):
    by_hand = clipped_by_hand([8] * 4, lambda ps: nn.utils.clip_grad_norm_(ps, 0.3, norm_type), 2)
    assert trained(learner([8] * 4, ll.GradientClip(0.3, norm_type)), 2) == same(by_hand)
    assert by_hand != same(trained(learner([8] * 4), 2))


@pytest.mark.parametrize(
    ("cbs", "fastai"),
    [
        ([ll.GradientClip(0.5)], [0.4642389416694641, -0.20431232452392578, 0.16849267482757568]),
        ([ll.GradientClip(0.5, 1.0)], [0.4128892123699188, -0.2062249779701233, 0.1384558528661728]),
        (
            [ll.GradientClip(0.5), ll.GradientAccumulation(16)],
            [0.40366896986961365, -0.21141985058784485, 0.11181368678808212],
        ),
    ],
)
def test_clipped_weights_are_those_of_fastai(cbs, fastai):
    assert trained(learner([8] * 4, *cbs), 2) == same(fastai)


def test_single_gradients_are_clamped_as_torch_does_it():
    by_hand = clipped_by_hand([8] * 4, lambda ps: nn.utils.clip_grad_value_(ps, 0.2))
    assert trained(learner([8] * 4, ll.GradientClip(None, max_value=0.2))) == same(by_hand)


def test_with_both_limits_values_are_clamped_first():
    def clip(ps):
        nn.utils.clip_grad_value_(ps, 0.2)
        nn.utils.clip_grad_norm_(ps, 0.25)

    learn = learner([8] * 4, ll.GradientClip(0.25, max_value=0.2))
    assert trained(learn) == same(clipped_by_hand([8] * 4, clip))


@pytest.mark.parametrize("max_norm", [0, 0.0, None])
def test_0_and_none_are_no_limit(max_norm):
    assert trained(learner([8] * 4, ll.GradientClip(max_norm, max_value=max_norm))) == trained(learner([8] * 4))


def test_a_window_is_clipped_once_as_a_whole():
    clipped, big = learner([4] * 4, ll.GradientClip(0.1), ll.GradientAccumulation(8)), [8, 8]
    assert trained(clipped) == same(trained(learner(big, ll.GradientClip(0.1))))


def test_the_last_window_is_clipped_where_it_is_stepped_after_the_phase():
    cbs = [ll.GradientClip(0.1), ll.GradientAccumulation(100)]
    assert trained(learner([4] * 2, *cbs, wrap=NoLength)) == same(trained(learner([8], ll.GradientClip(0.1))))


def test_whatever_their_order_clipping_comes_after_gathering_and_unscaling():
    clip, accumulation = ll.GradientClip(), ll.GradientAccumulation()
    clip.order, accumulation.order = -5, 30
    learn = learner([8], clip, accumulation)
    assert list(learn.ordered_cbs("before_step")) == [accumulation, clip]


def test_gradients_of_parameters_that_are_not_trained_do_not_count():
    model = nn.Sequential(line(), nn.Linear(1, 1))
    model[1].weight.data[:], model[1].bias.data[:] = 1.0, 0.0
    head_only = learner([8] * 4, ll.GradientClip(0.3), model=model, splitter=lambda m: list(m[0].parameters()))
    head_only.fit(1)
    assert numbers(head_only)[:3] == same(trained(learner([8] * 4, ll.GradientClip(0.3))))


@pytest.mark.parametrize("limits", [{"max_norm": -1.0}, {"max_value": -0.5}, {"max_norm": math.nan}])
def test_a_limit_that_is_none_is_refused(limits):
    ((name, limit),) = limits.items()
    with pytest.raises(ValueError, match=re.escape(f"`{name}={limit}`: a limit is positive")):
        ll.GradientClip(**limits)


def test_clipping_keeps_every_promise():
    check_callback(lambda: ll.GradientClip(0.01, max_value=0.5))


def test_two_accumulations_are_refused():
    learn = toy_learner(cbs=[ll.GradientAccumulation(8), ll.GradientAccumulation(16)])
    with pytest.raises(ValueError, match="would each gather what the other has scaled"):
        learn.fit(1)
