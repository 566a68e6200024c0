"""MixUp and CutMix. Numbers marked as fastai's come from fastai 2.8.12, run on the same data with the same seeds."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import learnloop as ll
from learnloop.callbacks.mixing import takes_classes
from learnloop.testing import check_callback, toy_learner
from tests.resuming import assert_resumes_exactly

N, BS = 24, 8


def images():
    return torch.randn(N, 1, 6, 5, generator=torch.Generator().manual_seed(1))


def classes():
    return torch.arange(N) % 3


def one_hot():
    return F.one_hot(classes(), 3).float()


def several_labels():
    return ((torch.arange(3 * N).view(N, 3) * 7) % 5 < 2).float()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(30, 3)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-0.3, 0.3, 90).view(3, 30))
            self.layer.bias.zero_()

    def forward(self, x):
        return self.layer(x.flatten(1))


class Seed(ll.Callback):
    """A seed of its own for each training batch, so that fastai draws the same."""

    order, run_valid = -5, False

    def before_batch(self):
        torch.manual_seed(5 + self.iter)


def batches(y, bs=BS):
    return list(zip(images().split(bs), y.split(bs), strict=True))


def learner(*cbs, y=None, loss_func=None, bs=BS, **kwargs):
    """Three batches an epoch, in order; one for validation."""
    data = batches(classes() if y is None else y, bs)
    cbs = [ll.TrainEvalCallback(), ll.Recorder(**kwargs.pop("recorder", {})), *cbs]
    learn = ll.Learner(
        ll.DataLoaders(data, data[:1], device="cpu"),
        Net(),
        ll.CrossEntropyLossFlat() if loss_func is None else loss_func,
        opt_func=ll.SGD,
        lr=0.1,
        cbs=cbs,
        default_cbs=False,
        **kwargs,
    )
    learn.logger = lambda row: None
    return learn


def shuffled_learner(*cbs):
    """As `learner`, from a loader that shuffles and makes new tensors."""
    learn = learner(*cbs)
    loaders = [ll.TensorLoader(images(), classes(), bs=BS, shuffle=True), ll.TensorLoader(images(), classes(), bs=N)]
    learn.dls = ll.DataLoaders(*loaders, device="cpu")
    learn.dls.seed = 42
    return learn


def seen_by(learn, event="after_loss", **what):
    """What an expression over the callback gives in each training batch of a fit."""
    found = {name: [] for name in what}

    def note(cb):
        if cb.training:
            for name, read in what.items():
                found[name].append(read(cb))

    learn.fit(1, cbs=ll.Callback(**{event: note}))
    return found


def one_batch_mixed(cb, xb, yb):
    """`xb` after the handler's `before_batch`."""
    learn = learner(cb, loss_func=nn.MSELoss())
    learn.dls = ll.DataLoaders([(*xb, *yb)], device="cpu")
    found = {}

    def note(cb):
        found["xb"] = cb.learn.xb
        raise ll.CancelBatchException

    learn.fit(1, cbs=ll.Callback(before_batch=note))
    return found["xb"]


# The promises of every callback


@pytest.mark.parametrize("make", [ll.MixUp, ll.CutMix])
def test_it_keeps_every_promise_with_classes(make):
    assert check_callback(make, shuffled_learner).broken == {}


def test_it_keeps_every_promise_with_blended_targets():
    assert check_callback(ll.MixUp).broken == {}


@pytest.mark.parametrize("make", [ll.MixUp, ll.CutMix])
def test_a_fit_stopped_at_any_event_and_resumed_ends_as_if_it_had_not_been_stopped(make):
    assert_resumes_exactly(lambda: shuffled_learner(make()))


# The numbers

TARGETS = {
    "classes": (classes, ll.CrossEntropyLossFlat),
    "one-hot": (one_hot, ll.MSELossFlat),
    "several labels": (several_labels, ll.BCEWithLogitsLossFlat),
}


