"""Optimizers of torch and of other packages behind the face of those here; several as one."""

from functools import partial

import pytest
import torch
from torch import nn

from learnloop import OptimWrapper, by_name
from learnloop.testing import toy_learner
from tests.optim.test_optimizer import stepped, tensors, values


def test_the_wrapper_steps_as_torch_does():
    opt = stepped(OptimWrapper(tensors(), opt=torch.optim.RMSprop, lr=0.1, alpha=0.9, momentum=0.5))
    mine, theirs = values(opt), tensors()
    plain = torch.optim.RMSprop(theirs, lr=0.1, alpha=0.9, momentum=0.5)
    for i in range(3):
        for j, p in enumerate(theirs):
            p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype) * 0.7 + i + j).reshape(p.shape)
        plain.step()
    assert mine == [p.detach().flatten().tolist() for p in theirs]


def test_the_wrapper_shows_torchs_hypers_under_the_names_here():
    adam = OptimWrapper(tensors(), opt=torch.optim.AdamW, lr=0.1).hypers[0]
    assert [adam[name] for name in ("lr", "mom", "sqr_mom", "eps", "wd")] == [0.1, 0.9, 0.999, 1e-8, 0.01]
    rmsprop = OptimWrapper(tensors(), opt=torch.optim.RMSprop, lr=0.1, alpha=0.7, momentum=0.5).hypers[0]
    assert (rmsprop["mom"], rmsprop["sqr_mom"]) == (0.5, 0.7)


def test_a_hyper_set_on_the_wrapper_reaches_torch():
    opt = OptimWrapper([[p] for p in tensors()], opt=torch.optim.AdamW, lr=0.1)
    opt.set_hypers(mom=[0.7, 0.8, 0.9], sqr_mom=0.5, wd=0.2)
    opt.hypers[0]["lr"] = 0.4
    groups = opt.opt.param_groups
    assert [g["betas"] for g in groups] == [(0.7, 0.5), (0.8, 0.5), (0.9, 0.5)]
    assert [g["weight_decay"] for g in groups] == [0.2] * 3
    assert [g["lr"] for g in groups] == [0.4, 0.1, 0.1]


def test_a_hyper_set_on_torchs_groups_shows_in_the_wrapper():
    opt = OptimWrapper(tensors(), opt=torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt.opt, step_size=1, gamma=0.5)
    stepped(opt, 1)
    scheduler.step()
    assert opt.hypers[0]["lr"] == 0.05


def test_a_group_added_to_torchs_optimizer_shows_in_the_wrapper():
    opt = OptimWrapper(tensors(), opt=torch.optim.SGD, lr=0.1)
    opt.opt.add_param_group({"params": tensors(), "lr": 0.3})
    opt.set_hyper("wd", [0.0, 0.2])
    assert [(h["lr"], h["wd"]) for h in opt.hypers] == [(0.1, 0.0), (0.3, 0.2)]


def test_other_parameters_in_torchs_groups_are_no_error():
    opt = OptimWrapper(tensors(), opt=torch.optim.SGD, lr=0.1)
    opt.opt.param_groups[0]["params"] = tensors()
    assert opt.hypers[0]["lr"] == 0.1


