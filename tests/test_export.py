"""A learner in one file: pickled without its data, as weights with a description, as a program."""

import json
import pickle
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastcore.foundation import L
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import learnloop as ll
from learnloop.testing import toy_learner

safetensors = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).resolve().parent.parent


def two_groups(model):
    return [list(model[0].parameters()), list(model[2].parameters())]


def learner(path, **kwargs):
    return toy_learner(path=path, **{"opt_func": ll.Adam, "splitter": two_groups, **kwargs})


def trusted(learn, fname="export.pkl"):
    return ll.load_learner(learn.path / fname, trusted=True)


def everything(learn):
    """Weights, and what the optimizer has gathered."""
    states = [value for state in learn.opt.state_dict()["state"] for value in state.values()]
    return [torch.as_tensor(value).clone() for value in [*learn.model.state_dict().values(), *states]]


@contextmanager
def untouched(learn):
    """The learner is the same before and after, part by part, and so are the files beside it."""
    names = ("dls", "opt", "model", "loss_func", "metrics", "cbs", "task", "logger")
    files = {p: p.read_bytes() for p in Path(learn.path).rglob("*") if p.is_file()}
    parts, before = [getattr(learn, name) for name in names], everything(learn)
    loaders, frozen = list(learn.dls), [p.requires_grad for p in learn.model.parameters()]
    modes, random = [m.training for m in learn.model.modules()], torch.get_rng_state()
    yield
    assert all(getattr(learn, name) is part for name, part in zip(names, parts, strict=True))
    assert all(map(torch.equal, everything(learn), before))
    assert list(learn.dls) == loaders
    assert [p.requires_grad for p in learn.model.parameters()] == frozen
    assert [m.training for m in learn.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert {p: p.read_bytes() for p in Path(learn.path).rglob("*") if p.is_file()} == files


# Which format


def test_the_ending_says_the_format_where_nothing_else_does(tmp_path):
    learn = learner(tmp_path)
    assert learn.export() == tmp_path / "export.pkl"
    assert learn.export(format="safetensors") == tmp_path / "export.safetensors"
    assert learn.export("w.safetensors").read_bytes()[8:9] == b"{"
    assert learn.export("w.model", format="safetensors").read_bytes()[8:9] == b"{"
    assert learn.export(tmp_path / "deep" / "w").read_bytes()[:2] == b"PK"


def test_an_unknown_format_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="`format='onnx'`: the formats are 'pickle', 'safetensors', 'pt2'"):
        learner(tmp_path).export(format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert learner(tmp_path).export() == tmp_path / "export.pkl"
    assert list(tmp_path.iterdir()) == []


# Pickled


def test_an_exported_learner_predicts_as_before(tmp_path):
    learn = learner(tmp_path, metrics=ll.mae)
    learn.fit(2)
    learn.export()
    loaded = trusted(learn)
    assert loaded.validate(dl=learn.dls.valid) == learn.validate()
    assert [cb.name for cb in loaded.cbs] == [cb.name for cb in learn.cbs]
    assert loaded.recorder.history == learn.recorder.history


def test_its_loaders_are_empty_and_it_has_no_optimizer(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1)
    learn.export()
    loaded = trusted(learn)
    assert [(len(dl), dl.bs, dl.n) for dl in loaded.dls] == [(0, 8, 0), (0, 8, 0)]
    assert loaded.opt is None


def test_no_sample_is_in_the_file(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1)
    data = learn.export().read_bytes()
    samples = [t[3:5].numpy().tobytes() for dl in learn.dls for t in dl.tensors]
    assert [data.find(sample) for sample in samples] == [-1] * 4


def test_the_loaded_learner_can_be_trained_on_other_data(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1)
    learn.export()
    loaded = trusted(learn)
    with pytest.raises(ValueError, match="the training loader is empty"):
        loaded.fit(1)
    loaded.dls = learn.dls
    loaded.fit(1)
    assert len(loaded.recorder.values) == 1


def test_what_is_frozen_stays_frozen_on_both_sides(tmp_path):
    learn = learner(tmp_path)
    learn.freeze()
    learn.export()
    assert (learn.opt.frozen_idx, [p.requires_grad for p in learn.model.parameters()]) == (1, [False] * 2 + [True] * 2)
    loaded = trusted(learn)
    assert [p.requires_grad for p in loaded.model.parameters()] == [False, False, True, True]
    loaded.dls = learn.dls
    loaded.fit(1)
    assert torch.equal(loaded.model[0].weight, learn.model[0].weight)
    assert not torch.equal(loaded.model[2].weight, learn.model[2].weight)


def test_the_exporting_learner_trains_on_as_if_nothing_had_been(tmp_path):
    numbers = []
    for exports in (False, True):
        learn = learner(tmp_path)
        learn.fit(1)
        if exports:
            with untouched(learn):
                file = learn.export(tmp_path / "e.pkl").read_bytes()
                (tmp_path / "e.pkl").unlink()
            assert file
        learn.fit(1)
        numbers.append(everything(learn))
    assert all(map(torch.equal, *numbers))


class Looks(ll.Callback):
    """Has the learner and its loaders in attributes of its own."""

    def before_fit(self):
        self.seen, self.loaders = [self.learn], {"dls": self.dls}


def test_whoever_refers_to_the_learner_refers_to_the_loaded_one(tmp_path):
    learn = learner(tmp_path, cbs=Looks())
    learn.fit(1)
    learn.export()
    loaded = trusted(learn)
    assert loaded.looks.learn is loaded.looks.seen[0] is loaded
    assert loaded.looks.loaders["dls"] is loaded.dls
    assert len(loaded.dls.train) == 0


@pytest.mark.parametrize("in_terminal", [False, True])
def test_a_handler_may_export_in_the_middle_of_a_fit(tmp_path, in_terminal, monkeypatch, capsys):
    if in_terminal:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    exports = ll.Callback(after_batch=lambda cb: cb.learn.export() if (cb.epoch, cb.iter) == (1, 2) else None)
    learn = learner(tmp_path)
    learn.add_cb(ll.ProgressCallback())
    learn.fit(2, cbs=exports)
    loaded = trusted(learn)
    assert (loaded.task, loaded.batch, loaded.pred, loaded.epoch) == (None, None, None, 1)
    assert len(loaded.recorder.values) == 1
    x, y = learn.dls.valid.tensors
    assert loaded.validate(dl=[(x, y)])[0] > 0


def rows(n=16):
    return TensorDataset(torch.linspace(-1, 1, n)[:, None].repeat(1, 2), torch.linspace(-1, 1, n)[:, None])


def twice(samples):
    """A way to collate."""
    x, y = torch.utils.data.default_collate(samples)
    return 2 * x, y


PLAIN = {
    "torch": lambda: ll.DataLoaders(DataLoader(rows(), 4, shuffle=True), DataLoader(rows(), 4, collate_fn=twice)),
    "lists": lambda: ll.DataLoaders([tuple(rows().tensors)], {"noisy": [tuple(rows().tensors)]}),
    "namespace": lambda: SimpleNamespace(train=DataLoader(rows(), 4), valid=DataLoader(rows(), 4)),
    "no_valid": lambda: SimpleNamespace(train=DataLoader(rows(), 4), valid=None),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_loaders_are_emptied_too(tmp_path, kind):
    dls = PLAIN[kind]()
    learn = learner(tmp_path)
    learn.dls = dls
    learn.fit(1)
    before = list(vars(dls).values())
    learn.export()
    assert all(a is b for a, b in zip(before, vars(dls).values(), strict=True))
    loaded = trusted(learn)
    assert len(loaded.dls.train) == 0
    assert loaded.validate(dl=[tuple(rows().tensors)]) == learn.validate(dl=[tuple(rows().tensors)])


def test_emptied_loaders_keep_how_they_read_and_what_they_are_called(tmp_path):
    learn = learner(tmp_path)
    learn.dls = ll.DataLoaders(DataLoader(rows(), 4), {"noisy": DataLoader(rows(), 4, collate_fn=twice)}, n_inp=1)
    learn.dls.vocab = ["left", "right"]
    learn.export()
    dls = trusted(learn).dls
    assert (dls.names, dls.n_inp, dls.bs, dls.vocab) == (["train", "noisy"], 1, 4, ["left", "right"])
    assert dls.test_dl(rows()).collate_fn is twice


def test_loaders_that_know_how_to_become_empty_are_asked(tmp_path):
    learn = learner(tmp_path)
    learn.dls = Emptying(train=list(learn.dls.train))
    learn.export()
    assert vars(trusted(learn).dls) == {"train": [], "asked": True}


class Emptying(SimpleNamespace):
    """As fastai's loaders do it."""

    def new_empty(self):
        return Emptying(train=[], asked=True)


def test_a_wrapped_model_is_exported_without_its_wrapper(tmp_path):
    learn = learner(tmp_path)
    learn.model = nn.DataParallel(learn.model)
    learn.export()
    assert type(learn.model) is nn.DataParallel
    assert type(trusted(learn).model) is nn.Sequential


def test_functions_that_stand_nowhere_are_taken_along(tmp_path):
    learn = learner(tmp_path, loss_func=lambda pred, y: (pred - y).abs().mean(), metrics=lambda pred, y: pred.mean())
    learn.add_cb(ll.Callback(after_pred=lambda cb: setattr(cb.learn, "pred", cb.pred * 0)))
    learn.export()
    loaded = trusted(learn)
    assert loaded.validate(dl=learn.dls.valid) == learn.validate()
    assert loaded.validate(dl=learn.dls.valid)[1] == 0


def test_a_model_of_a_script_is_loaded_elsewhere(tmp_path):
    code = f"""
import torch
from torch import nn
from learnloop.testing import toy_learner

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
    def forward(self, x):
        return self.layer(x) + 1

toy_learner(path={str(tmp_path)!r}, model=Net()).export()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    model = ll.load_learner(tmp_path / "export.pkl", trusted=True).model
    assert type(model).__name__ == "Net"
    assert torch.equal(model(torch.zeros(1, 2)), model.layer.bias[None] + 1)


# Reading a pickle


class Marks:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_not_read_unless_its_author_is_trusted(tmp_path):
    torch.save(Marks(tmp_path / "marker"), tmp_path / "export.pkl")
    with pytest.raises(ValueError) as caught:
        ll.load_learner(tmp_path / "export.pkl")
    assert str(caught.value) == (
        f"`{tmp_path}/export.pkl` is a pickle, and reading it runs whatever code its author put in. If you know that "
        "it is yours: `load_learner(…, trusted=True)`. Weights alone are safe to read: `learn.save`, `learn.load`."
    )
    assert not (tmp_path / "marker").exists()


def test_a_changed_pickle_is_not_read_even_if_trusted(tmp_path):
    torch.save(Marks(tmp_path / "marker"), tmp_path / "export.pkl")
    data = bytearray((tmp_path / "export.pkl").read_bytes())
    at = data.index(b"marker")
    for changed in (data[:-100], data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]):
        (tmp_path / "export.pkl").write_bytes(changed)
        with pytest.raises(ll.FileDamaged, match=r"export\.pkl` is cut short or damaged"):
            ll.load_learner(tmp_path / "export.pkl", trusted=True)
    assert not (tmp_path / "marker").exists()


def test_a_pickle_of_something_else_is_named(tmp_path):
    torch.save(nn.Linear(2, 1), tmp_path / "export.pkl")
    with pytest.raises(TypeError, match=r"export\.pkl` holds a Linear, no learner of `learn\.export`"):
        ll.load_learner(tmp_path / "export.pkl", trusted=True)


def test_a_missing_file_is_named_with_those_that_look_alike(tmp_path):
    learner(tmp_path).export()
    with pytest.raises(FileNotFoundError, match=r"exprt\.pkl`; the folder has `export\.pkl`"):
        ll.load_learner(tmp_path / "exprt.pkl")


def test_a_part_that_is_not_here_is_pythons_error_with_a_hint(tmp_path, monkeypatch):
    learn = learner(tmp_path, cbs=Looks())
    learn.export(pickle_module=pickle)
    monkeypatch.delattr(sys.modules[__name__], "Looks")
    with pytest.raises(AttributeError) as caught:
        trusted(learn)
    assert caught.value.__notes__ == [
        "The file names what is not here: import or define it as it was for the export, then load again."
    ]


def test_on_the_host_unless_told_otherwise(tmp_path):
    learn = learner(tmp_path)
    learn.dls.to("meta")
    learn.export()
    assert trusted(learn).dls.device == torch.device("cpu")
    assert ll.load_learner(learn.path / "export.pkl", cpu=False, trusted=True).dls.device == ll.default_device()


# An export that fails


class Half(nn.Module):
    """A module with something in it that cannot be stored."""

    def __init__(self, thing):
        super().__init__()
        self.parts = [1, {"deep": thing}]

    def forward(self, x):
        return x


def put(owner, name, thing):
    setattr(owner(), name, thing)


CULPRITS = {
    "learn.loss_func": lambda learn, thing: setattr(learn, "loss_func", thing),
    "learn.mine": lambda learn, thing: setattr(learn, "mine", thing),
    "learn.cbs[1].handle": lambda learn, thing: setattr(learn.recorder, "handle", thing),
    "learn.model[1].parts[1]['deep']": lambda learn, thing: learn.model.__setitem__(1, Half(thing)),
    "learn.metrics[0].func": lambda learn, thing: setattr(learn, "metrics", thing),
    "learn.dls.note": lambda learn, thing: setattr(learn.dls, "note", thing),
    "learn.splitter.keywords['by']": lambda learn, thing: setattr(learn, "splitter", partial(two_groups, by=thing)),
}


@pytest.mark.parametrize("where", CULPRITS)
def test_what_cannot_be_stored_is_named_and_nothing_has_changed(tmp_path, where):
    learn = learner(tmp_path)
    learn.fit(1)
    learn.freeze()
    learn.export()
    CULPRITS[where](learn, lambda *args: None)
    with untouched(learn), pytest.raises(TypeError) as caught:
        learn.export(pickle_module=pickle)
    assert str(caught.value).startswith(
        f"`{where}` is a function that cannot be stored: Can't pickle <function <lambda>"
    )
    assert str(caught.value).endswith(
        "Define it at the top of a module, or `pip install cloudpickle`, which stores functions of cells and lambdas "
        "too, or take it off before the export."
    )


def test_what_even_cloudpickle_cannot_store_is_named(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1)
    learn.recorder.lock = threading.Lock()
    with (
        untouched(learn),
        pytest.raises(TypeError, match=r"`learn\.cbs\[1\]\.lock` is a lock that cannot be stored: can"),
    ):
        learn.export()


def test_a_function_put_on_a_callback_is_not_left_to_fail_when_it_is_read(tmp_path):
    """Pickle stores a method by its name, which the class does not have."""
    learn = learner(tmp_path, cbs=ll.Callback(after_pred=lambda cb: None))
    with pytest.raises(TypeError, match=r"`learn\.cbs\[2\]\.after_pred` is a function that cannot be stored"):
        learn.export(pickle_module=pickle)


@pytest.mark.parametrize("format", ["pickle", "safetensors"])
def test_a_full_disk_leaves_the_earlier_file_and_the_learner(tmp_path, format):
    learn = learner(tmp_path)
    learn.fit(1)
    path = learn.export(format=format)
    learn.fit(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with untouched(learn), pytest.raises(OSError, match="nothing was written") as caught:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
            learn.export(format=format)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path)


# Weights with a description


def test_weights_come_back_from_safetensors(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path)
    for each in (learn, other):
        each.model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        each.fit(1)
    learn.export("w.safetensors")
    opt = other.opt
    assert other.load("w.safetensors") is other
    state, expected = other.model.state_dict(), learn.model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert other.opt is opt
    with pytest.raises(ValueError, match=r"w\.safetensors` holds no state of an optimizer"):
        other.load("w.safetensors", with_opt=True)


def test_the_weights_carry_a_description_in_strings_of_json(tmp_path):
    learn = learner(tmp_path, metrics=[ll.accuracy, ll.mae])
    learn.dls._n_inp, learn.dls.vocab = 1, L("cat", "dog")
    learn.freeze()
    with safetensors.safe_open(learn.export("w.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("format") == "pt"  # what readers of this format look for
    found = {name: json.loads(value) for name, value in metadata.items()}
    assert isinstance(found.pop("crc32"), int)
    assert found == {
        "learnloop": found["learnloop"],  # the version, where the package is installed
        "model": "torch.nn.modules.container.Sequential",
        "loss": "torch.nn.modules.loss.MSELoss",
        "metrics": ["accuracy", "mae"],
        "n_inp": 1,
        "shapes": {"0.weight": [4, 2], "0.bias": [4], "2.weight": [1, 4], "2.bias": [1]},
        "frozen_groups": 1,
        "frozen": ["0.weight", "0.bias"],
        "vocab": ["cat", "dog"],
        "shared": {},
    }


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def test_a_tensor_with_two_names_is_stored_once(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path)
    learn.model, other.model = tied(), tied()
    path = learn.export("w.safetensors")
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["0.bias", "0.weight", "2.bias"]
        assert json.loads(file.metadata()["shared"]) == {"2.weight": "0.weight"}
    other.load("w.safetensors")
    assert torch.equal(other.model[2].weight, learn.model[0].weight)
    assert other.model[2].weight is other.model[0].weight


def test_the_file_is_read_by_safetensors_itself_and_the_other_way_round(tmp_path):
    learn, model = learner(tmp_path), tied()
    learn.model = tied()
    assert safetensors.load_model(model, learn.export("w.safetensors")) == (set(), [])
    assert torch.equal(model[0].weight, learn.model[0].weight)
    other = tied()
    safetensors.save_model(other, tmp_path / "theirs.safetensors")
    learn.load("theirs.safetensors")
    assert torch.equal(learn.model[2].weight, other[2].weight)


def test_no_flipped_bit_and_no_cut_changes_the_weights_that_are_read(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path)
    path = learn.export("w.safetensors")
    data = path.read_bytes()
    expected = list(learn.model.state_dict().values())
    changed = [data[:n] for n in range(0, len(data), 7)]
    changed += [data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :] for i in range(len(data))]
    damaged = 0
    for each in changed:
        path.write_bytes(each)
        try:
            other.load("w.safetensors")
        except ll.FileDamaged:
            damaged += 1
        assert all(map(torch.equal, other.model.state_dict().values(), expected))
    assert damaged > len(changed) / 3  # the rest are flips in the description


def test_what_is_no_tensor_does_not_go_into_safetensors(tmp_path):
    class Keeps(nn.Module):
        def get_extra_state(self):
            return {"mean": 1}

    learn = learner(tmp_path)
    learn.model = nn.Sequential(Keeps())
    with pytest.raises(TypeError, match=r"`0\._extra_state` in the model's state is a dict; this format holds tensors"):
        learn.export("w.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    learn = learner(tmp_path)
    learn.export("w.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for verb in (learn.export, learn.load):
        with pytest.raises(ImportError, match="need the package: `pip install safetensors`"):
            verb("w.safetensors")


def test_a_missing_file_of_safetensors_is_named(tmp_path):
    learn = learner(tmp_path)
    learn.export("w.safetensors")
    with pytest.raises(FileNotFoundError, match=r"v\.safetensors`; the folder has `w\.safetensors`"):
        learn.load("v.safetensors")


# A program


class Drops(nn.Module):
    """Different in training: a program of it must not be."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))

    def forward(self, x):
        return self.layers(x)


def test_a_program_takes_batches_of_any_size_in_eval_mode(tmp_path):
    learn = learner(tmp_path, model=Drops(), splitter=ll.trainable_params)
    learn.fit(1)
    learn.model.train()
    learn.model.layers[1].eval()
    with untouched(learn):
        path = learn.export(format="pt2")
        program, data = torch.export.load(path).module(), path.read_bytes()
        path.unlink()
    learn.model.eval()
    for n in (1, 2, 8, 33):
        x = torch.randn(n, 2)
        torch.testing.assert_close(program(x), learn.model(x))
    x, _ = learn.dls.one_batch()
    assert data.find(x.numpy().tobytes()) == -1  # the batch it was made with stays here


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x, scale, bias=None):
        return {"logits": self.layer(x) * scale + (0 if bias is None else bias)}


def test_a_program_is_called_as_the_learner_calls_its_model(tmp_path):
    learn = learner(tmp_path, model=Named())
    example = {"x": torch.ones(1, 2), "scale": torch.tensor(3.0), "labels": torch.ones(1, 1)}
    program = torch.export.load(learn.export("p.pt2", example=example)).module()
    x = torch.randn(5, 2)
    expected = learn.model(x, torch.tensor(3.0))["logits"]
    torch.testing.assert_close(program(x=x, scale=torch.tensor(3.0))["logits"], expected)


def test_a_program_that_needs_one_size_of_batch_is_refused(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(8, 2)[:, :1]

    learn = learner(tmp_path, model=Fixed())
    with pytest.raises(Exception, match=r"Constraints violated \(batch\)") as caught:
        learn.export("p.pt2")
    assert caught.value.__notes__[-1] == (
        "`export(format='pt2')` traces the model with `torch.export`, for batches of any size."
    )
    assert list(tmp_path.iterdir()) == []


def test_only_a_module_becomes_a_program(tmp_path):
    with pytest.raises(TypeError, match="`format='pt2'` takes a torch module, and the model is a function"):
        learner(tmp_path, model=lambda x: x).export("p.pt2")


def test_without_data_a_program_needs_an_example(tmp_path):
    learn = learner(tmp_path)
    learn.export()
    loaded = trusted(learn)
    with pytest.raises(ValueError, match="the training loader is empty"):
        loaded.export("p.pt2")
    assert loaded.export("p.pt2", example=learn.dls.one_batch()).exists()
