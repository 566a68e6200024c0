"""The finder: what its losses suggest, its pass, and that nothing of it stays.

Numbers marked as fastai's come from fastai 2.8.12, run on the same numbers and data; it computes in float32.
"""

import gc
import math
import pickle
import random
import signal
import weakref
from functools import partial

import matplotlib
import numpy as np
import pytest
import torch
from fastcore.foundation import L
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import learnloop as ll
from learnloop import SuggestionMethod, minimum, slide, steep, valley
from learnloop.testing import EventLog, toy_learner
from tests.toys import Once, raise_at

matplotlib.use("Agg")

import matplotlib.pyplot as plt

BATCH = [
    *("before_batch", "after_pred", "after_loss", "before_backward", "after_backward", "cleanup_backward"),
    *("before_step", "after_step", "cleanup_step", "after_batch", "cleanup_batch"),
]
BEFORE = ["before_fit", "before_epoch", "before_train"]
END = ["cleanup_train", "cleanup_epoch", "after_cancel_fit", "after_fit", "cleanup_fit"]


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


# What losses suggest


def pass_of(kind, seed):
    """85 rates from 1e-7 on, and losses: noise, a random walk, or the curve of a training with a little noise."""
    noise = np.random.RandomState(seed)
    lrs = 1e-7 * 1e8 ** (np.arange(85) / 85)
    if kind == "noise":
        return lrs, noise.rand(85) + 0.1
    if kind == "walk":
        return lrs, 5 + np.cumsum(noise.randn(85)) * 0.1
    dip = 2 - 1.5 / (1 + np.exp(-2 * (np.log10(lrs) + 3)))
    return lrs, dip + 0.4 * lrs**2 + noise.randn(85) * 0.02


# fastai's: (lr, (lr, loss)) of valley, slide, minimum, steep
SUGGESTED = {
    ("noise", 0): [
        (0.131113395095, (0.131113395095, 0.46872517)),
        (1e-07, (1e-07, 0.64881434)),
        (1.5848932e-05, (0.000158489318, 0.1187898)),
        (0.007836419158, (0.007836419158, 1.08837378)),
    ],
    ("noise", 1): [
        (0.023158257827, (0.023158257827, 0.24672857)),
        (1e-07, (1e-07, 0.51702357)),
        (1.5425e-08, (1.54254e-07, 0.10011438)),
        (1.673129e-06, (1.673129e-06, 0.97811747)),
    ],
    ("noise", 2): [
        (0.311973452568, (0.311973452568, 0.54135489)),
        (1.673129e-06, (1.673129e-06, 0.61357787)),
        (0.176627707481, (1.766277074814, 0.11301734)),
        (4.944446e-06, (4.944446e-06, 0.94656146)),
    ],
    ("walk", 0): [
        (0.251188635826, (0.251188635826, 4.87295246)),
        (0.001719072228, (0.001719072228, 5.93299052)),
        (0.648283100128, (6.482831001282, 4.6221714)),
        (6.140946e-06, (6.140946e-06, 6.13866901)),
    ],
    ("walk", 1): [
        (3.4767741e-05, (3.4767741e-05, 4.79393673)),
        (0.035722445697, (0.035722445697, 5.04988615)),
        (2.4447546e-05, (0.000244475465, 4.37798166)),
        (2.37942e-07, (2.37942e-07, 5.02768564)),
    ],
    ("walk", 2): [
        (0.131113395095, (0.131113395095, 4.08657503)),
        (1e-07, (1e-07, 4.9583244)),
        (0.420270967484, (4.202709674835, 3.60122013)),
        (1.145047545433, (1.145047545433, 4.03681374)),
    ],
    ("dip", 0): [
        (0.00089730724, (0.00089730724, 1.25114298)),
        (0.000303635781, (0.000303635781, 1.63095917)),
        (0.016284134984, (0.16284134984, 0.49577755)),
        (0.001114445506, (0.001114445506, 1.25374794)),
    ],
    ("dip", 1): [
        (0.001719072228, (0.001719072228, 1.06397676)),
        (0.015013107099, (0.015013107099, 0.642071)),
        (0.031197345257, (0.311973452568, 0.52115834)),
        (0.001114445506, (0.001114445506, 1.24858153)),
    ],
    ("dip", 2): [
        (0.001719072228, (0.001719072228, 1.07000315)),
        (0.0013841287, (0.0013841287, 1.17416962)),
        (0.010556729883, (0.10556729883, 0.48941174)),
        (0.000722476165, (0.000722476165, 1.37060487)),
    ],
}


