"""The verbs that train with a schedule, and warm-up, stable, decay.

Numbers marked as fastai's come from fastai 2.8.12; they depend on the number of batches only. It counts progress in
float32.
"""

import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop import SchedCos, SchedLin, SchedPoly, warmup_stable_decay
from learnloop.testing import toy_learner


def learner(**kwargs):
    """Two batches an epoch."""
    return toy_learner(n_train=16, **kwargs)


def three_blocks():
    first, second = nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    return nn.Sequential(nn.Sequential(first), second, nn.Linear(3, 1))


def grouped(**kwargs):
    return learner(model=three_blocks(), splitter=lambda m: [list(block.parameters()) for block in m], **kwargs)


class Rates(ll.Callback):
    """Notes the rate of each group in every training batch, and the first group that is trained."""

    run_valid = False

    def __init__(self):
        self.noted = []

    def after_pred(self):
        self.noted.append((self.opt.frozen_idx, [h["lr"] for h in self.opt.hypers]))


# fit_flat_cos


def test_flat_cos_stays_at_the_rate_and_goes_down_in_the_last_quarter():
    learn = learner()
    learn.fit_flat_cos(4, 0.1)
    fastai = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0500005]
    assert learn.recorder.hps == {"lr": pytest.approx(fastai, abs=1e-8)}


def test_flat_cos_takes_the_share_the_divisor_and_the_learners_rate():
    learn = learner(opt_func=ll.Adam)
    learn.fit_flat_cos(2, pct_start=0.5, div_final=10.0, wd=0.3)
    assert learn.recorder.hps["lr"] == pytest.approx([0.1, 0.1, 0.1, 0.055])  # fastai's
    assert learn.opt.hypers[0]["wd"] == 0.3


def test_flat_cos_begins_at_start_epoch():
    learn = learner()
    learn.fit_flat_cos(4, 0.1, start_epoch=3)
    assert learn.recorder.hps["lr"] == pytest.approx([0.1, 0.0500005])  # the last epoch of the four
    assert [row["epoch"] for row in learn.recorder.history] == [3]


def test_flat_cos_runs_over_a_number_of_steps():
    learn = learner()
    learn.fit_flat_cos(lr=0.1, n_step=8, valid_every=4)
    assert learn.recorder.hps["lr"] == pytest.approx([0.1] * 7 + [0.0500005])
    assert len(learn.recorder.values) == 2


def test_flat_cos_spreads_a_slice_over_the_groups():
    rates = Rates()
    grouped(cbs=rates).fit_flat_cos(1, slice(1e-3, 1e-1))
    assert rates.noted[0] == (0, pytest.approx([1e-3, 1e-2, 1e-1]))


# fit_sgdr


@pytest.mark.parametrize(
    ("cycle_mult", "n_epoch", "fastai"),
    [
        (2, 3, [0.1, 0.05, 0.1, 0.085355339, 0.049999991, 0.014644661]),
        (3, 4, [0.1, 0.05, 0.1, 0.09330127, 0.074999999, 0.05, 0.024999997, 0.006698731]),
    ],
)
def test_sgdr_begins_anew_in_cycles_that_grow(cycle_mult, n_epoch, fastai):
    learn = learner()
    learn.fit_sgdr(2, 1, 0.1, cycle_mult=cycle_mult)
    assert learn.n_epoch == len(learn.recorder.values) == n_epoch
    assert learn.recorder.hps["lr"] == pytest.approx(fastai, abs=1e-7)


def test_sgdr_has_cycles_of_one_length_too():
    learn = learner()
    learn.fit_sgdr(3, 1, 0.1, cycle_mult=1)
    assert learn.n_epoch == 3
    assert learn.recorder.hps["lr"] == pytest.approx([0.1, 0.05] * 3)


