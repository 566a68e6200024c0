"""The batch in hand: what is split, predicted and computed, and the contracts of `loss` and `loss_grad`."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnloop import Callback, CancelBackwardException, CancelBatchException, DataLoaders, Recorder
from tests.toys import Heard, Once, learner, loaders, raise_at, weights

X = torch.tensor([[0.0], [1.0], [2.0]])
Y = torch.tensor([[1.0], [3.0], [5.0]])


def fitted(batch, *cbs, model=None, loss_func=F.mse_loss, valid=False, **kwargs):
    """A learner that has seen one batch; `kwargs` go to DataLoaders."""
    dls = DataLoaders([batch], *([[batch]] if valid else []), device="cpu", **kwargs)
    learn = learner(list(cbs), dls=dls, model=model, loss_func=loss_func)
    learn.fit(1)
    return learn


class Look(Callback):
    """What the batch is at an event."""

    def __init__(self, event_name="after_loss"):
        super().__init__(**{event_name: Look._look})
        self.seen = []

    def _look(self):
        learn = self.learn
        self.seen.append({"xb": learn.xb, "yb": learn.yb, "x": learn.x, "y": learn.y, "pred": learn.pred})


# Batches of every kind

without_targets = pytest.mark.filterwarnings("ignore:nothing was trained")


@pytest.mark.parametrize("kind", [tuple, list, namedtuple("Pair", "x y")._make], ids=["tuple", "list", "namedtuple"])
def test_of_a_sequence_the_last_is_the_target_and_the_others_are_inputs(kind):
    fitted(kind([X, Y]), look := Look())
    assert look.seen[0]["xb"] == (X,) and look.seen[0]["yb"] == (Y,)
    assert look.seen[0]["x"] is look.seen[0]["xb"][0] and look.seen[0]["y"] is look.seen[0]["yb"][0]


def test_several_inputs_are_given_to_the_model_one_by_one():
    class Sum(nn.Linear):
        def forward(self, a, b):
            return super().forward(a + b)

    fitted((X, X, Y), look := Look(), model=Sum(1, 1))
    assert len(look.seen[0]["xb"]) == 2 and len(look.seen[0]["yb"]) == 1
    assert look.seen[0]["x"] == look.seen[0]["xb"]


def test_n_inp_says_how_many_are_inputs():
    def loss(pred, a, b):
        return F.mse_loss(pred, a) + F.mse_loss(pred, b)

    fitted((X, Y, Y), look := Look(), loss_func=loss, n_inp=1)
    assert (len(look.seen[0]["xb"]), len(look.seen[0]["yb"])) == (1, 2)


def test_inputs_may_be_nested():
    class Nested(nn.Linear):
        def forward(self, inputs):
            a, more = inputs
            return super().forward(a + more["b"])

    learn = fitted(((X, {"b": X}), Y), look := Look(), model=Nested(1, 1))
    assert isinstance(look.seen[0]["x"], tuple) and learn.opt_iter == 1


@without_targets
def test_a_bare_tensor_is_one_input_without_target():
    learn = fitted(X, look := Look(), heard := Heard())
    assert look.seen[0]["xb"] == (X,) and look.seen[0]["yb"] == ()
    assert isinstance(look.seen[0]["pred"], Tensor)
    assert "before_backward" not in heard.events and learn.opt_iter == 0


@without_targets
def test_a_tuple_of_one_is_one_input_without_target():
    fitted((X,), look := Look())
    assert look.seen[0]["xb"] == (X,) and look.seen[0]["yb"] == ()


class ByName(nn.Linear):
    """Takes what it wants of a mapping."""

    def forward(self, values):
        return super().forward(values)


@pytest.mark.parametrize("key", ["labels", "label", "target"])
def test_of_a_mapping_the_usual_target_keys_are_targets_and_the_model_gets_the_keywords_it_takes(key):
    learn = fitted({"values": X, "id": 3, key: Y}, look := Look(), model=ByName(1, 1))
    assert set(look.seen[0]["x"]) == {"values", "id", key} and look.seen[0]["y"] is Y
    assert learn.opt_iter == 1


def test_targets_names_the_target_keys():
    learn = fitted({"values": X, "height": Y, "labels": X}, look := Look(), model=ByName(1, 1), targets=("height",))
    assert look.seen[0]["yb"] == (Y,) and learn.opt_iter == 1


def test_a_target_key_that_the_batch_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="`targets` names 'hight', but the batch has 'values', 'height'"):
        fitted({"values": X, "height": Y}, model=ByName(1, 1), targets="hight")


@without_targets
def test_a_mapping_without_targets_has_none():
    learn = fitted({"values": X}, look := Look(), model=ByName(1, 1))
    assert look.seen[0]["yb"] == () and learn.opt_iter == 0


def test_the_model_gets_targets_too_if_it_names_them():
    class WithLabels(nn.Linear):
        def forward(self, values, labels):
            pred = super().forward(values)
            return {"loss": F.mse_loss(pred, labels), "logits": pred}

    learn = fitted({"values": X, "labels": Y}, model=WithLabels(1, 1), loss_func=None)
    assert learn.opt_iter == 1


@dataclass
class Sample:
    values: Tensor
    label: Tensor


def test_a_dataclass_is_like_a_mapping():
    learn = fitted(Sample(X, Y), look := Look(), model=ByName(1, 1))
    assert isinstance(look.seen[0]["x"], Sample) and look.seen[0]["y"] is Y
    assert learn.opt_iter == 1


def test_every_kind_of_batch_is_validated_too():
    for batch, model in [((X, Y), None), ([X, Y], None), ({"values": X, "labels": Y}, ByName(1, 1))]:
        learn = fitted(batch, Recorder(), model=model, valid=True)
        learn.logger = lambda row: None
        assert float(learn.validate()[0]) > 0


def test_a_callback_may_replace_the_batch():
    class Halves(Callback):
        def before_batch(self):
            self.learn.xb, self.learn.yb = (self.x[:1],), (self.y[:1],)

    fitted((X, Y), Halves(), look := Look())
    assert look.seen[0]["pred"].shape == (1, 1)


def test_the_loaders_own_batch_is_not_changed_by_that():
    batch = [X, Y]
    fitted(batch, Callback(before_batch=lambda cb: setattr(cb.learn, "xb", (cb.x + 1,))))
    assert batch[0] is X and batch[1] is Y


def on_meta(train, valid):
    """Where the inputs of a training batch and of one for validation come to lie, with a model on the device `meta`."""
    look = Look()
    learner(look, dls=DataLoaders([train], [valid], device="cpu"), model=nn.Linear(1, 1, device="meta")).fit(1)
    return [str(seen["x"].device) for seen in look.seen]


def test_batches_come_to_the_device_of_the_model():
    assert on_meta((X, Y), (X, Y)) == ["meta", "meta"]


def test_whether_batches_must_be_moved_is_found_out_in_each_phase():
    assert on_meta((X.to("meta"), Y.to("meta")), (X, Y)) == ["meta", "meta"]


def test_once_a_batch_of_a_phase_had_to_be_moved_all_of_them_are():
    here, there = (X, Y), (X.to("meta"), Y.to("meta"))
    look = Look()
    dls = DataLoaders([here, there, here, here], device="cpu")
    learner(look, dls=dls, model=nn.Linear(1, 1, device="meta")).fit(1)
    assert [str(seen["x"].device) for seen in look.seen] == ["meta"] * 4


def test_where_the_first_batch_of_a_phase_lies_on_the_device_only_that_one_is_asked_to_move():
    asked = []

    class Asked(Tensor):
        def to(self, device, non_blocking):
            asked.append((str(device), non_blocking))
            return self

    x = X.as_subclass(Asked)
    learner(dls=DataLoaders([(x, Y), (x, Y), (x, Y)], device="cpu")).fit(1)
    assert asked == [("cpu", False)]


def test_batches_of_a_model_without_parameters_come_to_the_device_of_the_loaders():
    look = Look()
    learner(look, dls=DataLoaders([(X, Y)], device="meta"), model=abs).fit(1)
    assert str(look.seen[0]["x"].device) == "meta"


def test_a_batch_by_hand_comes_to_the_device_to_which_the_model_was_moved_after_a_fit():
    learn = learner(look := Look())
    learn.fit(1)
    learn.model.to("meta")
    learn.one_batch(0, (X, Y))
    assert [str(seen["x"].device) for seen in look.seen] == ["cpu", "cpu", "cpu", "meta"]


def test_before_the_first_fit_loss_is_0():
    assert learner().loss.item() == 0.0


def test_outside_of_a_run_there_is_no_batch():
    learn = learner()
    assert (learn.xb, learn.yb, learn.x, learn.y, learn.pred, learn.batch) == ((None,), (None,), None, None, None, None)


def test_in_before_batch_the_prediction_of_the_batch_before_is_gone():
    seen = []
    look = Callback(before_batch=lambda cb: seen.append((cb.learn.pred, hasattr(cb.learn, "loss_grad"))))
    learner(look).fit(1)
    assert seen == [(None, False)] * 3


def test_a_batch_that_the_model_cannot_take_raises_the_models_error_with_a_note():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        fitted((torch.zeros(2, 5), Y))
    assert "xb: (float32[2, 5] cpu)" in caught.value.__notes__[0]


# What the model returns


class Output:
    def __init__(self, **attributes):
        vars(self).update(attributes)


class Returns(nn.Linear):
    """Returns what a function makes of its prediction."""

    def __init__(self, make):
        super().__init__(1, 1)
        self.make = make

    def forward(self, x):
        return self.make(super().forward(x))


def own_loss(pred):
    return ((pred - Y) ** 2).mean()


@pytest.mark.parametrize(
    "make", [lambda p: Output(loss=own_loss(p), logits=p), lambda p: {"loss": own_loss(p), "logits": p}]
)
def test_without_loss_func_the_outputs_loss_is_used_and_its_logits_are_the_prediction(make):
    seen = []
    look = Callback(after_loss=lambda cb: seen.append((cb.pred, cb.loss_grad)))
    learn = fitted((X, Y), look, model=Returns(make), loss_func=None)
    ((pred, loss_grad),) = seen
    assert torch.is_tensor(pred) and loss_grad.item() == pytest.approx(own_loss(pred).item())
    assert learn.opt_iter == 1


@pytest.mark.parametrize("batch", [X, (X,), (X, Y)], ids=["tensor", "one", "two"])
def test_the_outputs_loss_is_gone_back_through_whatever_the_targets_are(batch):
    heard = Heard(["after_backward"])
    fitted(batch, heard, model=Returns(lambda p: Output(loss=own_loss(p), logits=p)), loss_func=None)
    assert len(heard.events) == 1


def test_without_logits_the_output_itself_is_the_prediction():
    output = Output(loss=torch.ones((), requires_grad=True))
    fitted((X, Y), look := Look(), model=Returns(lambda p: output), loss_func=None)
    assert look.seen[0]["pred"] is output


def test_a_loss_func_wins_over_the_outputs_loss():
    seen = []
    model = Returns(lambda p: Output(loss=torch.tensor(100.0), logits=p))
    fitted((X, Y), Callback(after_loss=lambda cb: seen.append(cb.loss.item())), model=model)
    assert seen[0] < 100


def test_a_tuple_that_the_model_returns_is_the_prediction():
    learn = fitted((X, Y), look := Look(), model=Returns(lambda p: (p, p)), loss_func=lambda p, y: F.mse_loss(p[0], y))
    assert isinstance(look.seen[0]["pred"], tuple) and learn.opt_iter == 1


def test_the_outputs_loss_of_one_batch_is_not_that_of_the_next():
    outputs = iter([lambda p: Output(loss=own_loss(p), logits=p), lambda p: p])
    dls = DataLoaders([(X,), (X,)], device="cpu")
    heard = Heard(["before_backward"])
    learner(heard, dls=dls, model=Returns(lambda p: next(outputs)(p)), loss_func=None).fit(1)
    assert len(heard.events) == 1


def test_a_missing_loss_is_an_error_that_says_what_to_pass():
    with pytest.raises(ValueError) as caught:
        fitted((X, Y), loss_func=None)
    assert str(caught.value) == (
        "`loss_func` is None, and the output of `Linear` has no `loss`. "
        "Pass `Learner(…, loss_func=…)`, or let the model return an object or mapping with `loss`."
    )


@without_targets
def test_without_targets_and_without_loss_func_a_model_just_predicts():
    learn = fitted(X, look := Look(), loss_func=None)
    assert look.seen[0]["pred"] is not None and learn.opt_iter == 0


def test_predicting_needs_no_loss_func_though_there_are_targets():
    dls = DataLoaders([(X, Y)], [(X, Y)], device="cpu")
    preds, targets = learner(dls=dls, loss_func=None).get_preds()
    assert preds.shape == (3, 1) and targets.equal(Y)


def test_a_callback_may_supply_the_loss_after_the_prediction():
    supplies = Callback(after_pred=lambda cb: setattr(cb.learn, "loss_grad", (cb.pred - cb.y).square().mean()))
    assert fitted((X, Y), supplies, loss_func=None).opt_iter == 1


# An empty yb is looked at twice


def test_a_callback_may_supply_the_loss_between_the_two_looks_at_yb():
    class Supplies(Callback):
        def before_batch(self):
            self.kept, self.learn.yb = self.yb, ()

        def after_loss(self):
            assert self.learn._raw_loss is None  # the loss function was not called
            self.learn.loss_grad = (self.pred**2).mean()
            self.learn.loss = self.learn.loss_grad.detach().clone()
            self.learn.yb = self.kept

    def never(pred, target):
        raise AssertionError("called")

    cbs = [Supplies(), recorder := Recorder()]
    learn = learner(cbs, dls=loaders(1, None), loss_func=never)
    learn.logger = lambda row: None
    before = weights(learn)
    learn.fit(1)
    assert learn.opt_iter == 1 and not weights(learn).equal(before)
    assert len(recorder.raw_losses) == 1


def test_a_callback_may_empty_yb_after_the_loss_to_skip_backward():
    heard = Heard(["before_backward", "after_batch"])
    learner([heard, Callback(after_loss=lambda cb: setattr(cb.learn, "yb", ()))], dls=loaders(1, None)).fit(1)
    assert heard.events == ["after_batch"]


def test_loss_grad_before_there_is_a_loss_is_an_attribute_error():
    for read in (lambda cb: cb.learn.loss_grad, lambda cb: cb.loss_grad):
        learn = learner(Callback(after_pred=read))
        with pytest.raises(AttributeError, match="`loss_grad` is there from `after_loss` on"):
            learn.fit(1)


# loss and loss_grad


def roots(pred, target):
    return ((pred - target) ** 2).mean().sqrt()


LOSSES = {
    "mse": F.mse_loss,
    "sqrt": roots,
    "exp": lambda p, y: (p - y).mean().exp(),
    "norm": lambda p, y: (p - y).norm(),
    "max": lambda p, y: (p - y).abs().max(),
    "std": lambda p, y: (p - y).std(),
}
IN_PLACE = {
    "mul_": lambda t: t.mul_(3),
    "zero_": lambda t: t.zero_(),
    "add_": lambda t: t.add_(1),
    "data": lambda t: t.data.mul_(3),
}


def gradients(cbs, loss_func):
    """The weights' gradients in `before_step`, always from the same weights."""
    grads = []
    keep = Callback(before_step=lambda cb: grads.append([p.grad.clone() for p in cb.learn.model.parameters()]))
    fitted((X, Y), *cbs, keep, loss_func=loss_func)
    return torch.cat([g.flatten() for g in grads[0]])