@pytest.mark.parametrize(("kind", "seed"), SUGGESTED)
@pytest.mark.parametrize("kept_as", [list, torch.tensor, lambda values: [torch.tensor(v) for v in values]])
def test_suggestions_are_those_of_fastai(kind, seed, kept_as):
    lrs, losses = (kept_as(values) for values in pass_of(kind, seed))
    for rule, (fastai, (rate, loss)) in zip((valley, slide, minimum, steep), SUGGESTED[kind, seed], strict=True):
        suggested, point = rule(lrs, losses, 100)
        assert suggested == pytest.approx(fastai, rel=1e-5, abs=1e-12)
        assert point == (pytest.approx(rate, rel=1e-5, abs=1e-12), pytest.approx(loss, rel=1e-5))


def longest_fall_the_slow_way(losses):
    """Length of the longest falling sequence, and the first index with which one of that length ends."""
    lengths = []
    for i, loss in enumerate(losses):
        lengths.append(1 + max((lengths[j] for j in range(i) if losses[j] > loss), default=0))
    return max(lengths), lengths.index(max(lengths))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_the_valley_is_the_longest_sequence_of_falling_losses(losses):
    n, end = longest_fall_the_slow_way(losses)
    third = n / 3
    index = max(0, end - n + int(third) + int(third / 2)) if end else 0
    assert valley(range(len(losses)), losses, 100)[0] == index


def test_where_no_loss_falls_the_valley_is_the_lowest_rate():
    assert valley([0.1, 0.2, 0.3, 0.4], [1, 2, 3, 4], 100)[0] == 0.1
    assert valley([0.1, 0.2, 0.3, 0.4], [2, 1, 3, 4], 100)[0] == 0.1  # fastai's counts from the end here: 0.4


def test_the_rules_have_the_options_of_fastai():
    lrs, losses = pass_of("dip", 1)
    assert slide(lrs, losses, 100, adjust_value=0.5)[0] == pytest.approx(0.015013107099 / 2, rel=1e-5)
    assert slide(lrs, losses, 100, thresh=1e9)[0] == pytest.approx(lrs[-16])
    assert slide(lrs, losses, 100, lr_diff=20, thresh=1e9)[0] == pytest.approx(lrs[-21])
    assert slide(lrs, losses, 100, thresh=0)[0] == pytest.approx(lrs[0])


@pytest.mark.parametrize(("rule", "least"), [(valley, 1), (slide, 16), (minimum, 1), (steep, 2)])
def test_too_few_losses_are_refused_with_how_many_it_takes(rule, least):
    lrs, losses = pass_of("dip", 0)
    rule(lrs[:least], losses[:least], 100)
    with pytest.raises(ValueError, match=f"`{rule.__name__}` needs {least} losses or more, and got {least - 1}; take"):
        rule(lrs[: least - 1], losses[: least - 1], 100)


def test_rates_and_losses_go_together():
    with pytest.raises(ValueError, match="`valley` got 3 rates and 2 losses"):
        valley([1, 2, 3], [1, 2], 100)


# The pass


def grid(rows, cols):
    return torch.sin((torch.arange(rows * cols, dtype=torch.float32) * 0.7 + 0.3) * 1.9).reshape(rows, cols)


def linear_learner(loader=DataLoader, **kwargs):
    """Six batches of a regression, the same numbers on every machine."""
    x = grid(24, 2)
    dl = loader(TensorDataset(x, x @ torch.tensor([[1.5], [-0.5]]) + 0.25), batch_size=4)
    model = nn.Linear(2, 1)
    model.load_state_dict({"weight": torch.tensor([[0.4, -0.2]]), "bias": torch.zeros(1)})
    options = {"opt_func": ll.SGD, "lr": 0.1, "default_cbs": False, "cbs": [ll.TrainEvalCallback(), ll.Recorder()]}
    return ll.Learner(ll.DataLoaders(dl, dl, device="cpu"), model, nn.MSELoss(), **{**options, **kwargs})


def find(learn, **kwargs):
    return learn.lr_find(**{"show_plot": False, **kwargs})


ALL = (SuggestionMethod.Valley, SuggestionMethod.Minimum, SuggestionMethod.Steep, SuggestionMethod.Slide)


