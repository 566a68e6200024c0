"""Saved states: another process goes on bit for bit with every algorithm; what does not fit is refused."""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop import OptimWrapper, by_name
from learnloop.optim.saved import check_fits
from learnloop.testing import toy_learner

ROOT = Path(__file__).parents[2]
KINDS = {
    "SGD": partial(ll.SGD, mom=0.9, wd=0.1),
    "SGD of steppers": partial(ll.SGD, mom=0.9, wd=0.1, fused=False),
    "RMSProp": partial(ll.RMSProp, mom=0.9),
    "Adam": ll.Adam,
    "Adam of steppers": partial(ll.Adam, fused=False),
    "RAdam": ll.RAdam,
    "QHAdam": ll.QHAdam,
    "Larc": ll.Larc,
    "Lamb": ll.Lamb,
    "Lion": ll.Lion,
    "ranger": ll.ranger,
    "Muon": ll.Muon,
    "torch": torch.optim.AdamW,
    "several": partial(OptimWrapper, opt=[torch.optim.SGD, torch.optim.NAdam]),
    "Lookahead of torch": lambda params, lr: ll.Lookahead(OptimWrapper(params, opt=torch.optim.AdamW, lr=lr), k=4),
}
if importlib.util.find_spec("schedulefree") is not None:
    import schedulefree

    KINDS |= {"schedule-free": schedulefree.AdamWScheduleFree}


def learner(name):
    """Two groups with different rates, and a fit of four updates, so that no count ends with it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
    groups = by_name({"0.*": {"lr": 0.01}, "*": {}})
    cbs = ll.ScheduleFreeCallback() if name == "schedule-free" else None
    return toy_learner(model=model, opt_func=KINDS[name], splitter=groups, lr=0.03, n_train=32, cbs=cbs)


def ends(learn):
    learn.fit(2)
    return [p.tolist() for p in learn.model.parameters()]


def go_on(folder):
    """What the other process does."""
    found = {}
    for name in KINDS:
        learn = learner(name)
        learn.load_state_dict(torch.load(Path(folder) / name, weights_only=True))
        found[name] = ends(learn)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Where each algorithm ends, without a stop and in another process."""
    folder, without = tmp_path_factory.mktemp("states"), {}
    for name in KINDS:
        learn = learner(name)
        learn.fit(1)
        torch.save(learn.state_dict(), folder / name)
        without[name] = ends(learn)
    script = f"from tests.optim.test_saved import go_on; go_on({str(folder)!r})"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return without, json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", KINDS)
def test_another_process_goes_on_bit_for_bit(name, both):
    without, elsewhere = both
    assert elsewhere[name] == without[name]


@pytest.mark.parametrize("name", [name for name in KINDS if name != "several"])
def test_a_state_with_other_shapes_is_refused_by_group_and_shape(name):
    learn = learner(name)
    learn.create_opt()
    state = learn.opt.state_dict()
    other = toy_learner(
        model=nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 5), nn.Linear(5, 1)),
        opt_func=KINDS[name],
        splitter=by_name("0.*", "*"),
    )
    other.create_opt()
    before = repr(other.opt.state_dict())
    with pytest.raises(
        ValueError, match=r"`value` of parameter 2 in group 1 has shape \(4, 4\), the parameter \(5, 4\)"
    ):
        other.opt.load_state_dict(state)
    assert repr(other.opt.state_dict()) == before


def test_the_same_parameters_in_other_groups_are_refused():
    saved = {"state": [{}] * 3, "hypers": [{}] * 2, "shapes": [[[1], [1]], [[1]]]}
    here = [[torch.ones(1)], [torch.ones(1), torch.ones(1)]]
    with pytest.raises(ValueError, match="3 parameters in groups of 2, 1, this optimizer 3 in groups of 1, 2"):
        check_fits(saved, here, (), "SGD")


def test_a_state_without_shapes_is_taken_as_it_is():
    check_fits({"state": [{}], "hypers": [{"lr": 0.1}]}, [[torch.ones(1)]], ("lr",), "SGD")


def test_the_form_made_of_steppers_goes_on_where_the_fused_one_stopped():
    fused, steppers = learner("Adam"), learner("Adam of steppers")
    fused.fit(1)
    steppers.load_state_dict(fused.state_dict())
    for mine, its in zip(ends(fused), ends(steppers), strict=True):
        assert torch.allclose(torch.tensor(mine), torch.tensor(its), atol=1e-6)
