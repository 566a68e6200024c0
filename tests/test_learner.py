"""The Learner: what its arguments do, what it refuses, and the verbs that people type."""

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastcore.basics import noop
from torch import nn

import learnloop as ll
from learnloop.data.loaders import TensorLoader
from learnloop.testing import EventLog, toy_learner


def two_groups(model):
    return [list(model[0].parameters()), list(model[2].parameters())]


def with_norm():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def weights(learn):
    return [p.detach().clone() for p in learn.model.parameters()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.fixture
def defaults():
    """`ll.defaults`, put back after the test."""
    former = copy.copy(vars(ll.defaults))
    yield ll.defaults
    vars(ll.defaults).update(former)


# Each argument has an effect


def test_without_arguments_it_trains_with_adam_and_the_default_callbacks(capsys):
    learn = ll.Learner(toy_learner().dls, nn.Linear(2, 1), nn.MSELoss())
    learn.fit(1)
    assert isinstance(learn.opt, ll.Adam)
    assert (learn.opt_func, learn.lr, learn.wd, learn.moms) == (ll.Adam, 1e-3, None, (0.95, 0.85, 0.95))
    assert [type(cb) for cb in learn.cbs] == [ll.TrainEvalCallback, ll.Recorder, ll.ProgressCallback]
    assert capsys.readouterr().out.startswith("epoch     train_loss  valid_loss  time\n0  ")


def test_the_names_of_the_parts_are_attributes():
    dls, model, loss = toy_learner().dls, nn.Linear(2, 1), nn.L1Loss()
    learn = ll.Learner(dls, model, loss, default_cbs=False)
    assert (learn.dls, learn.model, learn.loss_func) == (dls, model, loss)


def test_the_loss_of_the_data_is_taken_where_none_is_passed():
    dls, loss = toy_learner().dls, nn.L1Loss()
    dls.loss_func = loss
    assert ll.Learner(dls, nn.Linear(2, 1), default_cbs=False).loss_func is loss


def test_lr_is_the_rate_of_a_fit_that_gets_none():
    learn = toy_learner(lr=0.03)
    learn.fit(1)
    assert set(learn.recorder.lrs) == {0.03}


def test_a_rate_of_the_fit_is_for_that_fit_only():
    learn = toy_learner(lr=0.03)
    learn.fit(1, lr=0.5)
    assert set(learn.recorder.lrs) == {0.5}
    learn.fit(1)
    assert set(learn.recorder.lrs) == {0.03}


def test_a_slice_spreads_the_rate_over_the_groups():
    learn = toy_learner(splitter=two_groups)
    learn.fit(1, lr=slice(1e-3, 1e-1))
    assert [h["lr"] for h in learn.opt.hypers] == pytest.approx([1e-3, 1e-1])
    learn.fit(1, lr=slice(1e-1))
    assert [h["lr"] for h in learn.opt.hypers] == pytest.approx([1e-2, 1e-1])


def test_the_splitter_makes_the_groups():
    learn = toy_learner(splitter=two_groups)
    learn.create_opt()
    assert [[p.shape for p in group] for group in learn.opt.param_lists] == [[(4, 2), (4,)], [(1, 4), (1,)]]


def test_a_callback_is_passed_alone_or_in_a_list_as_instance_or_class():
    assert len(toy_learner(cbs=EventLog).cbs) == len(toy_learner(cbs=[EventLog()]).cbs) == 3


def test_metrics_are_passed_alone_or_in_a_list_and_set_later():
    learn = toy_learner(metrics=ll.accuracy)
    assert [m.name for m in learn.metrics] == ["accuracy"]
    learn.metrics = [ll.error_rate, ll.AvgLoss]
    assert [m.name for m in learn.metrics] == ["error_rate", "loss"]
    learn.metrics = None
    assert list(learn.metrics) == []


def test_files_go_below_the_path_or_that_of_the_data(tmp_path):
    assert toy_learner(path=tmp_path, model_dir="here").path == tmp_path
    assert toy_learner(model_dir="here").model_dir == "here"
    dls = ll.DataLoaders([(torch.ones(1), torch.ones(1))], path=tmp_path / "data")
    assert ll.Learner(dls, noop, noop, default_cbs=False).path == tmp_path / "data"
    assert ll.Learner(SimpleNamespace(train=[]), noop, noop, default_cbs=False).path == Path(".")


def test_wd_is_the_weight_decay_of_a_fit_that_gets_none():
    learn = toy_learner(wd=0.3)
    learn.fit(1)
    assert learn.opt.hypers[-1]["wd"] == 0.3
    learn.fit(1, wd=0.1)
    assert learn.opt.hypers[-1]["wd"] == 0.1


@pytest.mark.parametrize(("wd_bn_bias", "decayed"), [(False, ["0.weight", "2.weight"]), (True, None)])
def test_biases_and_normalization_layers_decay_on_request_only(wd_bn_bias, decayed):
    learn = toy_learner(model=with_norm(), wd_bn_bias=wd_bn_bias)
    learn.create_opt()
    names = [n for n, p in learn.model.named_parameters() if learn.opt.state[p].get("do_wd", True)]
    assert names == (decayed or [n for n, _ in learn.model.named_parameters()])


@pytest.mark.parametrize(("train_bn", "trained"), [(True, ["1.weight", "1.bias"]), (False, [])])
def test_normalization_layers_of_frozen_groups_are_trained_unless_told_otherwise(train_bn, trained):
    learn = toy_learner(
        model=with_norm(),
        train_bn=train_bn,
        splitter=lambda m: [[*m[0].parameters(), *m[1].parameters()], list(m[2].parameters())],
    )
    learn.create_opt()
    learn.opt.freeze_to(1)
    frozen_part = [n for n, p in learn.model.named_parameters() if p.requires_grad and not n.startswith("2")]
    assert frozen_part == trained


def test_moms_is_the_momentum_of_one_cycle():
    learn = toy_learner(n_train=8, moms=(0.9, 0.8, 0.7))
    learn.fit_one_cycle(1)
    assert learn.recorder.hps["mom"] == [0.9]
    learn.fit_one_cycle(1, moms=(0.6, 0.5, 0.4))
    assert learn.recorder.hps["mom"] == [0.6]


def test_one_cycle_takes_the_highest_rate_and_its_divisors():
    learn = toy_learner(n_train=32)
    learn.fit_one_cycle(1, 0.2, div=4.0, div_final=10.0, pct_start=0.5)
    assert learn.recorder.hps["lr"] == pytest.approx([0.05, 0.125, 0.2, 0.11])
    learn.fit_one_cycle(1, pct_start=0.5, div=1.0)
    assert max(learn.recorder.hps["lr"]) == pytest.approx(0.1)  # the learner's own


def test_one_cycle_leaves_the_rate_of_the_learner_alone():
    learn = toy_learner(lr=0.1)
    learn.fit_one_cycle(1, 0.5)
    assert learn.lr == 0.1


def test_one_cycle_runs_over_a_number_of_steps():
    learn = toy_learner()
    learn.fit_one_cycle(n_step=6, valid_every=3)
    assert (len(learn.recorder.hps["lr"]), len(learn.recorder.values)) == (6, 2)


def test_there_may_be_no_callback_at_all():
    learn = toy_learner(default_cbs=False)
    before = weights(learn)
    learn.fit(1)
    assert list(learn.cbs) == []
    assert not same(weights(learn), before)


def test_defaults_are_read_when_a_learner_is_made(defaults):
    defaults.lr, defaults.wd, defaults.moms = 0.5, 0.2, (0.8, 0.7, 0.8)
    defaults.callbacks = [ll.Recorder]
    learn = ll.Learner(toy_learner().dls, nn.Linear(2, 1), nn.MSELoss())
    assert (learn.lr, learn.wd, learn.moms) == (0.5, 0.2, (0.8, 0.7, 0.8))
    assert [type(cb) for cb in learn.cbs] == [ll.Recorder]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dls": [1, 2]}, r"`dls` is a list; put the loaders together first: `DataLoaders\(train, valid\)`"),
        ({"dls": None}, "`dls` is a NoneType"),
        ({"model": "resnet"}, "`model` is a str, which cannot be called"),
        ({"loss_func": nn.MSELoss}, r"`loss_func` is the class MSELoss; pass an instance: `MSELoss\(\)`"),
        ({"loss_func": 3}, "`loss_func` is a int, which cannot be called"),
        ({"cbs": [print]}, "is no Callback; `cbs` takes instances or subclasses of Callback"),
        ({"cbs": "Recorder"}, "is no Callback"),
        ({"metrics": ["accuracy"]}, "`metrics` holds 'accuracy', which is no metric"),
    ],
)
def test_a_wrong_part_is_refused_when_the_learner_is_made(arguments, message):
    parts = {"dls": toy_learner().dls, "model": nn.Linear(2, 1), "loss_func": nn.MSELoss(), **arguments}
    with pytest.raises(TypeError, match=message):
        ll.Learner(**parts)