# fastai's: arguments, suggestions, batches, the first and the last smoothed losses, the last rate
@pytest.mark.parametrize(
    ("arguments", "suggestions", "n", "first", "last", "last_rate"),
    [
        (
            {"num_it": 40},
            (0.015848932787776, 0.06309573650360, 6.309573450380e-07, 3.981071859016e-05),
            40,
            [0.54727381467819, 0.5510944724082947, 0.6271247863769531],
            [0.476658433675766, 0.4709000289440155, 0.9643133282661438],
            6.309573444801929,
        ),
        (
            {"start_lr": 1e-4, "end_lr": 100, "num_it": 50},
            (0.07585775852203369, 0.15848932266235, 0.3019951581954956, 0.00275422865524888),
            41,  # four times its best
            [0.5472738146781921, 0.5510588884353638, 0.6270089149475098],
            [0.3467319905757904, 0.42817291617393494, 6.494226932525635],
            6.309573444801937,
        ),
    ],
)
def test_the_pass_is_that_of_fastai(arguments, suggestions, n, first, last, last_rate):
    learn = linear_learner()
    assert find(learn, suggest_funcs=ALL, **arguments) == pytest.approx(suggestions, rel=1e-5)
    losses = [float(loss) for loss in learn.recorder.losses]
    assert (len(losses), len(learn.recorder.lrs)) == (n, n)
    assert losses[:3] == pytest.approx(first, rel=1e-5)
    assert losses[-3:] == pytest.approx(last, rel=1e-4)  # where it diverges, roundings of the machine grow
    assert learn.recorder.lrs[-1] == pytest.approx(last_rate)


def test_it_returns_a_named_tuple_of_the_suggested_rates():
    found = find(linear_learner(), suggest_funcs=(SuggestionMethod.Steep, SuggestionMethod.Valley))
    assert found._fields == ("steep", "valley")
    assert found == (found.steep, found.valley)
    assert type(found).__name__ == "SuggestedLRs"


def test_without_anything_asked_it_suggests_the_valley_only():
    assert find(linear_learner())._fields == ("valley",)


def test_without_suggestions_it_returns_none():
    assert find(linear_learner(), suggest_funcs=None) is None


def test_a_rule_is_a_function_a_partial_or_the_name_of_one_of_the_four():
    def first(lrs, losses, num_it):
        assert isinstance(lrs, torch.Tensor) and isinstance(losses, torch.Tensor)
        return float(lrs[0]), (float(lrs[0]), float(losses[0]))

    found = find(
        linear_learner(), num_it=40, suggest_funcs=[first, partial(slide, adjust_value=2.0), "valley", "Steep"]
    )
    assert found._fields == ("first", "slide", "valley", "steep")
    assert found[:2] == pytest.approx((1e-7 * 1e8 ** (4 / 40), 2 * 3.981071859016e-05))  # a tenth is left out


@pytest.mark.parametrize("unknown", ["vally", 3, ["valley", None]])
def test_an_unknown_suggestion_is_refused_before_the_pass_with_the_four(unknown):
    learn = linear_learner(cbs=raise_at("before_fit", AssertionError()))
    with pytest.raises(ValueError, match=r"is no suggestion; there are SuggestionMethod\.Valley, Slide, Minimum and"):
        find(learn, suggest_funcs=[unknown] if unknown == 3 else unknown)


def test_a_misspelt_suggestion_method_lists_the_four():
    assert SuggestionMethod.Valley is valley
    with pytest.raises(AttributeError, match=r"`Vally` is no suggestion; there are SuggestionMethod\.Valley, Slide"):
        _ = SuggestionMethod.Vally


@pytest.mark.parametrize("rules", [[slide, partial(slide, lr_diff=10)], [lambda lrs, losses, num_it: None]])
def test_rules_need_names_of_their_own(rules):
    with pytest.raises(ValueError, match="`suggest_funcs` needs functions with names of their own, and one is `"):
        find(linear_learner(), suggest_funcs=rules)


def test_it_is_one_epoch_of_training_without_validation():
    log = EventLog()
    learn = toy_learner(n_train=16, cbs=log)
    log.events.clear()
    find(learn, num_it=6)
    log.check([*BEFORE, *BATCH * 6, *END])


def test_the_loader_is_begun_again_as_often_as_it_takes():
    seen = []
    learn = toy_learner(n_train=16, cbs=ll.Callback(before_batch=lambda cb: seen.append(cb.x.sum().item())))
    find(learn, num_it=12)
    assert len(seen) == 12
    assert [seen[i] + seen[i + 1] for i in range(0, 12, 2)] == pytest.approx([seen[0] + seen[1]] * 6)  # whole passes


def test_the_task_is_lr_find_and_the_callback_is_there_before_anyones_before_fit():
    seen = []

    class Early(ll.Callback):
        order = -1000

        def before_fit(self):
            seen.append((self.learn.task, hasattr(self, "lr_finder"), self.lr_finder.num_it))

    learn = toy_learner(cbs=Early())
    find(learn, num_it=8)
    assert seen == [("lr_find", True, 8)]
    assert learn.task is None
    assert not hasattr(learn, "lr_finder")
    assert [type(cb).__name__ for cb in learn.cbs] == ["TrainEvalCallback", "Recorder", "Early"]