@pytest.mark.parametrize(
    ("handler", "targets", "losses", "weights"),
    [
        (ll.MixUp, "classes", [1.552455, 0.963528, 2.202669], [-0.326398, -0.277156, -0.261046]),
        (ll.MixUp, "one-hot", [1.64655, 0.381285, 1.687482], [-0.282753, -0.227416, -0.194182]),
        (ll.MixUp, "several labels", [0.875252, 0.764841, 0.747918], [-0.308731, -0.287941, -0.268805]),
        (ll.CutMix, "classes", [1.404678, 1.005571, 2.943782], [-0.273672, -0.274915, -0.268079]),
        (ll.CutMix, "one-hot", [1.653197, 0.424104, 3.074281], [-0.138437, -0.223908, -0.18424]),
        (ll.CutMix, "several labels", [0.838459, 0.74924, 0.759055], [-0.299979, -0.286233, -0.265188]),
    ],
)
def test_losses_and_weights_are_those_of_fastai(handler, targets, losses, weights):
    y, loss_func = TARGETS[targets]
    learn = learner(Seed(), handler(), y=y(), loss_func=loss_func())
    learn.fit(1)
    assert learn.recorder.raw_losses == pytest.approx(losses, abs=1e-6)
    assert learn.model.layer.weight.flatten()[:3].tolist() == pytest.approx(weights, abs=1e-6)


def test_class_numbers_come_to_the_same_as_their_one_hot_form():
    of_numbers, of_one_hot = (
        learner(Seed(), ll.MixUp(), y=y, loss_func=loss_func)
        for y, loss_func in ((classes(), nn.CrossEntropyLoss()), (one_hot(), lambda p, y: F.cross_entropy(p, y)))
    )
    of_numbers.fit(2)
    of_one_hot.fit(2)
    assert of_numbers.recorder.raw_losses == pytest.approx(of_one_hot.recorder.raw_losses, rel=1e-5)


def test_each_sample_of_mixup_keeps_at_least_half_of_itself():
    weights = torch.cat(seen_by(learner(ll.MixUp(1.0)), lam=lambda cb: cb.mix_up.lam)["lam"])
    assert weights.shape == (N,)
    assert 0.5 <= weights.min() < weights.max() <= 1


def test_the_weight_of_cutmix_is_the_area_that_is_left():
    found = seen_by(learner(ll.CutMix()), lam=lambda cb: cb.cut_mix.lam, x=lambda cb: cb.x, batch=lambda cb: cb.batch)
    for lam, x, (before, _) in zip(found["lam"], found["x"], found["batch"], strict=True):
        changed = (x != before).any(dim=(0, 1)).sum().item()
        assert lam == pytest.approx(1 - changed / 30)


def test_the_box_of_cutmix_has_the_area_that_was_drawn_where_no_edge_cuts_it():
    torch.manual_seed(0)
    boxes = [ll.CutMix().rand_bbox(100, 200, torch.tensor([0.75])) for _ in range(200)]
    assert all(0 <= x1 <= x2 <= 100 and 0 <= y1 <= y2 <= 200 for x1, y1, x2, y2 in boxes)
    assert max(int((x2 - x1) * (y2 - y1)) for x1, y1, x2, y2 in boxes) == 50 * 100