def test_an_object_with_handlers_that_is_no_callback_gets_a_hint():
    class Clip:
        def after_backward(self):
            pass

    with pytest.raises(TypeError, match="Derive the class from `Callback`"):
        toy_learner(cbs=Clip())


def test_a_callback_that_would_hide_a_part_of_the_learner_is_refused():
    class Model(ll.Callback):
        pass

    with pytest.raises(ValueError, match=r"`Model` would hide `learn\.model`"):
        toy_learner(cbs=Model())


def test_a_missing_loss_is_named_at_the_first_batch():
    learn = toy_learner(loss_func=None)
    with pytest.raises(ValueError, match="`loss_func` is None, and the output of `Sequential` has no `loss`"):
        learn.fit(1)
    assert_clean(learn)


def test_a_loss_that_is_no_number_is_named():
    learn = toy_learner(loss_func=nn.MSELoss(reduction="none"))
    with pytest.raises(ValueError, match=r"`loss_func` returned shape \(8, 1\); backward needs one number"):
        learn.fit(1)
    assert_clean(learn)


def test_a_batch_that_the_model_cannot_take_gives_the_models_own_error():
    learn = toy_learner(model=nn.Linear(5, 1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        learn.fit(1)
    assert_clean(learn)


def test_an_empty_loader_is_named_before_anything_begins():
    log = EventLog()
    learn = toy_learner(cbs=log)
    learn.dls = ll.DataLoaders(TensorLoader(torch.ones(3, 2), torch.ones(3, 1), bs=8, drop_last=True), device="cpu")
    with pytest.raises(ValueError, match="the training loader is empty: TensorLoader has 0 batches"):
        learn.fit(1)
    assert log.events == ["after_create"]
    assert learn.opt is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"pass either `fit\(n_epoch\)` or `fit\(n_step=…, valid_every=…\)`"),
        ({"n_epoch": 1, "n_step": 1}, ValueError, "pass either"),
        ({"n_epoch": -1}, ValueError, "`n_epoch=-1`: pass 0 or more"),
        ({"n_epoch": 1.5}, TypeError, "`n_epoch=1.5`: pass a whole number"),
        ({"n_epoch": "2"}, TypeError, "`n_epoch='2'`: pass a whole number"),
        ({"n_epoch": True}, TypeError, "`n_epoch=True`"),
        ({"n_epoch": 1, "start_epoch": -1}, ValueError, "`start_epoch=-1`"),
        ({"n_step": 0}, ValueError, "`n_step=0`: pass 1 or more"),
        ({"n_step": 4, "valid_every": 0}, ValueError, "`valid_every=0`"),
        ({"n_epoch": 1, "valid_every": 2}, ValueError, "`valid_every` goes with `n_step`"),
        ({"n_epoch": 1, "cbs": [3]}, TypeError, "`3` is no Callback"),
    ],
)
def test_wrong_values_to_fit_are_refused_before_anything_begins(arguments, error, message):
    log = EventLog()
    learn = toy_learner(cbs=log)
    before = weights(learn)
    with pytest.raises(error, match=message):
        learn.fit(**arguments)
    assert log.events == ["after_create"]
    assert learn.opt is None
    assert same(weights(learn), before)