def test_the_rates_grow_by_equal_factors_from_start_to_just_below_the_end():
    learn = toy_learner()
    find(learn, start_lr=1e-4, end_lr=1e-2, num_it=20)
    assert learn.recorder.lrs == pytest.approx([1e-4 * 100 ** (i / 20) for i in range(20)])
    assert learn.recorder.hps == {"lr": learn.recorder.lrs}


@pytest.mark.parametrize("num_it", [1, 3, 6])
def test_it_makes_at_least_six_batches(num_it):
    learn = toy_learner(n_train=16)
    find(learn, start_lr=1e-6, end_lr=1.0, num_it=num_it)
    assert learn.recorder.lrs == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])


def test_without_stop_div_a_diverging_pass_goes_to_its_end():
    learn = linear_learner()
    find(learn, start_lr=1e-4, end_lr=100, num_it=50, stop_div=False)
    assert len(learn.recorder.losses) == 50


def test_a_negative_loss_is_no_divergence():
    learn = toy_learner(loss_func=lambda pred, y: nn.functional.mse_loss(pred, y) - 100)
    find(learn, num_it=20, end_lr=1e-3)
    assert len(learn.recorder.losses) == 20


def test_a_loader_without_length_will_do():
    class Stream:
        def __iter__(self):
            return iter([(torch.ones(4, 2), torch.ones(4, 1))] * 5)

    learn = linear_learner(lambda *args, **kwargs: Stream())
    find(learn, num_it=12)
    assert len(learn.recorder.losses) == 12


def two_groups(model):
    return [[model[0].weight, model[0].bias], [model[2].weight, model[2].bias]]


def test_a_list_of_rates_has_one_per_group():
    rates = []
    note = ll.Callback(before_step=lambda cb: rates.append([h["lr"] for h in cb.opt.hypers]))
    learn = toy_learner(splitter=two_groups, cbs=note)
    found = find(learn, start_lr=[1e-6, 1e-4], end_lr=[1e-4, 1e-2], num_it=10)
    assert rates[0] == pytest.approx([1e-6, 1e-4])
    assert rates[5] == pytest.approx([1e-5, 1e-3])
    assert learn.recorder.lrs == [of_groups[1] for of_groups in rates]  # and so the suggestion is for the last group
    assert 1e-4 <= found.valley < 1e-2


def test_one_list_and_one_number_go_together():
    learn = toy_learner(splitter=two_groups)
    find(learn, start_lr=1e-6, end_lr=[1e-3, 1e-2], num_it=8)
    assert learn.recorder.lrs[4] == pytest.approx(1e-4)


def test_a_list_of_another_length_than_the_groups_is_refused():
    learn = toy_learner(splitter=two_groups)
    with pytest.raises(ValueError, match="`lr` got 3 values, but there are 2 parameter groups"):
        find(learn, start_lr=[1e-6] * 3, end_lr=[1e-3] * 3)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 10),
        (-1e-7, 10),
        (10, 1e-7),
        (1e-7, math.inf),
        (math.nan, 1),
        ([1e-7, 1], [1, 1]),
        ("low", 10),
        (slice(1), 10),
    ],
)
def test_rates_that_do_not_grow_are_refused(start, end):
    with pytest.raises(ValueError, match=r"`start_lr=.*`end_lr=.*: the rate grows from one to the other\. Pass two"):
        find(toy_learner(), start_lr=start, end_lr=end)


@pytest.mark.parametrize("num_it", [10.5, "many", None, True])
def test_what_is_no_number_of_batches_is_refused(num_it):
    with pytest.raises(TypeError, match=f"`num_it={num_it!r}`: pass a whole number of batches"):
        find(toy_learner(), num_it=num_it)


@pytest.mark.parametrize("event", ["before_fit", "after_batch", "after_validate", "cleanup_fit"])
def test_inside_a_fit_it_raises(event):
    learn = toy_learner(cbs=Once(event, lambda cb: cb.learn.lr_find()))
    with pytest.raises(RuntimeError, match="`lr_find` was called while a run is active"):
        learn.fit(1)


def test_inside_with_learn_it_raises():
    learn = toy_learner()
    with pytest.raises(RuntimeError, match="`lr_find` was called while a run is active"), learn:
        find(learn)


def test_inside_a_pass_of_the_finder_a_fit_raises():
    learn = toy_learner(cbs=Once("after_batch", lambda cb: cb.learn.fit(1)))
    with pytest.raises(RuntimeError, match="`fit` was called while a run is active"):
        find(learn)


def test_without_a_recorder_it_says_what_to_add():
    with pytest.raises(RuntimeError, match=r"`lr_find` reads the losses from the Recorder: `learn.add_cb\(Recorder"):
        find(toy_learner(default_cbs=False))