def test_the_wrapper_takes_a_built_optimizer():
    built = torch.optim.SGD(tensors(), lr=0.1, momentum=0.9)
    opt = OptimWrapper(opt=built)
    assert (opt.opt is built, opt.hypers[0]["mom"], opt.defaults["momentum"]) == (True, 0.9, 0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimWrapper(tensors()), "needs `opt`"),
        (lambda: OptimWrapper(opt=torch.optim.SGD), "needs `params`"),
        (lambda: OptimWrapper(tensors(), opt=torch.optim.SGD(tensors(), lr=0.1)), "pass it alone"),
    ],
)
def test_the_wrapper_wants_parameters_with_a_class_and_none_with_a_built_optimizer(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_groups_may_go_to_torch_unconverted():
    a, b, _ = tensors()
    groups = [{"params": [a], "lr": 0.5}, {"params": [b]}]
    opt = OptimWrapper(groups, opt=torch.optim.SGD, convert_groups=False, lr=0.1)
    assert [h["lr"] for h in opt.hypers] == [0.5, 0.1]


def test_an_own_map_of_names_is_used():
    opt = OptimWrapper(tensors(), opt=torch.optim.SGD, hp_map={"momentum": "inertia"}, lr=0.1)
    opt.set_hyper("inertia", 0.5)
    assert (opt.opt.param_groups[0]["momentum"], "mom" in opt.hypers[0]) == (0.5, False)


def test_the_wrapper_leaves_weight_decay_away_where_the_flag_says_so():
    opt = OptimWrapper(tensors((2,), (2,)), opt=torch.optim.SGD, lr=0.5, weight_decay=0.1)
    opt.state[opt.param_lists[0][1]]["do_wd"] = False
    for p, *_ in opt.all_params():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert values(opt) == [pytest.approx([-0.95, 0.95]), [-1.0, 1.0]]


def test_the_wrapper_may_leave_weight_decay_away_everywhere():
    opt = OptimWrapper(tensors((2,)), opt=torch.optim.AdamW, lr=0.5, weight_decay=0.1)
    opt.state[opt.param_lists[0][0]]["do_wd"] = False
    opt.param_lists[0][0].grad = torch.zeros(2)
    opt.step()
    assert (values(opt), opt.hypers[0]["wd"]) == ([[-1.0, 1.0]], 0.1)


def test_torchs_groups_are_whole_again_after_a_step_that_fails():
    def fail(*_):
        raise RuntimeError("no step")

    opt = OptimWrapper(tensors(), opt=torch.optim.AdamW, lr=0.1)
    opt.state[opt.param_lists[0][1]]["do_wd"] = False
    opt.opt.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no step"):
        opt.step()
    assert [len(group["params"]) for group in opt.opt.param_groups] == [3]


def test_the_wrapper_hands_a_closure_on():
    opt = OptimWrapper(tensors((2,)), opt=torch.optim.LBFGS, lr=0.1)
    (p,) = opt.param_lists[0]

    def closure():
        opt.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert float(opt.step(closure).detach()) == 2.0
    assert float((p.detach() ** 2).sum()) < 2.0


# of other packages


class Halver:
    """An optimizer of its own kind: all that is asked of it are `param_groups`, `state` and `step`."""

    def __init__(self, params, lr):
        self.param_groups, self.state = [{**group, "lr": lr} for group in params], {}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(group["lr"])
                self.state.setdefault(p, {"halved": 0})["halved"] += 1


def test_any_class_that_works_like_torchs_can_be_wrapped():
    opt = OptimWrapper([[p] for p in tensors((1,), (1,))], opt=Halver, lr=[0.5, 0.25])
    stepped(opt, 1)
    assert values(opt) == [[-0.5], [-0.25]]
    assert [s["halved"] for s in opt.state_dict()["state"]] == [1, 1]
    assert isinstance(toy_learner(opt_func=partial(OptimWrapper, opt=Halver)).model, nn.Module)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="`opt` gave a dict without param_groups, state, step"):
        OptimWrapper(tensors(), opt=lambda params: {})


# several


def two_blocks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))


def test_one_optimizer_for_each_group():
    a, b, _ = tensors()
    makers = [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW]
    opt = stepped(OptimWrapper([[a], [b]], opt=makers, lr=[0.5, 0.1]))
    x, y, _ = tensors()
    alone = [torch.optim.SGD([x], lr=0.5, momentum=0.9), torch.optim.AdamW([y], lr=0.1)]
    for i in range(3):
        for j, p in enumerate((x, y)):
            p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype) * 0.7 + i + j).reshape(p.shape)
        for one in alone:
            one.step()
    assert values(opt) == [p.detach().flatten().tolist() for p in (x, y)]
    assert opt.opt == opt.optimizers