def loss_of(loss_func):
    """The loss at the weights from which `gradients` begins."""
    torch.manual_seed(0)
    return loss_func(nn.Linear(1, 1)(X), Y).item()


@pytest.mark.parametrize("look_first", [False, True], ids=["", "looked at before"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("change", IN_PLACE)
def test_changing_loss_in_place_changes_neither_loss_grad_nor_the_gradient(loss, change, look_first):
    values = []

    def spoil(cb):
        if look_first:
            values.append(cb.learn.loss_grad.item())
        IN_PLACE[change](cb.learn.loss)
        values.append(cb.learn.loss_grad.item())

    spoilt = gradients([Once("after_loss", spoil)], LOSSES[loss])
    torch.testing.assert_close(spoilt, gradients([], LOSSES[loss]))
    assert values[0] == values[-1] == loss_of(LOSSES[loss])


@pytest.mark.parametrize("look_first", [False, True], ids=["", "looked at before"])
@pytest.mark.parametrize("loss", LOSSES)
def test_changing_loss_grad_in_place_scales_the_gradient_and_leaves_loss_alone(loss, look_first):
    values = []

    def scale(cb):
        if look_first:
            values.append(cb.learn.loss.item())
        cb.learn.loss_grad.mul_(3)
        values.append(cb.learn.loss.item())

    scaled = gradients([Once("after_loss", scale)], LOSSES[loss])
    torch.testing.assert_close(scaled, 3 * gradients([], LOSSES[loss]))
    assert values[0] == values[-1] == loss_of(LOSSES[loss])


@pytest.mark.parametrize("loss", LOSSES)
def test_looking_at_both_changes_nothing(loss):
    def look(cb):
        assert cb.learn.loss_grad.item() == cb.learn.loss.item()
        assert cb.learn.loss_grad.requires_grad and not cb.learn.loss.requires_grad

    assert gradients([Once("after_loss", look)], LOSSES[loss]).equal(gradients([], LOSSES[loss]))


def test_reading_twice_gives_the_same_tensor():
    def look(cb):
        assert cb.learn.loss is cb.learn.loss and cb.learn.loss_grad is cb.learn.loss_grad
        assert cb.learn.loss is not cb.learn.loss_grad

    fitted((X, Y), Once("after_loss", look))


def test_scaling_loss_grad_by_assignment_scales_the_gradient():
    def scale(cb):
        cb.learn.loss_grad = cb.learn.loss_grad * 3

    torch.testing.assert_close(gradients([Once("after_loss", scale)], roots), 3 * gradients([], roots))


def test_an_augmented_assignment_to_loss_grad_scales_the_gradient_too():
    def scale(cb):
        cb.learn.loss_grad /= 2

    torch.testing.assert_close(gradients([Once("after_loss", scale)], roots), gradients([], roots) / 2)


def test_setting_loss_does_not_change_the_gradient():
    def change(cb):
        cb.learn.loss = torch.tensor(42.0)

    assert gradients([Once("after_loss", change)], F.mse_loss).equal(gradients([], F.mse_loss))


def recorded(*cbs, **kwargs):
    """The losses that are recorded of one batch."""
    learn = learner([*cbs, Recorder()], dls=DataLoaders([(X, Y)], device="cpu"), **kwargs)
    learn.logger = lambda row: None
    learn.fit(1)
    return learn.recorder.raw_losses


def test_the_record_takes_the_loss_as_computed_if_nobody_looks():
    assert recorded() == [loss_of(F.mse_loss)]


def test_the_record_takes_loss_as_it_was_set():
    assert recorded(Once("after_loss", lambda cb: setattr(cb.learn, "loss", torch.tensor(42.0)))) == [42.0]
    assert recorded(Once("after_step", lambda cb: setattr(cb.learn, "loss", torch.tensor(43.0)))) == [43.0]


def test_the_record_takes_loss_as_it_was_changed_in_place():
    assert recorded(Once("after_loss", lambda cb: cb.learn.loss.fill_(42.0))) == [42.0]


def test_the_record_does_not_take_what_became_of_loss_grad():
    plain = [loss_of(F.mse_loss)]
    assert recorded(Once("after_loss", lambda cb: cb.learn.loss_grad.mul_(100))) == plain
    assert recorded(Once("after_loss", lambda cb: setattr(cb.learn, "loss_grad", cb.learn.loss_grad * 100))) == plain


def test_changing_loss_grad_in_place_after_backward_changes_no_record():
    assert recorded(Once("after_backward", lambda cb: cb.learn.loss_grad.detach().zero_())) == [loss_of(F.mse_loss)]


def test_a_loss_grad_without_a_graph_is_an_error_at_backward_not_at_the_assignment():
    heard = Heard(["before_backward", "after_loss"])
    learn = learner([heard, Once("after_loss", lambda cb: setattr(cb.learn, "loss_grad", cb.learn.loss * 2))])
    with pytest.raises(ValueError, match=r"it was built from `learn\.loss`.*Build it from `learn\.loss_grad`"):
        learn.fit(1)
    assert heard.events == ["after_loss", "before_backward"]


def test_a_loss_grad_without_a_graph_is_no_error_where_backward_is_cancelled():
    cbs = [
        Once("after_loss", lambda cb: setattr(cb.learn, "loss_grad", cb.learn.loss * 2)),
        raise_at("before_backward", CancelBackwardException),
    ]
    learner(cbs, dls=loaders(1, None)).fit(1)


def test_a_loss_that_is_no_single_number_is_an_error_that_says_what_to_do():
    learn = learner(loss_func=nn.MSELoss(reduction="none"))
    with pytest.raises(ValueError) as caught:
        learn.fit(1)
    assert str(caught.value) == (
        "`loss_func` returned shape (2, 1); backward needs one number. "
        'Use `reduction="mean"`, or reduce the loss in an `after_loss` handler.'
    )


def test_such_a_loss_reduced_in_after_loss_trains():
    reduce = Callback(after_loss=lambda cb: setattr(cb.learn, "loss_grad", cb.learn.loss_grad.mean()))
    learn = learner(reduce, loss_func=nn.MSELoss(reduction="none"), dls=loaders(1, None))
    learn.fit(1)
    assert learn.opt_iter == 1


def test_a_loss_of_one_element_is_one_number():
    learn = learner(loss_func=lambda p, y: F.mse_loss(p, y).reshape(1), dls=loaders(1, None))
    learn.fit(1)
    assert learn.opt_iter == 1


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("loss", [None, 3.0])
def test_a_loss_func_that_returns_no_tensor_is_an_error_that_names_it(loss, is_frozen):
    learn = learner(loss_func=lambda p, y: loss)
    learn.model.requires_grad_(not is_frozen)
    with pytest.raises((TypeError, ValueError), match=r"loss_func|loss_grad"):
        learn.fit(1)


def test_losses_of_the_batch_before_are_not_seen_in_the_next_one():
    seen = []

    def look(cb):
        seen.append((cb.learn.iter, cb.learn._raw_loss, cb.learn._loss, cb.learn._loss_grad))

    learner(Callback(before_batch=look)).fit(1)
    assert all(row[1:] == (None, None, None) for row in seen)


def test_loss_before_a_batch_has_one_shows_the_last_for_reading():
    seen = []
    cbs = [
        Callback(before_batch=lambda cb: seen.append(float(cb.learn.loss))),
        Callback(after_batch=lambda cb: seen.append(float(cb.learn.loss))),
    ]
    learner(cbs, dls=loaders(2, None)).fit(1)
    assert seen[0] == 0.0 and seen[2] == seen[1]


def test_a_pred_that_a_callback_sets_in_a_cancelled_batch_is_seen_at_its_end():
    class Sets(Callback):
        def before_batch(self):
            self.learn.pred = "mine"
            raise CancelBatchException

    learner([Sets(), look := Look("after_batch")], dls=loaders(1, None)).fit(1)
    assert look.seen[0]["pred"] == "mine"


def test_the_loss_func_may_be_replaced_in_the_middle_of_a_fit():
    cbs = [Once("before_batch", lambda cb: setattr(cb.learn, "loss_func", lambda p, y: (p * 0).sum() + 5))]
    assert recorded(*cbs) == [5.0]


@pytest.mark.parametrize("batch", [(X, Y), {"x": X, "label": Y}], ids=["tuple", "mapping"])
def test_the_model_may_be_replaced_in_the_middle_of_a_fit(batch):
    seen = []
    cbs = [
        Once("after_batch", lambda cb: setattr(cb.learn, "model", lambda x: x * 0 + 7)),
        Callback(after_pred=lambda cb: seen.append(cb.pred.flatten().tolist())),
    ]
    learner(cbs, dls=DataLoaders([batch, batch], device="cpu"), model=lambda x: x * 0 + 5).fit(1)
    assert seen == [[5.0, 5.0, 5.0], [7.0, 7.0, 7.0]]


@pytest.mark.parametrize(
    ("loss_func", "batch", "names"),
    [
        (F.mse_loss, (X, Y), ["Answer", "Tensor"]),
        (F.mse_loss, {"x": X, "label": Y}, ["Tensor", "Tensor"]),
        (None, (X, Y), ["Tensor", "Tensor"]),
    ],
    ids=["a loss function", "a mapping", "a loss of its own"],
)
def test_after_pred_sees_the_whole_output_only_beside_a_loss_function_where_the_inputs_are_tensors(
    loss_func, batch, names
):
    class Answer:
        def __init__(self, logits):
            self.logits, self.loss = logits, logits.mean()

    class Model(nn.Linear):
        def forward(self, x):
            return Answer(super().forward(x))

    seen = []

    def look(cb):
        seen.append(type(cb.pred).__name__)

    cbs, dls = Callback(after_pred=look, after_loss=look), DataLoaders([batch], device="cpu")
    learn = learner(cbs, dls, Model(1, 1), loss_func)
    learn.one_batch(0, batch)
    learn.fit(1)
    assert seen == [*names, *names]


# The loss of a batch that is done


def finished(*cbs, **kwargs):
    losses = []
    fitted((X, Y), *cbs, Callback(after_batch=lambda cb: losses.append(cb.learn._finished_loss())), **kwargs)
    return losses[0]


def test_of_a_batch_that_is_done_the_loss_is_the_one_for_the_record_without_its_graph():
    loss = finished()
    assert loss.item() == loss_of(F.mse_loss) and not loss.requires_grad
    assert finished(Once("after_loss", lambda cb: setattr(cb.learn, "loss", cb.learn.loss_grad * 0 + 42))).item() == 42


def test_of_a_batch_that_is_done_the_loss_stays_where_it_lies():
    set_loss = Once("after_loss", lambda cb: setattr(cb.learn, "loss", torch.tensor(1.0, device="meta")))
    assert finished(set_loss).device.type == "meta"


def test_of_a_batch_that_is_done_the_loss_may_be_a_number():
    learn = learner(loss_func=lambda pred, target: 3.0)
    learn.one_batch(0, (X, Y))
    assert learn._finished_loss() == 3.0