def test_it_shows_no_row_and_no_bar_over_epochs(capsys):
    learn = linear_learner(cbs=[ll.TrainEvalCallback(), ll.Recorder(), ll.ProgressCallback()])
    find(learn)
    assert capsys.readouterr().out == ""
    assert learn.logger is print and learn.create_mbar


def test_a_validation_started_by_a_callback_in_it_runs():
    losses = []
    learn = toy_learner(cbs=Once("after_batch", lambda cb: losses.append(cb.learn.validate()[0])))
    find(learn, num_it=6)
    assert len(losses) == 1
    assert len(learn.recorder.losses) == 6


# A loss that is not a number


def nan_from(batch):
    """A loss that is not a number from a batch on."""

    def act(cb):
        if cb.training and cb.train_iter >= batch:
            cb.learn.loss_grad = cb.learn.loss_grad * math.nan
            cb.learn.loss = cb.learn.loss * math.nan

    return ll.Callback(after_loss=act)


def test_the_pass_ends_where_the_loss_is_not_a_number():
    learn = linear_learner()
    learn.add_cb(nan_from(25))
    found = find(learn, num_it=40, suggest_funcs=(minimum, steep))
    assert len(learn.recorder.losses) == 26
    assert all(math.isfinite(rate) for rate in found)


def test_what_comes_before_it_is_suggested_from_up_to_the_batch_before():
    used = []

    def length(lrs, losses, num_it):
        used.append(len(losses))
        return 1.0, (1.0, 1.0)

    for batch in (25, 37):
        learn = linear_learner()
        learn.add_cb(nan_from(batch))
        find(learn, num_it=40, suggest_funcs=length)
    assert used == [25 - 4, 35 - 4]  # without the first tenth, and never with the last five of a whole pass


def test_where_nothing_is_left_to_suggest_from_it_says_why_and_shows_the_picture():
    learn = linear_learner()
    learn.add_cb(nan_from(0))
    with pytest.raises(ValueError, match=r"`lr_find` has no loss left .* made 1 batches, the loss of number 0 was nan"):
        learn.lr_find()
    assert len(plt.get_fignums()) == 1


# Nothing stays


class Net(nn.Module):
    """Layers with weights, buffers, random numbers and a buffer that is in no state dict."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.layers(x)


class Drawing(ll.Callback):
    """Counts batches, and draws from every random generator."""

    _stateattrs = ("count",)

    def __init__(self):
        self.count = 0

    def before_batch(self):
        self.count += 1
        random.random(), np.random.rand(), torch.rand(1)


def mae(pred, y):
    return (pred - y).abs().mean()


def torch_loaders():
    x = grid(24, 2)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return ll.DataLoaders(DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=5), device="cpu")


class Foreign:
    """A loader that draws from the global generators as it likes."""

    def __len__(self):
        return 4

    def __iter__(self):
        for _ in range(4):
            x = torch.randn(6, 2)
            yield x, x.sum(1, keepdim=True)


LEARNERS = {
    "adam": {},
    "sgd with momentum": {"opt_func": partial(ll.SGD, mom=0.9)},
    "an optimizer of torch": {"opt_func": partial(torch.optim.AdamW, lr=0.01)},
    "a loader of torch": {"dls": torch_loaders},
    "a foreign loader": {"dls": lambda: ll.DataLoaders(Foreign(), Foreign(), device="cpu")},
}


def full_learner(cbs=None, **kwargs):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    options = {k: v for k, v in kwargs.items() if k != "dls"}
    recorder = ll.Recorder(train_metrics=True)
    learn = toy_learner(
        model=Net(),
        default_cbs=False,
        cbs=[ll.TrainEvalCallback(), recorder, Drawing(), *L(cbs)],
        metrics=mae,
        **{"opt_func": ll.Adam, "lr": 0.01, **options},
    )
    if "dls" in kwargs:
        learn.dls = kwargs["dls"]()
    learn.splitter = lambda m: [list(m.layers[0].parameters()), list(m.layers[1:].parameters())]
    return learn


def everything(learn):
    """All that a learner is: its state, and what else it shows."""
    recorder = learn.recorder
    shown = (recorder.values, recorder.iters, recorder.log, recorder.history, recorder.metric_names)
    names = "lr train_iter opt_iter pct_train n_epoch n_step epoch iter n_iter training dl xb yb pred final_record"
    numbers = {n: getattr(learn, n, "absent") for n in names.split()}
    metrics = [m.value for m in learn.metrics]
    numbers["dl"] = next((i for i, dl in enumerate(learn.dls) if dl is numbers["dl"]), numbers["dl"])
    order = {p: i for i, p in enumerate(learn.model.parameters())}
    groups = [learn.opt.frozen_idx, [order[p] for group in learn.opt.param_lists for p in group]]
    return [learn.state_dict(), *shown, numbers, metrics, list(learn.cbs), learn.model.calls.clone(), groups]


def same(a, b):
    return pickle.dumps(plain_of(a)) == pickle.dumps(plain_of(b))


def plain_of(value):
    """Tensors as lists, so that equal numbers are equal bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {k: plain_of(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, L)):
        return [plain_of(v) for v in value]
    return repr(value)


