"""Steppers: what each does to one parameter or a list, and how an optimizer runs those of a user."""

from functools import partial

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop import Optimizer, list_stepper
from learnloop.optim import steppers


def param(*values, grad=None):
    p = nn.Parameter(torch.tensor(values))
    p.grad = None if grad is None else torch.tensor(grad)
    return p


def stepped(opt, times=1, grad=1.0):
    for _ in range(times):
        for p, *_ in opt.all_params():
            p.grad = torch.full_like(p, grad)
        opt.step()
    return opt


# one parameter, as by hand


def test_sgd_step_goes_down_the_gradient():
    p = param(1.0, 2.0, grad=[0.5, -1.0])
    ll.sgd_step(p, 0.1)
    assert p.tolist() == pytest.approx([0.95, 2.1])


def test_momentum_step_goes_down_the_average():
    p = param(1.0, grad=[9.0])
    ll.momentum_step(p, lr=0.1, grad_avg=torch.tensor([2.0]))
    assert p.tolist() == pytest.approx([0.8])


def test_weight_decay_shrinks_and_l2_reg_adds_to_the_gradient():
    p = param(2.0, grad=[1.0])
    ll.weight_decay(p, 0.1, wd=0.5)
    assert (p.item(), p.grad.item()) == (pytest.approx(1.9), 1.0)
    ll.l2_reg(p, wd=0.5)
    assert (p.item(), p.grad.item()) == (pytest.approx(1.9), pytest.approx(1.95))


@pytest.mark.parametrize("decay", [ll.weight_decay, ll.l2_reg])
def test_both_decays_leave_a_parameter_alone_that_says_so(decay):
    p = param(2.0, grad=[1.0])
    decay(p, lr=0.1, wd=0.5, do_wd=False)
    assert (p.item(), p.grad.item()) == (2.0, 1.0)


@pytest.mark.parametrize(("dampening", "ends"), [(False, [1.0, 1.9]), (True, [0.1, 0.19])])
def test_average_grad_is_a_sum_or_with_dampening_an_average(dampening, ends):
    p = param(0.0, grad=[1.0])
    first = ll.average_grad(p, mom=0.9, dampening=dampening)
    assert first["grad_avg"].item() == pytest.approx(ends[0])
    assert ll.average_grad(p, mom=0.9, dampening=dampening, **first)["grad_avg"].item() == pytest.approx(ends[1])


@pytest.mark.parametrize(("dampening", "end"), [(False, 4.0), (True, 0.4)])
def test_average_sqr_grad_is_of_squares_and_dampened_by_default(dampening, end):
    p = param(0.0, grad=[2.0])
    more = {} if dampening else {"dampening": False}
    assert ll.average_sqr_grad(p, sqr_mom=0.9, **more)["sqr_avg"].item() == pytest.approx(end)


def test_step_stat_counts():
    assert ll.step_stat(param(0.0)) == {"step": 1}
    assert ll.step_stat(param(0.0), step=7) == {"step": 8}


def test_debias_is_the_sum_of_the_weights_so_far():
    assert ll.debias(0.9, 0.1, 1) == pytest.approx(0.1)
    assert ll.debias(0.9, 0.1, 3) == pytest.approx(0.1 + 0.1 * 0.9 + 0.1 * 0.81)


def test_the_first_adam_step_is_the_rate_in_the_gradients_direction():
    p = param(1.0, 1.0, grad=[3.0, -0.2])
    averages = {"grad_avg": p.grad * 0.1, "sqr_avg": p.grad**2 * 0.01}
    ll.adam_step(p, lr=0.1, mom=0.9, sqr_mom=0.99, step=1, eps=0.0, **averages)
    assert p.tolist() == pytest.approx([0.9, 1.1])


def test_radam_steps_without_squares_while_they_are_few():
    p = param(1.0, grad=[3.0])
    averages = {"grad_avg": torch.tensor([0.3]), "sqr_avg": torch.tensor([0.09])}
    ll.radam_step(p, lr=0.1, mom=0.9, sqr_mom=0.99, step=1, eps=1e-5, beta=0.0, **averages)
    assert p.item() == pytest.approx(1.0 - 0.1 * 3.0)


