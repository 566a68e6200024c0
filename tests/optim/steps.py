"""Twenty steps on fixed gradients, with the optimizers of any library that has them under these names."""

import math

import torch
from torch import nn

SHAPES = (((2, 3), (3,)), ((3, 1), (1,)), ((2, 2), (2,)))  # three groups, of a matrix and a bias each


def parameters(dtype=torch.float32):
    shapes = [shape for group in SHAPES for shape in group]
    flat = [torch.cos(torch.arange(math.prod(s), dtype=torch.float32) * 1.3 + i) for i, s in enumerate(shapes)]
    return [nn.Parameter(f.reshape(s).to(dtype)) for f, s in zip(flat, shapes, strict=True)]


def give_gradients(params, i):
    for j, p in enumerate(params):
        waves = torch.arange(p.numel(), dtype=torch.float32).reshape(p.shape) * 0.7 + i * 0.9 + j
        p.grad = (torch.sin(waves) * (j + 1)).to(p.dtype) if p.requires_grad else None


def trained(make, hypers, each=None, steps=20):
    """Values after the steps. The first bias has no decay, a matrix no gradient at first, the last group is frozen
    for twelve steps."""
    params = parameters()
    opt = make([params[:2], params[2:4], params[4:]])
    opt.set_hypers(**hypers)
    opt.state[params[1]]["do_wd"] = False
    for i in range(steps):
        for p in params[4:]:
            p.requires_grad_(i >= 12)
        give_gradients(params, i)
        if i < 5:
            params[2].grad = None
        if each is not None:
            each(opt, i)
        opt.step()
    return [v for p in params for v in p.detach().flatten().tolist()]


def mom_sometimes_zero(opt, i):
    opt.set_hyper("mom", 0.0 if i % 7 == 3 else 0.9)


def mom_on(opt, i):
    opt.set_hyper("mom", 0.9)


RATES = {"lr": [0.05, 0.02, 0.01]}
APART = {"lr": [0.05, 0.02, 0.01], "mom": [0.9, 0.5, 0.8], "wd": [0.1, 0.3, 0.2]}
MANY = {**APART, "sqr_mom": [0.99, 0.9, 0.95], "eps": [1e-5, 1e-3, 1e-6]}

#: name -> algorithm, its arguments, hypers by group, what happens before each step
CASES = {
    "sgd": ("SGD", {"wd": 0.1}, APART),
    "sgd_l2": ("SGD", {"wd": 0.1, "decouple_wd": False}, RATES),
    "sgd_mom": ("SGD", {"mom": 0.9, "wd": 0.1}, APART),
    "sgd_mom_l2": ("SGD", {"mom": 0.9, "wd": 0.1, "decouple_wd": False}, APART),
    "sgd_mom_zero": ("SGD", {"mom": 0.9, "wd": 0.1}, APART, mom_sometimes_zero),
    "sgd_never_mom": ("SGD", {}, RATES, mom_on),
    "rmsprop": ("RMSProp", {}, {**APART, "sqr_mom": [0.99, 0.9, 0.95]}),
    "rmsprop_mom": ("RMSProp", {"mom": 0.9}, APART),
    "rmsprop_l2": ("RMSProp", {"wd": 0.1, "decouple_wd": False}, RATES),
    "adam": ("Adam", {}, RATES),
    "adam_groups": ("Adam", {}, MANY),
    "adam_l2": ("Adam", {"decouple_wd": False}, MANY),
    "adam_eps": ("Adam", {"eps": 0.1, "sqr_mom": 0.9, "wd": 0.0}, RATES, mom_sometimes_zero),
    "radam": ("RAdam", {}, RATES),
    "radam_groups": ("RAdam", {"sqr_mom": 0.9}, MANY),
    "radam_l2": ("RAdam", {"decouple_wd": False, "beta": 5.0}, MANY),
    "qhadam": ("QHAdam", {}, RATES),
    "qhadam_groups": ("QHAdam", {"nu_1": 0.8, "nu_2": 0.6}, MANY),
    "qhadam_l2": ("QHAdam", {"decouple_wd": False}, MANY),
    "larc": ("Larc", {}, RATES),
    "larc_groups": ("Larc", {"trust_coeff": 0.1}, APART),
    "lars_l2": ("Larc", {"clip": False, "mom": 0.0, "wd": 0.1, "decouple_wd": False}, RATES),
    "lamb": ("Lamb", {}, RATES),
    "lamb_groups": ("Lamb", {}, MANY),
    "lamb_l2": ("Lamb", {"decouple_wd": False}, MANY),
    "ranger": ("ranger", {}, RATES),
    "ranger_groups": ("ranger", {"k": 4, "alpha": 0.3, "sqr_mom": 0.95}, MANY),
}


def case(name, library, **more):
    """`trained` with the optimizer of a case, looked up in a module."""
    algorithm, kwargs, hypers, *each = CASES[name]
    return trained(lambda params: getattr(library, algorithm)(params, 0.1, **kwargs, **more), hypers, *each)