def differing(before, after):
    return [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not same(a, b)]


@pytest.mark.parametrize("name", LEARNERS)
def test_everything_is_as_it_was(name):
    learn = full_learner(**LEARNERS[name])
    learn.fit(1)
    learn.model.layers[0].training = True
    before = everything(learn)
    find(learn, num_it=30)
    assert differing(before, everything(learn)) == []


@pytest.mark.parametrize("name", LEARNERS)
def test_a_training_goes_on_bit_for_bit_as_without_it(name):
    def trained(*finders):
        learn = full_learner(**LEARNERS[name])
        for finder in finders:
            finder(learn)
            learn.fit(1)
        return everything(learn)

    nothing = lambda learn: None  # noqa: E731
    without = trained(nothing, nothing)
    assert differing(without, trained(find, partial(find, num_it=150, stop_div=False))) == []


def test_two_passes_in_a_row_are_the_same():
    learn = full_learner()
    passes = []
    for _ in range(2):
        passes.append((find(learn), [float(loss) for loss in learn.recorder.losses]))
    assert passes[0] == passes[1]


def disturbed(learn, error, event):
    cb = raise_at(event, error)
    learn.add_cb(cb)
    try:
        find(learn, num_it=12)
    finally:
        learn.remove_cb(cb)


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt("mine")], ids=["error", "interrupt"])
@pytest.mark.parametrize("event", [*BEFORE, *BATCH, *END])
def test_whatever_ends_it_everything_is_as_it_was(event, error):
    learn = full_learner()
    learn.fit(1)
    before = everything(learn)
    with pytest.raises(type(error), match="mine"):
        disturbed(learn, error, event)
    assert differing(before, everything(learn)) == []
    assert learn.task is None and not hasattr(learn, "lr_finder")


def press(times=1):
    def action(cb):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    return action


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("event", [*BEFORE, *BATCH, *END])
def test_ctrl_c_ends_it_at_once_and_everything_is_as_it_was(event, times):
    learn = full_learner()
    learn.fit(1)
    before, pressed = everything(learn), Once(event, press(times))
    with pytest.raises(KeyboardInterrupt) as caught:
        find_with(learn, pressed)
    assert type(caught.value) is KeyboardInterrupt
    assert differing(before, everything(learn)) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def find_with(learn, cb):
    learn.add_cb(cb)
    try:
        find(learn, num_it=12)
    finally:
        learn.remove_cb(cb)


def test_ctrl_c_while_everything_is_put_back_waits_until_it_is():
    class Pressing(ll.Callback):
        _stateattrs = ("number",)
        number = 0
        done = False

        def before_fit(self):
            object.__setattr__(self, "number", 1)

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.done = True
            signal.raise_signal(signal.SIGINT)

    pressing = Pressing()
    object.__setattr__(pressing, "number", 7)
    learn = full_learner(cbs=pressing)
    learn.fit(1)
    object.__setattr__(pressing, "number", 7)
    before = everything(learn)
    with pytest.raises(KeyboardInterrupt):
        find(learn, num_it=12)
    assert pressing.done
    assert differing(before, everything(learn)) == []


def test_a_loss_that_is_not_a_number_leaves_everything_as_it_was():
    learn = full_learner(cbs=nan_from(20))
    learn.fit(1)
    before = everything(learn)
    find(learn)
    assert math.isnan(learn.recorder.losses[-1])
    assert differing(before, everything(learn)) == []


def test_a_learner_that_was_never_fitted_gets_an_optimizer_and_nothing_else():
    learn = full_learner()
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    find(learn)
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())
    assert not hasattr(learn, "dl")
    assert (learn.train_iter, learn.opt_iter, learn.pct_train, learn.epoch) == (0, 0, 0.0, 0)
    assert [h["lr"] for h in learn.opt.hypers] == [0.01, 0.01]
    assert not any(learn.opt.state[p].keys() - {"do_wd", "force_train"} for p in learn.model.parameters())
    learn.load_state_dict(learn.state_dict())
    with pytest.raises(RuntimeError, match="there is nothing to resume"):
        learn.resume()


