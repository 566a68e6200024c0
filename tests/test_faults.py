"""What goes wrong outside of the loop: the user's error comes out as it was, says where, and nothing is left behind.

Every fault is a real one: raised in the model, in its backward pass, the loss, a metric, the data; a data worker that
is killed, one that hangs, memory that runs out.
"""

import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path
from tempfile import gettempdir

import pytest
import torch
import torch.utils.data._utils as torch_workers
from torch import nn
from torch.utils.data import DataLoader, Dataset

import learnloop as ll

N, BS = 24, 4


class Mine(Exception):
    """An error with arguments of its own kind."""

    def __init__(self, code, text):
        super().__init__(code, text)
        self.code = code


def fail():
    raise Mine(7, "mine")


def fail_plainly():
    raise LookupError("mine")


def run_out():
    return torch.empty(1 << 60)  # refused at once by the allocator of any machine


class Faults:
    """Where something goes wrong: at the visit number `at` of a place, counted in one process."""

    def __init__(self):
        self.place, self.at, self.act, self.visits = None, 0, fail, 0

    def visit(self, place):
        if place == self.place:
            self.visits += 1
            if self.visits == self.at:
                self.act()


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, faults):
        ctx.faults = faults
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.faults.visit("backward")
        return grad, None


class Model(nn.Module):
    def __init__(self, faults):
        super().__init__()
        self.faults = faults
        self.body, self.norm, self.head = nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x):
        self.faults.visit("model")
        if not self.training:
            self.faults.visit("model in eval mode")
        return Backward.apply(self.head(self.norm(self.body(x)).relu()), self.faults)


class Samples(Dataset):
    def __init__(self, faults):
        self.faults = faults
        t = torch.linspace(-1, 1, N)[:, None]
        self.x, self.y = torch.cat([t, t**2], 1), 2 * t - t**2

    def __len__(self):
        return N

    def __getitem__(self, i):
        self.faults.visit("data")
        return self.x[i], self.y[i]


class Metric(ll.ValueMetric):
    def __init__(self, faults):
        super().__init__(lambda: faults.visit("metric") or 1.0, "visits")


def everything():
    """Callbacks that open something, put something in the place of something else, or keep something."""
    return [
        *(ll.MixedPrecision("bf16"), ll.GradientAccumulation(8), ll.GradientClip(), ll.SAM(), ll.MicroBatch()),
        *(ll.MixUp(), ll.EMA(), ll.ActivationStats(), ll.GradientStats(), ll.SpikeGuard(), ll.BnFreeze()),
        *(ll.CSVLogger(), ll.JSONLLogger(), ll.SaveModelCallback(), ll.EarlyStoppingCallback(patience=9)),
        *(
            ll.TerminateOnNaNCallback(),
            ll.Checkpoint("5step", keep=2),
            ll.ParamScheduler({"lr": ll.SchedLin(0.1, 0.01)}),
        ),
    ]


def learner(path, faults, cbs=None, **loader):
    torch.manual_seed(0)
    data = Samples(faults)

    def loss_func(pred, y, reduction="mean"):
        faults.visit("loss")
        return nn.functional.mse_loss(pred, y, reduction=reduction)

    train = DataLoader(data, batch_size=BS, shuffle=True, **loader)
    dls = ll.DataLoaders(train, ll.TensorLoader(data.x, data.y, bs=8), device="cpu")
    cbs = everything() if cbs is None else cbs
    learn = ll.Learner(dls, Model(faults), loss_func, ll.SGD, 0.1, cbs=cbs, metrics=Metric(faults), path=path)
    return learn


