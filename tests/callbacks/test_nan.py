"""TerminateOnNaNCallback: the fit ends before a bad loss reaches anything, and says where it arose."""

import math
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import learnloop as ll
from learnloop.testing import EventLog, check_callback, toy_learner
from tests.resuming import assert_resumes_exactly


class Root(nn.Module):
    """The square root: no number where its input is negative."""

    def forward(self, x):
        return x.sqrt()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def spoil(number, value=math.nan, event="after_loss"):
    """A callback that makes the loss of one training batch bad."""

    def handler(cb):
        if cb.training and cb.learn.train_iter == number:
            cb.learn.loss_grad = cb.learn.loss_grad * value

    return ll.Callback(**{event: handler})


def state_of(learn):
    return {name: t.tolist() for name, t in learn.model.state_dict().items()}


def states_before_each_batch(seed):
    """The states of the model in a training without the callback."""
    states = []
    note = ll.Callback(before_batch=lambda cb: states.append(state_of(cb.learn)) if cb.training else None)
    learn = toy_learner(model=network(), cbs=note)
    torch.manual_seed(seed)
    learn.fit(1)
    return states


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_fit_ends_before_a_bad_loss_reaches_weights_or_running_statistics(value):
    learn = toy_learner(model=network(), cbs=[ll.TerminateOnNaNCallback(), spoil(2, value)])
    torch.manual_seed(1)
    learn.fit(1)
    assert state_of(learn) == states_before_each_batch(seed=1)[2]
    assert (learn.train_iter, learn.opt_iter) == (2, 2)
    assert all(p.grad is None for p in learn.model.parameters())