def test_sgdr_begins_at_start_epoch():
    learn = learner()
    learn.fit_sgdr(2, 1, 0.1, start_epoch=2, wd=0.1)
    assert learn.recorder.hps["lr"] == pytest.approx([0.05, 0.014644661])
    assert learn.opt.hypers[0]["wd"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1), ValueError, "`n_cycles=0`: pass 1 or more"),
        ((2, 0), ValueError, "`cycle_len=0`: pass 1 or more"),
        ((2, 1.5), TypeError, "`cycle_len=1.5`: pass a whole number"),
        ((2, 1, 0.1, 0), ValueError, "`cycle_mult=0`: pass 1 or more"),
        ((2, 1, 0.1, 1.5), TypeError, "`cycle_mult=1.5`: pass a whole number"),
        ((True, 1), TypeError, "`n_cycles=True`: pass a whole number"),
    ],
)
def test_sgdr_refuses_what_is_no_number_of_cycles(arguments, error, message):
    learn = learner()
    with pytest.raises(error, match=message):
        learn.fit_sgdr(*arguments)
    assert learn.opt is None


# What is wrong is named as it was written


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("fit_one_cycle", {"pct_start": 1.2}, "`pct_start=1.2`: pass the share of the fit, from 0 to 1"),
        ("fit_one_cycle", {"pct_start": 30}, "`pct_start=30`: pass the share of the fit, from 0 to 1"),
        ("fit_one_cycle", {"div": 0}, "`div=0`: the rate is divided by it; pass a number above 0"),
        ("fit_one_cycle", {"div_final": -1.0}, "`div_final=-1.0`: the rate is divided by it"),
        ("fit_one_cycle", {"moms": (0.9, 0.8)}, r"`moms=\(0.9, 0.8\)`: pass three momenta"),
        ("fit_one_cycle", {"lr_max": [1e-3, 1e-2]}, "`lr` got 2 values, but there are 1 parameter groups"),
        ("fit_flat_cos", {"pct_start": -0.1}, "`pct_start=-0.1`: pass the share of the fit, from 0 to 1"),
        ("fit_flat_cos", {"div_final": 0}, "`div_final=0`: the rate is divided by it"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_batch(verb, arguments, message):
    learn = learner()
    with pytest.raises(ValueError, match=message):
        getattr(learn, verb)(1, **arguments)
    assert not hasattr(learn, "dl")


@pytest.mark.parametrize("verb", ["fit_one_cycle", "fit_flat_cos"])
@pytest.mark.parametrize("pct_start", [0, 1])
def test_a_share_may_be_all_or_nothing(verb, pct_start):
    learn = learner()
    getattr(learn, verb)(2, 0.1, pct_start=pct_start)
    assert learn.recorder.lrs[0] == pytest.approx(0.1 / 25 if verb == "fit_one_cycle" and pct_start else 0.1)


def test_the_verbs_keep_the_callbacks_that_are_passed_and_take_them_off_again():
    learn, rates = learner(), Rates()
    for verb in (learn.fit_one_cycle, learn.fit_flat_cos, partial(learn.fit_sgdr, 1)):
        rates.noted.clear()
        verb(1, cbs=rates)
        assert len(rates.noted) == 2
        assert [type(cb).__name__ for cb in learn.cbs] == ["TrainEvalCallback", "Recorder"]


@pytest.mark.parametrize("verb", ["fit_one_cycle", "fit_flat_cos", "fit_sgdr"])
def test_reset_opt_makes_a_new_optimizer_once(verb):
    learn = learner()
    learn.fit(1)
    former, made = learn.opt, []
    learn.opt_func = lambda *args, **kwargs: made.append(1) or ll.SGD(*args, **kwargs)
    getattr(learn, verb)(1, *([1] if verb == "fit_sgdr" else []), reset_opt=True)
    assert learn.opt is not former
    assert made == [1]


# A schedule of a hyper that is not there


def test_a_schedule_of_an_unknown_hyper_is_refused_with_those_there_are():
    learn = learner()
    with pytest.raises(
        ValueError, match=r"a schedule of `weight_decay`, but the optimizer's hypers are .*lr"
    ) as caught:
        learn.fit(1, cbs=ll.ParamScheduler({"lr": SchedLin(1, 0), "weight_decay": SchedLin(1, 0)}))
    assert "`learn.opt.set_hyper('weight_decay', …)`" in str(caught.value)
    assert learn.train_iter == 0
    assert "weight_decay" not in learn.opt.hypers[0]


def test_a_misspelt_hyper_gets_the_nearest_one():
    with pytest.raises(ValueError, match="Did you mean `sqr_mom`"):
        learner(opt_func=ll.Adam).fit(1, cbs=ll.ParamScheduler({"sqrmom": SchedLin(1, 0)}))


def test_a_hyper_that_was_created_can_be_scheduled():
    learn = learner()
    learn.create_opt()
    learn.opt.set_hyper("shrink", 1.0)
    learn.fit(1, cbs=ll.ParamScheduler({"shrink": SchedLin(1.0, 0.5)}))
    assert learn.recorder.hps["shrink"] == [1.0, 0.75]


@pytest.mark.parametrize("opt_func", [ll.SGD, torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW])
def test_one_cycle_moves_the_momentum_whether_the_optimizer_reads_it_or_not(opt_func):
    learn = learner(opt_func=opt_func)
    learn.fit_one_cycle(1, 0.1)
    assert learn.recorder.hps["mom"] == pytest.approx([0.95, 0.875])


def test_a_validation_leaves_what_a_scheduler_recorded():
    learn = learner(cbs=ll.ParamScheduler({"lr": SchedLin(0.1, 0.0)}))
    learn.fit(1)
    learn.validate()
    assert learn.recorder.hps == {"lr": [0.1, 0.05]}


# Freezing and fine-tuning


def test_fine_tune_trains_the_last_group_and_then_all():
    rates = Rates()
    grouped(cbs=rates).fine_tune(2, 0.02, freeze_epochs=1)
    fastai = [
        (2, [8e-05, 8e-05, 0.0008]),
        (2, [0.001055231, 0.001055231, 0.010552313]),
        (0, [2e-05, 0.0002, 0.002]),
        (0, [9.4641e-05, 0.00094641, 0.009464101]),
        (0, [8.1175e-05, 0.000811747, 0.008117468]),
        (0, [2.8307e-05, 0.000283065, 0.002830653]),
    ]
    assert rates.noted == [(frozen, pytest.approx(lrs, rel=1e-4)) for frozen, lrs in fastai]


def test_fine_tune_passes_the_rest_on_to_both_parts():
    learn = grouped()
    learn.fine_tune(1, 0.01, freeze_epochs=2, wd=0.25, moms=(0.5, 0.5, 0.5))
    assert [h["wd"] for h in learn.opt.hypers] == [0.25] * 3
    assert learn.recorder.hps["mom"] == [0.5] * 2


def test_fine_tune_moves_frozen_weights_in_the_second_part_only():
    learn = grouped()
    before = learn.model[0][0].weight.detach().clone()
    learn.freeze()
    learn.fit(1)
    assert torch.equal(learn.model[0][0].weight, before)
    learn.fine_tune(1)
    assert not torch.equal(learn.model[0][0].weight, before)


def seeded():
    torch.manual_seed(0)
    return grouped()


def stopped_after(learn, n, run):
    """Runs a verb that Ctrl-C stops after so many training batches in all."""
    left = iter(range(n - 1, -1, -1))
    press = ll.Callback(after_pred=lambda cb: signal.raise_signal(signal.SIGINT) if next(left, None) == 0 else None)
    press.run_valid = False
    with learn.added_cbs(press), pytest.raises(KeyboardInterrupt):
        run()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_resume_goes_on_with_the_phases_of_fine_tune_that_are_left(n):
    whole, learn = seeded(), seeded()
    whole.fine_tune(2, 0.02)
    stopped_after(learn, n, lambda: learn.fine_tune(2, 0.02))
    learn.resume()
    assert [p.tolist() for p in learn.model.parameters()] == [p.tolist() for p in whole.model.parameters()]
    assert (learn.n_epoch, learn.opt.frozen_idx) == (2, 0)


def test_fine_tune_can_be_stopped_in_both_phases():
    whole, learn = seeded(), seeded()
    whole.fine_tune(2, 0.02)
    stopped_after(learn, 1, lambda: learn.fine_tune(2, 0.02))
    stopped_after(learn, 4, learn.resume)
    learn.resume()
    assert [p.tolist() for p in learn.model.parameters()] == [p.tolist() for p in whole.model.parameters()]


def test_a_fit_after_a_stopped_fine_tune_has_no_phase_after_it():
    learn = grouped()
    stopped_after(learn, 1, lambda: learn.fine_tune(2, 0.02))
    stopped_after(learn, 1, lambda: learn.fit(3))
    rates = Rates()
    with learn.added_cbs(rates):
        learn.resume()
    assert (learn.n_epoch, len(rates.noted)) == (3, 5)


def test_freeze_leaves_the_last_group_and_normalization_layers():
    learn = grouped()
    learn.freeze()
    assert [p.requires_grad for p in learn.model.parameters()] == [False, False, True, True, False, False, True, True]
    learn.freeze_to(1)
    assert [p.requires_grad for p in learn.model.parameters()] == [False, False] + [True] * 6
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())