def assert_clean(learn):
    """Nothing of a run is left, and the learner can be used."""
    assert (learn.task, learn.batch, learn.xb, learn.yb, learn.pred) == (None, None, (None,), (None,), None)
    assert not any(cb.learn is not learn for cb in learn.cbs)
    learn.model = nn.Linear(2, 1)
    learn.loss_func = nn.MSELoss()
    learn.fit(1, reset_opt=True)


def test_callbacks_that_contradict_each_other_leave_the_learner_as_it_was():
    class Early(ll.Callback):
        run_before = "Late"

    class Late(ll.Callback):
        run_before = Early

    learn = toy_learner()
    with pytest.raises(ll.OrderingError):
        learn.fit(1, cbs=[Early(), Late()])
    assert [type(cb) for cb in learn.cbs] == [ll.TrainEvalCallback, ll.Recorder]
    assert learn.task is None
    learn.fit(1)


def test_after_an_error_the_callbacks_of_the_fit_are_gone():
    def fails(cb):
        raise ZeroDivisionError

    learn = toy_learner()
    cb = ll.Callback(after_loss=fails)
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, cbs=cb)
    assert cb not in learn.cbs
    assert cb.learn is None
    assert_clean(learn)


# Attributes


def test_what_the_learner_does_not_have_is_read_from_the_model():
    model = nn.Linear(2, 1)
    model.temperature = 0.7
    learn = toy_learner(model=model)
    assert learn.temperature == 0.7
    assert learn.weight is model.weight


