"""Files of weights and optimizer: what is saved and read back, and every way in which that can fail."""

import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from fastcore.foundation import L
from torch import nn

import learnloop as ll
from learnloop.checkpoint import read_plain, write_atomically
from learnloop.testing import toy_learner

ROOT = Path(__file__).resolve().parent.parent


def with_norm(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def learner(path, seed=0, **kwargs):
    return toy_learner(path=path, model=with_norm(seed), **{"opt_func": ll.Adam, **kwargs})


def everything(learn):
    """Weights, buffers, and what the optimizer has gathered."""
    opt = {} if learn.opt is None else learn.opt.state_dict()
    states = [value for state in opt.get("state", []) for value in state.values()]
    return [torch.as_tensor(value).clone() for value in [*learn.model.state_dict().values(), *states]]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@contextmanager
def unchanged(learn):
    """Nothing of the learner moves in the block."""
    before, opt, hypers = everything(learn), learn.opt, learn.opt and [dict(h) for h in learn.opt.hypers]
    yield
    assert same(everything(learn), before)
    assert learn.opt is opt
    assert hypers == (opt and [dict(h) for h in opt.hypers])


@contextmanager
def largest_file(n):
    """A disk that is full after `n` bytes, as the system tells it: a write beyond them fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Where


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("best", "models/best.pth"),
        ("v1.0", "models/v1.0.pth"),
        ("best.pth", "models/best.pth"),
        (Path("deep") / "best", "models/deep/best.pth"),
    ],
)
def test_weights_go_below_the_folder_for_models(tmp_path, file, path):
    learn = learner(tmp_path)
    assert learn.save(file) == tmp_path / path
    assert (tmp_path / path).exists()
    assert learn.load(file, with_opt=False) is learn


def test_an_absolute_path_stays(tmp_path):
    assert learner(tmp_path / "elsewhere").save(tmp_path / "here") == tmp_path / "here.pth"
    assert [p.name for p in tmp_path.iterdir()] == ["here.pth"]


def test_weights_are_not_saved_under_the_ending_of_another_format(tmp_path):
    with pytest.raises(ValueError, match=r"weights are saved as \.pth; `learn\.export\('.*x\.safetensors'\)` writes"):
        learner(tmp_path).save("x.safetensors")
    assert list(tmp_path.iterdir()) == []


# There and back


def test_a_loaded_learner_trains_on_as_the_saved_one_does(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path, seed=1)
    learn.fit(2)
    learn.save("a")
    other.load("a", with_opt=True)
    assert same(everything(other), everything(learn))
    for each in (learn, other):
        torch.manual_seed(3)
        each.fit(1)
    assert same(everything(other), everything(learn))


def test_hypers_come_back(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path)
    learn.fit(1, lr=0.07, wd=0.3)
    learn.save("a")
    other.load("a")
    assert {"lr": 0.07, "wd": 0.3}.items() <= dict(other.opt.hypers[0]).items()


def test_loading_goes_into_the_parameters_that_are_there(tmp_path):
    learn = learner(tmp_path)
    learn.save("a")
    parameters = list(learn.model.parameters())
    learn.load("a", with_opt=False)
    assert all(a is b for a, b in zip(parameters, learn.model.parameters(), strict=True))


def test_loading_makes_an_optimizer_where_there_is_none(tmp_path):
    learner(tmp_path).save("a")
    learn = learner(tmp_path)
    learn.load("a", with_opt=False)
    assert isinstance(learn.opt, ll.Adam)


def test_a_handler_may_save_and_load_in_the_middle_of_a_fit(tmp_path):
    seen = []

    def back_and_forth(cb):
        if cb.epoch == 0:
            cb.learn.save("first")
            seen.extend(everything(cb.learn))
        elif cb.epoch == 2:
            cb.learn.load("first", with_opt=True)

    learn = learner(tmp_path, cbs=ll.Callback(after_epoch=back_and_forth))
    learn.fit(3)
    assert same(everything(learn), seen)


def test_the_model_may_be_a_function(tmp_path):
    learn = toy_learner(path=tmp_path, model=lambda x: x[:, :1])
    learn.fit(1)
    learn.save("a")
    assert learn.load("a", with_opt=True) is learn


def test_the_functions_take_any_path_model_and_optimizer(tmp_path):
    model, other = with_norm(0), with_norm(1)
    opt, other_opt = ll.SGD(model.parameters(), lr=0.3), ll.SGD(other.parameters(), lr=0.1)
    ll.save_model(tmp_path / "any.name", model, opt)
    ll.load_model(tmp_path / "any.name", other, other_opt)
    assert torch.equal(other[0].weight, model[0].weight)
    assert other_opt.hypers[0]["lr"] == 0.3
    ll.load_model(tmp_path / "any.name", with_norm(2), None)


def test_plain_data_that_a_module_keeps_beside_its_tensors_comes_back(tmp_path):
    learn = learner(tmp_path)
    learn.model = nn.Sequential(Keeps({"mean": np.arange(3.0), "names": L("a", "b")}), nn.Linear(2, 1))
    learn.save("a")
    kept, learn.model[0].kept = learn.model[0].kept, None
    learn.load("a", with_opt=False)
    assert learn.model[0].kept["mean"].tolist() == kept["mean"].tolist()
    assert learn.model[0].kept["names"] == kept["names"]


class Keeps(nn.Module):
    """Has something in its state that is no tensor; `fails` raises when it is put back."""

    def __init__(self, kept, fails=None):
        super().__init__()
        self.kept, self.fails = kept, fails

    def forward(self, x):
        return x

    def get_extra_state(self):
        return self.kept

    def set_extra_state(self, kept):
        self.kept = kept
        if self.fails is not None:
            raise self.fails


def test_what_could_not_be_read_back_is_refused_before_anything_is_written(tmp_path):
    learn = learner(tmp_path)
    learn.model = nn.Sequential(Keeps(print))
    with pytest.raises(TypeError, match=r"the model's state: `0\._extra_state` is a builtin_function_or_method"):
        learn.save("a")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_has_seen_no_batch_has_nothing_to_save(tmp_path):
    learn = learner(tmp_path)
    learn.model = nn.LazyLinear(1)
    with pytest.raises(TypeError, match="`weight` has no shape before the model has seen a batch; run it once"):
        learn.save("a")


def test_a_layer_that_has_seen_no_batch_takes_its_shape_from_the_file(tmp_path):
    learn = learner(tmp_path)
    learn.model = nn.Linear(2, 1)
    learn.save("a")
    lazy = nn.LazyLinear(1)
    ll.load_model(tmp_path / "models/a.pth", lazy, None)
    assert torch.equal(lazy.weight, learn.model.weight)


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert learner(tmp_path).save("a") == tmp_path / "models/a.pth"
    assert list(tmp_path.iterdir()) == []


# With and without the optimizer


def test_without_an_optimizer_only_weights_are_saved(tmp_path):
    learn = learner(tmp_path)
    assert set(torch.load(learn.save("before_the_fit"))) == set(learn.model.state_dict())
    learn.fit(1)
    assert set(torch.load(learn.save("a", with_opt=False))) == set(learn.model.state_dict())
    assert set(torch.load(learn.save("b"))) == {"model", "opt"}


def test_a_file_without_an_optimizer_loads_with_a_warning(tmp_path):
    learn = learner(tmp_path)
    path = learn.save("a")
    with pytest.warns(UserWarning) as warned:
        learn.load("a")
    assert str(warned[0].message) == f"`{path}` holds no state of an optimizer: the weights alone were loaded."
    assert warned[0].filename == __file__


def test_who_asks_for_the_weights_alone_gets_no_warning(tmp_path, recwarn):
    learn = learner(tmp_path)
    learn.save("a")
    learn.load("a", with_opt=False)
    assert list(recwarn) == []


def test_who_asks_for_the_optimizer_gets_it_or_an_error(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path, seed=1)
    learn.save("a")
    with (
        unchanged(other),
        pytest.raises(ValueError, match=r"a\.pth` holds no state of an optimizer\. Pass `with_opt=F"),
    ):
        other.load("a", with_opt=True)
    with pytest.raises(ValueError, match="there is no optimizer to fill"):
        learn.fit(1)
        ll.load_model(learn.save("b"), other.model, None, with_opt=True)


def test_an_optimizer_of_another_kind_is_left_out_with_a_warning(tmp_path):
    learn, other = learner(tmp_path, opt_func=ll.SGD), learner(tmp_path, seed=1)
    learn.fit(1)
    learn.save("a")
    with pytest.warns(UserWarning, match=r"a\.pth` does not fit and was left out: group 0 of the state has no sqr_mom"):
        other.load("a")
    assert torch.equal(other.model[0].weight, learn.model[0].weight)


def test_an_optimizer_of_another_kind_leaves_all_as_it_was_where_it_is_asked_for(tmp_path):
    learn, other = learner(tmp_path, opt_func=ll.SGD), learner(tmp_path, seed=1)
    learn.fit(1)
    other.fit(1)
    learn.save("a")
    with (
        unchanged(other),
        pytest.raises(ValueError, match="does not fit, and nothing was loaded: group 0 of the state"),
    ):
        other.load("a", with_opt=True)


# Files of others


def test_a_file_in_the_layout_of_fastai_is_read(tmp_path):
    """As fastai 2.8.12 writes it after `fit_one_cycle`: hypers in an `L`, rates as numbers of numpy."""
    learn = learner(tmp_path)
    learn.fit(1)
    state = learn.opt.state_dict()
    hypers = L({**state["hypers"][0], "lr": np.float64(0.25)})
    model = with_norm(5).state_dict()
    torch.save({"model": model, "opt": {"state": state["state"], "hypers": hypers}}, tmp_path / "fastai.pth")
    learn.load(tmp_path / "fastai", with_opt=True)
    assert torch.equal(learn.model[0].weight, model["0.weight"])
    assert learn.opt.hypers[0]["lr"] == 0.25


def test_the_file_has_the_layout_that_fastai_reads(tmp_path):
    """fastai 2.8.12 takes a file whose keys are just these two, reads it with `weights_only=True`, and its optimizer
    takes a list of states and one of hypers."""
    learn = learner(tmp_path)
    learn.fit(1)
    state = torch.load(learn.save("a"), weights_only=True)
    assert list(state) == ["model", "opt"]
    assert list(state["opt"]) == ["state", "hypers"]
    assert list(state["opt"]["state"][0]) == ["grad_avg", "sqr_avg", "step"]
    assert set(state["opt"]["hypers"][0]) == {"lr", "mom", "sqr_mom", "eps", "wd"}


def test_weights_that_torch_saved_are_read(tmp_path):
    learn, model = learner(tmp_path), with_norm(7)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    learn.load(tmp_path / "plain", with_opt=False)
    assert torch.equal(learn.model[2].weight, model[2].weight)


def test_weights_saved_on_a_gpu_are_read_without_one(tmp_path):
    learn, model = learner(tmp_path), with_norm(7)
    torch.save(model.state_dict(), tmp_path / "host.pth")
    with zipfile.ZipFile(tmp_path / "host.pth") as host, zipfile.ZipFile(tmp_path / "gpu.pth", "w") as gpu:
        for name in host.namelist():
            # Where a tensor was is a string in the pickle, with its length before it.
            gpu.writestr(name, host.read(name).replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"))
    learn.load(tmp_path / "gpu", with_opt=False)
    assert torch.equal(learn.model[2].weight, model[2].weight)
    assert learn.model[2].weight.device.type == "cpu"


def test_the_layers_versions_are_in_the_file(tmp_path):
    assert read_plain(learner(tmp_path).save("a"))._metadata["1"] == {"version": 2}  # of BatchNorm1d


# Wrapped models

WRAPPERS = [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["parallel", "compiled", "both"])
def test_names_are_those_of_the_model_inside_its_wrappers(tmp_path, wrap):
    learn, other = learner(tmp_path), learner(tmp_path, seed=1)
    learn.model = wrap(learn.model)
    path = learn.save("a")
    assert set(torch.load(path)) == set(with_norm().state_dict())
    other.load("a", with_opt=False)
    learn.load("a", with_opt=False)
    assert torch.equal(other.model[0].weight, ll.get_model(learn.model)[0].weight)


def test_names_are_those_of_the_model_inside_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        learn = learner(tmp_path)
        learn.model = nn.parallel.DistributedDataParallel(learn.model)
        assert set(torch.load(learn.save("a"))) == set(with_norm().state_dict())
        learn.load("a", with_opt=False)
    finally:
        torch.distributed.destroy_process_group()


# What does not fit


def test_names_and_shapes_that_do_not_fit_are_named_and_nothing_has_changed(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path, loss_func=lambda pred, y: pred.mean())
    learn.model = nn.Sequential(nn.Linear(2, 4), nn.Identity(), nn.Linear(4, 1), nn.Linear(1, 1))
    learn.fit(1)
    path = learn.save("a")
    other.model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    other.fit(1)
    with unchanged(other), pytest.raises(ValueError) as caught:
        other.load("a")
    assert str(caught.value) == (
        f"`{path}` does not fit the model `Sequential`, which is as it was; "
        "only in the file: `3.weight` [1, 1], `3.bias` [1]; "
        "only in the model: `1.running_mean` [4], `1.running_var` [4], `1.num_batches_tracked` []; "
        "of another shape: `2.weight` [1, 4] in the file and [2, 4] here, `2.bias` [1] in the file and [2] here."
    )


def test_a_long_list_of_names_is_cut(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path)
    learn.model = nn.ModuleDict({"all": nn.Sequential(*(nn.Linear(1, 1) for _ in range(10)))})
    learn.save("a")
    with pytest.raises(
        ValueError, match=r"only in the file: `all\.0\.weight` .*, `all\.2\.bias` \[1\] and 14 more; only"
    ):
        other.load("a", strict=False)


def test_not_strict_leaves_out_names_that_only_one_side_has(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path, seed=1)
    learn.model.add_module("more", nn.Linear(1, 1))
    learn.save("a")
    other.model.add_module("other", nn.Linear(1, 1))
    other.load("a", with_opt=False, strict=False)
    assert torch.equal(other.model[0].weight, learn.model[0].weight)


def test_not_strict_still_refuses_another_shape_and_names_that_have_nothing_in_common(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path)
    learn.model = nn.Sequential(nn.Linear(2, 5))
    learn.save("a")
    with unchanged(other), pytest.raises(ValueError, match=r"of another shape: `0\.weight` \[5, 2\] in the file and"):
        other.load("a", strict=False)
    other.model = nn.Linear(2, 5)
    with (
        unchanged(other),
        pytest.raises(ValueError, match=r"only in the file: `0\.weight`.*only in the model: `weight`"),
    ):
        other.load("a", strict=False)


def test_a_model_that_fails_while_it_is_loaded_has_its_weights_back(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path)
    learn.model = nn.Sequential(nn.Linear(2, 1), Keeps(1))
    learn.save("a")
    other.model = nn.Sequential(nn.Linear(2, 1), Keeps(2, fails=KeyboardInterrupt()))
    with unchanged(other), pytest.raises(KeyboardInterrupt):
        other.load("a")


def test_a_model_that_renames_what_it_loads_is_heard(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path)
    learn.model = nn.Sequential(nn.Linear(2, 1))
    learn.save("a")
    other.model = nn.Linear(2, 1)

    def rename(module, state, prefix, *args):
        for name in list(state):
            state[name.removeprefix("0.")] = state.pop(name)

    other.model.register_load_state_dict_pre_hook(rename)
    other.load("a", with_opt=False)
    assert torch.equal(other.model.weight, learn.model[0].weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that is not there")
@pytest.mark.parametrize("device", ["cuda", 0])
def test_a_device_that_is_not_there_is_torchs_own_error(tmp_path, device):
    learn = learner(tmp_path)
    learn.save("a")
    with unchanged(learn), pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        learn.load("a", device=device)


# Files that are not what they should be


def test_a_missing_file_is_named_with_those_that_look_alike(tmp_path):
    learn = learner(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file `.*models/best\.pth`; nothing like it is in that f"):
        learn.load("best")
    learn.save("bets")
    learn.save("unet")
    with pytest.raises(FileNotFoundError, match=r"best\.pth`; the folder has `bets\.pth`"):
        learn.load("best")
    with pytest.raises(FileNotFoundError, match=r"qqq\.pth`; the folder has `bets\.pth`, `unet\.pth`"):
        learn.load("qqq")
    assert learn.opt is None


@pytest.fixture
def small(tmp_path):
    """A small file, what is in it, and a place for what becomes of it."""
    state = {"model": {"a": torch.randn(4), "b": torch.arange(6)}, "opt": {"state": [{"step": 3}], "hypers": [{}]}}
    write_atomically(tmp_path / "small.pth", lambda file: torch.save(state, file))
    return (tmp_path / "small.pth").read_bytes(), state, tmp_path / "changed.pth"


def is_as_written(path, state):
    """Whether a file is read as it was written; False where it is found to be damaged."""
    try:
        found = read_plain(path)
    except ll.FileDamaged:
        return False
    assert same(list(found["model"].values()), list(state["model"].values()))
    assert (found["opt"], list(found["model"])) == (state["opt"], list(state["model"]))
    return True


def test_a_file_that_is_cut_anywhere_is_found_to_be_damaged(small):
    data, state, path = small
    for n in range(0, len(data), 3):
        path.write_bytes(data[:n])
        assert not is_as_written(path, state), n
    path.write_bytes(data)
    assert is_as_written(path, state)


def test_no_flipped_bit_changes_what_is_read(small):
    """A bit in every other byte; those in dates and padding change nothing. torch alone reads past most others."""
    data, state, path = small
    for i in range(0, len(data), 2):
        changed = bytearray(data)
        changed[i] ^= 1 << i // 2 * 5 % 8
        path.write_bytes(changed)
        is_as_written(path, state)


def test_a_flipped_bit_in_a_weight_is_found(tmp_path):
    learn = learner(tmp_path)
    path = learn.save("a")
    data = bytearray(path.read_bytes())
    data[data.find(learn.model[0].weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(data)
    message = (
        r"a\.pth` is cut short or damaged \(`a?r?c?h?i?v?e?/data/0` in it is not what was written\): take an earlier"
    )
    with unchanged(learn), pytest.raises(ll.FileDamaged, match=message):
        learn.load("a")


def test_a_bit_that_marks_a_tensor_as_a_folder_is_found(small):
    """torch would read nothing for it, and return what lay in the memory."""
    data, state, path = small
    changed = bytearray(data)
    entry = data.rfind(b"PK\1\2", 0, data.rfind(b"archive/data/0"))
    changed[entry + 38] ^= 0x10  # the attributes, in zip's list of contents
    path.write_bytes(changed)
    assert not is_as_written(path, state)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is cut short or damaged"),
        (b"epoch,loss\n0,1.5\n", r"is no file of weights, as `learn\.save` and `torch\.save` write them"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, data, message):
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        learner(tmp_path).load(tmp_path / "a")


def test_an_archive_of_another_kind_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with pytest.raises(ValueError, match="is no file of weights"):
        learner(tmp_path).load(tmp_path / "a")


@pytest.mark.parametrize(
    ("state", "kind"),
    [({"epoch": 3, "lr": 0.1}, "a dict of 'epoch', 'lr'"), ([1, 2], "a list")],
)
def test_plain_data_that_is_no_weights_is_named(tmp_path, state, kind):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth` holds {kind}.*, not weights by name"):
        learner(tmp_path).load(tmp_path / "a")


class Marks:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("place", ["alone", "weights", "optimizer", "old_format"])
def test_no_code_of_a_file_is_run(tmp_path, place):
    learn, marker = learner(tmp_path), tmp_path / "marker"
    weights, bad = learn.model.state_dict(), Marks(marker)
    held = {"alone": bad, "weights": {**weights, "x": bad}, "optimizer": {"model": weights, "opt": bad}}.get(place, bad)
    torch.save(held, tmp_path / "a.pth", _use_new_zipfile_serialization=place != "old_format")
    with unchanged(learn), pytest.raises(ValueError) as caught:
        learn.load(tmp_path / "a")
    assert not marker.exists()
    if place != "old_format":
        assert re.search(r"a\.pth` holds `\w*\.open`, which is code and no data: it was refused", str(caught.value))
    torch.load(tmp_path / "a.pth", weights_only=False)  # and it would have
    assert marker.exists()


def test_a_bare_pickle_is_not_read(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Marks(marker), 2))
    with pytest.raises(ValueError, match="is no file of weights"):
        learner(tmp_path).load(tmp_path / "a")
    assert not marker.exists()


def test_a_pickled_model_is_refused_with_what_to_do(tmp_path):
    torch.save(with_norm(), tmp_path / "a.pth")
    message = (
        r"holds `torch\.nn\.modules\.\w+\.\w+`, which is code and no data: it was refused, and none of it ran\. "
        r"If you made it yourself, read it once with `torch\.load\(…, weights_only=False\)` and save the model's"
    )
    with pytest.raises(ValueError, match=message):
        learner(tmp_path).load(tmp_path / "a")


# Writing that fails


def test_a_full_disk_leaves_the_earlier_file_and_no_other(tmp_path):
    learn = learner(tmp_path)
    path = learn.save("a")
    before = path.read_bytes()
    learn.fit(1)
    for limit in (0, 100, 1000, 4000):
        with largest_file(limit), pytest.raises(OSError) as caught:
            learn.save("a")
        assert caught.value.filename == str(path)
        assert str(caught.value) == (
            f"[Errno 27] File too large; nothing was written, and an earlier file is as it was: '{path}'"
        )
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["a.pth"]
    learn.save("a")
    assert path.read_bytes() != before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "models").write_text("a file of that name")
    with pytest.raises(OSError, match=r"nothing was written.*models/a\.pth"):
        learner(tmp_path).save("a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"nothing was written.*a\.pth"):
        learner(tmp_path).save(tmp_path / "a")


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_what_stops_the_writing_is_raised_as_it_is(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("before")

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(path, write)
    assert caught.value is error
    assert ([p.name for p in tmp_path.iterdir()], path.read_text()) == (["a"], "before")


def test_a_process_killed_while_it_writes_leaves_the_earlier_file(tmp_path):
    learn = learner(tmp_path)
    path = learn.save("a")
    before = path.read_bytes()
    code = f"""
import os, signal, torch
from learnloop.checkpoint import write_atomically

class Dies:
    def __init__(self, file):
        self.file, self.n = file, 0
    def write(self, data):
        self.n += len(data)
        self.file.write(data)
        if self.n > 5000:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return len(data)
    def flush(self):
        pass

write_atomically({str(path)!r}, lambda file: torch.save({{"x": torch.ones(9999)}}, Dies(file)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == before
    learn.load("a", with_opt=False)
    half = [p for p in path.parent.iterdir() if p != path]
    assert [(p.name[0], p.suffix) for p in half] == [(".", ".tmp")]
    assert half[0].stat().st_size > 5000
    learn.save("a")  # what lies there is in nobody's way


def test_a_reader_meets_a_whole_file_while_others_are_written(tmp_path):
    path, done, failures = tmp_path / "a", threading.Event(), []

    def numbered(n):
        return lambda file: torch.save({"x": torch.full((3000,), float(n)), "y": torch.full((9,), float(n))}, file)

    def read():
        while not done.is_set():
            found = read_plain(path)
            if len(set(torch.cat([found["x"], found["y"]]).tolist())) != 1:
                failures.append(found)

    write_atomically(path, numbered(0))
    reader = threading.Thread(target=read)
    reader.start()
    for n in range(100):
        write_atomically(path, numbered(n))
    done.set()
    reader.join()
    assert failures == []


# Writing that succeeds


def test_the_folder_is_made_and_nothing_else_is_in_it(tmp_path):
    path = learner(tmp_path / "not" / "yet").save("a")
    assert [p.name for p in path.parent.iterdir()] == ["a.pth"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "disk" / "real")
    write_atomically(tmp_path / "latest", lambda file: file.write(b"1"))
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "disk" / "real").read_bytes() == b"1"


def test_a_new_file_is_as_readable_as_any_and_a_replaced_one_as_before(tmp_path):
    umask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", lambda file: file.write(b"1"))
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    (tmp_path / "a").chmod(0o604)
    write_atomically(tmp_path / "a", lambda file: file.write(b"2"))
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o604


def test_a_name_of_the_longest_kind_can_be_written(tmp_path):
    write_atomically(tmp_path / ("é" * 120), lambda file: file.write(b"1"))
    assert (tmp_path / ("é" * 120)).read_bytes() == b"1"


def test_the_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    write_atomically(tmp_path / "a", lambda file: file.write(b"1"))
    assert calls == ["fsync", "replace", "fsync"]  # the last one is for the name


def test_a_whole_run_is_read_back_from_a_file(tmp_path):
    learn, other = learner(tmp_path), learner(tmp_path, seed=1)
    learn.fit(1)
    state = learn.state_dict()
    write_atomically(tmp_path / "run", lambda file: torch.save(state, file))
    other.load_state_dict(read_plain(tmp_path / "run"))
    assert same(everything(other), everything(learn))
