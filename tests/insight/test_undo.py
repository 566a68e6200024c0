"""After a dry run a learner is what it was, whatever callbacks did to it."""

import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import learnloop as ll
from learnloop import Callback
from learnloop.loop.state import capture, same
from learnloop.testing import toy_learner


def trained(**kwargs):
    learn = toy_learner(**kwargs)
    learn.fit(1)
    return learn


def dry(learn, event, handler):
    return learn.dry_run(cbs=Callback(**{event: handler}))


def test_weights_optimizer_counters_record_and_generators_are_as_they_were():
    learn = trained(opt_func=ll.Adam, metrics=ll.mae)
    before = capture(learn)
    learn.dry_run(3)
    assert same(before, capture(learn))


def test_a_training_goes_the_same_way_with_dry_runs_in_between():
    plain, looked_at = toy_learner(opt_func=ll.Adam), toy_learner(opt_func=ll.Adam)
    for _ in range(2):
        plain.fit(1)
        looked_at.dry_run(2)
        looked_at.fit(1)
    assert looked_at.recorder.values == plain.recorder.values
    assert torch.equal(looked_at.model[0].weight, plain.model[0].weight)


def test_a_learner_without_an_optimizer_has_none():
    learn = toy_learner()
    learn.dry_run()
    assert learn.opt is None


def test_reset_opt_leaves_the_optimizer_that_is_there():
    learn = trained()
    opt = learn.opt
    learn.dry_run(reset_opt=True)
    assert learn.opt is opt


def test_attributes_of_learner_and_callbacks_are_as_they_were():
    def writes(cb):
        cb.learn.mine, cb.learn.model.also, cb.recorder.also = 1, 2, 3
        cb.recorder.history.append("nothing")
        del cb.learn.create_mbar

    learn = trained()
    history, rows = learn.recorder.history, list(learn.recorder.history)
    dry(learn, "before_fit", writes)
    assert learn.recorder.history is history and history == rows
    assert "mine" not in vars(learn) and learn.create_mbar is False
    assert not hasattr(learn.model, "also") and not hasattr(learn.recorder, "also")


def test_its_class_and_its_modules_are_plain_again():
    learn = toy_learner()
    learn.dry_run()
    assert type(learn) is ll.Learner
    assert all("train" not in vars(module) for module in learn.model.modules())


def test_metrics_keep_their_values():
    learn = trained(metrics=ll.mae)
    value = learn.metrics[0].value
    learn.dry_run()
    assert learn.metrics[0].value == value


def test_callbacks_that_came_or_went_are_as_they_were():
    learn = toy_learner(cbs=ll.CollectDataCallback())
    before = list(learn.cbs)
    dry(learn, "before_epoch", lambda cb: cb.learn.remove_cb(ll.CollectDataCallback).add_cb(ll.EMA()))
    assert list(learn.cbs) == before and all(cb.learn is learn for cb in before)
    assert not hasattr(learn, "ema") and learn.collect_data is before[-1]


def test_hooks_and_parts_of_the_model_are_as_they_were():
    def writes(cb):
        cb.model[0].register_forward_hook(lambda *_: None)
        cb.model[0].register_buffer("more", torch.ones(1))
        cb.model.append(nn.Linear(1, 1))
        cb.learn.model = nn.Linear(2, 1)

    learn = trained()
    before = capture(learn)
    dry(learn, "after_fit", writes)
    assert not learn.model[0]._forward_hooks and same(before, capture(learn))


def test_buffers_that_others_took_the_place_of_are_back_with_their_values():
    learn = toy_learner(model=nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)))
    buffer = learn.model[0].running_mean

    def replaces(cb):
        buffer.fill_(7)
        cb.model[0].running_mean = buffer * 2

    dry(learn, "before_fit", replaces)
    assert learn.model[0].running_mean is buffer and buffer.tolist() == [0, 0]