def traces(learn):
    """Everything outside of the learner and on it that a fault must leave as it was."""
    modules, params = list(learn.model.modules()), list(learn.model.parameters())
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return {
        "hooks": [len(getattr(m, kind)) for m in modules for kind in kinds],
        "hooks of parameters": [len(p._backward_hooks or ()) for p in params],
        "replaced methods": [name for m in modules for name in vars(m) if name == "forward"],
        "the learner's steps": [name for name in ("_forward", "_backward", "_predict") if name in vars(learn)],
        "handlers of signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "autocast": torch.is_autocast_enabled("cpu"),
        "gradient mode": torch.is_grad_enabled(),
        "logger": learn.logger,
        "output": (sys.stdout, sys.stderr),
        "open files": sorted(f for f in files if Path(f).is_file() and Path(f).parent != Path(gettempdir())),
        "loss": learn.loss_func,
        "callbacks": [(id(cb), cb.run) for cb in learn.cbs],
        "batch": (learn.xb, learn.yb, learn.pred, learn.batch, learn.task),
        "nested": (learn._depth, learn._muted, learn._open_spans),
        "bars": [getattr(learn.progress, name, None) for name in ("mbar", "pbar")]
        if hasattr(learn, "progress")
        else [],
        "processes": multiprocessing.active_children(),
        "threads": [t.name for t in threading.enumerate() if "learnloop" in t.name],
    }


class Seen(ll.Callback):
    """Weak references to everything of a batch."""

    order = 1000

    def __init__(self):
        self.refs = []

    def before_batch(self):
        self.refs += [weakref.ref(t) for t in (*self.learn.xb, *self.learn.yb)]

    def after_pred(self):
        self.refs.append(weakref.ref(self.learn.pred))


def error_of(run, kind=Mine):
    """The exception that comes out, and the text of its notes; its frames are let go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:  # `pytest.raises` would keep the frames in a circle
            run()
        except kind as error:
            return error.with_traceback(None), "\n".join(error.__notes__)
    raise AssertionError(f"no {kind} came out")


@pytest.fixture
def faults():
    return Faults()


def numbers(learn):
    return [t.tolist() for t in learn.model.state_dict().values()]


# Errors

PLACES = [
    ("model", 6, "raised by the model, the loss or the optimizer at epoch 0, batch 3, train"),
    ("backward", 5, "raised by the model, the loss or the optimizer at epoch 0, batch 2, train"),
    ("loss", 1, "raised by the model, the loss or the optimizer at epoch 0, batch 0, train"),
    ("loss", 3, "raised by SAM.before_step at epoch 0, batch 1, train"),  # in its second pass
    ("model in eval mode", 2, "raised by the model, the loss or the optimizer at epoch 0, batch 1, validate"),
    ("metric", 1, "raised by Recorder.after_validate at epoch 0, batch 2, validate"),
    ("data", 6, "raised by the training loader, on its way to the next batch, number 1 of epoch 0, train"),
]


@pytest.mark.parametrize(("place", "at", "said"), PLACES, ids=[f"{place} {at}" for place, at, _ in PLACES])
def test_an_error_comes_out_as_it_was_and_leaves_nothing(place, at, said, faults, tmp_path, capsys):
    learn, seen = learner(tmp_path, faults), Seen()
    learn.add_cb(seen)
    before = traces(learn)
    faults.place, faults.at = place, at
    error, notes = error_of(lambda: learn.fit(2))
    assert (type(error), error.args, error.code) == (Mine, (7, "mine"), 7)
    assert said in notes and "also raised" not in notes
    del error
    after = traces(learn)
    for what in before:
        assert after[what] == before[what], what
    assert [ref for ref in seen.refs if ref() is not None] == []


def test_a_learner_that_failed_trains_like_one_that_did_not(faults, tmp_path, capsys):
    cbs = [ll.GradientClip(), ll.SAM(), ll.MicroBatch(), ll.MixUp(), ll.MixedPrecision("bf16")]
    learn = learner(tmp_path, faults, cbs)
    start = {name: t.clone() for name, t in learn.model.state_dict().items()}

    def trained():
        learn.model.load_state_dict(start)
        torch.manual_seed(1)
        learn.fit(1, reset_opt=True)
        return numbers(learn)

    expected = trained()
    for place in ("model", "backward", "loss", "data"):
        faults.place, faults.at, faults.visits = place, 3, 0
        error_of(lambda: learn.fit(1))
        faults.place = None
        assert trained() == expected, place


@pytest.mark.parametrize("run", ["validate", "get_preds", "lr_find"])
def test_beside_a_training_too_and_modes_are_put_back(run, faults, tmp_path, capsys):
    cbs = [cb for cb in everything() if not isinstance(cb, (ll.MicroBatch, ll.Checkpoint))]
    learn = learner(tmp_path, faults, cbs)
    learn.create_opt()
    learn.model.train()
    learn.model.head.eval()
    before, modes = traces(learn), [m.training for m in learn.model.modules()]
    weights = numbers(learn)
    faults.place, faults.at = "model", 2
    error, notes = error_of(getattr(learn, run))
    assert error.code == 7 and "raised by the model, the loss or the optimizer" in notes
    del error
    after = traces(learn)
    for what in before:
        assert after[what] == before[what], what
    assert [m.training for m in learn.model.modules()] == modes
    assert numbers(learn) == weights


def test_gradients_are_on_again_after_an_error_that_left_them_off(faults, tmp_path, capsys):
    """As a signal does that raises inside of torch's `no_grad`, before its body has begun."""

    def leave_off():
        torch.set_grad_enabled(False)
        fail()

    learn = learner(tmp_path, faults, [])
    faults.place, faults.at, faults.act = "loss", 2, leave_off
    error_of(lambda: learn.fit(1))
    assert torch.is_grad_enabled()


