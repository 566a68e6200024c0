"""EMA and SWA: the same averages as those of `torch.optim.swa_utils`, and the trained weights where they belong."""

import copy
import math
import signal

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

import learnloop as ll
from learnloop.callbacks.averaging import decay_after, finite_slots, scored_weights, slots_of
from learnloop.testing import check_callback, toy_learner
from tests.resuming import assert_resumes_exactly


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))


def learner(*cbs, n_train=24, n_valid=8, **kwargs):
    """Three batches an epoch, one for validation, batch norm in the model."""
    return toy_learner(n_train=n_train, n_valid=n_valid, model=network(), cbs=cbs, **kwargs)


def weights(learn):
    """The model's whole state, as lists."""
    return {name: t.tolist() for name, t in learn.model.state_dict().items()}


def fitted(learn, *args, **kwargs):
    torch.manual_seed(0)
    learn.fit(*args, **kwargs)
    return learn


def loss_of(model, learn):
    """The loss of a model on the validation set, by hand."""
    model.eval()
    with torch.no_grad():
        return [nn.functional.mse_loss(model(x), y).item() for x, y in learn.dls.valid]


class TorchAverage(ll.Callback):
    """torch's AveragedModel, updated after each batch that made an update, or after each epoch."""

    def __init__(self, multi_avg_fn, after="after_batch", use_buffers=True):
        super().__init__(**{after: TorchAverage.update})
        self.arguments, self.model_averaged = {"multi_avg_fn": multi_avg_fn, "use_buffers": use_buffers}, None

    def before_fit(self):
        self.model_averaged = AveragedModel(self.model, **self.arguments)

    def update(self):
        if self.training:
            self.model_averaged.update_parameters(self.model)


def at(event, action, training=None):
    """A callback that acts at each event of that name, in one phase if that is said."""

    def act(cb):
        if training in (None, cb.training):
            action(cb.learn)

    return ll.Callback(**{event: act})


FLOATS = ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var", "3.weight")


# The promises of every callback


@pytest.mark.parametrize("make", [lambda: ll.EMA(0.9), lambda: ll.EMA(0.9, apply_at_end=False), lambda: ll.SWA(0)])
def test_it_keeps_every_promise(make):
    assert check_callback(make, lambda: learner(n_train=16)).broken == {}


@pytest.mark.parametrize("apply_at_end", [True, False])
def test_ema_stopped_at_any_event_and_resumed_ends_as_if_it_had_not_been_stopped(apply_at_end):
    assert_resumes_exactly(lambda: learner(ll.EMA(0.9, warmup=True, apply_at_end=apply_at_end)))


@pytest.mark.parametrize("every", [None, 2])
def test_swa_stopped_at_any_event_and_resumed_ends_as_if_it_had_not_been_stopped(every):
    assert_resumes_exactly(lambda: learner(ll.SWA(0.4, every=every)), every=2)


def test_it_is_resumed_with_mixtures_precision_accumulation_and_clipping():
    def make():
        precision = ll.MixedPrecision(init_scale=64.0, growth_interval=2)
        return learner(ll.EMA(0.9), ll.MixUp(), precision, ll.GradientAccumulation(16), ll.GradientClip())

    assert_resumes_exactly(make, lambda learn: learn.fit(n_step=4, valid_every=2), every=3)


# The numbers


def test_ema_is_that_of_torch():
    average = TorchAverage(get_ema_multi_avg_fn(0.9))
    learn = learner(ll.EMA(0.9), average)
    # torch's begins with the weights after the first update, ours with those before it.
    torch_from_start = at("before_train", lambda learn: average.model_averaged.n_averaged.fill_(1))
    fitted(learn, 2, cbs=torch_from_start)
    for name in FLOATS:
        theirs = average.model_averaged.module.state_dict()[name]
        torch.testing.assert_close(learn.model.state_dict()[name], theirs, rtol=1e-6, atol=1e-7)


def test_ema_is_a_weighted_mean_of_all_weights_of_the_fit():
    seen = []
    learn = learner(
        ll.EMA(0.5), at("after_batch", lambda learn: seen.append(learn.model[0].weight.detach().clone()), True)
    )
    start = learn.model[0].weight.detach().clone()
    fitted(learn, 1)
    expected = 0.125 * start + 0.125 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2]
    torch.testing.assert_close(learn.model[0].weight, expected, rtol=1e-6, atol=1e-7)


