"""MicroBatch, compared with the same training in whole batches; memory runs out where a test says so."""

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.callbacks.micro_batch import is_out_of_memory, joined, parts, rows
from learnloop.testing import EventLog, check_callback
from tests.resuming import assert_resumes_exactly

N = 13  # samples per batch


class Short(nn.Module):
    """A layer that runs out of memory for more than `most` samples, where it goes forward or where it goes back."""

    def __init__(self, most, back=False):
        super().__init__()
        self.most, self.back, self.sizes = most, back, []

    def forward(self, x):
        self.sizes.append(len(x))
        if self.back:
            return ShortBack.apply(x, self.most)
        return refuse(x, self.most)


def refuse(x, most):
    if len(x) > most:
        raise torch.OutOfMemoryError("Tried to allocate more than there is")
    return x


class ShortBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, most):
        ctx.most = most
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return refuse(grad, ctx.most), None


def samples(n):
    t = torch.linspace(-1, 1, n)[:, None]
    return torch.cat([t, t**2], 1), 2 * t - t**2 + 0.5


def network(most=N, back=False, *middle):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 4), *middle, nn.Tanh(), Short(most, back), nn.Linear(4, 1))


def learner(*cbs, model=None, opt_func=ll.SGD, metrics=None, n_batch=4, loss_func=None):
    x, y = samples(n_batch * N)
    dls = ll.DataLoaders(ll.TensorLoader(x, y, bs=N), device="cpu")
    cbs = [ll.TrainEvalCallback(), ll.Recorder(train_metrics=metrics is not None), *cbs]
    options = {"cbs": cbs, "default_cbs": False, "metrics": metrics}
    learn = ll.Learner(dls, network() if model is None else model, loss_func or nn.MSELoss(), opt_func, 0.1, **options)
    learn.logger = lambda row: None
    return learn


def outcome(learn, seed=0):
    torch.manual_seed(seed)
    learn.fit(2)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()]), torch.tensor(learn.recorder.raw_losses)


def assert_same(found, expected, atol=1e-6):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


MOST = [7, 5, 1]  # parts of 7 and 6; these do not fit either, so four; thirteen


# Numbers


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("opt_func", [ll.SGD, ll.Adam])
def test_parts_train_as_the_whole_batch(opt_func, most, back):
    cb = ll.MicroBatch()
    found = outcome(learner(cb, model=network(most, back), opt_func=opt_func))
    assert cb.size == {7: 7, 5: 4, 1: 1}[most]
    assert_same(found, outcome(learner(opt_func=opt_func)))


@pytest.mark.parametrize("size", [5, 7, 11])
def test_parts_of_unequal_size_count_by_their_samples(size):
    assert_same(outcome(learner(ll.MicroBatch(size))), outcome(learner()))


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize("n_acc", [N, 2 * N, 30, 3 * N])
def test_under_accumulation_windows_are_what_they_were(n_acc, back):
    found = outcome(learner(ll.MicroBatch(), ll.GradientAccumulation(n_acc), model=network(5, back)))
    assert_same(found, outcome(learner(ll.GradientAccumulation(n_acc))))


def test_memory_that_runs_out_only_later_in_a_window_loses_no_gradient():
    def run(*cbs):
        learn = learner(*cbs, ll.GradientAccumulation(2 * N), model=network(back=True))
        short = learn.model[2]
        learn.add_cb(ll.Callback(before_batch=lambda cb: setattr(short, "most", 5 if cbs and cb.iter == 1 else N)))
        return outcome(learn)

    assert_same(run(ll.MicroBatch()), run())