def test_weights_lie_where_they_lay():
    learn = toy_learner(
        model=nn.Sequential(nn.Unflatten(1, (2, 1, 1)), nn.Conv2d(2, 4, (1, 1)), nn.Flatten(), nn.Linear(4, 1))
    )
    weight = learn.model[1].weight
    place, values = (weight.data_ptr(), weight.stride()), weight.tolist()

    def moves(cb):
        weight.data = weight.data.double().float() * 3

    dry(learn, "before_fit", moves)
    assert (weight.data_ptr(), weight.stride()) == place and weight.tolist() == values


def test_the_data_is_not_changed_in_place():
    data = [(torch.ones(4, 2), torch.zeros(4, 1)) for _ in range(3)]
    dls = ll.DataLoaders(data, data, device="cpu")
    learn = ll.Learner(dls, nn.Linear(2, 1), nn.MSELoss(), ll.SGD, default_cbs=False)
    dry(learn, "before_batch", lambda cb: cb.x.zero_())
    assert all(x.eq(1).all() for x, _ in data)


def test_generators_of_loaders_are_as_they_were():
    dataset, generator = TensorDataset(torch.rand(8, 2), torch.rand(8, 1)), torch.Generator().manual_seed(3)
    dl = DataLoader(dataset, batch_size=2, sampler=RandomSampler(dataset, generator=generator))
    dls = ll.DataLoaders(dl, device="cpu", keyed=False)
    learn = ll.Learner(dls, nn.Linear(2, 1), nn.MSELoss(), ll.SGD, default_cbs=False)
    before = generator.get_state()
    learn.dry_run()
    assert torch.equal(generator.get_state(), before)


def test_a_loss_with_numbers_of_its_own_keeps_them():
    class Counting(nn.MSELoss):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, pred, y):
            self.seen += len(y)
            return super().forward(pred, y)

    learn = toy_learner(loss_func=Counting())
    learn.dry_run()
    assert learn.loss_func.seen == 0


def test_global_generators_are_as_they_were():
    def draws(cb):
        torch.rand(1), random.random(), np.random.rand()

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    dry(toy_learner(), "before_batch", draws)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("event", ["before_fit", "after_loss", "cleanup_fit"])
def test_after_an_error_it_is_as_it_was_too(event, error):
    def fails(cb):
        raise error

    learn = trained()
    before = capture(learn)
    with pytest.raises(error):
        dry(learn, event, fails)
    assert same(before, capture(learn)) and type(learn) is ll.Learner
    assert [type(cb) for cb in learn.cbs] == [ll.TrainEvalCallback, ll.Recorder]


def test_after_ctrl_c_it_is_as_it_was_too():
    learn = trained()
    before = capture(learn)
    with pytest.raises(KeyboardInterrupt):
        dry(learn, "after_batch", lambda cb: signal.raise_signal(signal.SIGINT))
    assert same(before, capture(learn)) and type(learn) is ll.Learner
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_stopped_fit_can_still_be_resumed():
    def stops(cb):
        if cb.training and cb.iter == 1:
            signal.raise_signal(signal.SIGINT)

    whole, stopped = toy_learner(), toy_learner()
    whole.fit(2)
    stop = Callback(after_batch=stops)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(2, cbs=stop)
    stopped.dry_run()
    stop.after_batch = lambda: None
    stopped.resume()
    assert torch.equal(stopped.model[0].weight, whole.model[0].weight)


def test_what_cannot_be_copied_is_shared():
    cb = Callback(before_fit=lambda cb: cb.numbers.append(1))
    cb.numbers, cb.stream = [], (n for n in range(3))
    learn = toy_learner(cbs=cb)
    stream = cb.stream
    learn.dry_run()
    assert cb.numbers == [] and cb.stream is stream


def test_nothing_is_printed(capsys):
    learn = toy_learner(default_cbs=True)
    learn.logger = print
    dry(learn, "before_fit", lambda cb: print("hello"))
    assert capsys.readouterr().out == ""
