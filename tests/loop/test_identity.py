"""What a fit is made of: what must be the same for a resume, and what may differ."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from learnloop import Callback, DataLoaders, ParamScheduler, Recorder, SchedLin
from learnloop.loop.fits import FitCall
from learnloop.loop.identity import check_same_fit, identity
from learnloop.testing import EventLog
from tests.toys import learner, tensor_loader


class Reads(Callback):
    reads_only = True
    _stateattrs = ("seen",)

    def __init__(self):
        self.seen = 0

    def after_batch(self):
        self.seen += 1


class Writes(Callback):
    def __init__(self, rate=1, **others):
        self.settings = {"rate": rate, **others}

    def identity(self):
        return self.settings


def state_of(cbs=None, call=(1,), **kwargs):
    learn = learner(cbs, **kwargs)
    learn.fit(*call)
    return learn.state_dict()


def differences(state, cbs=None, call=None, **kwargs):
    """The message about another fit."""
    learn = learner(cbs, **kwargs)
    learn.create_opt()
    with pytest.raises(ValueError) as caught:
        check_same_fit(learn, call or FitCall(1), state)
    return str(caught.value)


def fits(state, cbs=None, call=None, **kwargs):
    learn = learner(cbs, **kwargs)
    learn.create_opt()
    check_same_fit(learn, call or FitCall(1), state)


def test_the_same_call_is_the_same_fit():
    fits(state_of(Writes()), Writes())


def test_it_is_plain_data():
    learn = learner([Writes(torch.ones(2)), ParamScheduler({"lr": SchedLin(1.0, 0.0)})])
    learn.fit(1)
    found = learn.state_dict()["identity"]
    assert found["settings"][0] == ["Writes", {"rate": found["settings"][0][1]["rate"]}]
    assert found["settings"][1][1]["schedule of `lr`"][::5] == [1.0, 0.5]
    assert (found["n_epoch"], found["n_step"], found["batches"], found["lr"]) == (1, None, 2, 0.1)


def test_a_callback_that_only_reads_may_come_and_go():
    fits(state_of([Writes(), Reads()]), Writes())
    fits(state_of(Writes()), [EventLog(), Writes(), Reads()])
    fits(state_of(Recorder()))


def test_what_a_callback_that_only_reads_had_kept_comes_back_where_it_is_and_is_left_out_where_it_is_not():
    state = state_of([Reads(), Reads()])
    here, nobody = learner(Reads()), learner()
    here.load_state_dict(state)
    nobody.load_state_dict(state)
    assert here.cbs[0].seen == 3


def test_a_callback_that_writes_must_be_there_and_may_not_join():
    assert "callback Writes was there then and is not now: add it first" in differences(state_of(Writes()))
    assert "callback Writes was not there then" in differences(state_of(), Writes())
    assert "callback Writes was not there then" in differences(state_of(Writes()), [Writes(), Writes()])


def test_what_a_callback_says_of_itself_must_be_the_same():
    assert "the rate of Writes is another" in differences(state_of(Writes(1)), Writes(2))
    assert "the rate of Writes is another" in differences(state_of(Writes(torch.ones(2))), Writes(torch.zeros(2)))
    fits(state_of(Writes(torch.ones(2))), Writes(torch.ones(2)))


def test_what_only_one_of_the_two_says_of_itself_is_a_difference_too():
    assert "the decay of Writes is another" in differences(state_of(Writes(1)), Writes(1, decay=0.9))
    assert "the decay of Writes is another" in differences(state_of(Writes(1, decay=0.9)), Writes(1))


def test_several_of_one_class_are_compared_in_their_order():
    fits(state_of([Writes(1), Writes(2)]), [Writes(1), Writes(2)])
    assert "the rate of Writes is another" in differences(state_of([Writes(1), Writes(2)]), [Writes(2), Writes(1)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (FitCall(2), "`n_epoch=1` then and `n_epoch=2` now"),
        (FitCall(None, n_step=3), "`n_epoch=1` then and `n_epoch=None` now; `n_step=None` then and `n_step=3` now"),
        (FitCall(1, lr=0.2), "`lr=0.1` then and `lr=0.2` now"),
        (FitCall(1, lr=slice(0.01, 0.1)), "`lr=0.1` then and `lr=['slice', 0.01, 0.1]` now"),
        (FitCall(1, wd=0.2), "`wd=None` then and `wd=0.2` now"),
        (FitCall(1, start_epoch=1), "`start_epoch=0` then and `start_epoch=1` now"),
    ],
)
def test_the_numbers_of_the_call_must_be_the_same(call, message):
    assert message in differences(state_of(), call=call)


def test_the_length_of_the_data_must_be_the_same():
    loader = lambda n, bs: DataLoaders(DataLoader(TensorDataset(torch.ones(n, 1), torch.ones(n, 1)), bs))  # noqa: E731
    state = state_of(dls=loader(8, 2))
    assert "8 samples for training then and 10 now" in differences(state, dls=loader(10, 2))
    assert "4 training batches then and 2 now" in differences(state, dls=loader(8, 4))
    ready = state_of(dls=DataLoaders(list(tensor_loader(2))))
    assert "2 training batches then and 3 now" in differences(ready, dls=DataLoaders(list(tensor_loader(3))))


def test_a_loader_without_a_length_has_none():
    learn = learner(dls=DataLoaders(x for x in ()))
    learn.create_opt()
    assert identity(learn, FitCall(1))["batches"] is None


def test_five_differences_are_named_and_what_to_do():
    message = differences(state_of(), [Writes()], FitCall(None, n_step=3, lr=1, wd=1, start_epoch=1))
    assert message.startswith("what is to be resumed is another fit: `n_epoch=1` then")
    assert message.count(";") == 4
    assert message.endswith("Repeat the call as it was, or start anew without `resume`.")


def test_another_model_is_named_first():
    with pytest.raises(ValueError, match="`weight` saved but not in the model"):
        fits(state_of(), model=torch.nn.Sequential(torch.nn.Linear(1, 1)))


def test_a_state_from_before_any_fit_is_none_to_resume():
    assert "was taken before any fit" in differences(learner().state_dict())


def test_it_is_what_the_fit_began_with():
    """A callback that another one adds on its way does not make the same call another one."""
    adds = Callback(before_fit=lambda cb: cb.learn.add_cb(Writes()))
    fits(state_of(adds), Callback())