def test_several_by_name_pattern():
    kinds = {"0.*": torch.optim.SGD, "*": torch.optim.AdamW}
    opt = OptimWrapper(two_blocks().named_parameters(), opt=kinds, lr=0.1)
    assert [type(o).__name__ for o in opt.optimizers] == ["SGD", "AdamW"]
    assert [[tuple(p.shape) for p in group] for group in opt.param_lists] == [[(4, 2), (4,)], [(1, 4), (1,)]]
    opt.set_hypers(lr=slice(0.5), mom=0.7)
    assert [h["lr"] for h in opt.hypers] == [0.05, 0.5]
    assert (opt.optimizers[0].param_groups[0]["momentum"], opt.optimizers[1].param_groups[0]["betas"][0]) == (0.7, 0.7)


def test_a_learner_trains_freezes_and_saves_with_several():
    def make():
        kinds = {"0.*": torch.optim.SGD, "*": torch.optim.AdamW}
        return toy_learner(model=two_blocks(), opt_func=partial(OptimWrapper, opt=kinds))

    learn, other = make(), make()
    learn.fit(1)
    other.load_state_dict(learn.state_dict())
    for one in (learn, other):
        one.freeze()
        one.fit_one_cycle(1)
    assert [p.requires_grad for p in learn.model.parameters()] == [False, False, True, True]
    weights = [[p.tolist() for p in one.model.parameters()] for one in (learn, other)]
    assert weights[0] == weights[1]
    assert repr(learn.opt).startswith("OptimWrapper of SGD and AdamW, 2 parameter groups\n  0: 0.*, 2 tensors")


@pytest.mark.parametrize(
    ("params", "opt", "message"),
    [
        (lambda: [[p] for p in tensors()], [torch.optim.SGD], "names 1 optimizers, but there are 3 parameter groups"),
        (tensors, {"*": torch.optim.SGD}, "patterns need names"),
        (lambda: by_name("0.*", "1.*")(two_blocks()), {"*": torch.optim.SGD}, "the splitter has made 2 already"),
        (lambda: two_blocks().named_parameters(), {"9.*": torch.optim.SGD}, "no parameter is left for the pattern"),
        (lambda: None, [torch.optim.SGD], "needs `params`"),
    ],
)
def test_several_that_do_not_fit_the_groups_are_refused(params, opt, message):
    with pytest.raises(ValueError, match=message):
        OptimWrapper(params(), opt=opt, lr=0.1)


def test_several_take_no_closure():
    opt = OptimWrapper([[p] for p in tensors()[:2]], opt=[torch.optim.SGD] * 2, lr=0.1)
    with pytest.raises(NotImplementedError, match="several optimizers take no closure"):
        opt.step(lambda: 0.0)


def test_decay_is_left_away_in_each_of_several():
    opt = OptimWrapper([[p] for p in tensors((1,), (1,))], opt=[torch.optim.SGD] * 2, lr=0.5, weight_decay=0.1)
    opt.state[opt.param_lists[1][0]]["do_wd"] = False
    for p, *_ in opt.all_params():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert values(opt) == [[pytest.approx(-0.95)], [-1.0]]
    assert [h["wd"] for h in opt.hypers] == [0.1, 0.1]


# rates by group


def test_rates_may_differ_by_group_from_the_start():
    opt = OptimWrapper([[p] for p in tensors()], opt=torch.optim.AdamW, lr=slice(1e-3, 1e-1))
    assert [h["lr"] for h in opt.hypers] == pytest.approx([1e-3, 1e-2, 1e-1])


def test_groups_by_name_bring_their_own_hypers():
    groups = by_name({"0.*": {"lr": 1e-4, "mom": 0.5}, "1.*": {}})(two_blocks())
    opt = OptimWrapper(groups, opt=torch.optim.AdamW, lr=0.1)
    assert [(g["lr"], g["betas"][0]) for g in opt.opt.param_groups] == [(1e-4, 0.5), (0.1, 0.9)]
