"""MixedPrecision: its numbers are those of the same loop written by hand with torch's autocast and GradScaler."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import learnloop as ll
from learnloop.testing import EventLog, check_callback, toy_learner
from tests.resuming import assert_resumes_exactly

MODES = ["fp16", "bf16"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def learner(*cbs, n_train=64, **kwargs):
    """Eight batches an epoch; ten epochs of it have steps that overflow in float16 at the default scale."""
    return toy_learner(cbs=cbs, n_train=n_train, **kwargs)


def weights(learn):
    return [p.tolist() for p in learn.model.parameters()]


def by_hand(mode, n_epoch, max_norm=None, n_acc=1, share=1.0, device="cpu", **scaling):
    """Weights, losses and scale of the loop as torch's documentation writes it, over the batches of `learner`."""
    learn = learner()
    batches = batches_of(n_epoch)
    model, opt = learn.model.to(device), torch.optim.SGD(learn.model.parameters(), lr=0.1)
    scaler, losses = torch.amp.GradScaler(device, enabled=mode == "fp16", **scaling), []
    for i, (x, y) in enumerate(batches):
        with torch.autocast(device, dtype=DTYPES[mode]):
            loss = nn.functional.mse_loss(model(x.to(device)).float(), y.to(device))
        losses.append(loss.item())
        scaler.scale(loss * share).backward()
        if (i + 1) % n_acc == 0:
            scaler.unscale_(opt)
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    return [p.tolist() for p in model.parameters()], losses, scaler.get_scale()


def batches_of(n_epoch):
    """The batches that `learner` trains on."""
    seen = []
    torch.manual_seed(0)
    learner(ll.Callback(before_batch=lambda cb: seen.append((cb.x, cb.y)) if cb.training else None)).fit(n_epoch)
    return seen


def fitted(learn, n_epoch=1):
    torch.manual_seed(0)
    learn.fit(n_epoch)
    return learn


class SpoilGradient(ll.Callback):
    """An infinite gradient in one batch."""

    def __init__(self, at, value=math.inf):
        self.at, self.value = at, value

    def after_backward(self):
        if self.iter == self.at:
            next(self.model.parameters()).grad.view(-1)[0] = self.value


class HostReads(TorchDispatchMode):
    """Counts tensors that are brought to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# The promises of every callback


@pytest.mark.filterwarnings("ignore:.* steps were skipped")
@pytest.mark.parametrize("mode", MODES)
def test_it_keeps_every_promise(mode):
    assert check_callback(lambda: ll.MixedPrecision(mode)).broken == {}


@pytest.mark.parametrize("mode", MODES)
def test_a_fit_stopped_at_any_event_and_resumed_ends_as_if_it_had_not_been_stopped(mode):
    def make():
        spoil = [SpoilGradient(at=1)] if mode == "fp16" else []
        return learner(ll.MixedPrecision(mode, init_scale=64.0, growth_interval=2), *spoil, n_train=24, n_valid=8)

    assert_resumes_exactly(make)


def test_a_fit_is_resumed_in_the_middle_of_an_accumulation():
    mixed = partial(ll.MixedPrecision, init_scale=64.0, growth_interval=2)
    assert_resumes_exactly(lambda: learner(mixed(), ll.GradientAccumulation(16), n_train=32, n_valid=8), every=3)


# The numbers


@pytest.mark.parametrize("mode", MODES)
def test_it_trains_as_a_loop_by_hand(mode):
    learn = fitted(learner(ll.MixedPrecision(mode)), 3)
    by_hand_weights, losses, _ = by_hand(mode, 3)
    assert learn.recorder.raw_losses == losses
    assert weights(learn) == by_hand_weights
    assert weights(learn) != weights(fitted(learner(), 3))


def test_steps_that_overflow_are_skipped_and_the_scale_moves_as_by_hand():
    learn = fitted(learner(ll.MixedPrecision(init_scale=2.0**20, growth_interval=5)), 3)
    by_hand_weights, _, scale = by_hand("fp16", 3, init_scale=2.0**20, growth_interval=5)
    assert weights(learn) == by_hand_weights
    assert learn.mixed_precision.scaler.get_scale() == scale
    assert learn.mixed_precision.n_skipped == 24 - learn.opt_iter > 3


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_clipped_as_they_are_without_the_scale(mode):
    learn = fitted(learner(ll.GradientClip(0.1), ll.MixedPrecision(mode)), 2)
    assert weights(learn) == by_hand(mode, 2, max_norm=0.1)[0]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_add_up_scaled_until_the_step_and_are_clipped_then(mode):
    cbs = [ll.GradientClip(0.1), ll.GradientAccumulation(16), ll.MixedPrecision(mode, growth_interval=1)]
    learn = fitted(learner(*cbs), 2)
    assert weights(learn) == by_hand(mode, 2, max_norm=0.1, n_acc=2, share=0.5, growth_interval=1)[0]
    assert learn.opt_iter + learn.mixed_precision.n_skipped == 8


def test_gradients_that_a_later_callback_keeps_from_a_step_count_in_full_in_the_next():
    class Late(ll.Callback):
        order = 20  # after they were unscaled

        def before_step(self):
            if self.iter % 2 == 0:
                raise ll.CancelBatchException

    # No scale changes: float16 rounds differently at another one.
    learn = fitted(learner(Late(), ll.MixedPrecision(init_scale=64.0)), 2)
    assert weights(learn) == by_hand("fp16", 2, n_acc=2, init_scale=64.0)[0]


# Autocast


@pytest.mark.parametrize("mode", MODES)
def test_the_model_computes_in_16_bits_and_what_comes_out_has_32(mode):
    inside, outside = set(), set()
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    model.register_forward_hook(lambda module, inputs, output: inside.add(output.dtype))
    note = ll.Callback(after_batch=lambda cb: outside.update([cb.pred.dtype, cb.loss.dtype, cb.loss_grad.dtype]))
    fitted(learner(ll.MixedPrecision(mode), note, model=model))
    assert inside == {DTYPES[mode]}
    assert outside == {torch.float32}


class OwnLoss(nn.Module):
    """A model whose loss lies in 16 bits, as that of an operation that autocast runs in them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        pred = self.layer(x)
        return {"logits": pred, "loss": pred.T @ pred / 8}


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_the_model_computes_in_16_bits_comes_out_in_32(mode):
    inside, outside = set(), set()
    model = OwnLoss()
    model.register_forward_hook(lambda module, inputs, output: inside.add(output["loss"].dtype))
    note = ll.Callback(after_batch=lambda cb: outside.update([cb.loss.dtype, cb.loss_grad.dtype]))
    learn = learner(ll.MixedPrecision(mode, init_scale=64.0), note, model=model)
    learn.loss_func = None
    learn.fit(1)
    assert inside == {DTYPES[mode]}
    assert outside == {torch.float32}
    assert learn.opt_iter == 8