def test_frozen_groups_and_gradients_are_as_they_were():
    learn = full_learner()
    learn.freeze()
    learn.model.layers[4].bias.grad = torch.ones(1)
    frozen = [p.requires_grad for p in learn.model.parameters()]
    find(learn)
    assert [p.requires_grad for p in learn.model.parameters()] == frozen
    assert learn.opt.frozen_idx == 1
    assert learn.model.layers[4].bias.grad.tolist() == [1.0]
    assert learn.model.layers[0].weight.grad is None


def test_a_fit_that_was_stopped_can_be_resumed_after_it():
    def stopped():
        learn = full_learner(cbs=Once("after_step", press()))
        with pytest.raises(KeyboardInterrupt):
            learn.fit(3)
        return learn

    plain_resume, with_finder = stopped(), stopped()
    find(with_finder)
    assert with_finder.interrupted
    for learn in (plain_resume, with_finder):
        learn.resume()
    assert differing(everything(plain_resume), everything(with_finder)) == []


def test_callbacks_that_leave_or_join_during_it_are_put_back():
    late = Drawing()

    def act(cb):
        cb.learn.remove_cb(Drawing)
        cb.learn.add_cb(ll.Callback())

    learn = full_learner(cbs=[Once("before_train", act), late])
    cbs = list(learn.cbs)
    find(learn)
    assert all(a is b for a, b in zip(learn.cbs, cbs, strict=True))
    assert late.learn is learn and learn.drawing is late


def test_it_keeps_nothing_alive():
    seen = []

    def note(cb):
        seen.append(weakref.ref(cb.xb[0]))
        seen.append(weakref.ref(cb.pred))
        seen.append(weakref.ref(cb.learn.lr_finder))

    learn = full_learner(cbs=ll.Callback(after_pred=note))
    find(learn, num_it=8)
    gc.collect()
    assert len(seen) == 24
    assert [ref for ref in seen if ref() is not None] == []


# What the recorder shows


def test_until_the_next_fit_the_recorder_shows_the_pass_and_keeps_the_trainings_rows():
    learn = linear_learner(metrics=mae)
    learn.logger = lambda row: None
    learn.fit_one_cycle(2, 0.1)
    r = learn.recorder
    rows = [list(row) for row in r.values], list(r.log), r.iters, r.history, list(r.metric_names), learn.final_record
    training = r.lrs, [float(loss) for loss in r.losses], r.hps

    find(learn, num_it=20)
    assert (len(r.lrs), len(r.losses), len(r.raw_losses), len(r.hps["lr"])) == (20, 20, 20, 20)
    assert list(r.hps) == ["lr"]
    assert float(learn.smooth_loss) == pytest.approx(float(r.losses[-1]))
    now = [list(row) for row in r.values], list(r.log), r.iters, r.history, list(r.metric_names), learn.final_record
    assert now == rows
    learn.validate()
    assert len(r.losses) == 20

    learn.fit(1)
    assert (len(r.lrs), len(r.losses), r.hps) == (6, 6, {})
    assert training[0] != r.lrs


def test_the_state_of_a_learner_after_it_holds_the_trainings_record():
    learn = linear_learner()
    learn.logger = lambda row: None
    learn.fit_one_cycle(1, 0.1)
    lrs, hps = list(learn.recorder.lrs), dict(learn.recorder.hps)
    find(learn)
    learn.load_state_dict(learn.state_dict())
    assert learn.recorder.lrs == lrs
    assert learn.recorder.hps == hps


def test_after_an_interrupted_pass_the_recorder_shows_the_training():
    learn = full_learner()
    learn.fit(1)
    losses = [float(loss) for loss in learn.recorder.losses]
    with pytest.raises(KeyboardInterrupt):
        disturbed(learn, KeyboardInterrupt(), "after_step")
    assert [float(loss) for loss in learn.recorder.losses] == losses


def test_the_learning_curve_stays_that_of_the_training():
    learn = toy_learner(n_train=64)
    learn.fit(2)
    before = learn.recorder.plot_loss(ax=plt.figure().add_subplot()).lines[0].get_ydata()
    find(learn)
    after = learn.recorder.plot_loss(ax=plt.figure().add_subplot()).lines[0].get_ydata()
    assert list(before) == list(after)


# The picture