def test_what_neither_has_is_an_attribute_error_with_the_nearest_spelling():
    learn = toy_learner()
    assert not hasattr(learn, "lr_fnd")
    with pytest.raises(AttributeError) as caught:
        learn.loss_fnc  # noqa: B018
    assert str(caught.value) == (
        "`loss_fnc` is neither on the learner nor on the model `Sequential`. Did you mean `loss_func`?"
    )


def test_smooth_loss_is_there_once_a_batch_was_recorded():
    learn = toy_learner()
    assert not hasattr(learn, "smooth_loss")
    with pytest.raises(AttributeError, match="`smooth_loss` is there once a training batch was recorded"):
        learn.smooth_loss  # noqa: B018
    learn.fit(1)
    assert learn.smooth_loss == learn.recorder.losses[-1]


def test_a_callback_is_found_by_its_class():
    learn = toy_learner(cbs=[EventLog(), EventLog()])
    assert learn[ll.Recorder] is learn.recorder
    assert list(learn[EventLog]) == list(learn.cbs[2:])
    with pytest.raises(KeyError, match="no ProgressCallback among the callbacks"):
        learn[ll.ProgressCallback]


def test_there_is_no_final_record_before_the_first():
    learn = toy_learner()
    assert not hasattr(learn, "final_record")
    learn.fit(1)
    assert len(learn.final_record) == 2


def test_its_representation_names_model_data_and_callbacks():
    assert repr(toy_learner()) == (
        "Learner(Sequential, DataLoaders(4 batches, 2 batches, bs=8, device=cpu), cbs=[TrainEvalCallback, Recorder])"
    )


# The optimizer


def test_the_optimizer_is_made_by_the_first_fit_and_kept():
    learn = toy_learner()
    assert learn.opt is None
    learn.fit(1)
    opt = learn.opt
    learn.fit(1)
    assert learn.opt is opt
    learn.fit(1, reset_opt=True)
    assert learn.opt is not opt


def test_the_rate_of_a_partial_overrides_that_of_the_learner():
    learn = toy_learner(opt_func=partial(ll.SGD, lr=0.7), lr=0.1)
    learn.fit(1)
    assert set(learn.recorder.lrs) == {0.7}
    assert learn.lr == 0.7


def test_a_partial_of_other_hypers_keeps_them():
    learn = toy_learner(opt_func=partial(ll.Adam, sqr_mom=0.9, wd=0.2))
    learn.fit(1)
    assert {"sqr_mom": 0.9, "wd": 0.2, "lr": 0.1}.items() <= dict(learn.opt.hypers[0]).items()


@pytest.mark.parametrize(
    "opt_func",
    [
        torch.optim.SGD,
        partial(torch.optim.SGD, momentum=0.9),
        partial(ll.OptimWrapper, opt=torch.optim.AdamW),
    ],
)
def test_a_class_of_torch_has_the_same_face(opt_func):
    learn = toy_learner(opt_func=opt_func, lr=0.05)
    before = weights(learn)
    learn.fit(1)
    assert isinstance(learn.opt, ll.OptimWrapper)
    assert learn.opt.hypers[-1]["lr"] == 0.05
    assert not same(weights(learn), before)


def test_a_frozen_model_is_run_through_and_left_as_it_is():
    model = nn.Linear(2, 1).requires_grad_(False)
    learn = toy_learner(model=model)
    before = weights(learn)
    learn.fit(1)
    assert same(weights(learn), before)
    assert len(learn.recorder.raw_losses) == 4


def test_a_model_without_parameters_can_be_fitted_and_validated():
    learn = toy_learner(model=lambda x: x[:, :1])
    learn.fit(1)
    assert (learn.train_iter, learn.opt_iter) == (4, 0)
    assert len(learn.validate()) == 1


def test_an_unknown_argument_of_the_optimizer_is_its_own_error():
    learn = toy_learner(opt_func=partial(ll.SGD, momentun=0.9))
    with pytest.raises(TypeError, match="momentun"):
        learn.fit(1)
    assert learn.opt is None
    assert learn.task is None


# Fitting


def test_a_fit_makes_the_loss_smaller():
    learn = toy_learner()
    learn.fit(20)
    assert learn.recorder.values[-1][1] < 0.1 * learn.recorder.values[0][1]