# Which samples


def batch_order(learn, epoch=0):
    """The numbers of the samples in each batch, as a fit of the same seed reads them."""
    xs = []
    learn.fit(epoch + 1, cbs=ll.Callback(before_batch=lambda cb: xs.append(cb.x) if cb.training else None))
    every = learn.dls.train.dataset.x
    return [[int((every == row).all(1).nonzero()) for row in x] for x in xs]


@pytest.mark.parametrize("loader", [{}, {"num_workers": 1}], ids=["here", "worker"])
def test_the_numbers_of_the_samples_are_told(loader, faults, tmp_path, capsys):
    learn = learner(tmp_path, faults, [], **loader)
    torch.manual_seed(5)
    order = batch_order(learn)
    torch.manual_seed(5)
    faults.place, faults.at, faults.visits = "loss", 3, 0
    _, notes = error_of(lambda: learn.fit(1))
    assert f"\n  samples: {', '.join(map(str, order[2]))}" in notes
    torch.manual_seed(5)
    faults.place, faults.at, faults.visits = "data", 2 * BS + 1, 0
    faults.act = fail_plainly  # torch makes an error of a worker anew, from a text alone
    _, notes = error_of(lambda: learn.fit(1), LookupError)
    assert f"\n  waiting for samples: {', '.join(map(str, order[2]))}" in notes


def test_of_many_samples_the_first_are_told(faults, tmp_path, capsys):
    learn = learner(tmp_path, faults, [])
    learn.dls = ll.DataLoaders(ll.TensorLoader(*(learn.dls.train.dataset.x,) * 2, bs=12), device="cpu")
    learn.model.body.weight.data.zero_()
    faults.place, faults.at = "loss", 2
    learn.model.head = nn.Linear(4, 2)
    _, notes = error_of(lambda: learn.fit(1))
    assert "\n  samples: 12, 13, 14, 15, 16, 17, 18, 19, … (12)" in notes


def test_where_a_loader_does_not_tell_nothing_is_said_of_samples(faults, tmp_path, capsys):
    learn = learner(tmp_path, faults, [])
    data = learn.dls.train
    learn.dls = ll.DataLoaders(data, device="cpu", keyed=False)
    faults.place, faults.at = "loss", 2
    _, notes = error_of(lambda: learn.fit(1))
    assert "batch 1, train" in notes and "samples" not in notes


# Workers


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(60)


