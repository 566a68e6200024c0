"""Muon: torch's own for the weights inside, AdamW for the rest, who is who, and that it says so."""

from functools import partial

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop import Muon
from learnloop.testing import toy_learner


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.inside = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))
        self.head = nn.Linear(4, 3)


def of_learner(model, **kwargs):
    learn = toy_learner(model=model, opt_func=partial(Muon, **kwargs), lr=0.1)
    learn.create_opt()
    return learn.opt, [n for n, p in model.named_parameters() if learn.opt.state[p]["is_hidden"]]


def give_gradients(params, i):
    for j, p in enumerate(params):
        p.grad = torch.sin(torch.arange(p.numel()) * 0.7 + i + j).reshape(p.shape)


def test_hidden_are_the_matrices_but_for_embeddings_and_the_last(capsys):
    _, hidden = of_learner(Words())
    assert hidden == ["inside.0.weight", "inside.2.weight"]
    assert capsys.readouterr().out == (
        "Muon steps 2 tensors with 48 values (inside.0.weight, inside.2.weight); "
        "AdamW 7 tensors with 57 values (embed.weight … head.bias)\n"
    )


def test_hidden_may_be_named():
    assert of_learner(Words(), hidden="inside.0.*eight")[1] == ["inside.0.weight"]
    assert of_learner(Words(), hidden=["*2.weight", "head.weight"])[1] == ["inside.2.weight", "head.weight"]


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (nn.Linear(2, 1), {}, "there is nothing for Muon: no two-dimensional weights"),
        (Words(), {"hidden": "outside.*"}, "no names like 'outside.\\*'"),
        (Words(), {"hidden": "inside.*"}, r"`hidden` names a parameter of shape \(6,\)"),
    ],
)
def test_a_split_that_leaves_muon_nothing_or_vectors_is_refused(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        of_learner(model, **kwargs)


def test_names_need_to_be_known():
    with pytest.raises(ValueError, match="`hidden` needs names"):
        Muon([nn.Parameter(torch.ones(2, 2))], 0.1, hidden="*")


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_its_steps_are_those_of_torchs_muon_and_adamw(adjust_lr):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))

    ours, theirs = model(), model()
    opt = Muon(ours.parameters(), 0.02, mom=0.9, sqr_mom=0.95, eps=1e-8, wd=0.1, adjust_lr=adjust_lr)
    hidden = [theirs[0].weight, theirs[1].weight]
    rest = [p for p in theirs.parameters() if all(p is not h for h in hidden)]
    muon = torch.optim.Muon(hidden, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn=adjust_lr)
    adamw = torch.optim.AdamW(rest, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for i in range(5):
        for one in (ours, theirs):
            give_gradients(one.parameters(), i)
        for one in (opt, muon, adamw):
            one.step()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, its, atol=1e-6)


def test_one_group_stays_one_group_and_freezing_goes_by_the_splitter():
    learn = toy_learner(
        model=nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1)),
        opt_func=Muon,
        splitter=ll.by_name("0.*", "*"),
    )
    learn.freeze()
    assert [p.requires_grad for p in learn.model.parameters()] == [False, False, True, True, True, True]
    learn.fit_one_cycle(1, slice(1e-3, 1e-2))
    assert len(learn.opt.hypers) == 2


def test_who_is_hidden_outlives_cleared_and_loaded_state():
    opt, hidden = of_learner(Words())
    other, _ = of_learner(Words(), hidden="head.weight")
    other.load_state_dict(opt.state_dict())
    other.clear_state()
    assert sum(state["is_hidden"] for _, _, state, _ in other.all_params()) == len(hidden)