def test_freezing_forgets_what_the_optimizer_gathered():
    learn = grouped(opt_func=ll.Adam)
    learn.fit(1)
    weight = learn.model[2].weight
    assert "grad_avg" in learn.opt.state[weight] or len(learn.opt.state[weight]) > 0
    learn.freeze()
    assert set(learn.opt.state[weight]) <= {"do_wd", "force_train"}


def test_with_one_group_freeze_freezes_nothing():
    learn = learner()
    learn.freeze()
    assert all(p.requires_grad for p in learn.model.parameters())


# Warm-up, stable, decay


def at(schedule, *places):
    return [schedule(pos) for pos in places]


def test_warmup_stable_decay_goes_up_stays_and_goes_down():
    schedule = warmup_stable_decay(1.0, pct_warmup=0.1, pct_decay=0.2, div=10, div_final=100)
    assert at(schedule, 0.0, 0.05, 0.1, 0.5, 0.8, 0.9, 1.0) == pytest.approx([0.1, 0.55, 1.0, 1.0, 1.0, 0.505, 0.01])


def test_warmup_stable_decay_meets_its_rates_exactly():
    schedule = warmup_stable_decay(3e-4)
    assert at(schedule, 0.0, 0.05, 0.3, 0.8, 1.0) == [3e-4 / 25, 3e-4, 3e-4, 3e-4, 3e-4 / 1e5]