def test_fit_counts_epochs_batches_and_updates():
    learn = toy_learner(n_train=24)
    learn.fit(2)
    assert (learn.n_epoch, learn.epoch, learn.train_iter, learn.opt_iter) == (2, 1, 6, 6)
    assert learn.pct_train == pytest.approx(1)


def test_fit_of_steps_counts_updates_and_validates_in_between():
    seen = []
    learn = toy_learner(n_train=24, cbs=ll.Callback(before_validate=lambda cb: seen.append((cb.epoch, cb.opt_iter))))
    learn.fit(n_step=7, valid_every=3)
    assert seen == [(0, 3), (1, 6), (2, 7)]
    assert (learn.n_epoch, learn.train_iter, learn.opt_iter, learn.pct_train) == (3, 7, 7, 1.0)


def test_fit_begins_at_start_epoch():
    learn = toy_learner()
    learn.fit(3, start_epoch=2)
    assert [row["epoch"] for row in learn.recorder.history] == [2]


def test_a_fit_of_no_epoch_changes_nothing():
    learn = toy_learner()
    before = weights(learn)
    learn.fit(0)
    assert same(weights(learn), before)
    assert list(learn.recorder.values) == []


def test_one_batch_by_hand_trains_on_it():
    learn = toy_learner()
    learn.create_opt()
    before = weights(learn)
    learn.training = True
    learn.one_batch(0, learn.dls.one_batch())
    assert not same(weights(learn), before)
    learn.training = False
    after = weights(learn)
    learn.one_batch(0, learn.dls.one_batch())
    assert same(weights(learn), after)


def test_nothing_can_be_resumed_where_nothing_was_stopped():
    learn = toy_learner()
    learn.fit(1)
    with pytest.raises(RuntimeError, match="there is nothing to resume"):
        learn.resume()


# Looking


def test_validate_returns_loss_and_metrics():
    learn = toy_learner(metrics=[lambda pred, y: (pred - y).abs().mean(), ll.AvgLoss()])
    loss, error, again = learn.validate()
    x, y = (torch.cat(parts) for parts in zip(*learn.dls.valid, strict=True))
    with torch.no_grad():
        pred = learn.model(x)
    assert loss == again == pytest.approx(((pred - y) ** 2).mean().item())
    assert error == pytest.approx((pred - y).abs().mean().item())


def test_validate_takes_another_loader_by_number_or_itself():
    learn = toy_learner(n_train=16, n_valid=8)
    assert learn.validate(dl=learn.dls.valid) == learn.validate()
    assert learn.validate(ds_idx=0)[0] == pytest.approx(learn.validate(dl=learn.dls.train)[0])


def test_validate_without_a_validation_loader_says_what_to_pass():
    with pytest.raises(
        ValueError, match=r"there is no validation loader: pass one to DataLoaders, or `validate\(dl=…\)`"
    ):
        toy_learner(n_valid=0).validate()


def test_callbacks_for_one_validation_leave_with_it():
    log = EventLog(cleanups=False)
    learn = toy_learner(n_valid=8)
    learn.validate(cbs=log)
    log.check("""
        before_fit before_epoch before_validate
        before_batch after_pred after_loss after_batch
        after_validate after_epoch after_fit
    """)
    assert log not in learn.cbs


def test_with_learn_stands_between_the_events_of_fit_and_epoch():
    log = EventLog()
    with toy_learner(cbs=log) as learn:
        assert isinstance(learn, ll.Learner)
        assert log.events == ["after_create", "before_fit", "before_epoch"]
    assert log.events[3:] == ["after_epoch", "cleanup_epoch", "after_fit", "cleanup_fit"]
    assert learn.task is None


def test_an_error_inside_with_learn_leaves_it_with_cleanups_only():
    log = EventLog()
    with pytest.raises(ZeroDivisionError), toy_learner(cbs=log):
        raise ZeroDivisionError
    assert log.events[3:] == ["cleanup_epoch", "cleanup_fit"]


def test_the_training_loop_is_shown_with_who_listens(capsys):
    toy_learner().show_training_loop()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "after_create"
    assert shown[1].split(None, 1) == ["before_fit", "[TrainEvalCallback, Recorder]"]
    assert "      before_batch" in shown
    assert shown[-1].split(None, 1) == ["cleanup_fit", "[TrainEvalCallback]"]