def test_it_composes_with_precision_accumulation_and_clipping_as_a_loop_by_hand():
    cbs = [Seed(), ll.MixUp(), ll.MixedPrecision("bf16"), ll.GradientAccumulation(2 * BS), ll.GradientClip(0.1)]
    learn = learner(*cbs, bs=6)  # windows of 18 and of the 6 that are left
    learn.fit(1)

    model, parts = Net(), batches(classes(), 6)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for window in ((0, 1, 2), (3,)):
        for i in window:
            x, y = parts[i]
            torch.manual_seed(5 + i)
            lam = torch.distributions.Beta(0.4, 0.4).sample((6,))
            lam, other = torch.maximum(lam, 1 - lam), torch.randperm(6)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                pred = model(lam.view(-1, 1, 1, 1) * x + (1 - lam).view(-1, 1, 1, 1) * x[other]).float()
                entropy = partial(F.cross_entropy, pred, reduction="none")
                loss = (lam * entropy(y) + (1 - lam) * entropy(y[other])).mean()
            (loss / len(window)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        opt.zero_grad()
    assert learn.opt_iter == 2
    torch.testing.assert_close(learn.model.layer.weight, model.layer.weight, rtol=1e-3, atol=1e-5)


# Targets


def test_metrics_see_the_targets_as_they_were():
    learn = learner(
        ll.MixUp(),
        y=one_hot(),
        loss_func=ll.MSELossFlat(),
        recorder={"train_metrics": True},
        metrics=[lambda pred, y: y.square().sum() / len(y)],
    )
    learn.fit(1)
    assert learn.recorder.values[0][1] == 1.0  # below that for mixtures


def purity(cb):
    """1 for targets of one class each, less for mixtures."""
    return cb.y.square().sum().item() / len(cb.y)


def test_targets_are_blended_until_the_batch_is_over():
    learn = learner(ll.MixUp(), y=one_hot(), loss_func=ll.MSELossFlat())
    assert max(seen_by(learn, "after_pred", purity=purity)["purity"]) < 1
    assert max(seen_by(learn, "after_step", purity=purity)["purity"]) < 1
    assert seen_by(learn, "after_batch", purity=purity)["purity"] == [1.0] * 3


def test_a_cancelled_batch_shows_its_targets_as_they_were():
    def cancel(cb):
        if cb.training:
            raise ll.CancelBatchException

    learn = learner(ll.MixUp(), ll.Callback(after_pred=cancel), y=one_hot(), loss_func=ll.MSELossFlat())
    assert seen_by(learn, "after_batch", purity=purity)["purity"] == [1.0] * 3


@pytest.mark.parametrize("make", [ll.MixUp, ll.CutMix])
def test_a_batch_of_one_is_its_own_mixture(make):
    learn = learner(make(), bs=1)
    plain = learner(bs=1)
    learn.fit(1)
    plain.fit(1)
    assert learn.recorder.raw_losses == pytest.approx(plain.recorder.raw_losses, abs=1e-5)


@pytest.mark.parametrize("make", [ll.MixUp, ll.CutMix])
@pytest.mark.parametrize("targets", TARGETS)
def test_the_data_of_the_loader_stay_as_they_are(make, targets):
    y, loss_func = TARGETS[targets]
    learn = learner(make(), y=y(), loss_func=loss_func())
    before = [(x.clone(), t.clone()) for x, t in learn.dls.train]
    learn.fit(1)
    for (x, t), (x_before, t_before) in zip(learn.dls.train, before, strict=True):
        assert torch.equal(x, x_before)
        assert torch.equal(t, t_before)


def test_every_place_of_a_segmentation_counts_by_the_weight_of_its_sample():
    x, y = torch.randn(4, 3, 2, 2), torch.randint(0, 3, (4, 2, 2))
    losses = []
    for loss_func in (ll.CrossEntropyLossFlat(axis=1), nn.CrossEntropyLoss()):  # flat, and in the shape of the targets
        learn = learner(Seed(), ll.MixUp(), loss_func=loss_func)
        learn.dls, learn.model = ll.DataLoaders([(x, y)], device="cpu"), nn.Conv2d(3, 3, 1, bias=False)
        nn.init.eye_(learn.model.weight.data[:, :, 0, 0])
        learn.fit(1)
        losses += learn.recorder.raw_losses
    torch.manual_seed(5)
    lam = torch.distributions.Beta(0.4, 0.4).sample((4,))
    lam, other = torch.maximum(lam, 1 - lam).view(-1, 1, 1, 1), torch.randperm(4)
    entropy = partial(F.cross_entropy, lam * x + (1 - lam) * x[other], reduction="none")
    by_hand = (lam[:, 0] * entropy(y) + (1 - lam[:, 0]) * entropy(y[other])).mean().item()
    assert losses == pytest.approx([by_hand] * 2, rel=1e-5)


def test_a_sum_stays_a_sum():
    mean, total = (learner(Seed(), ll.MixUp(), loss_func=nn.CrossEntropyLoss(reduction=r)) for r in ("mean", "sum"))
    mean.fit(1)
    total.fit(1)
    assert total.recorder.raw_losses[0] == pytest.approx(BS * mean.recorder.raw_losses[0])


def test_other_inputs_are_blended_by_mixup_and_left_alone_by_cutmix():
    x, more = torch.randn(4, 1, 4, 4), torch.arange(4.0)[:, None]
    mixed = one_batch_mixed(ll.MixUp(), (x, more), (torch.zeros(4, 3),))
    assert not torch.equal(mixed[1], more)
    mixed = one_batch_mixed(ll.CutMix(), (x, more), (torch.zeros(4, 3),))
    assert mixed[1] is more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_keep_their_precision(dtype):
    x = torch.randn(4, 1, 4, 4, dtype=dtype)
    assert one_batch_mixed(ll.MixUp(), (x,), (torch.zeros(4, 3),))[0].dtype == dtype


def test_several_labels_in_integers_are_blended_where_the_loss_turns_them_to_floats():
    numbers, floats = (
        learner(Seed(), ll.MixUp(), y=y, loss_func=ll.BCEWithLogitsLossFlat())
        for y in (several_labels().long(), several_labels())
    )
    numbers.fit(1)
    floats.fit(1)
    assert numbers.recorder.raw_losses == floats.recorder.raw_losses


# The loss function


@pytest.mark.parametrize(
    ("loss_func", "takes"),
    [
        (ll.CrossEntropyLossFlat(), True),
        (ll.FocalLossFlat(), True),
        (nn.CrossEntropyLoss(), True),
        (nn.NLLLoss(), True),
        (F.cross_entropy, True),
        (partial(F.cross_entropy, label_smoothing=0.1), True),
        (ll.MSELossFlat(), False),
        (nn.BCEWithLogitsLoss(), False),
        (F.mse_loss, False),
        (None, False),
    ],
)
def test_a_loss_says_whether_it_takes_class_numbers(loss_func, takes):
    assert takes_classes(loss_func) is takes


def test_a_loss_over_class_numbers_is_replaced_between_before_train_and_after_train():
    learn = learner(ll.MixUp())
    own, there = learn.loss_func, {}

    class Note(ll.Callback):
        order = 1

        def __call__(self, event_name):
            there.setdefault(event_name, self.learn.loss_func is own)

    learn.fit(1, cbs=Note())
    assert not there["before_train"]
    assert not there["before_batch"]
    assert there["after_train"]
    assert there["before_validate"]
    assert learn.loss_func is own


def test_any_other_loss_stays_in_place():
    learn = learner(ll.MixUp(), y=one_hot(), loss_func=ll.MSELossFlat())
    own = learn.loss_func
    assert seen_by(learn, "before_batch", own=lambda cb: cb.loss_func is own)["own"] == [True] * 3


def test_the_loss_in_place_shows_the_attributes_of_the_one_it_stands_for():
    found = seen_by(learner(ll.MixUp()), y_int=lambda cb: cb.loss_func.y_int, axis=lambda cb: cb.loss_func.axis)
    assert found == {"y_int": [True] * 3, "axis": [-1] * 3}


def test_a_validation_nested_in_a_training_batch_is_not_mixed():
    plain = learner().validate()[0]

    def validate(cb):
        if cb.training and cb.iter == 0:
            assert cb.learn.validate()[0] == plain
            assert len(cb.learn.mix_up.yb1) == 1

    learn = learner(Seed(), ll.MixUp(), ll.Callback(after_pred=validate))
    undisturbed = learner(Seed(), ll.MixUp())
    learn.fit(1)
    undisturbed.fit(1)
    assert learn.recorder.raw_losses == undisturbed.recorder.raw_losses


def test_events_sent_by_hand_mix_a_batch_and_the_loss_is_put_back_at_the_end():
    learn = learner(ll.MixUp())
    own, (x, y) = learn.loss_func, learn.dls.train[0]
    with learn:
        learn.training = True
        learn._split((x, y))
        learn("before_train")
        learn("before_batch")
        assert learn.loss_func is not own
        assert not torch.equal(learn.x, x)
        assert torch.equal(learn.y, y)
    assert learn.loss_func is own


def test_validation_is_not_mixed():
    learn = learner(ll.MixUp())
    assert learn.validate() == learner().validate()


def test_a_loss_that_another_callback_puts_in_place_is_left_there():
    other = nn.CrossEntropyLoss(label_smoothing=0.2)

    def replace(cb):
        if cb.training:
            cb.learn.loss_func = other

    learn = learner(ll.MixUp(), ll.Callback(after_batch=replace))
    learn.fit(1)
    assert learn.loss_func is other


def test_a_handler_as_written_for_fastai_blends_the_loss():
    class Halves(ll.MixHandler):
        def before_batch(self):
            shuffle = torch.arange(len(self.y)).flip(0)
            self.lam, self.yb1 = 0.5, (self.y[shuffle],)
            self.learn.xb = ((self.x + self.x[shuffle]) / 2,)

    learn = learner(Halves())
    learn.fit(1)
    x, y = images()[:BS], classes()[:BS]
    pred = Net()((x + x.flip(0)) / 2)
    by_hand = (F.cross_entropy(pred, y) + F.cross_entropy(pred, y.flip(0))).item() / 2
    assert learn.recorder.raw_losses[0] == pytest.approx(by_hand)


# What is refused


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan")])
def test_alpha_is_positive(alpha):
    with pytest.raises(ValueError, match=r"`alpha` is .*; it shapes Beta"):
        ll.MixUp(alpha)


def test_targets_that_nobody_can_blend_are_named_with_what_to_do():
    learn = learner(ll.MixUp(), loss_func=lambda pred, y: F.cross_entropy(pred, y))
    with pytest.raises(TypeError, match=r"`loss_func.y_int = True`; else make them floating point"):
        learn.fit(1)


def test_a_loss_that_says_so_takes_class_numbers():
    def loss_func(pred, y, reduction="mean"):
        return F.cross_entropy(pred, y, reduction=reduction)

    loss_func.y_int = True
    learn = learner(Seed(), ll.MixUp(), loss_func=loss_func)
    learn.fit(1)
    assert learn.recorder.raw_losses == pytest.approx([1.552455, 0.963528, 2.202669], abs=1e-6)  # fastai's
    assert learn.loss_func is loss_func


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (
            ll.MixUp,
            torch.ones(4, 3, dtype=torch.uint8),
            r"mixes tensors of floating point numbers, and input 0 is uint8",
        ),
        (ll.CutMix, torch.ones(4, 3), r"mixes floating point images, \(n, …, height, width\), and input 0 is float32"),
    ],
)
def test_inputs_that_cannot_be_mixed_are_named(make, x, message):
    with pytest.raises(TypeError, match=message):
        one_batch_mixed(make(), (x,), (torch.zeros(4, 3),))


def test_two_handlers_on_one_learner_are_refused():
    with pytest.raises(
        ValueError, match=r"\[MixUp, CutMix\] would each mix what the other has mixed. Keep one of them."
    ):
        learner(ll.MixUp(), ll.CutMix()).fit(1)


def test_a_toy_regression_learns_from_mixtures():
    learn = toy_learner(n_train=64, cbs=ll.MixUp())
    torch.manual_seed(0)
    learn.fit(10)
    assert learn.recorder.values[-1][1] < learn.recorder.values[0][1] / 3
