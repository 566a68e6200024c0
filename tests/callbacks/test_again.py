"""What is put back for a second pass over a batch: test_sharpness.py and test_micro_batch.py see it at work."""

import torch
from torch import nn

import learnloop as ll
from learnloop.callbacks.again import Buffers, kept_in_hand, note, put_back, unheard_by_readers
from learnloop.testing import EventLog, toy_learner


def test_a_batch_is_put_back_with_its_random_state_and_what_callbacks_keep_of_it():
    learn = toy_learner(cbs=[mix := ll.MixUp()])
    learn.xb, learn.yb, mix.lam = (torch.ones(2),), (torch.zeros(2),), torch.tensor([0.7, 0.6])
    noted = note(learn)
    drawn = torch.rand(3)
    learn.xb, learn.pred, mix.lam = (None,), 1, None
    put_back(learn, noted)
    assert learn.xb[0].tolist() == [1, 1] and learn.yb[0].tolist() == [0, 0] and learn.pred is None
    assert torch.equal(mix.lam, torch.tensor([0.7, 0.6])) and torch.equal(torch.rand(3), drawn)


def test_what_is_done_meanwhile_leaves_no_trace():
    learn = toy_learner(model=nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    learn.xb, state, random = (torch.ones(2),), learn.model[1].state_dict(), torch.get_rng_state()
    before = {name: value.clone() for name, value in state.items()}
    with kept_in_hand(learn):
        learn.xb, learn.pred = (None,), learn.model(torch.rand(5, 2))
    assert learn.xb[0].tolist() == [1, 1] and learn.pred is None
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(learn.model[1].state_dict()[name], before[name]) for name in before)


def test_a_buffer_that_a_module_has_replaced_is_itself_again():
    norm = nn.BatchNorm1d(2)
    own, buffers = norm.running_mean, Buffers(norm)
    own.add_(1)
    norm.running_mean = torch.full((2,), 9.0)
    buffers.put_back()
    assert norm.running_mean is own and own.tolist() == [0, 0]


def test_of_what_happens_inside_readers_hear_nothing():
    log = EventLog()
    learn = toy_learner(cbs=log)
    with unheard_by_readers(learn, lambda cb: cb is log):
        learn("after_pred")
    learn("after_loss")
    assert log.events == ["after_create", "after_loss"]
