"""What a run is, as plain data: what may be in it, what comes back, and what is refused."""

import io
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from fastcore.foundation import L
from torch import nn

from learnloop import SGD, Adam, Callback, Learner, MCDropoutCallback
from learnloop.data.keyed import draw_seed
from learnloop.loop.state import check_plain, plain, restore, same, unplain
from tests.toys import learner, loaders, weights

ROOT = Path(__file__).parents[2]


def through_a_file(state):
    """The state as `torch.load` reads it without running code from the file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def returned(value):
    return unplain(through_a_file(plain(value)))


# Plain data


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, 2.5, 1j, "text", [1, [2]], (1, (2,)), {"a": {1: 2.0, False: None}}),
        *(Path("models/best"), np.float64(1.5), np.float16(0.1), np.int8(3), np.bool_(True), np.str_("ab")),
        {"__kind__": "a user's own key"},
    ],
)
def test_numbers_strings_containers_paths_and_numpy_scalars_come_back_as_what_they_were(value):
    back = returned(value)
    assert (back, type(back)) == (value, type(value))


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("first", [1 / 7, 3])
@pytest.mark.parametrize("last", [0.1, float("inf"), 5e-324, 1, -(2**63), 2**64, True, None, "text"])
def test_a_long_list_of_numbers_comes_back_to_the_bit_as_what_it_was(kind, first, last):
    value = kind([first * i for i in range(100)] + [last])
    found = returned(value)
    assert (found, type(found)) == (value, kind)
    assert [type(v) for v in found] == [type(v) for v in value]


def test_a_long_list_of_floats_is_stored_as_one_tensor():
    found = plain({"rates": [0.1] * 100, "few": [0.1] * 3})
    assert (found["rates"]["value"].dtype, found["few"]) == (torch.float64, [0.1] * 3)


def test_a_list_of_64_numbers_is_stored_as_it_is():
    assert plain([0.1] * 64) == [0.1] * 64
    assert plain([0.1] * 65)["value"].shape == (65,)


def test_a_tensor_of_a_device_that_is_not_here_comes_back_in_host_memory():
    saved = {"__kind__": "tensor", "value": torch.ones(2), "device": "cuda:99"}
    assert unplain(saved).tolist() == [1.0, 1.0] and unplain(saved).device.type == "cpu"


@pytest.mark.parametrize(
    ("saved_on", "n", "expected"),
    [
        *(("meta", 1, "meta"), ("meta:0", 1, "meta"), ("meta:1", 2, "meta")),
        *(("meta:0", 0, "cpu"), ("meta:1", 1, "cpu"), ("cuda:0", 1, "cpu")),
    ],
)
def test_a_tensor_comes_back_on_its_device_where_there_are_so_many_of_its_kind(saved_on, n, expected, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: n)
    saved = {"__kind__": "tensor", "value": torch.ones(2), "device": saved_on}
    assert unplain(saved).device.type == expected


def test_a_tensor_of_an_accelerator_that_torch_cannot_use_comes_back_in_host_memory(monkeypatch):
    def current(check_available=False):
        return None if check_available else torch.device("meta")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # of which a driver tells
    assert unplain({"__kind__": "tensor", "value": torch.ones(2), "device": "meta:0"}).tolist() == [1.0, 1.0]


def test_the_losses_of_a_long_fit_are_stored_as_one_tensor():
    learn = learner(dls=loaders(5))
    for _ in range(3):
        learn.fit(1)
        learn.state_dict()
    assert len(learn.state_dict()["kept"]["losses"]) == 1


NAN = float("nan")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, "a"], [1, "a"], True),
        ([1, 2], [1], False),
        ([1], [1, 2], False),
        ([1, 2], [1, 3], False),
        ((1,), [1], False),
        (1, 1.0, False),
        (NAN, NAN, True),
        ({"a": [NAN]}, {"a": [NAN]}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"b": 1}, False),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), True),
        (torch.tensor([1.0]), torch.tensor([2.0]), False),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([1.0]), [1.0], False),
        ({"a": 1}, [("a", 1)], False),
    ],
    ids=str,
)
def test_two_pieces_of_plain_data_are_the_same_to_the_bit_and_of_the_same_kind(a, b, expected):
    assert same(a, b) == expected


def test_an_L_comes_back_as_an_L():
    back = returned(L(1, L(2, 3)))
    assert isinstance(back, L) and isinstance(back[1], L)
    assert back == L(1, L(2, 3))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.arange(6, dtype=np.int16).reshape(2, 3).T,  # not contiguous
        np.zeros((0, 3)),
        np.array(7),
        np.array(["a", "bcd"]),
        np.array(["2020-02-29"], dtype="datetime64[D]"),
        np.array([True, False]),
    ],
)
def test_a_numpy_array_comes_back_with_shape_dtype_and_values(array):
    back = returned(array)
    assert (type(back), back.dtype, back.shape, back.tolist()) == (np.ndarray, array.dtype, array.shape, array.tolist())


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox])
def test_a_numpy_generator_comes_back_where_it_stood(bits):
    generator = np.random.Generator(bits(3))
    generator.random(5)
    back = returned(generator)
    assert back.random(4).tolist() == generator.random(4).tolist()


def test_a_tensor_comes_back_without_its_graph():
    x = torch.ones(2, requires_grad=True) * 2
    back = returned(x)
    assert (back.tolist(), back.requires_grad) == ([2.0, 2.0], False)


def test_a_tensor_of_another_class_is_stored_as_a_plain_one():
    class Image(torch.Tensor):
        pass

    assert type(returned(torch.ones(2).as_subclass(Image))) is torch.Tensor


def test_what_plain_returns_shares_no_memory_with_what_it_was_given():
    x, array = torch.zeros(2), np.zeros(2)
    stored = plain({"x": x, "array": array, "list": [x]})
    x.fill_(1.0)
    array.fill(1.0)
    back = unplain(stored)
    assert (back["x"].tolist(), back["array"].tolist(), back["list"][0].tolist()) == ([0, 0], [0, 0], [0, 0])


def test_what_unplain_returns_can_be_changed_without_changing_the_state():
    stored = plain({"x": torch.zeros(2)})
    unplain(stored)["x"].fill_(1.0)
    assert stored["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({1, 2}, "set"),
        (object(), "object"),
        (np.array([object()]), "ndarray"),
        (np.zeros(2, dtype=[("a", "i4")]), "ndarray"),
        (torch.Size([1]), "Size"),
        (nn.Linear(1, 1), "Linear"),
        (max, "builtin_function_or_method"),
    ],
)
def test_anything_else_is_a_type_error_that_says_where_and_what(value, kind):
    for function in (plain, check_plain):
        with pytest.raises(TypeError, match=rf"`Timer.marks` is a {kind}, which cannot be stored"):
            function([value], "`Timer.marks`")


def test_keys_that_a_file_does_not_take_are_refused():
    with pytest.raises(TypeError, match=r"`Timer.marks` has the key \(1, 2\); keys are strings or numbers"):
        plain({(1, 2): 3}, "`Timer.marks`")


# Callbacks' state


class Keeps(Callback):
    """Names one attribute that survives."""

    _stateattrs = ("kept",)

    def __init__(self, kept=None):
        if kept is not None:
            self.kept = kept


def test_a_state_that_cannot_be_stored_is_refused_before_the_first_epoch():
    events = []
    learn = learner([Keeps({1, 2}), Callback(before_epoch=lambda cb: events.append("before_epoch"))])
    with pytest.raises(TypeError, match=r"`Keeps\.kept` is a set, which cannot be stored"):
        learn.fit(1)
    assert (events, learn.task) == ([], None)


@pytest.mark.parametrize(
    "kept", [L(1, 2), Path("x"), np.float32(2), np.arange(3.0), np.random.default_rng(1), torch.ones(2), {"a": (1,)}]
)
def test_a_callbacks_attribute_comes_back_as_what_it_was(kept):
    state = through_a_file(learner(Keeps(kept)).state_dict())
    other = learner(Keeps(0))
    other.load_state_dict(state)
    back = other.keeps.kept
    assert type(back) is type(kept)
    assert repr(plain(back)) == repr(plain(kept))


def test_two_callbacks_of_one_class_get_their_own_states_also_where_one_has_none_yet():
    learn = learner([Keeps(), Keeps("second")])
    state = learn.state_dict()
    first, second = Keeps("other"), Keeps("another")
    learner([first, second]).load_state_dict(state)
    assert (first.kept, second.kept) == ("other", "second")


def test_a_callback_without_a_saved_state_may_join():
    state = learner().state_dict()
    extra = Keeps("mine")
    learner(extra).load_state_dict(state)
    assert extra.kept == "mine"


# The whole run


def fitted(**kwargs):
    learn = learner(opt_func=kwargs.pop("opt_func", Adam), default_cbs=True, **kwargs)
    with learn.no_logging(), learn.no_bar():
        learn.fit(2)
    return learn


def test_a_state_reads_back_from_a_file_as_it_was():
    state = fitted().state_dict()
    assert repr(through_a_file(state)) == repr(state)


def test_loading_brings_back_weights_optimizer_counters_record_and_random_states():
    learn = fitted()
    state = learn.state_dict()
    expected = weights(learn), repr(learn.opt.state_dict()), torch.get_rng_state(), np.random.get_state()[1].tolist()
    python = random.getstate()
    other = fitted(seed=5)
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    other.load_state_dict(state)
    assert torch.equal(weights(other), expected[0])
    assert repr(other.opt.state_dict()) == expected[1]
    assert torch.equal(torch.get_rng_state(), expected[2])
    assert np.random.get_state()[1].tolist() == expected[3]
    assert random.getstate() == python
    assert (other.train_iter, other.opt_iter, other.pct_train) == (4, 4, 1.0)
    assert other.recorder.raw_losses == learn.recorder.raw_losses
    assert list(map(list, other.recorder.values)) == list(map(list, learn.recorder.values))


def test_modes_frozen_parameters_and_gradients_come_back():
    learn = learner(model=nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)))
    learn.model[0].requires_grad_(False)
    learn.model[1].eval()
    learn.model[2].weight.grad = torch.full((1, 2), 3.0)
    state = learn.state_dict()
    other = learner(model=nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)))
    other.load_state_dict(state)
    assert [m.training for m in other.model] == [True, False, True]
    assert [p.requires_grad for p in other.model.parameters()] == [False, False, True, True, True, True]
    assert other.model[2].weight.grad.tolist() == [[3.0, 3.0]]
    assert other.model[2].bias.grad is None


class Smoothed(nn.Linear):
    """A line with a buffer that its own state leaves out."""

    def __init__(self, mean):
        super().__init__(1, 1)
        self.register_buffer("mean", mean, persistent=False)


@pytest.mark.parametrize("mean", [torch.tensor([3.0]), None], ids=["a tensor", "none yet"])
def test_buffers_that_the_models_own_state_leaves_out_come_back(mean):
    state = learner(model=Smoothed(mean)).state_dict()
    other = learner(model=Smoothed(torch.tensor([5.0])))
    other.load_state_dict(state)
    assert other.model.mean == mean


def test_such_buffers_come_back_on_the_device_of_the_model():
    state = learner(model=Smoothed(torch.tensor([3.0]))).state_dict()
    other = learner(model=Smoothed(torch.tensor([5.0], device="meta")))
    other.load_state_dict(state)
    assert other.model.mean.device.type == "meta"


def test_a_model_with_another_number_of_such_buffers_is_refused():
    state = learner(model=Smoothed(torch.tensor([3.0]))).state_dict()
    refused(learner(model=nn.Linear(1, 1)), state, "1 buffers saved, 0 here")


def test_a_state_is_a_copy_that_training_does_not_move():
    learn = fitted()
    state = learn.state_dict()
    before = repr(state)
    with learn.no_logging(), learn.no_bar():
        learn.fit(1)
    assert repr(state) == before


def test_loading_makes_the_optimizer_where_there_is_none_yet():
    state = fitted().state_dict()
    other = learner(opt_func=Adam, default_cbs=True)
    other.load_state_dict(state)
    assert repr(other.opt.state_dict()) == repr(unplain(state["opt"]))


class Zeros(Callback):
    """Validates with a model of zeros."""

    former = None

    def before_validate(self):
        self.former = [p.detach().clone() for p in self.learn.model.parameters()]
        self.write([torch.zeros_like(p) for p in self.former])

    def cleanup_validate(self):
        self.write(self.former)
        self.former = None

    @contextmanager
    def trained_weights(self):
        inside = [p.detach().clone() for p in self.learn.model.parameters()]
        self.write(self.former or inside)
        yield
        self.write(inside)

    def write(self, values):
        for p, value in zip(self.learn.model.parameters(), values, strict=True):
            p.data.copy_(value)


def test_a_state_holds_the_weights_that_are_trained_while_a_callback_has_put_in_others():
    states, inside = [], []

    def take(cb):
        states.append(cb.learn.state_dict()["model"])
        inside.append(weights(cb.learn).tolist())

    learn = learner([Zeros(), Callback(after_validate=take)])
    learn.fit(1)
    assert inside == [[0.0, 0.0]]
    assert [t.tolist() for t in states[0].values()] == [t.tolist() for t in learn.model.state_dict().values()]


# What is refused, and leaves everything as it was


def refused(learn, state, match):
    before = repr(learn.state_dict()["model"]), learn.opt, repr(learn.opt and learn.opt.state_dict())
    random_before = torch.get_rng_state()
    with pytest.raises(ValueError, match=match):
        learn.load_state_dict(state)
    after = repr(learn.state_dict()["model"]), learn.opt, repr(learn.opt and learn.opt.state_dict())
    assert after == before
    assert torch.equal(torch.get_rng_state(), random_before)
    with pytest.raises(RuntimeError, match="nothing to resume"):
        learn.resume()


def test_a_model_with_other_names_is_refused():
    state = learner().state_dict()
    refused(learner(model=nn.Sequential(nn.Linear(1, 1))), state, "`weight` saved but not in the model")
    refused(learner(model=nn.Sequential(nn.Linear(1, 1))), state, "`0.bias` in the model but not saved")


def test_a_model_with_other_shapes_is_refused():
    refused(learner(model=nn.Linear(3, 1)), learner().state_dict(), r"`weight` is \[1, 1\] saved and \[1, 3\] here")


def test_a_model_with_other_modules_is_refused():
    state = learner(model=nn.Sequential(nn.Linear(1, 1), nn.ReLU())).state_dict()
    refused(learner(model=nn.Sequential(nn.Linear(1, 1))), state, "3 modules saved, 2 here")


def test_a_state_of_a_callback_that_is_not_there_is_refused():
    state = learner(Keeps(1)).state_dict()
    refused(learner(), state, "callback Keeps has a saved state but is not on the learner: add it first")


def test_a_second_callback_of_a_class_that_is_not_there_is_refused():
    state = learner([Keeps(1), Keeps(2)]).state_dict()
    refused(learner(Keeps(3)), state, "callback Keeps has a saved state but is not on the learner")


@pytest.mark.parametrize("opt_func", [SGD, torch.optim.AdamW])
def test_the_state_of_another_kind_of_optimizer_is_refused(opt_func):
    state = fitted().state_dict()
    named = {SGD: "SGD", torch.optim.AdamW: "OptimWrapper of AdamW"}[opt_func]
    refused(learner(opt_func=opt_func, default_cbs=True), state, f"the optimizer is Adam saved and {named} here")


def test_the_state_of_an_optimizer_is_refused_where_there_is_none():
    state, learn = fitted().state_dict(), learner(default_cbs=True)
    with pytest.raises(ValueError, match=r"an optimizer saved, none here: call `learn\.create_opt\(\)`\.$"):
        restore(learn, state)


def test_five_differences_are_named():
    saved, here = (nn.Sequential(*(nn.Linear(n, n) for _ in range(3))) for n in (1, 2))
    names = [f"`{i}.{kind}`" for i in range(3) for kind in ("weight", "bias")]
    with pytest.raises(ValueError) as caught:
        learner(model=here).load_state_dict(learner(model=saved).state_dict())
    assert [name for name in names if name in str(caught.value)] == names[:5]


def test_an_optimizer_with_other_groups_is_refused():
    state = fitted().state_dict()
    split = learner(opt_func=Adam, default_cbs=True, splitter=lambda m: [[m.weight], [m.bias]])
    refused(split, state, "the state has 1 parameter groups, this optimizer 2")


@pytest.mark.parametrize("state", [None, {}, {"model": {}}, [1], {"version": 99}])
def test_what_is_no_state_is_refused(state):
    refused(learner(), state, "this is no state of a learner: `load_state_dict` takes what `state_dict")


@pytest.mark.parametrize("change", [lambda state: state.update(version=2), lambda state: state.pop("random")])
def test_a_state_of_another_version_or_without_one_of_its_parts_is_refused(change):
    state = fitted().state_dict()
    assert state["version"] == 1
    change(state)
    refused(learner(), state, "this is no state of a learner")


def test_loading_during_a_run_is_refused():
    learn = learner()
    learn.add_cb(Callback(after_batch=lambda cb: cb.learn.load_state_dict({})))
    with pytest.raises(RuntimeError, match="`load_state_dict` was called while a run is active"):
        learn.fit(1)


# Runs beside the training


def doubting():
    """A learner whose every validation draws one seed for its dropout."""
    return learner(MCDropoutCallback(), model=nn.Sequential(nn.Linear(1, 1), nn.Dropout()))


def test_a_run_that_draws_a_seed_on_purpose_moves_the_global_stream_by_that_draw_alone():
    learn = doubting()
    torch.manual_seed(3)
    for _ in range(3):
        learn.validate()
    moved = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(3):
        draw_seed()
    assert torch.equal(torch.get_rng_state(), moved)


def test_a_run_inside_of_one_that_has_drawn_a_seed_moves_the_stream_by_its_own_draw_alone():
    states = []

    def validate(cb):
        states.append(torch.get_rng_state())
        cb.learn.validate()
        states.append(torch.get_rng_state())

    doubting().validate(cbs=Callback(after_validate=validate))
    torch.set_rng_state(states[0])
    draw_seed()
    assert torch.equal(torch.get_rng_state(), states[1])


# Elsewhere


def test_another_process_goes_on_with_the_very_numbers(tmp_path):
    def new():
        learn = learner(dls=loaders(4, 2, shuffle=True), default_cbs=True)
        learn.logger, learn.create_mbar = (lambda row: None), False
        return learn

    stopped = new()
    stopped.add_cb(Callback(after_batch=lambda cb: cb.train_iter == 6 and signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(3)
    torch.save(stopped.state_dict(), tmp_path / "state")
    script = f"""
import torch
from tests.toys import learner, loaders, weights
learn = learner(dls=loaders(4, 2, shuffle=True), default_cbs=True)
learn.load_state_dict(torch.load({str(tmp_path / "state")!r}, weights_only=True))
learn.resume()
print(weights(learn).tolist(), learn.recorder.raw_losses)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    whole = new()
    whole.fit(3)
    assert done.stdout.splitlines()[-1] == f"{weights(whole).tolist()} {whole.recorder.raw_losses}"


def test_a_function_as_a_model_has_a_state_too():
    learn = Learner(loaders(), lambda x: x, nn.MSELoss(), default_cbs=False)
    learn.fit(1)
    learn.load_state_dict(through_a_file(learn.state_dict()))
    assert learn.train_iter == 2