@pytest.mark.parametrize(
    ("decay", "halfway"), [(SchedLin, 0.5), (SchedCos, 0.5), (partial(SchedPoly, power=0.5), 1 - 0.5**0.5)]
)
def test_the_way_down_is_any_schedule(decay, halfway):
    schedule = warmup_stable_decay(1.0, decay=decay, div_final=1e12)
    assert schedule(0.9) == pytest.approx(halfway)


def test_warmup_stable_decay_may_leave_out_parts():
    assert at(warmup_stable_decay(1.0, pct_warmup=0, pct_decay=0), 0.0, 0.5) == [1.0, 1.0]
    assert at(warmup_stable_decay(1.0, pct_warmup=0.5, pct_decay=0.5, div=2, div_final=4), 0.25, 0.5, 0.75) == [
        0.75,
        1.0,
        0.625,
    ]


def test_warmup_stable_decay_takes_one_rate_per_group():
    schedule = warmup_stable_decay(np.array([0.1, 1.0]), div=10)
    assert schedule(0.0).tolist() == pytest.approx([0.01, 0.1])
    assert schedule(0.5).tolist() == [0.1, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pct_warmup": 0.6, "pct_decay": 0.5}, "`pct_warmup=0.6` and `pct_decay=0.5` are more than the whole fit"),
        ({"pct_warmup": -0.1}, "`pct_warmup=-0.1`: pass the share of the fit, from 0 to 1"),
        ({"pct_decay": 20}, "`pct_decay=20`: pass the share of the fit, from 0 to 1"),
        ({"pct_decay": float("nan")}, "`pct_decay=nan`: pass the share of the fit"),
        ({"div": 0}, "`div=0`: the rate is divided by it"),
    ],
)
def test_warmup_stable_decay_refuses_wrong_parts(arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup_stable_decay(1.0, **arguments)


def test_warmup_stable_decay_trains_in_a_param_scheduler():
    learn = learner()
    learn.fit(5, cbs=ll.ParamScheduler({"lr": warmup_stable_decay(0.1, pct_warmup=0.2, div=10)}))
    assert learn.recorder.lrs == pytest.approx([0.01, 0.055, *[0.1] * 7, 0.0500005])
