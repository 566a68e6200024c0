"""ChannelsLast and Compile: the numbers are those of the model as it is."""

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.testing import check_callback, toy_learner
from tests.resuming import assert_resumes_exactly


def images(n):
    x = torch.linspace(-1, 1, n * 3 * 6 * 6).sin().view(n, 3, 6, 6)
    return x, x.mean((1, 2, 3))[:, None]


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1))


def image_learner(*cbs):
    learn = toy_learner(model=convolutions(), cbs=cbs)
    loaders = [ll.TensorLoader(*images(n), bs=4, shuffle=n > 8) for n in (16, 8)]
    learn.dls = ll.DataLoaders(*loaders, device="cpu")
    learn.dls.seed = 1
    return learn


def weights(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def fitted(*cbs):
    learn = image_learner(*cbs)
    learn.fit(2)
    return learn


def is_channels_last(learn):
    weight = learn.model[0].weight
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


# ChannelsLast


def test_weights_of_convolutions_have_channels_last_and_numbers_stay():
    learn, seen = image_learner(ll.ChannelsLast()), []
    note = ll.Callback(after_pred=lambda cb: seen.append(is_channels_last(cb.learn)))
    learn.fit(2, cbs=note)
    assert all(seen)
    assert torch.allclose(weights(learn), weights(fitted()), rtol=0, atol=1e-6)


def test_to_channelslast_and_to_contiguous_are_each_other_undone():
    learn = image_learner()
    assert learn.to_channelslast(use_amp=False) is learn
    learn.to_channelslast(use_amp=False)
    learn.fit(1)
    assert is_channels_last(learn)
    assert len(learn._grab_cbs(ll.ChannelsLast)) == 1

    assert learn.to_contiguous() is learn
    learn.fit(1)
    assert learn.model[0].weight.is_contiguous()
    assert not learn._grab_cbs(ll.ChannelsLast)


def test_to_channelslast_brings_mixed_precision_unless_it_is_told_not_to():
    learn = image_learner().to_channelslast(amp_mode="bf16")
    assert learn.mixed_precision.dtype is torch.bfloat16
    learn.to_channelslast()  # what is there stays
    assert learn.mixed_precision.dtype is torch.bfloat16
    learn.to_contiguous(to_fp32=True)
    assert not hasattr(learn, "mixed_precision")


def test_a_model_that_is_a_function_is_let_be():
    toy_learner(model=lambda x: x.sum(1, keepdim=True), cbs=ll.ChannelsLast()).fit(1)


def test_with_channels_last_every_promise_is_kept():
    check_callback(ll.ChannelsLast, image_learner, events=["before_fit", "after_loss", "after_epoch"])
    assert_resumes_exactly(lambda: image_learner(ll.ChannelsLast()), every=9)


# Compile. The backend `eager` runs what torch has traced without a compiler.


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_the_model_runs_compiled_with_the_same_numbers():
    calls = []

    def backend(module, inputs):
        calls.append(len(inputs))
        return module

    learn = fitted(ll.Compile(backend=backend))
    assert calls
    assert torch.equal(weights(learn), weights(fitted()))


def test_the_model_stays_the_same_object_with_the_same_names():
    names = []
    learn = image_learner(ll.Compile(backend="eager"))
    model = learn.model
    learn.fit(1, cbs=ll.Callback(after_batch=lambda cb: names.append(list(cb.model.state_dict()))))
    assert names[0] == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert learn.model is model


def test_between_fits_the_model_runs_as_written_and_the_next_fit_compiles_nothing_anew():
    compiled = ll.Compile(backend="eager")
    learn = fitted(compiled)
    assert learn.model._compiled_call_impl is None
    assert compiled.n_compiled > 0
    learn.fit(1)
    assert (compiled.n_compiled, compiled.recompilations) == (0, [])


def test_recompilations_are_counted_and_named():
    compiled = ll.Compile(backend="eager", dynamic=False)
    learn = image_learner(compiled)
    x, y = images(11)
    learn.dls = ll.DataLoaders([(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])], device="cpu")
    learn.fit(1)
    assert (compiled.n_compiled, len(compiled.recompilations)) == (2, 1)
    assert compiled.recompilations[0].startswith("Sequential: ")
    assert "expected 4, actual 3" in compiled.recompilations[0]


def test_what_was_compiled_before_is_put_back():
    learn = image_learner(ll.Compile(backend="eager"))
    learn.model.compile(backend="eager")
    former = learn.model._compiled_call_impl
    learn.fit(1)
    assert learn.model._compiled_call_impl is former


def test_many_models_in_one_process_are_all_compiled():
    counts = []
    for _ in range(12):  # torch compiles one code eight times at most
        compiled = ll.Compile(backend="eager")
        toy_learner(n_train=8, n_valid=0, cbs=compiled).fit(1)
        counts.append(compiled.n_compiled)
    assert counts == [1] * 12


def test_a_model_that_is_a_function_is_refused():
    learn = toy_learner(model=lambda x: x.sum(1, keepdim=True), cbs=ll.Compile())
    with pytest.raises(TypeError, match="Compile needs a torch module, and the model is a function"):
        learn.fit(1)


def test_a_bad_layer_of_a_compiled_model_is_found():
    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt()

    guard = ll.TerminateOnNaNCallback()
    model = nn.Sequential(nn.Linear(2, 4), Root(), nn.Linear(4, 1))
    toy_learner(model=model, cbs=[guard, ll.Compile(backend="eager")]).fit(1)
    assert guard.bad_layer == "1"


def test_compiled_every_promise_is_kept():
    check_callback(lambda: ll.Compile(backend="eager"), events=["before_fit", "after_loss", "after_epoch"])
    assert_resumes_exactly(lambda: toy_learner(cbs=ll.Compile(backend="eager")), every=13)