def test_the_warmup_of_ema_is_shorter_memory_at_first():
    assert [decay_after(n, 0.999, True) for n in (0, 1, 90)] == pytest.approx([0.1, 2 / 11, 0.91])
    assert decay_after(10**6, 0.999, True) == decay_after(0, 0.999, False) == 0.999


def test_swa_is_that_of_torch_batch_norm_included():
    average = TorchAverage(get_swa_multi_avg_fn(), "after_train", use_buffers=False)
    learn = fitted(learner(ll.SWA(0), average, bs=24), 4)  # one batch: the variance depends on how they are shuffled
    theirs = average.model_averaged.module
    update_bn(learn.dls.train, theirs)
    for name in FLOATS:
        torch.testing.assert_close(learn.model.state_dict()[name], theirs.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert learn.recorder.values[-1][1] == pytest.approx(loss_of(theirs, learn)[0], rel=1e-5)


def test_swa_averages_the_statistics_of_batch_norm_where_no_batches_are_spent_on_them():
    seen = []
    note = at("after_train", lambda learn: seen.append({n: learn.model.state_dict()[n].clone() for n in FLOATS}))
    learn = fitted(learner(ll.SWA(0, bn_batches=0), note), 4)
    for name in FLOATS:
        mean = torch.stack([state[name] for state in seen]).mean(dim=0)
        torch.testing.assert_close(learn.model.state_dict()[name], mean)


def test_a_limit_on_the_batches_for_batch_norm():
    counted = []
    learn = learner(ll.SWA(0, bn_batches=2))
    learn.model[1].register_forward_hook(lambda m, i, o: counted.append(m.training and m.momentum != 0.1))
    fitted(learn, 2)
    assert sum(counted) == 4  # two for the validation of each epoch, none at the end


def test_the_number_of_batches_that_batch_norm_has_seen_stays_that_of_the_training():
    assert fitted(learner(ll.SWA(0)), 2).model[1].num_batches_tracked.item() == 6
    assert learner().model[1].momentum == fitted(learner(ll.SWA(0)), 2).model[1].momentum == 0.1


@pytest.mark.parametrize(
    ("swa", "fit", "taken"),
    [
        (ll.SWA(0.75), {"n_epoch": 4}, [0, 0, 1, 2]),
        (ll.SWA(0), {"n_epoch": 4}, [1, 2, 3, 4]),
        (ll.SWA(1), {"n_epoch": 4}, [0, 0, 0, 1]),
        (ll.SWA(0.7), {"n_epoch": 10}, [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]),
        (ll.SWA(0.5, every=2), {"n_epoch": 4}, [0, 1, 2, 4]),  # updates 6, 8, 10, 12 of 12
        (ll.SWA(0.5), {"n_step": 8, "valid_every": 2}, [0, 1, 2, 3]),
        (ll.SWA(0.5, every=1), {"n_step": 4, "valid_every": 2}, [1, 3]),
    ],
)
def test_swa_takes_in_weights_from_its_start_on(swa, fit, taken):
    counts = []
    swa = copy.deepcopy(swa)
    fitted(learner(swa, at("after_epoch", lambda learn: counts.append(swa.n_averaged))), **fit)
    assert counts == taken


# What counts as an update


def test_a_cancelled_step_is_no_update():
    def cancel(cb):
        if cb.iter == 1:
            raise ll.CancelStepException

    learn, seen = learner(ll.EMA(0.9), ll.Callback(before_step=cancel)), []
    fitted(learn, 2, cbs=at("after_epoch", lambda learn: seen.append((learn.ema.n_averaged, learn.opt_iter))))
    assert seen == [(2, 2), (4, 4)]


def test_a_step_that_overflowed_is_no_update():
    seen = []
    learn = learner(ll.EMA(0.9), ll.MixedPrecision(init_scale=2.0**20, growth_interval=2))
    note = at("after_epoch", lambda learn: seen.append((learn.ema.n_averaged, learn.opt_iter, learn.train_iter)))
    fitted(learn, 5, cbs=note)
    assert learn.mixed_precision.n_skipped > 0
    assert seen[-1] == (learn.opt_iter, learn.opt_iter, 15)


def test_a_batch_that_is_cancelled_after_its_step_is_one():
    def cancel(cb):
        raise ll.CancelBatchException

    seen = []
    learn = learner(ll.EMA(0.9), ll.Callback(after_step=cancel))
    fitted(learn, 1, cbs=at("after_epoch", lambda learn: seen.append(learn.ema.n_averaged)))
    assert seen == [3]


def test_an_epoch_that_is_cut_after_a_step_counts_it():
    def cut(cb):
        if cb.iter == 1:
            raise ll.CancelTrainException

    seen = []
    learn = learner(ll.EMA(0.9), ll.Callback(after_step=cut))
    fitted(learn, 1, cbs=at("after_epoch", lambda learn: seen.append(learn.ema.n_averaged)))
    assert seen == [2]


@pytest.mark.parametrize("make", [lambda: ll.EMA(0.0), lambda: ll.SWA(1)])
def test_the_last_window_of_an_accumulation_is_in_the_averages(make):
    # Windows of 16 over 24 samples: the last is stepped after the last batch. These averages are the last weights.
    learn, plain = (fitted(learner(*cbs, ll.GradientAccumulation(16)), 1) for cbs in ([make()], []))
    torch.testing.assert_close(learn.model[0].weight, plain.model[0].weight, rtol=0, atol=0)


# Who sees which weights


def test_validation_scores_the_averages():
    average = TorchAverage(get_ema_multi_avg_fn(0.9))
    found = []
    start = at("before_train", lambda learn: average.model_averaged.n_averaged.fill_(1))
    note = at(
        "after_epoch", lambda learn: found.append(loss_of(copy.deepcopy(average.model_averaged.module), learn)[0])
    )
    learn = fitted(learner(ll.EMA(0.9), average), 3, cbs=[start, note])
    assert [row[1] for row in learn.recorder.values] == pytest.approx(found, rel=1e-5)


def test_training_goes_on_from_its_own_weights():
    learn, plain = fitted(learner(ll.EMA(0.9)), 3), fitted(learner(), 3)
    assert learn.recorder.raw_losses == plain.recorder.raw_losses
    assert [row[1] for row in learn.recorder.values] != [row[1] for row in plain.recorder.values]


def test_a_validation_nested_in_a_batch_changes_nothing_of_the_training():
    nested = at("after_pred", lambda learn: learn.validate(), training=True)
    learn, plain = fitted(learner(ll.EMA(0.9), nested), 2), fitted(learner(ll.EMA(0.9)), 2)
    assert learn.recorder.raw_losses == plain.recorder.raw_losses
    assert weights(learn) == weights(plain)


def test_a_validation_nested_in_a_validation_leaves_the_averages_in():
    inside = []

    def note(learn):
        before = weights(learn)
        learn.validate()
        inside.append(weights(learn) == before)

    fitted(learner(ll.EMA(0.9), at("after_batch", note, training=False)), 1)
    assert inside == [True]


def test_the_model_has_its_trained_weights_outside_of_validation():
    plain, seen = [], []
    fitted(learner(at("after_epoch", lambda learn: plain.append(weights(learn)))), 2)
    fitted(learner(ll.EMA(0.9), at("after_epoch", lambda learn: seen.append(weights(learn)))), 2)
    assert seen == plain


def test_taken_off_inside_a_nested_validation_it_leaves_the_trained_weights():
    plain = fitted(learner(), 1)

    def take_off(learn):
        learn.validate(cbs=at("after_pred", lambda inner: inner.remove_cb(ll.EMA)))

    learn = fitted(learner(ll.EMA(0.9), at("after_pred", take_off, training=False)), 1)
    assert weights(learn) == weights(plain)


# The end of a fit


def test_after_a_fit_the_model_has_the_averages_that_the_last_validation_scored():
    for cb in (ll.EMA(0.9), ll.SWA(0)):
        learn = fitted(learner(cb), 3)
        assert learn.validate()[0] == learn.recorder.values[-1][1]
        assert cb.averages == {}


def test_a_callback_of_one_fit_leaves_its_averages_too():
    learn = fitted(learner(), 2, cbs=ll.EMA(0.9))
    assert learn.validate()[0] == learn.recorder.values[-1][1]
    assert weights(learn) != weights(fitted(learner(), 2))


def test_they_stay_beside_the_model_on_request_and_are_what_validation_sees():
    learn, plain = fitted(learner(ll.EMA(0.9, apply_at_end=False)), 2), fitted(learner(), 2)
    assert weights(learn) == weights(plain)
    assert learn.validate()[0] == learn.recorder.values[-1][1]
    assert weights(learn) == weights(plain)
    with learn.ema.applied():
        assert loss_of(learn.model, learn)[0] == pytest.approx(learn.recorder.values[-1][1])
        assert learn.validate()[0] == learn.recorder.values[-1][1]
    assert weights(learn) == weights(plain)


def test_a_fit_that_is_cancelled_ends_with_the_averages():
    def cancel(cb):
        if cb.epoch == 1:
            raise ll.CancelFitException

    learn = fitted(learner(ll.EMA(0.9), ll.Callback(before_validate=cancel)), 5)
    plain = fitted(learner(ll.Callback(before_validate=cancel)), 5)
    assert weights(learn) != weights(plain)


@pytest.mark.parametrize("event", ["after_batch", "after_validate", "before_validate", "after_epoch"])
@pytest.mark.parametrize("make", [lambda: ll.EMA(0.9), lambda: ll.SWA(0)])
def test_after_an_error_or_ctrl_c_the_model_has_the_trained_weights(make, event):
    def fail(learn):
        if learn.epoch == 1:
            raise ZeroDivisionError

    def press(learn):
        if learn.epoch == 1:
            signal.raise_signal(signal.SIGINT)

    for act, error in ((fail, ZeroDivisionError), (press, KeyboardInterrupt)):
        found = []
        for cbs in ([make()], []):
            learn = learner(*cbs, at(event, act))
            with pytest.raises(error):
                fitted(learn, 3)
            found.append(weights(learn))
        assert found[0] == found[1]


def test_an_error_in_the_pass_for_batch_norm_leaves_the_trained_weights():
    def fail(learn):
        if learn.task == "validate":
            raise ZeroDivisionError

    plain, learn = fitted(learner(n_valid=0), 2), learner(ll.SWA(0), at("before_batch", fail), n_valid=0)
    with pytest.raises(ZeroDivisionError):
        fitted(learn, 2)
    assert weights(learn) == weights(plain)
    assert learn.model[1].momentum == 0.1


def test_without_validation_batch_norm_is_seen_to_at_the_end():
    learn = fitted(learner(ll.SWA(0, every=1), n_valid=0, bs=24), 2)
    theirs = copy.deepcopy(learn.model)
    update_bn(learn.dls.train, theirs)
    torch.testing.assert_close(learn.model[1].running_var, theirs[1].running_var)


def test_ema_without_an_update_leaves_the_weights_alone():
    learn = learner(ll.EMA(0.9))
    before = weights(learn)
    fitted(learn, 0)
    assert weights(learn) == before


def test_swa_that_never_began_leaves_the_weights_alone():
    def cut(cb):
        if cb.epoch == 1:
            raise ll.CancelFitException

    cut = ll.Callback(before_epoch=cut)
    learn, plain = fitted(learner(ll.SWA(0.9)), 10, cbs=cut), fitted(learner(), 10, cbs=cut)
    assert weights(learn) == weights(plain)


# States and files


@pytest.mark.parametrize("make", [lambda: ll.EMA(0.9), lambda: ll.SWA(0)])
@pytest.mark.parametrize("event", ["before_validate", "after_validate"])
def test_a_state_taken_in_a_validation_holds_trained_weights_and_averages(make, event):
    whole, states = fitted(learner(make()), 3), []

    def take(learn):
        if learn.epoch == 1:
            inside = weights(learn)
            states.append(learn.state_dict())
            assert weights(learn) == inside

    fitted(learner(make(), at(event, take)), 3)
    plain = []
    fitted(learner(at(event, lambda learn: plain.append(weights(learn)))), 3)
    for name, value in plain[1].items():
        assert states[0]["model"][name].tolist() == value
    resumed = learner(make())
    resumed.load_state_dict(states[0])
    resumed.resume()
    assert weights(resumed) == weights(whole)
    assert list(map(list, resumed.recorder.values)) == list(map(list, whole.recorder.values))


def saved_weights(tmp_path, name="other", make=lambda: learner()):
    """A file of weights of another training, and what it holds, as `weights` gives it."""
    other = fitted(make(), 1)
    other.path = tmp_path
    other.save(name)
    return weights(other)


def test_weights_that_are_loaded_begin_the_averages_anew(tmp_path):
    in_file, seen = saved_weights(tmp_path), []

    def load(learn):
        learn.load("other", with_opt=False)
        seen.append({name: a.tolist() for name, a in learn.ema.averages.items()})

    fitted(learner(ll.EMA(0.99), at("after_epoch", load), path=tmp_path), 1)
    assert set(FLOATS) < set(seen[0])
    assert seen == [{name: in_file[name] for name in seen[0]}]


def test_swa_forgets_what_it_took_in_when_weights_are_loaded(tmp_path):
    saved_weights(tmp_path)
    learn = learner(
        ll.SWA(0), at("before_epoch", lambda learn: learn.epoch == 2 and learn.load("other")), path=tmp_path
    )
    n_averaged = []
    fitted(learn, 3, cbs=at("after_epoch", lambda learn: n_averaged.append(learn.swa.n_averaged)))
    assert n_averaged == [1, 2, 1]


@pytest.mark.parametrize("make", [lambda: ll.EMA(0.9), lambda: ll.SWA(0)])
def test_weights_that_are_loaded_in_a_validation_are_not_put_out_with_the_averages(make, tmp_path):
    in_file, seen = saved_weights(tmp_path), []
    load = at("after_validate", lambda learn: learn.load("other"))
    fitted(learner(make(), load, path=tmp_path), 1, cbs=at("after_epoch", lambda learn: seen.append(weights(learn))))
    assert seen == [in_file]


@pytest.mark.parametrize("make", [lambda: ll.EMA(0.9), lambda: ll.SWA(0)])
@pytest.mark.parametrize(
    ("event", "scored"), [("before_validate", True), ("after_validate", True), ("after_epoch", False)]
)
def test_save_writes_the_weights_that_are_in_the_model(make, event, scored, tmp_path):
    inside = {}

    def save(learn):
        learn.save(f"at_{learn.epoch}")
        inside[learn.epoch] = weights(learn)

    fitted(learner(make(), at(event, save), path=tmp_path), 2)
    trained = {}
    fitted(learner(at(event, lambda learn: trained.update({learn.epoch: weights(learn)}))), 2)
    for epoch, of_model in inside.items():
        assert weights(learner(path=tmp_path).load(f"at_{epoch}")) == of_model
        assert (of_model == trained[epoch]) is not scored


def test_averages_beside_the_model_are_written_inside_of_applied(tmp_path):
    learn = fitted(learner(ll.EMA(0.9, apply_at_end=False), path=tmp_path), 2)
    scored = learn.recorder.values[-1][1]
    learn.save("trained")
    with learn.ema.applied():
        learn.save("averages")
    assert learner(path=tmp_path).load("averages").validate()[0] == scored
    assert weights(learner(path=tmp_path).load("trained")) == weights(fitted(learner(), 2))


def test_what_scores_is_what_a_tracker_can_save():
    scored, seen = [], []

    def note(learn):
        with scored_weights(learn):
            scored.append(loss_of(copy.deepcopy(learn.model), learn)[0])
        seen.append(weights(learn))

    learn = fitted(learner(ll.EMA(0.9), at("after_epoch", note)), 2)
    assert scored == pytest.approx([row[1] for row in learn.recorder.values])
    plain = []
    fitted(learner(at("after_epoch", lambda learn: plain.append(weights(learn)))), 2)
    assert seen == plain


def turn_uphill(learn):
    """From epoch 2 on every step makes the loss larger."""
    if learn.epoch >= 2:
        for p in learn.model.parameters():
            p.grad.neg_()


@pytest.mark.parametrize("make", [lambda: ll.EMA(0.5), lambda: ll.SWA(0, every=1)])
def test_a_tracker_saves_the_averages_that_scored_best_and_loads_them_at_the_end(make, tmp_path):
    learn = learner(make(), ll.SaveModelCallback(), path=tmp_path)
    fitted(learn, 5, cbs=at("before_step", turn_uphill))
    losses = [row[1] for row in learn.recorder.values]
    assert losses[-1] > min(losses)
    assert learn.validate()[0] == min(losses)
    assert learner(path=tmp_path).load("model", with_opt=False).validate()[0] == min(losses)


@pytest.mark.parametrize("apply_at_end", [True, False])
@pytest.mark.parametrize(
    ("kwargs", "names"), [({"every_epoch": True}, ["model_0", "model_1"]), ({"at_end": True}, ["model"])]
)
def test_a_tracker_saves_the_averages_that_were_scored_at_any_time(apply_at_end, kwargs, names, tmp_path):
    learn = learner(ll.EMA(0.9, apply_at_end=apply_at_end), ll.SaveModelCallback(**kwargs), path=tmp_path)
    losses = [row[1] for row in fitted(learn, 2).recorder.values]
    assert [learner(path=tmp_path).load(name, with_opt=False).validate()[0] for name in names] == losses[-len(names) :]


def test_between_validations_a_tracker_saves_the_weights_that_are_trained(tmp_path):
    fitted(learner(ll.EMA(0.9), ll.SaveModelCallback(every_step=6), path=tmp_path), 2)
    assert weights(learner(path=tmp_path).load("model_step6", with_opt=False)) == weights(fitted(learner(), 2))


# Models of every kind


class Odd(nn.Module):
    """Shared weights, a mask with -inf, a counter, a buffer that is replaced, one that is not saved."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = self.first
        self.last = nn.Linear(2, 1)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(2), persistent=False)

    def forward(self, x):
        if self.training:
            self.count += 1
            self.mean = self.mean + 1
        return self.last(self.second(self.first(x)))


def test_what_is_averaged_is_finite_and_floating_point_and_each_tensor_once():
    assert list(slots_of(Odd())) == ["mask", "mean", "first.weight", "first.bias", "last.weight", "last.bias"]
    assert list(finite_slots(Odd())) == ["mean", "first.weight", "first.bias", "last.weight", "last.bias"]


def test_buffers_are_averaged_where_they_are_now_and_others_stay_as_they_are():
    model = Odd()
    learn = toy_learner(n_train=16, n_valid=0, model=model, cbs=ll.EMA(0.5))
    learn.fit(1)
    assert model.mean.tolist() == [1.25, 1.25]  # 0, 1, 2: 0.25 * 0 + 0.25 * 1 + 0.5 * 2
    assert model.count.item() == 2
    assert model.mask.tolist() == [0.0, -math.inf]


def test_weights_in_16_bits_are_averaged_in_32():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    learn = toy_learner(model=model, cbs=ll.EMA(0.999, apply_at_end=False))
    learn.add_cb(ll.Callback(before_batch=lambda cb: setattr(cb.learn, "xb", (cb.x[:, :1].bfloat16(),))))
    learn.loss_func = lambda pred, y: (pred.float() - y).square().mean()
    learn.fit(1)
    average = learn.ema.averages["weight"]
    assert average.dtype == torch.float32
    assert 0 < abs(average.item() - 1) < 0.004  # the next number of bfloat16 below 1 is 0.996


def test_a_model_without_weights_is_left_alone():
    learn = toy_learner(model=lambda x: x[:, :1], cbs=ll.EMA(0.9))
    learn.fit(1)
    assert learn.ema.averages == {}


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ll.EMA(1.0), "`decay` is 1.0; it is what each update keeps of the averages: pass 0.999, or 0 to 1."),
        (lambda: ll.SWA(30), "`start` is 30; it is a part of the training: for epoch 30 of 40 pass 30 / 40."),
        (lambda: ll.SWA(every=0), "`every` is 0; it counts updates, so pass 1 or more, or None for one per epoch."),
        (lambda: ll.SWA(bn_batches=-1), "`bn_batches` is -1; pass a number of batches, or None for all."),
    ],
)
def test_wrong_arguments_are_refused_at_once(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


def test_two_averages_on_one_learner_are_refused():
    with pytest.raises(ValueError, match=r"\[EMA, SWA\] would each put averages in the place of the other's"):
        learner(ll.EMA(), ll.SWA()).fit(1)


def test_there_is_nothing_to_apply_before_a_fit():
    learn = learner(ll.EMA())
    with pytest.raises(RuntimeError, match="EMA has no averages now"), learn.ema.applied():
        pass