def test_autocast_covers_forward_and_loss_only():
    states = {}

    class Note(EventLog):
        def __call__(self, event_name):
            states[event_name] = torch.is_autocast_enabled("cpu")

    fitted(learner(ll.MixedPrecision("bf16"), Note(order=20)))
    open_in = {name for name, is_open in states.items() if is_open}
    assert open_in == {"before_batch", "after_pred"}


def test_a_run_nested_between_prediction_and_loss_leaves_autocast_open():
    dtypes = []

    def loss_func(pred, y):
        dtypes.append((pred.dtype, torch.is_autocast_enabled("cpu")))
        return nn.functional.mse_loss(pred, y)

    def validate(cb):
        if cb.training and cb.iter == 0:
            cb.learn.validate()
            assert torch.is_autocast_enabled("cpu")

    learn = learner(ll.MixedPrecision("bf16"), ll.Callback(after_pred=validate), loss_func=loss_func)
    learn.fit(1)
    assert set(dtypes) == {(torch.float32, True)}
    assert not torch.is_autocast_enabled("cpu")


def test_taken_off_inside_a_nested_run_it_closes_every_autocast():
    def validate(cb):
        if cb.training and cb.iter == 0:
            cb.learn.validate(cbs=ll.Callback(after_pred=lambda inner: inner.learn.to_fp32()))

    learn = learner(ll.MixedPrecision("bf16"), ll.Callback(after_pred=validate))
    learn.fit(1)
    assert not torch.is_autocast_enabled("cpu")
    assert "mixed_precision" not in vars(learn)


def test_validation_is_in_16_bits_too():
    learn = learner(ll.MixedPrecision("bf16"))
    in_16_bits = learn.validate()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*learn.dls.valid, strict=True))
        by_hand = nn.functional.mse_loss(learn.model(x).float(), y).item()
    assert in_16_bits == pytest.approx(by_hand, rel=1e-6)
    assert in_16_bits != learn.to_fp32().validate()[0]


# Steps that overflow


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_with_a_gradient_that_is_not_finite_is_cancelled_and_counted(value):
    log = EventLog("iter", "opt_iter", cleanups=False, order=20)
    learn = toy_learner(n_train=24, n_valid=0, cbs=[ll.MixedPrecision(init_scale=64.0), SpoilGradient(1, value), log])
    learn.fit(1)
    steps = [e for e in log.events if e[0].endswith("_step")]
    assert steps == [
        ("before_step", 0, 0),
        ("after_step", 0, 1),
        ("after_cancel_step", 1, 1),
        ("after_step", 1, 1),
        ("before_step", 2, 1),
        ("after_step", 2, 2),
    ]
    assert learn.mixed_precision.n_skipped == 1
    assert learn.mixed_precision.scaler.get_scale() == 32.0


def test_a_skipped_step_moves_no_weight_and_leaves_no_gradient():
    learn = toy_learner(n_train=8, n_valid=0, cbs=[ll.MixedPrecision(init_scale=64.0), SpoilGradient(0)])
    before = weights(learn)
    with pytest.warns(UserWarning, match="1 of the 1 steps were skipped"):
        learn.fit(1)
    assert weights(learn) == before
    assert [p.grad for p in learn.model.parameters()] == [None] * 4


