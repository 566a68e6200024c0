"""Hook and Hooks. Numbers of a gradient are compared with torch.autograd."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

import learnloop as ll


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


X = torch.linspace(-1, 1, 8).view(4, 2)


def n_hooks(model):
    kinds = ("_forward_hooks", "_backward_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def summed(module, input, output):
    return output.sum().item()


def test_a_hook_calls_its_function_with_module_input_and_output_and_stores_what_it_returns():
    model = network()
    with ll.Hook(model[1], lambda *args: args) as hook:
        assert hook.stored is None
        model(X)
        module, (before,), after = hook.stored
    assert module is model[1]
    assert torch.equal(after, before.tanh())


def owned(owner, module, input, output):
    return owner is not None


def test_the_output_that_goes_on_is_untouched():
    model = network()
    expected = model(X)
    with ll.Hook(model[0], lambda m, i, o: torch.zeros(4, 3)):
        assert torch.equal(model(X), expected)


def test_after_the_block_no_hook_is_on_the_model_and_the_stored_value_stays():
    model = network()
    with ll.Hook(model[0], summed) as hook:
        model(X)
    stored = hook.stored
    model(2 * X)
    assert n_hooks(model) == 0
    assert hook.removed
    assert hook.stored == stored == pytest.approx(model[0](X).sum().item())


def test_an_error_in_the_block_removes_it_too():
    model = network()
    with pytest.raises(ZeroDivisionError), ll.hook_outputs(model):
        raise ZeroDivisionError
    assert n_hooks(model) == 0


def test_removing_twice_is_no_error():
    hook = ll.hook_output(network()[0])
    hook.remove()
    hook.remove()
    assert repr(hook) == "Hook(removed)"


def test_a_hook_may_remove_itself_while_the_module_runs():
    model, hooks = network(), []
    hooks.append(ll.Hook(model[0], lambda *args: hooks[0].remove()))
    hooks.append(ll.Hook(model[0], lambda *args: "ran"))
    model(X)
    assert [h.removed for h in hooks] == [True, False]
    assert hooks[1].stored == "ran"
    hooks[1].remove()


def test_a_removed_hook_keeps_neither_the_model_nor_its_function_alive():
    model = network()
    owner = nn.Identity()
    hook = ll.Hook(model[0], partial(owned, owner))
    model(X)
    hook.remove()
    refs = [weakref.ref(model), weakref.ref(owner)]
    del model, owner
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_a_model_keeps_no_removed_hook_alive():
    model = network()
    with ll.hook_output(model[0]) as hook:
        model(X)
    ref = weakref.ref(hook)
    del hook
    assert ref() is None


@pytest.mark.parametrize(("detach", "requires_grad"), [(True, False), (False, True)])
def test_detach_decides_whether_the_graph_is_stored(detach, requires_grad):
    model = network()
    with ll.hook_output(model[0], detach=detach) as hook:
        model(X)
    assert hook.stored.requires_grad is requires_grad


def test_nested_outputs_are_detached_too():
    rnn = nn.LSTM(2, 3, batch_first=True)
    with ll.hook_output(rnn) as hook:
        rnn(X[None])
    output, (h, c) = hook.stored
    assert [t.requires_grad for t in (output, h, c)] == [False] * 3


def test_grad_stores_the_gradient_of_the_output():
    model = network()
    with ll.hook_output(model[1], grad=True) as hook:
        model(X).square().sum().backward()
    hidden = model[:2](X).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model[2](hidden).square().sum(), hidden)
    (stored,) = hook.stored
    assert torch.allclose(stored, expected, rtol=0, atol=1e-7)


def test_a_backward_hook_gets_the_gradients_of_input_and_output():
    model = network()
    with ll.Hook(model[2], lambda m, i, o: (i, o), is_forward=False) as hook:
        model(X).sum().backward()
    (of_input,), (of_output,) = hook.stored
    assert torch.equal(of_output, torch.ones(4, 1))
    assert torch.equal(of_input, model[2].weight.detach().expand(4, 3))


def test_several_hooks_store_in_the_order_of_the_modules():
    model = network()
    with ll.Hooks([model[2], model[0]], lambda m, i, o: tuple(o.shape)) as hooks:
        model(X)
    assert list(hooks.stored) == [(4, 1), (4, 3)]
    assert [h.stored for h in hooks] == [hooks[0].stored, hooks[1].stored]
    assert len(hooks) == 2
    assert repr(hooks) == "Hooks(2 modules, 0 active)"


def test_hook_outputs_stores_the_output_of_each_module():
    model = network()
    with ll.hook_outputs(model) as hooks:
        pred = model(X)
    assert torch.equal(hooks.stored[2], pred)
    assert torch.equal(hooks.stored[1], hooks.stored[0].tanh())


def test_where_one_module_is_none_no_hook_is_left():
    model = network()
    with pytest.raises(TypeError, match=r"goes on a torch module, and this is a str; for several, use `Hooks`"):
        ll.hook_outputs([model[0], "second", model[2]])
    assert n_hooks(model) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_brings_the_output_to_the_host():
    model = network().cuda()
    with ll.hook_output(model[0], cpu=True) as host, ll.hook_output(model[0]) as device:
        model(X.cuda())
    assert (host.stored.device.type, device.stored.device.type) == ("cpu", "cuda")