@pytest.mark.parametrize(
    ("act", "said"),
    [(kill, r"DataLoader worker \(pid.* (is killed by|exited)"), (hang, "timed out after 0.5 s")],
)
@pytest.mark.parametrize("persistent", [False, True], ids=["plain", "persistent"])
def test_a_worker_that_dies_or_hangs_ends_the_fit_and_is_gone(
    act, said, persistent, faults, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch_workers, "MP_STATUS_CHECK_INTERVAL", 0.3)  # torch waits so long for each that is to end
    options = {"num_workers": 1, "persistent_workers": persistent, "timeout": 0.5 if act is hang else 0}
    learn = learner(tmp_path, faults, **options)
    before = traces(learn)
    faults.place, faults.at, faults.act = "data", 2 * BS + 1, act
    error, notes = error_of(lambda: learn.fit(1), (RuntimeError, ConnectionError, EOFError))
    assert re.search(said, str(error)) or (act is kill and "died while it handed over a batch" in notes)
    waiting = (
        r"raised by the training loader, on its way to the next batch, number \d of epoch 0, train\n  waiting for sam"
    )
    died = r"raised by a data worker that died, noticed at epoch 0, batch \d, train$"  # wherever the main process was
    assert re.match(waiting, notes) or (act is kill and re.match(died, notes))
    del error
    deadline = time.monotonic() + 5.0  # a process that was killed takes its time to be gone
    while (after := traces(learn)) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    for what in before:
        assert after[what] == before[what], what
    faults.place = None
    learn.fit(1)  # with workers of its own
    assert learn.train_iter == N // BS
    assert not persistent or multiprocessing.active_children()
    learn.dls = None
    gc.collect()  # with the loader its workers end


def test_a_line_that_breaks_while_a_worker_hands_over_is_told_as_its_death(faults, tmp_path, monkeypatch, capsys):
    def breaks(iterator):
        raise ConnectionResetError(104, "Connection reset by peer")

    learn = learner(tmp_path, faults, [], num_workers=1)
    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_next_data", breaks)
    _, notes = error_of(lambda: learn.fit(1), ConnectionResetError)
    assert notes.endswith("\n  a data worker died while it handed over a batch")
    learn = learner(tmp_path, faults, [])
    faults.place, faults.at, faults.act = "data", 2, lambda: breaks(None)  # a dataset that reads from the network
    _, notes = error_of(lambda: learn.fit(1), ConnectionResetError)
    assert "worker" not in notes


# Memory


def test_memory_that_runs_out_comes_out_as_torch_said_it(faults, tmp_path, capsys):
    learn, seen = learner(tmp_path, faults, [ll.MixedPrecision("bf16"), ll.GradientAccumulation(8)]), Seen()
    learn.add_cb(seen)
    before = traces(learn)
    faults.place, faults.at, faults.act = "model", 3, run_out
    error, notes = error_of(lambda: learn.fit(1), RuntimeError)
    assert "batch 2, train" in notes and "xb: (float32[4, 2] cpu)" in notes
    del error
    assert traces(learn) == before
    assert [ref for ref in seen.refs if ref() is not None] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_the_gpu_goes_back_with_the_exception():
    x = torch.randn(64, 1 << 18, device="cuda")  # 64 MiB
    model = nn.Sequential(nn.Linear(1 << 18, 8), nn.Linear(8, 1)).cuda()
    calls = []

    def loss_func(pred, y):
        calls.append(1)
        if len(calls) == 3:
            torch.empty(1 << 50, device="cuda")  # a petabyte
        return nn.functional.mse_loss(pred, y)

    dls = ll.DataLoaders(ll.TensorLoader(x, torch.zeros(64, 1, device="cuda"), bs=16), device="cuda")
    learn = ll.Learner(dls, model, loss_func, ll.SGD, 0.01, cbs=ll.MixedPrecision("bf16"))
    learn.logger = lambda row: None
    learn.create_opt()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        with learn.no_bar():
            error, _ = error_of(lambda: learn.fit(1), torch.OutOfMemoryError)
        del error
        for p in model.parameters():
            p.grad = None
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()