def test_buffers_that_a_model_replaces_or_empties_are_put_back_too():
    class Caching(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.register_buffer("last", torch.zeros(2))
            self.register_buffer("cache", torch.ones(1))

        def forward(self, x):
            if self.training:
                self.last, self.cache = x.mean(0), None
            return super().forward(x)

    means = []
    note = ll.Callback(before_batch=lambda cb: means.append(cb.x.mean(0)))
    learn = toy_learner(model=Caching(), cbs=[ll.TerminateOnNaNCallback(), note, spoil(2)])
    learn.fit(1)
    assert torch.equal(learn.model.last, means[1])


def test_a_loss_that_is_only_recorded_counts_too(capsys):
    def spoil_record(cb):
        cb.learn.loss = torch.tensor(math.nan)

    learn = toy_learner(cbs=[ll.TerminateOnNaNCallback, ll.Callback(after_loss=spoil_record)])
    learn.logger = lambda row: None
    learn.fit(1)
    assert learn.opt_iter == 0
    assert "The loss is nan at epoch 0, batch 0" in capsys.readouterr().out


def test_it_is_an_orderly_end():
    log = EventLog(cleanups=False)
    learn = toy_learner(cbs=[ll.TerminateOnNaNCallback, spoil(0), log])
    log.events.clear()
    learn.fit(3)
    assert log.events == [
        *("before_fit", "before_epoch", "before_train", "before_batch", "after_pred", "after_loss"),
        *("after_cancel_fit", "after_fit"),
    ]


def test_a_handler_of_after_loss_may_still_mend_the_loss():
    mend = ll.Callback(after_loss=lambda cb: setattr(cb.learn, "loss_grad", cb.learn.loss_grad.nan_to_num()))
    mend.order = 100
    learn = toy_learner(cbs=[ll.TerminateOnNaNCallback, spoil(1), mend])
    learn.fit(1)
    assert learn.opt_iter == 4


def test_bad_losses_of_a_validation_are_let_be():
    def spoil_valid(cb):
        if not cb.training:
            cb.learn.loss = torch.tensor(math.nan)

    learn = toy_learner(cbs=[ll.TerminateOnNaNCallback, ll.Callback(after_loss=spoil_valid)])
    learn.fit(2)
    assert learn.opt_iter == 8


@pytest.mark.parametrize(("every", "batches"), [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_every_says_how_often_it_looks(every, batches):
    def spoil_from_1(cb):
        if cb.learn.train_iter >= 1:
            cb.learn.loss_grad = cb.learn.loss_grad * math.nan

    cbs = [ll.TerminateOnNaNCallback(every), ll.Callback(after_loss=spoil_from_1)]
    learn = toy_learner(n_train=64, cbs=cbs)
    learn.fit(1)
    assert learn.train_iter == batches


def test_the_batch_is_kept_as_a_copy_until_the_next_fit():
    guard, seen = ll.TerminateOnNaNCallback(), []
    learn = toy_learner(cbs=[guard, spoil(1), ll.Callback(before_batch=lambda cb: seen.append((cb.x, cb.y)))])
    learn.fit(1)
    (xb,), (yb,) = guard.bad_batch
    assert torch.equal(xb, seen[1][0]) and torch.equal(yb, seen[1][1])
    assert xb.data_ptr() != seen[1][0].data_ptr()

    learn.remove_cb(learn.cbs[-2])
    learn.fit(1)
    assert (guard.bad_batch, guard.bad_layer) == (None, None)


def bad_layer(model, capsys, **kwargs):
    """What is named and said after a fit whose loss is bad in the first batch."""
    guard = ll.TerminateOnNaNCallback()
    learn = toy_learner(model=model, cbs=guard, **kwargs)
    learn.logger = lambda row: None
    learn.fit(1)
    return guard.bad_layer, capsys.readouterr().out


def test_the_first_layer_whose_output_is_not_finite_is_named(capsys):
    model = nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.Tanh(), Root()), nn.Linear(4, 1))
    name, text = bad_layer(model, capsys)
    assert name == "1.1"
    assert text == (
        "The loss is nan at epoch 0, batch 0: the first output that is not finite is that of `1.1` (Root). "
        "The fit ends here.\n"
    )


def test_what_arises_between_layers_is_named_by_the_layer_that_gets_it(capsys):
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.after(self.before(x).log())

    name, text = bad_layer(Between(), capsys)
    assert name == "after"
    assert "it arose on the way into `after` (Linear)" in text


def test_a_bad_loss_of_finite_outputs_is_one_of_the_loss(capsys):
    name, text = bad_layer(None, capsys, loss_func=lambda pred, y: (pred - y).mean() * math.inf)
    assert name is None
    assert re.search(r"The loss is -?inf at .*: every layer's output is finite, so it arose in the loss", text)


def test_a_bad_batch_is_said_to_be_one(capsys):
    learn = toy_learner(cbs=ll.TerminateOnNaNCallback)
    learn.logger = lambda row: None
    learn.dls.train.tensors[0][:] = math.inf
    learn.fit(1)
    assert "the batch itself is not finite" in capsys.readouterr().out


def test_a_model_that_refuses_a_second_pass_hides_nothing(capsys):
    class Once(nn.Linear):
        n_calls = 0

        def forward(self, x):
            self.n_calls += 1
            if self.n_calls > 1:
                raise RuntimeError("only once")
            return super().forward(x) * math.nan

    name, text = bad_layer(Once(2, 1), capsys)
    assert name is None
    assert "the forward pass could not be repeated to find the layer (RuntimeError('only once'))" in text


def test_the_search_moves_no_random_generator_and_leaves_no_hook():
    def state_after(model):
        torch.manual_seed(3)
        learn = toy_learner(model=model, cbs=[ll.TerminateOnNaNCallback, spoil(0)])
        learn.fit(1)
        assert not any(m._forward_hooks for m in learn.model.modules())
        return torch.get_rng_state().tolist()

    def dropout(n):
        return nn.Sequential(nn.Linear(2, 4), *[nn.Dropout(0.5)] * n, nn.Linear(4, 1))

    torch.manual_seed(3)
    learn = toy_learner(model=dropout(1), cbs=ll.Callback(after_loss=lambda cb: cancel()))
    learn.fit(1)
    assert state_after(dropout(1)) == torch.get_rng_state().tolist()


def cancel():
    raise ll.CancelFitException


def test_within_no_logging_it_is_silent(capsys):
    toy_learner(cbs=[ll.TerminateOnNaNCallback, spoil(0)]).fit(1)
    assert capsys.readouterr().out == ""


def test_in_mixed_precision_the_layer_is_looked_for_in_the_same_format(capsys):
    class Big(nn.Module):
        def forward(self, x):
            return x * 60000.0 * 60000.0  # infinite in float16 alone

    guard = ll.TerminateOnNaNCallback()
    model = nn.Sequential(nn.Linear(2, 4), Big(), nn.Linear(4, 1))
    toy_learner(model=model, cbs=[guard, ll.MixedPrecision()]).fit(1)
    assert guard.bad_layer == "1"


class HostReads(TorchDispatchMode):
    """Counts how often a tensor is brought to the host as a number."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("every", "n"), [(1, 4), (2, 2), (4, 1)])
def test_each_look_waits_for_the_device_once(every, n):
    learn = toy_learner(n_valid=0, default_cbs=False, cbs=ll.TerminateOnNaNCallback(every))
    learn.fit(1)
    with HostReads() as reads:
        learn.fit(1)
    without = toy_learner(n_valid=0, default_cbs=False)
    without.fit(1)
    with HostReads() as others:
        without.fit(1)
    assert reads.n - others.n == n


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_a_number_of_batches_that_is_none_is_refused(every):
    with pytest.raises(ValueError, match=re.escape(f"`every={every!r}`: pass a whole number")):
        ll.TerminateOnNaNCallback(every)


def test_it_keeps_every_promise():
    check_callback(ll.TerminateOnNaNCallback)


def test_it_changes_nothing_where_all_is_well_and_goes_on_exactly():
    def fitted(*cbs):
        torch.manual_seed(0)
        learn = toy_learner(model=network(), cbs=cbs)
        learn.fit(2)
        return state_of(learn)

    assert fitted(ll.TerminateOnNaNCallback()) == fitted()
    assert_resumes_exactly(lambda: toy_learner(model=network(), cbs=ll.TerminateOnNaNCallback()), every=5)