@pytest.mark.parametrize(("clip", "rate"), [(True, 0.5), (False, 2.0)])
def test_larc_layer_lr_compares_norms_and_clip_bounds_it(clip, rate):
    p = param(3.0, 4.0, grad=[0.0, 0.25])
    new = ll.larc_layer_lr(p, lr=0.5, trust_coeff=0.2, wd=0.0, eps=0.0, clip=clip)
    assert new["local_lr"].item() == pytest.approx(rate)  # 0.5 * 0.2 * 5 / 0.25 = 2
    ll.larc_step(p, **new)
    assert p.tolist() == pytest.approx([3.0, 4.0 - rate * 0.25])


def test_lamb_scales_a_step_at_most_tenfold():
    p = param(100.0, grad=[1.0])
    ll.lamb_step(p, lr=0.1, mom=0.0, sqr_mom=0.0, step=1, grad_avg=p.grad, sqr_avg=p.grad, eps=0.0)
    assert p.item() == pytest.approx(100.0 - 0.1 * 10)


@pytest.mark.parametrize(
    "name",
    [name for name in dir(steppers) if hasattr(getattr(steppers, name), "over_list")],
)
def test_every_stepper_does_to_a_list_what_it_does_to_each(name):
    stepper = getattr(steppers, name)
    numbers = {**stepper.defaults, "lr": 0.1, "mom": 0.9, "sqr_mom": 0.99, "wd": 0.1, "step": 9, "eps": 1e-3}

    def state(i):
        kept = {"grad_avg": torch.tensor([0.3, 0.1 * i]), "sqr_avg": torch.tensor([0.2, 0.5 + i])}
        return {**kept, "local_lr": torch.tensor(0.05 * (i + 1))}

    def two():
        return [param(1.0, 2.0, grad=[0.5, -1.0]), param(-1.0, 0.5, grad=[1.5, 1.0])]

    as_list = two()
    columns = {key: [state(i)[key] for i in range(2)] for key in state(0)}
    with torch.no_grad():
        stepper(as_list, **columns, **numbers)
    one_by_one = two()
    for i, p in enumerate(one_by_one):
        stepper(p, **state(i), **numbers)
    ends = [[*p.tolist(), *p.grad.tolist()] for p in (*as_list, *one_by_one)]
    assert ends[:2] == [pytest.approx(end) for end in ends[2:]]


# a user's


def test_a_stepper_over_lists_gets_tensors_in_lists_and_numbers_once():
    seen = []

    @list_stepper(pull=0.5)
    def towards_start(ps, lr, pull, start=None, step=0, **kwargs):
        start = [p.detach().clone() for p in ps] if start is None else start
        seen.append((len(ps), lr, pull, step))
        torch._foreach_lerp_(ps, start, pull)
        return {"start": start, "step": step + 1}

    a, b = param(4.0), param(8.0)
    opt = Optimizer([a, b], [ll.sgd_step, towards_start], lr=1.0)
    stepped(opt, 2)
    assert seen == [(2, 1.0, 0.5, 0), (2, 1.0, 0.5, 1)]
    assert [p.item() for p in (a, b)] == [2.5, 6.5]  # 4 → 3, noted; → 2, and half the way back
    assert opt.state[a] == {"start": torch.tensor([3.0]), "step": 2}


def test_what_torch_returns_for_a_list_may_become_state():
    @list_stepper
    def keep_squares(ps, **kwargs):
        return {"squares": torch._foreach_mul(ps, ps)}

    @list_stepper
    def return_them(ps, **kwargs):
        return ps  # as some of fastai's do; only a dict is state

    a, b = param(2.0), param(3.0)
    opt = stepped(Optimizer([a, b], [keep_squares, return_them], lr=0.1))
    assert [opt.state[p]["squares"].item() for p in (a, b)] == [4.0, 9.0]


def test_a_list_of_another_length_is_refused():
    @list_stepper
    def one(ps, **kwargs):
        return {"one": [1]}

    with pytest.raises(ValueError, match="a stepper returned 1 values of `one` for 2 parameters"):
        stepped(Optimizer([param(1.0), param(2.0)], one, lr=0.1))


