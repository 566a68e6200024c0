"""docs/security.md: what it names is there, and what it says of hostile files and of secrets holds."""

import inspect
import os
import pickle
import re
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.callbacks.notify import FIELDS, Notify
from learnloop.integrations.mlflow import MLflowCallback
from learnloop.integrations.tensorboard import TensorBoardCallback
from learnloop.integrations.trackio import TrackioCallback
from learnloop.integrations.wandb import WandbCallback
from learnloop.loop.dispatch import listed
from learnloop.testing import toy_learner

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
CODE = re.findall(r"`([^`]+)`", PAGE.read_text())
OTHERS = {cb.__name__: cb for cb in (WandbCallback, MLflowCallback, TrackioCallback, TensorBoardCallback)}


def named(code):
    """What a piece of code calls or names, and the keywords that it passes; None for what is none of ours."""
    found = re.fullmatch(r"([\w.]+)(?:\((.*)\))?", code)
    if found is None:
        return None
    path, keywords = found[1], re.findall(r"(\w+)=", found[2] or "")
    first, *rest = path.split(".")
    owner = {"ll": ll, "learn": ll.Learner, "torch": torch}.get(first)
    if owner is None and first[:1].isupper():
        owner = OTHERS.get(first) or getattr(ll, first, None)
    if owner is None:
        return None
    for name in rest:
        owner = getattr(owner, name)
    return owner, keywords


def test_every_function_and_argument_that_it_names_is_there():
    checked = []
    for code in CODE:
        if (thing := named(code)) is not None:
            assert not thing[1] or set(thing[1]) <= set(inspect.signature(thing[0]).parameters), code
            checked.append(code.partition("(")[0])
    assert {"learn.load", "learn.export", "ll.load_learner", "Notify", "WandbCallback", "Checkpoint"} <= set(checked)
    assert len(checked) > 30


def test_every_callback_variable_and_argument_that_stands_alone_is_there():
    text = PAGE.read_text()
    for cls, argument in (
        (Notify, "template"),
        (MLflowCallback, "tracking_uri"),
        (ll.datasets.fashion_mnist, "download"),
    ):
        assert f"`{argument}" in text and argument in inspect.signature(cls).parameters
    for service in ("slack", "telegram"):
        assert any(f"`{variable}`" in text for variable in vars(Notify(service).service).values())


# Hostile files


class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(Hostile.trace),)


@pytest.fixture
def hostile(tmp_path):
    Hostile.trace = tmp_path / "it ran"
    file = tmp_path / "models" / "hostile.pth"
    file.parent.mkdir()
    torch.save({"weights": Hostile()}, file)
    for name in ("000000-abc.ckpt", "hostile.pkl"):
        (file.parent / name).write_bytes(file.read_bytes())
    return file


@pytest.mark.parametrize(
    "read",
    [
        lambda learn, file: learn.load("hostile"),
        lambda learn, file: ll.load_model(file, learn.model, None),
        lambda learn, file: learn.fit(1, cbs=ll.Checkpoint("1ep", path=file.parent), resume=True),
        lambda learn, file: learn.fit(1, resume=file),
        lambda learn, file: ll.load_learner(file.with_suffix(".pkl")),
    ],
    ids=["load", "load_model", "resume", "resume a file", "load_learner"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_with_code_in_it_is_refused_and_nothing_runs(read, hostile, tmp_path):
    learn = toy_learner(path=tmp_path)
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError):
        read(learn, hostile)
    assert not Hostile.trace.exists()
    assert all(map(torch.equal, before, learn.model.parameters()))


def test_only_trusted_a_pickle_runs(hostile):
    with pytest.raises(TypeError, match="no learner"):
        ll.load_learner(hostile.with_suffix(".pkl"), trusted=True)
    assert Hostile.trace.exists()


# What is written


def test_an_export_holds_no_samples(tmp_path):
    learn = toy_learner(path=tmp_path)
    assert len(ll.load_learner(learn.export("learner.pkl"), trusted=True).dls.train) == 0


@pytest.mark.parametrize(
    "keeper", [ll.CollectDataCallback, ll.OverfitBatch, lambda: [ll.SAM(), ll.GradientAccumulation(99)]]
)
def test_the_callbacks_of_which_it_says_so_keep_samples_in_a_state(keeper):
    states = []

    def look(cb):
        if cb.training and cb.learn.train_iter == 2:
            states.append((cb.x.clone(), cb.learn.state_dict()["callbacks"]))

    learn = toy_learner(cbs=[*listed(keeper()), ll.Callback(after_batch=look)])
    learn.fit(1)
    ((x, callbacks),) = states
    assert any(torch.equal(t[: len(x)], x) for t in tensors_in(callbacks) if t.shape[1:] == x.shape[1:])


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    for v in values:
        yield from tensors_in(v)


def test_files_have_the_rights_of_those_that_they_replace(tmp_path):
    learn = toy_learner(path=tmp_path)
    file = learn.save("weights")
    file.chmod(0o600)
    learn.save("weights")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


# Secrets


def test_what_stands_in_a_variable_is_kept_nowhere(monkeypatch):
    secret = "https://127.0.0.1:1/very-secret"
    monkeypatch.setenv("SLACK_WEBHOOK_URL", secret)
    learn = toy_learner(cbs=(cb := Notify("slack", retries=0, wait=0.2)))
    learn.fit(1)
    everything = repr([vars(cb), cb, cb.service, learn.state_dict()]).encode() + pickle.dumps(learn)
    assert b"very-secret" not in everything


def test_a_secret_in_the_place_of_a_name_is_not_repeated():
    with pytest.raises(ValueError) as caught:
        Notify("https://hooks.slack.com/very-secret")
    assert "very-secret" not in str(caught.value)


@pytest.mark.parametrize("template", ["{name.__class__}", "{error[0]}", "{learn}"])
def test_a_template_names_only_the_fields_that_are_offered(template):
    with pytest.raises(ValueError, match=f"the fields are {', '.join(FIELDS)}"):
        Notify(template=template)


def test_an_error_gains_no_values_of_the_data():
    learn = toy_learner(loss_func=nn.CrossEntropyLoss(weight=torch.ones(7)))
    with pytest.raises(RuntimeError) as caught:
        learn.fit(1)
    assert re.sub(r"samples: [\d, ]+", "", caught.value.__notes__[0]).count("float32[") == 3
    assert "tensor(" not in caught.value.__notes__[0]