def test_a_function_of_inputs_and_targets_makes_a_callback():
    learn = toy_learner(cbs=ll.before_batch_cb(lambda cb, xb, yb: ((xb[0] * 0,), yb)))
    seen = []
    learn.add_cb(ll.Callback(after_pred=lambda cb: seen.append(cb.x.abs().sum().item())))
    learn.fit(1)
    assert set(seen) == {0.0}


def test_batches_are_detached_for_the_host():
    batch = {"pred": torch.ones(2, requires_grad=True) * 2}
    assert not toy_learner().to_detach(batch)["pred"].requires_grad


def test_no_mbar_and_no_logging_are_for_the_block_only():
    learn = toy_learner()
    learn.create_mbar, learn.logger = True, print
    with learn.no_mbar(), learn.no_logging():
        assert (learn.create_mbar, learn.logger) == (False, noop)
    assert (learn.create_mbar, learn.logger) == (True, print)


# State


def test_a_state_brings_back_weights_optimizer_and_record():
    learn = toy_learner(opt_func=ll.Adam)
    learn.fit(2)
    fresh = toy_learner(opt_func=ll.Adam)
    fresh.load_state_dict(learn.state_dict())
    assert same(weights(fresh), weights(learn))
    assert fresh.recorder.history == learn.recorder.history

    for each in (learn, fresh):
        each.fit(1)
    assert same(weights(fresh), weights(learn))


def refused(learn, state):
    """The message of a state that is refused; nothing of the learner moves."""
    before, opt = weights(learn), learn.opt
    with pytest.raises(ValueError) as caught:
        learn.load_state_dict(state)
    assert same(weights(learn), before)
    assert learn.opt is opt
    return str(caught.value)


@pytest.mark.parametrize("state", [{}, {"model": {}}, None, [1]])
def test_what_is_no_state_is_refused(state):
    assert refused(toy_learner(), state) == (
        "this is no state of a learner: `load_state_dict` takes what `state_dict()` returned."
    )


def test_a_state_of_another_model_is_refused_with_what_differs():
    state = toy_learner(model=nn.Linear(2, 1)).state_dict()
    message = refused(toy_learner(model=nn.Linear(2, 3, bias=False)), state)
    assert message.startswith("the state does not fit this learner: ")
    assert "`bias` saved but not in the model" in message
    assert "`weight` is [1, 2] saved and [3, 2] here" in message


def test_a_state_of_a_callback_that_is_not_there_is_refused():
    class Counts(ll.Callback):
        _stateattrs = ("n",)

        def before_fit(self):
            self.n = 1

    learn = toy_learner(cbs=Counts())
    learn.fit(1)
    message = refused(toy_learner(), learn.state_dict())
    assert "callback Counts has a saved state but is not on the learner" in message


def test_a_state_is_not_loaded_into_a_run_that_is_active():
    state = toy_learner().state_dict()
    with pytest.raises(RuntimeError, match="`load_state_dict` was called while a run is active"):
        toy_learner(cbs=ll.Callback(before_epoch=lambda cb: cb.learn.load_state_dict(state))).fit(1)


def test_a_state_that_cannot_be_stored_is_named_before_the_first_batch():
    class Keeps(ll.Callback):
        _stateattrs = ("function",)

        def before_fit(self):
            self.function = print

    learn = toy_learner(cbs=Keeps())
    with pytest.raises(TypeError, match=r"`Keeps\.function` is a builtin_function_or_method, which cannot be stored"):
        learn.fit(1)
    assert learn.train_iter == 0


# In a cell


def test_in_a_cell_a_learner_shows_what_it_is_made_of():
    learn = toy_learner(metrics=[mae_of], loss_func=lambda pred, y: ((pred - y) ** 2).mean())
    shown = learn._repr_html_()
    assert "<td>model</td><td>Sequential, 17 parameters</td>" in shown
    assert "<td>loss</td><td>&lt;lambda&gt;</td>" in shown
    assert "<td>optimizer</td><td>made at the first fit</td>" in shown
    assert "<td>metrics</td><td>mae_of</td>" in shown
    assert "last epoch" not in shown
    learn.fit(1)
    assert f"valid_loss {learn.recorder.history[0]['valid_loss']:.6f}" in learn._repr_html_()
    assert "<td>optimizer</td><td>SGD, 1 parameter group</td>" in learn._repr_html_()


def mae_of(pred, y):
    return (pred - y).abs().mean()


def test_a_learner_of_a_plain_function_shows_itself_too():
    assert "<td>model</td><td>function, 0 parameters</td>" in toy_learner(model=lambda x: x[:, :1])._repr_html_()
