"""TensorBoardCallback against the real package: what its files hold, read back by TensorBoard itself."""

import sys
import threading

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.integrations.tensorboard import TensorBoardCallback
from learnloop.testing import check_callback, toy_learner
from tests.toys import Once, raising

pytest.importorskip("tensorboard")


def learner(folder, **kwargs):
    return toy_learner(n_train=32, n_valid=16, cbs=TensorBoardCallback(folder, **{"trace_model": False, **kwargs}))


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def scalars(folder):
    """{tag: [(step, value), …]}"""
    found = read(folder)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_losses_and_hypers_every_so_many_batches_and_columns_after_each_epoch(tmp_path):
    learn = learner(tmp_path, every=2)
    learn.fit(2)
    found = scalars(tmp_path)
    raw = learn.recorder.raw_losses
    assert set(found) == {"train_loss", "raw_loss", "lr_0", "mom_0", "wd_0", "valid_loss"}
    assert found["raw_loss"] == [(n, pytest.approx(raw[n - 1])) for n in (2, 4, 6, 8)]
    assert found["train_loss"] == [(n, pytest.approx(learn.recorder.losses[n - 1].item())) for n in (2, 4, 6, 8)]
    assert found["lr_0"] == [(n, pytest.approx(0.1)) for n in (2, 4, 6, 8)]
    assert found["valid_loss"] == [(4 * (i + 1), pytest.approx(row[1])) for i, row in enumerate(learn.recorder.values)]


def test_several_fits_share_a_folder_and_their_steps_go_on(tmp_path):
    learn = learner(tmp_path, every=4)
    learn.fit(1)
    learn.fit(1)
    assert [step for step, _ in scalars(tmp_path)["raw_loss"]] == [4, 8]
    assert [step for step, _ in scalars(tmp_path)["valid_loss"]] == [4, 8]


def test_without_a_folder_all_fits_share_the_one_that_was_made_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = learner(None)
    learn.fit(1)
    learn.fit(1)
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize(
    "run", [ll.Learner.validate, ll.Learner.get_preds, lambda learn: learn.lr_find(show_plot=False)]
)
def test_other_runs_write_nothing(tmp_path, run):
    run(learner(tmp_path / "logs"))
    assert not (tmp_path / "logs").exists()


def test_the_graph_of_the_model_is_written_once_and_tracing_moves_nothing(tmp_path):
    def trained(*cbs):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
        learn = toy_learner(model=layers, cbs=cbs)
        learn.fit(2)
        return [t.tolist() for t in learn.model.state_dict().values()], torch.get_rng_state().tolist()

    assert trained(TensorBoardCallback(tmp_path, every=1)) == trained()
    assert read(tmp_path).Tags()["graph"] is True


def test_a_model_that_cannot_be_traced_warns_once_and_the_curves_are_there(tmp_path):
    class Odd(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    with pytest.warns(UserWarning, match=r"no graph of `Odd`, which cannot be traced \(no copies\)") as caught:
        toy_learner(model=Odd(2, 1), cbs=TensorBoardCallback(tmp_path, every=1)).fit(2)
    assert len(caught) == 1 and len(scalars(tmp_path)["raw_loss"]) == 8


def test_the_files_are_closed_after_an_error(tmp_path):
    before = threading.active_count()
    learn = learner(tmp_path)
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, cbs=Once("after_loss", raising(ZeroDivisionError())))
    assert learn.tensor_board.target is None
    assert threading.active_count() == before


def test_without_the_package_the_message_names_the_extra(monkeypatch, tmp_path):
    for name in ("torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"`TensorBoardCallback` needs tensorboard: `pip install 'learnloop\[tens"):
        learner(tmp_path).fit(1)


def test_tensorboardx_serves_where_tensorboard_is_not_installed(monkeypatch, tmp_path):
    pytest.importorskip("tensorboardX")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    learn = learner(tmp_path, every=4)
    learn.fit(1)
    learn.fit(1)
    assert [step for step, _ in scalars(tmp_path)["raw_loss"]] == [4, 8]


def test_it_keeps_the_promises(tmp_path):
    make = lambda: TensorBoardCallback(tmp_path, every=1, trace_model=False)  # noqa: E731
    events = ("before_fit", "after_loss", "after_batch", "after_epoch", "after_fit")
    assert TensorBoardCallback.reads_only
    assert check_callback(make, events=events).broken == {}