def test_the_picture_shows_losses_over_rates_with_each_suggestion_marked():
    learn = linear_learner()
    found = learn.lr_find(num_it=40, suggest_funcs=ALL)
    (ax,) = plt.gcf().axes
    curve, *marks = ax.lines
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "Learning Rate", "Loss")
    assert list(curve.get_xdata()) == learn.recorder.lrs[:-5]
    assert list(curve.get_ydata()) == [float(loss) for loss in learn.recorder.losses[:-5]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["valley", "minimum", "steep", "slide"]
    rates = [mark.get_xdata()[0] for mark in marks]
    assert rates == pytest.approx([found.valley, 10 * found.minimum, found.steep, found.slide])
    assert len({mark.get_color() for mark in marks}) == 4


def test_show_plot_false_draws_nothing():
    find(linear_learner())
    assert plt.get_fignums() == []


def test_without_suggestions_the_picture_has_no_legend():
    linear_learner().lr_find(suggest_funcs=None)
    (ax,) = plt.gcf().axes
    assert (len(ax.lines), ax.get_legend()) == (1, None)


def test_plot_lr_find_returns_its_figure_unless_told_not_to():
    learn = linear_learner()
    find(learn, num_it=20)
    fig = learn.recorder.plot_lr_find(skip_end=0, suggestions=[(0.1, 0.5)], nms=["mine"])
    assert fig is plt.gcf()
    assert len(fig.axes[0].lines[0].get_xdata()) == 20
    assert learn.recorder.plot_lr_find(return_fig=False) is None


def test_plot_lr_find_draws_into_axes_that_it_is_given():
    learn = linear_learner()
    find(learn)
    ax = plt.figure().add_subplot()
    assert learn.recorder.plot_lr_find(ax=ax) is ax.figure
    assert len(ax.lines) == 1


def test_a_pass_shorter_than_what_is_skipped_shows_its_first_loss():
    learn = linear_learner()
    learn.add_cb(nan_from(3))
    with pytest.raises(ValueError, match="has no loss left"):
        learn.lr_find()
    assert len(plt.gcf().axes[0].lines[0].get_xdata()) == 1


def test_without_a_pass_there_is_nothing_to_plot():
    with pytest.raises(RuntimeError, match=r"there is no pass of the finder to plot. Run `learn.lr_find\(\)` first"):
        linear_learner().recorder.plot_lr_find()


# In a plain fit, as fastai has it


def test_in_a_fit_it_ends_the_fit_validates_nothing_and_puts_the_weights_back():
    learn = full_learner()
    learn.fit(1)
    before = everything(learn)
    log = EventLog(cleanups=False)
    learn.fit(20, cbs=[ll.LRFinder(num_it=10), log])
    after = everything(learn)
    for part in ("model", "buffers", "modes", "trainable", "grads", "opt"):
        assert same(before[0][part], after[0][part])
    assert len(learn.recorder.lrs) == len(learn.recorder.hps["lr"]) == 10
    assert log.events.count("before_batch") == 10
    assert not hasattr(learn, "lr_finder")


def test_in_a_fit_an_error_puts_the_weights_back_too():
    learn = full_learner()
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        learn.fit(20, cbs=[ll.LRFinder(num_it=10), raise_at("after_step", ZeroDivisionError())])
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())


def test_taken_off_inside_a_batch_it_puts_the_weights_back_after_it_and_the_fit_goes_on():
    finder, seen = ll.LRFinder(num_it=10), []

    def look(cb):
        seen.append(torch.cat([p.detach().flatten() for p in cb.learn.model.parameters()]).tolist())

    take_off = Once("after_loss", lambda cb: cb.learn.remove_cb(finder))
    watch = ll.Callback(before_fit=look, after_step=look, before_batch=look)
    toy_learner(n_valid=0, lr=0.5).fit(1, cbs=[finder, take_off, watch])
    before_fit, _, after_step, second_batch, *_ = seen
    assert after_step != before_fit
    assert second_batch == before_fit


def test_a_fit_that_was_stopped_with_it_goes_on_and_puts_back_the_weights_of_its_beginning():
    def trained(stops):
        learn = toy_learner()
        before = {name: value.clone() for name, value in learn.model.state_dict().items()}
        cbs = [ll.LRFinder(num_it=10), *stops]
        try:
            learn.fit(5, cbs=cbs)
        except KeyboardInterrupt:
            learn.resume()
        assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())
        return learn.recorder.raw_losses

    stop = Once("after_batch", lambda cb: signal.raise_signal(signal.SIGINT))
    assert trained([stop]) == trained([])


@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_beside_another_scheduler_the_finder_sets_the_rate(places):
    cbs = [ll.ParamScheduler({"lr": lambda pos: 5.0}), ll.LRFinder(1e-4, 1e-2, 10, stop_div=False)]
    learn = toy_learner(cbs=[cbs[i] for i in places])
    learn.fit(1)
    assert learn.recorder.lrs == pytest.approx([1e-4 * 100 ** (i / 10) for i in range(len(learn.recorder.lrs))])