def test_memory_that_runs_out_in_a_later_part_begins_the_batch_again():
    class ThirdTime(ll.Callback):
        n = 0

        def after_loss(self):
            self.n += 1
            if self.n == 3:
                raise torch.OutOfMemoryError("now")

    micro = ll.MicroBatch(5)
    found = outcome(learner(micro, ThirdTime(), ll.GradientAccumulation(30)))
    assert micro.size == 3
    assert_same(found, outcome(learner(ll.GradientAccumulation(30))))


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_in_mixed_precision_too(mode, back):
    def run(most, *cbs):
        mixed = ll.MixedPrecision(mode, init_scale=2.0**10)
        return outcome(
            learner(mixed, ll.GradientClip(0.5), ll.GradientAccumulation(2 * N), *cbs, model=network(most, back))
        )

    assert_same(run(5, ll.MicroBatch()), run(N), atol=2e-3 if mode == "bf16" else 3e-4)


def test_mixtures_are_cut_with_their_targets_and_weights():
    def run(most, *cbs):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(2, 4), Short(most), nn.Linear(4, 3))
        learn = learner(*cbs, ll.MixUp(), model=model, loss_func=nn.CrossEntropyLoss())
        x, _ = samples(4 * N)
        learn.dls = ll.DataLoaders(ll.TensorLoader(x, torch.arange(4 * N) % 3, bs=N), device="cpu")
        return outcome(learn)

    assert_same(run(5, ll.MicroBatch()), run(N))


@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
def test_the_second_pass_of_sam_is_split_as_well(back):
    def run(most, *cbs):
        return outcome(learner(ll.SAM(0.2), ll.GradientAccumulation(2 * N), *cbs, model=network(most, back)))

    assert_same(run(5, ll.MicroBatch()), run(N))


def test_a_model_that_returns_its_own_loss_is_split_as_well():
    class Own(nn.Module):
        def __init__(self, most):
            super().__init__()
            self.inner = network(most)

        def forward(self, x, labels):
            logits = self.inner(x)
            return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}

    def run(most, *cbs):
        learn = learner(*cbs, model=Own(most))
        x, y = samples(2 * N)
        learn.dls = ll.DataLoaders([{"x": x[i : i + N], "labels": y[i : i + N]} for i in (0, N)], device="cpu")
        learn.loss_func = None
        return outcome(learn)

    assert_same(run(5, ll.MicroBatch()), run(N))


# What others see


def test_metrics_and_callbacks_see_the_whole_batch_afterwards():
    seen = {}

    def run(most, *cbs):
        def look(cb):
            seen.setdefault(most, []).append([t.detach().clone() for t in (*cb.xb, *cb.yb, cb.pred, cb.loss)])

        learn = learner(*cbs, ll.Callback(before_step=look, after_batch=look), model=network(most), metrics=ll.mae)
        outcome(learn)
        return learn.recorder.values

    rows_found, rows_expected = run(5, ll.MicroBatch()), run(N)
    for found, expected in zip(seen[5], seen[N], strict=True):
        assert_same(found, expected)
    for found, expected in zip(rows_found, rows_expected, strict=True):
        assert list(found) == pytest.approx(list(expected), abs=1e-6)


def test_each_part_has_its_events():
    log = EventLog(cleanups=False)
    learner(log, ll.MicroBatch(7), n_batch=1).fit(1)
    start, end = log.events.index("before_batch"), log.events.index("after_batch")
    part = "after_pred after_loss before_backward after_backward"
    assert " ".join(log.events[start:end]) == f"before_batch {part} {part} before_step after_step"


def test_the_size_is_kept_for_the_batches_after():
    model = network(5)
    learner(ll.MicroBatch(), model=model, n_batch=3).fit(1)
    assert model[2].sizes == [13, 6, *([3, 3, 3, 4] * 3)]