def test_parameters_with_other_numbers_come_in_a_call_of_their_own():
    seen = []

    @list_stepper
    def note(ps, step=0, **kwargs):
        seen.append(([p.item() for p in ps], step))
        return {"step": step + 1}

    a, b = param(1.0), param(2.0)
    opt = Optimizer([a, b], note)
    a.grad = torch.ones(1)
    opt.step()
    stepped(opt, grad=1.0)
    assert seen == [([1.0], 0), ([1.0], 1), ([2.0], 0)]


def test_plain_steppers_and_those_over_lists_act_in_the_order_given():
    def double(p, **kwargs):
        p.mul_(2)
        return {"doubled": True}

    @list_stepper
    def add_one(ps, doubled=False, **kwargs):
        assert doubled
        torch._foreach_add_(ps, 1)

    opt = stepped(Optimizer([param(1.0), param(2.0)], [double, add_one, double], lr=0.1))
    assert [p.item() for p, *_ in opt.all_params()] == [6.0, 10.0]


def test_a_plain_stepper_may_give_each_parameter_a_number_of_its_own():
    seen = []

    def measure(p, **kwargs):
        return {"size": p.abs().sum().item()}

    @list_stepper
    def shrink(ps, size, **kwargs):
        seen.append((len(ps), size))
        torch._foreach_div_(ps, size)

    opt = stepped(Optimizer([param(4.0), param(8.0), param(4.0)], [measure, shrink], lr=0.1), 2)
    assert [p.item() for p, *_ in opt.all_params()] == [1.0, 1.0, 1.0]
    assert seen == [(2, 4.0), (1, 8.0), (3, 1.0)]


def test_a_stepper_added_later_acts_from_the_next_step_on():
    opt = Optimizer(param(1.0), ll.sgd_step, lr=0.5)
    stepped(opt)
    opt.cbs.append(lambda p, **kwargs: p.zero_() and None)
    assert stepped(opt).param_lists[0][0].item() == 0.0


def test_what_a_partial_fixes_is_the_default():
    opt = Optimizer(param(1.0), [partial(ll.average_grad, mom=0.5, dampening=True), ll.momentum_step], lr=1.0)
    assert opt.hypers[0] == {"lr": 1.0, "mom": 0.5}
    assert stepped(opt).param_lists[0][0].item() == 0.5


def test_adam_step_brings_its_default_along():
    averages = [partial(ll.average_grad, dampening=True), ll.average_sqr_grad, ll.step_stat]
    assert Optimizer(param(1.0), [*averages, ll.adam_step], lr=0.1).hypers[0]["eps"] == 1e-5


def test_a_hyper_that_no_stepper_reads_is_refused():
    with pytest.raises(TypeError, match="no stepper reads the hyper `sqr_mon`; did you mean `sqr_mom`"):
        Optimizer(param(1.0), [ll.average_sqr_grad, ll.sgd_step], lr=0.1, sqr_mon=0.9)


def test_common_hypers_are_taken_even_where_nothing_reads_them():
    assert Optimizer(param(1.0), ll.sgd_step, lr=0.1, mom=0.9, wd=0.0).hypers[0] == {"lr": 0.1, "mom": 0.9, "wd": 0.0}


def test_a_new_hyper_reaches_the_steppers():
    seen = []
    opt = Optimizer(param(1.0), lambda p, heat=None, **kwargs: seen.append(heat), lr=0.1)
    opt.set_hyper("heat", 3.0)
    stepped(opt)
    assert seen == [3.0]


def test_the_gradient_mode_outside_is_left_as_it_is():
    stepped(ll.SGD(param(1.0), 0.1))
    assert torch.is_grad_enabled()


def test_large_parameters_go_through_the_steppers_a_few_at_a_time_on_a_cpu():
    seen = []

    @list_stepper
    def note(ps, **kwargs):
        seen.append(len(ps))

    big = [nn.Parameter(torch.zeros(100_000)) for _ in range(3)]
    stepped(Optimizer([param(1.0), *big], [note, ll.sgd_step], lr=1.0))
    assert seen == [2, 1, 1]
    assert [p[0].item() for p in big] == [-1.0, -1.0, -1.0]
