"""Recurrent models: reset, three outputs, two penalties.

The numbers are those of fastai 2.8.12, run with the same model and data.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import learnloop as ll
from learnloop.callbacks.rnn import activation_penalty, carried_by, change_penalty, put_back
from learnloop.data.keyed import preserved_randomness
from learnloop.testing import check_callback, toy_learner
from tests.resuming import assert_resumes_exactly
from tests.toys import Once


class Carrying(nn.Module):
    """A recurrent model over five symbols that goes on where the batch before it ended."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.rnn = nn.LSTM(3, 4, batch_first=True)
        self.out = nn.Linear(4, 5)
        self.hidden, self.resets = None, 0

    def reset(self):
        self.hidden = None
        self.resets += 1

    def forward(self, x):
        raw, hidden = self.rnn(self.emb(x), self.hidden)
        self.hidden = tuple(t.detach() for t in hidden)
        return self.out(raw * 0.5), [raw], [raw * 0.5]


def batches(n=4, length=6):
    """Sequences in which every symbol follows the one before it."""
    start = torch.arange(n)[:, None, None] + torch.arange(2)[:, None] + torch.arange(length)
    return [(x % 5, (x + 1) % 5) for x in start]


def learner(*cbs, model=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    dls = ll.DataLoaders(batches(), batches(), device="cpu")
    cbs = [ll.TrainEvalCallback(), ll.Recorder(), *cbs]
    loss_func = ll.CrossEntropyLossFlat()
    options = {"opt_func": ll.SGD, "lr": 0.5, "default_cbs": False, **kwargs}
    learn = ll.Learner(dls, Carrying() if model is None else model, loss_func, cbs=cbs, **options)
    learn.logger = lambda row: None
    return learn


@pytest.mark.parametrize(
    ("alpha", "beta", "valid_losses", "sum_of_weights"),
    [
        (0.0, 0.0, [1.595194, 1.5825886], -8.4478407),
        (2.0, 0.0, [1.5966699, 1.586059], -8.4612122),
        (0.0, 1.0, [1.5988038, 1.591306], -8.4642334),
        (2.0, 1.0, [1.6002785, 1.5942311], -8.4811974),
    ],
)
def test_losses_and_weights_are_those_of_fastai(alpha, beta, valid_losses, sum_of_weights):
    learn = learner(*ll.rnn_cbs(alpha, beta))
    learn.fit(2)
    assert [row[1] for row in learn.recorder.values] == pytest.approx(valid_losses, abs=1e-6)
    assert sum(p.sum().item() for p in learn.model.parameters()) == pytest.approx(sum_of_weights, abs=3e-6)


def test_the_model_is_reset_as_often_as_in_fastai():
    learn = learner(*ll.rnn_cbs())
    learn.fit(2)
    assert learn.model.resets == 6  # before the fit, twice for training, twice for validation, after the fit
    assert learn.model.hidden is None


def test_rnn_cbs_leaves_the_regularizer_out_where_it_would_do_nothing():
    assert [type(cb).__name__ for cb in ll.rnn_cbs()] == ["ModelResetter", "RNNCallback"]
    assert [type(cb).__name__ for cb in ll.rnn_cbs(beta=1)] == ["ModelResetter", "RNNCallback", "RNNRegularizer"]


def test_orders_and_switches_are_those_of_fastai():
    found = [(cb.order, cb.run_train, cb.run_valid) for cb in ll.rnn_cbs(2, 1)]
    assert found == [(0, True, True), (0, True, True), (1, True, False)]


# The outputs


def test_the_loss_gets_the_prediction_and_the_last_layer_is_kept_for_the_batch():
    class TwoLayers(Carrying):
        def forward(self, x):
            pred, (raw,), (out,) = super().forward(x)
            return pred, [raw * 0, raw], [out * 0, out]

    seen = []

    def look(cb):
        rnn = cb.learn.cbs[3]
        seen.append((type(cb.learn.pred), rnn.raw_out.shape, torch.equal(rnn.out, rnn.raw_out * 0.5)))

    learn = learner(*ll.rnn_cbs(), Once("after_loss", look), model=TwoLayers())
    learn.fit(1)
    assert seen == [(torch.Tensor, (2, 6, 4), True)]
    assert learn.cbs[3].raw_out is None and learn.cbs[3].out is None


def test_a_model_with_another_number_of_outputs_is_named():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    with pytest.raises(ValueError, match=r"into \(pred, raw_out, out\), and `Sequential` returned a Tensor"):
        learner(ll.RNNCallback(), model=model).fit(1)


def test_a_model_without_reset_is_refused_before_the_first_batch():
    with pytest.raises(TypeError, match=r"calls `reset\(\)` of the model, and `Linear` has none"):
        learner(ll.ModelResetter(), model=nn.Linear(1, 1)).fit(1)


def test_one_splits_the_outputs_and_a_second_is_refused():
    with pytest.raises(ValueError, match=r"^\[RNNCallback, RNNCallback\] would each split what the model returns\."):
        learner(ll.RNNCallback(), ll.RNNCallback(), model=Carrying()).fit(1)


def test_the_regularizer_alone_is_refused_before_the_first_batch():
    with pytest.raises(ValueError, match="add both, as `rnn_cbs"):
        learner(ll.RNNRegularizer(2, 1)).fit(1)


# The penalties


def test_the_penalties_are_the_mean_squares_of_values_and_of_changes():
    out = torch.tensor([[[1.0], [3.0], [0.0]]])
    assert activation_penalty(out) == (1 + 9) / 3
    assert change_penalty(out) == (4 + 9) / 2


def test_a_sequence_of_one_and_a_batch_of_one_are_regularized_without_nan():
    for size in ((1, 6), (2, 1)):
        learn = learner(*ll.rnn_cbs(2.0, 1.0))
        x = torch.zeros(size, dtype=torch.long)
        learn.dls = ll.DataLoaders([(x, x)], device="cpu")
        learn.fit(1)
        assert torch.isfinite(learn.model.out.weight).all()


def test_the_recorded_loss_is_without_the_penalties():
    plain, with_them = learner(*ll.rnn_cbs()), learner(*ll.rnn_cbs(100.0, 100.0))
    plain.fit(1), with_them.fit(1)
    assert with_them.recorder.raw_losses[0] == plain.recorder.raw_losses[0]
    assert with_them.recorder.raw_losses[1] != plain.recorder.raw_losses[1]


# What a model carries


def test_carried_are_tensors_in_attributes_that_are_neither_parameters_nor_buffers():
    model = Carrying()
    assert carried_by(model) == {}  # the list of its weights that an LSTM keeps is none of them
    model(torch.zeros(2, 3, dtype=torch.long))
    carried = carried_by(model)
    assert list(carried) == [".hidden"] and [t.shape for t in carried[".hidden"]] == [(1, 2, 4), (1, 2, 4)]
    model.reset()
    put_back(model, carried)
    assert model.hidden is carried[".hidden"]


def test_a_validation_in_the_middle_of_a_training_leaves_the_hidden_state():
    class ValidateOnce(ll.Callback):
        def after_batch(self):
            if self.training and self.train_iter == 2 and not self.learn._depth:
                self.learn.validate()

    plain, disturbed = learner(*ll.rnn_cbs()), learner(*ll.rnn_cbs(), ValidateOnce())
    plain.fit(1), disturbed.fit(1)
    assert disturbed.recorder.raw_losses == plain.recorder.raw_losses


def test_a_stop_at_any_event_is_resumed_with_the_hidden_state_of_that_batch():
    assert_resumes_exactly(lambda: small_learner(ll.ModelResetter, ll.RNNCallback), every=4)


def test_the_hidden_state_is_in_what_is_stored():
    learn = learner(ll.ModelResetter(), ll.RNNCallback())
    stop = Once("after_batch", lambda cb: states.append(cb.learn.state_dict()), training=True)
    states = []
    learn.fit(1, cbs=stop)
    assert [(name, list(state)) for name, state, _ in states[0]["callbacks"] if name == "ModelResetter"] == [
        ("ModelResetter", ["carried"])
    ]


# The promises


class Small(nn.Module):
    """Carries the sum of what it saw; small, because it is trained some thousand times."""

    def __init__(self):
        super().__init__()
        self.line, self.seen = nn.Linear(2, 1), torch.zeros(1)

    def reset(self):
        self.seen = torch.zeros(1)

    def forward(self, x):
        self.seen = self.seen + x.sum().detach()
        out = self.line(x)[:, None] + self.seen / 100
        return out[:, 0], out, out.expand(-1, 2, -1)


def small_learner(*cbs):
    with preserved_randomness():
        torch.manual_seed(0)
        return toy_learner(16, 8, model=Small(), loss_func=loss_of_first, cbs=[cb() for cb in cbs])


def loss_of_first(pred, target):
    return F.mse_loss(pred[0] if isinstance(pred, tuple) else pred, target)


@pytest.mark.parametrize(
    ("make", "beside"),
    [
        (ll.ModelResetter, [ll.RNNCallback]),
        (ll.RNNCallback, [ll.ModelResetter]),  # which stores what the model carries
        (lambda: ll.RNNRegularizer(2.0, 1.0), [ll.ModelResetter, ll.RNNCallback]),
    ],
)
def test_they_keep_the_promises(make, beside):
    assert check_callback(make, lambda: small_learner(*beside)).broken == {}


@pytest.mark.parametrize(("rates", "said"), [((-1.0,), "alpha=-1.0"), ((0, "a"), "beta='a'"), ((True,), "alpha=True")])
def test_the_rates_of_the_penalties_are_numbers_from_zero(rates, said):
    with pytest.raises(ValueError, match=f"^`{said}`: pass how much of the penalty is added, a number of 0 or more.$"):
        ll.RNNRegularizer(*rates)