@pytest.mark.filterwarnings("ignore:batches are done in parts")
def test_gradients_buffers_and_random_state_are_put_back_first():
    seen = []

    class Looks(nn.Module):
        def forward(self, x):
            norm, weight = learn.model[2], learn.model[1].weight
            grad = None if weight.grad is None else weight.grad.tolist()
            seen.append((norm.running_mean.tolist(), torch.get_rng_state().tolist(), grad))
            return x

    middle = [nn.BatchNorm1d(4), nn.Dropout(0.5), Short(N, back=True), nn.Linear(4, 1)]
    model = nn.Sequential(Looks(), nn.Linear(2, 4), *middle)
    learn = learner(ll.MicroBatch(), ll.GradientAccumulation(4 * N), model=model, n_batch=2)
    learn.add_cb(ll.Callback(before_batch=lambda cb: setattr(middle[2], "most", 7 if cb.iter else N)))
    learn.fit(1)
    first, tried, again, last = (
        seen  # the second batch ran out of memory in its backward pass, and is done in two parts
    )
    assert tried == again != first
    assert first[2] is None and again[2] is not None and again[2] != last[2]


def test_batch_norm_in_training_mode_is_warned_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match="batch norm takes statistics from each part"):
        learner(ll.MicroBatch(6), model=model).fit(1)


def test_a_single_sample_that_does_not_fit_ends_the_fit_with_the_error():
    learn = learner(ll.MicroBatch(), model=network(0))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
        learn.fit(1)
    assert any("down to single samples" in note for note in caught.value.__notes__)
    assert all(p.grad is None for p in learn.model.parameters())


def test_other_errors_go_on_their_way():
    def loss_func(pred, y):
        raise RuntimeError("mine")

    cb = ll.MicroBatch()
    with pytest.raises(RuntimeError, match="mine"):
        learner(cb, loss_func=loss_func).fit(1)
    assert cb.size is None


def test_a_cancelled_batch_leaves_the_gradients_of_those_before():
    grads = []

    def cancel(cb):
        if cb.learn.train_iter == 1 and cb.learn.gradient_accumulation.count > N:  # in the second part
            raise ll.CancelBatchException

    def look(cb):
        grads.append([None if p.grad is None else p.grad.clone() for p in cb.learn.model.parameters()])

    learn = learner(ll.MicroBatch(7), ll.GradientAccumulation(100), n_batch=3)
    learn.add_cb(ll.Callback(after_loss=cancel, after_batch=look))
    learn.fit(1)
    assert_same(grads[1], grads[0], atol=0)


# As a callback


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_errors_of_memory_are_known(error, is_it):
    assert is_out_of_memory(error) is is_it


def test_parts_are_of_nearly_one_size():
    assert parts(13, 5) == [(0, 4), (4, 8), (8, 13)]
    assert parts(4, 3) == [(0, 2), (2, 4)]
    assert parts(4, 9) == [(0, 4)]


def test_rows_are_taken_from_what_has_one_per_sample():
    x, weight = torch.arange(4), torch.ones(3)
    taken = rows({"x": x, "weight": weight, "texts": ["a", "b", "c", "d"], "name": "data"}, 4, 1, 3)
    assert taken["x"].tolist() == [1, 2] and taken["texts"] == ["b", "c"]
    assert taken["weight"] is weight and taken["name"] == "data"


def test_parts_are_joined_by_rows_and_numbers_by_their_mean():
    parts = [(torch.ones(2, 3), torch.tensor(1.0), 4.0, None), (torch.zeros(1, 3), torch.tensor(4.0), 1.0, None)]
    x, loss, number, nothing = joined(parts, [2, 1])
    assert x.shape == (3, 3) and loss == 2.0 and number == 3.0 and nothing is None


def test_it_resumes_exactly_with_the_size_it_has_found():
    def make():
        return learner(ll.MicroBatch(), ll.GradientAccumulation(2 * N), model=network(5), n_batch=3)

    assert_resumes_exactly(make, every=11)


def test_it_keeps_every_promise():
    check_callback(lambda: ll.MicroBatch(3), events=("after_loss", "before_backward"))


@pytest.mark.parametrize("size", [0, -1, True, 2.5])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="pass a number of samples"):
        ll.MicroBatch(size)