def test_a_fit_of_which_half_the_steps_were_skipped_warns_with_the_scale_at_its_end():
    learn = learner(ll.MixedPrecision(init_scale=2.0**30))
    with pytest.warns(UserWarning, match=r"of the 24 steps were skipped.* is \d+ now: begin with that"):
        learn.fit(3)


def test_in_bfloat16_no_step_is_skipped():
    learn = toy_learner(n_train=8, n_valid=0, cbs=[ll.MixedPrecision("bf16"), SpoilGradient(0)])
    learn.fit(1)
    assert learn.opt_iter == 1
    assert learn.mixed_precision.n_skipped == 0


@pytest.mark.parametrize(("mode", "reads"), [("fp16", 8), ("bf16", 0)])
def test_float16_waits_for_the_device_once_per_step_and_bfloat16_never(mode, reads):
    counts = []
    for n_train in (64, 128):  # a fit has reads of its own: what a longer one has more are those of the batches
        learn = learner(ll.MixedPrecision(mode, init_scale=64.0), n_train=n_train, n_valid=0)
        with HostReads() as counted:
            learn.fit(1)
        counts.append(counted.count)
    plain = []
    for n_train in (64, 128):
        with HostReads() as counted:
            learner(n_train=n_train, n_valid=0).fit(1)
        plain.append(counted.count)
    assert counts[1] - counts[0] - (plain[1] - plain[0]) == reads


# Its place in the loop


def test_a_cancelled_backward_leaves_nothing_to_unscale():
    def cancel(cb):
        raise ll.CancelBackwardException

    learn = learner(ll.MixedPrecision(), ll.Callback(before_backward=cancel))
    before = weights(learn)
    learn.fit(1)
    assert weights(learn) == before


def test_scaled_gradients_of_a_cancelled_batch_do_not_outlive_the_fit():
    def cancel(cb):
        raise ll.CancelBatchException

    learn = learner(ll.MixedPrecision(), ll.Callback(after_backward=cancel))
    learn.fit(1)
    assert [p.grad for p in learn.model.parameters()] == [None] * 4


def test_the_scaler_is_on_the_learner_during_a_fit_only():
    there = []
    learn = learner(ll.MixedPrecision(), ll.Callback(before_batch=lambda cb: there.append(cb.scaler.is_enabled())))
    learn.fit(1)
    assert set(there) == {True}
    assert not hasattr(learn, "scaler")
    assert learn.mixed_precision.scaler.get_scale() <= 2.0**16


def test_each_fit_begins_with_a_scaler_of_its_own():
    learn = learner(ll.MixedPrecision(init_scale=2.0**20))
    learn.fit(1)
    first = learn.mixed_precision.n_skipped
    learn.fit(1)
    assert first > 3
    assert learn.mixed_precision.n_skipped > 3


def test_the_scale_is_stored_with_the_learner():
    learn = learner(ll.MixedPrecision(init_scale=2.0**20, growth_interval=50))
    learn.fit(2)
    other = learner(ll.MixedPrecision())
    other.load_state_dict(learn.state_dict())
    assert other.mixed_precision.state_dict() == learn.mixed_precision.state_dict()
    assert other.mixed_precision.scaler.get_growth_interval() == 50


# What one types


def test_the_learner_has_a_verb_for_each_precision():
    learn = toy_learner()
    assert learn.to_fp16(init_scale=4.0) is learn
    assert (learn.mixed_precision.amp_mode, learn.mixed_precision.scaling["init_scale"]) == (ll.AMPMode.FP16, 4.0)
    learn.to_bf16()
    assert [cb.amp_mode for cb in learn.cbs if isinstance(cb, ll.MixedPrecision)] == [ll.AMPMode.BF16]
    assert not hasattr(learn.to_fp32(), "mixed_precision")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amp_mode": "fp8"}, "`amp_mode` is 'fp8'; pass 'fp16' or 'bf16'."),
        ({"init_scale": 0}, "`init_scale` is 0; the loss is multiplied by it, so pass more than 0."),
        ({"growth_factor": 1.0}, "`growth_factor` is 1.0; the scale grows by it, so pass more than 1."),
        ({"backoff_factor": 2.0}, "`backoff_factor` is 2.0; the scale shrinks by it: pass a number from 0 to 1."),
        ({"growth_interval": 0}, "`growth_interval` is 0; it counts steps, so pass 1 or more."),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError) as caught:
        ll.MixedPrecision(**arguments)
    assert str(caught.value) == message


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_on_cuda_it_trains_as_a_loop_by_hand(mode):
    learn = learner(ll.GradientClip(0.1), ll.MixedPrecision(mode, init_scale=2.0**20))
    learn.dls.device = "cuda"
    learn = fitted(learn, 3)
    by_hand_weights, losses, _ = by_hand(mode, 3, max_norm=0.1, device="cuda", init_scale=2.0**20)
    assert learn.recorder.raw_losses == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(weights(learn), by_hand_weights, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-6)


def test_two_of_them_are_refused():
    learn = learner(ll.MixedPrecision("bf16"), ll.MixedPrecision("bf16"))
    with pytest.raises(ValueError, match="would each scale the loss, and close the other's autocast"):
        learn.fit(1)
    assert not torch.is_autocast_enabled("cpu")
