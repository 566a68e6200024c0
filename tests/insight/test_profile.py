"""`learn.profile()` and ProfileCallback: parts that add up, what is brought to the host, and nothing left behind."""

import json
import time

import matplotlib
import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.insight.profile import Profile, trace_events
from learnloop.insight.timing import Interval, Part, Stopwatch
from learnloop.loop.state import capture, same
from learnloop.testing import check_callback, toy_learner

matplotlib.use("Agg")

import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def slept(seconds):
    """Milliseconds that really passed: on a busy machine more than were asked for."""
    start = time.perf_counter()
    time.sleep(seconds)
    return (time.perf_counter() - start) * 1e3


class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.linear, self.seconds, self.slept = nn.Linear(1, 1), seconds, []

    def forward(self, x):
        self.slept.append(slept(self.seconds))
        return self.linear(x)


class SlowLoader:
    def __init__(self, seconds, n=8):
        self.seconds, self.n, self.slept = seconds, n, []

    def __len__(self):
        return self.n

    def __iter__(self):
        for _ in range(self.n):
            self.slept.append(slept(self.seconds))
            yield torch.zeros(4, 1), torch.zeros(4, 1)


def slow_learner(cbs=(), loader=0.004, model=0.008):
    dls = ll.DataLoaders(SlowLoader(loader), [(torch.zeros(4, 1), torch.zeros(4, 1))], device="cpu")
    return ll.Learner(dls, Slow(model), nn.MSELoss(), cbs=cbs)


class Sleeps(ll.Callback):
    def __init__(self):
        self.slept = []

    def after_loss(self):
        self.slept.append(slept(0.006))


def test_every_part_has_the_time_that_it_took():
    learn = slow_learner(Sleeps())
    parts = learn.profile(6, warmup=0).parts
    for title, sleeper in {
        "loader": learn.dls.train,
        "forward": learn.model,
        "Sleeps.after_loss": learn.sleeps,
    }.items():
        passed = sum(sleeper.slept) / 6
        assert 0.99 * passed <= parts[title].ms <= 1.2 * passed + 20  # other programs may come in between
    loop = ["loader", "forward", "loss", "backward", "step", "zero_grad", "loop"]
    assert [title for title in parts if title in loop] == loop
    assert [parts[title].calls for title in ("forward", "backward", "step")] == [1, 1, 1]


def test_the_parts_add_up_to_the_time_that_passed():
    start = time.perf_counter()
    report = slow_learner(Sleeps()).profile(20, warmup=0)
    passed = (time.perf_counter() - start) * 1e3
    assert report.n_batch == 20
    assert report.sum_of_parts == pytest.approx(report.ms, rel=0.05)
    assert 20 * report.sum_of_parts < passed
    assert sum(part.share for part in report.parts.values()) == pytest.approx(1, abs=0.05)


def test_what_runs_inside_a_part_counts_for_itself_only():
    watch = Stopwatch(keep=1)
    outer, inner = Part("train", "loop"), Part("train", "forward")
    watch.enter(outer)
    watch.enter(inner)
    time.sleep(0.02)
    watch.leave()
    watch.leave()
    assert watch.times[inner] > 15e6 > watch.times[outer]
    whole = next(i for i in watch.intervals if i.part == outer)
    assert watch.times[inner] + watch.times[outer] == pytest.approx(whole.end - whole.start, rel=0.01)


class Reads(ll.Callback):
    run_valid = False

    def after_loss(self):
        float(self.loss)


def test_it_counts_what_is_brought_to_the_host_and_says_by_whom():
    report = toy_learner(cbs=[Reads()]).profile(6, warmup=0)
    (found,) = [n for (part, call), n in report.host_reads.items() if part == "Reads.after_loss"]
    assert found == 1
    (call,) = [call for part, call in report.host_reads if part == "Reads.after_loss"]
    assert call.startswith("__float__ in test_profile.py:")
    assert report.parts["Reads.after_loss"].host_reads == 1
    assert report.parts["forward"].host_reads == 0
    assert toy_learner(cbs=[Reads()]).profile(2, host_reads=False).host_reads is None


def test_a_loader_that_is_too_slow_is_named():
    report = slow_learner(loader=0.1, model=0.0).profile(5)
    assert report.waiting > 0.45
    assert any("the model waits for the loader" in line for line in report.lines())
    assert not any("waits for" in line for line in slow_learner(loader=0.0).profile(5).lines())


def test_nothing_of_it_stays():
    learn = toy_learner(cbs=[ll.EMA()], default_cbs=True, metrics=ll.mse)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        learn.lr_find(num_it=8, show_plot=False)
    before, names, cbs = capture(learn), set(vars(learn)), list(learn.cbs)
    history, losses = list(learn.recorder.history), [float(loss) for loss in learn.recorder.losses]
    handlers = {k: list(v) for k, v in learn._train_handlers.items()}
    with learn.no_bar():
        learn.profile(4)
    assert same(capture(learn), before)
    assert set(vars(learn)) == names and list(learn.cbs) == cbs and "zero_grad" not in vars(learn.opt)
    assert {k: list(v) for k, v in learn._train_handlers.items()} == handlers
    assert learn.recorder.history == history
    assert [float(loss) for loss in learn.recorder.losses] == losses


def test_a_learner_without_an_optimizer_has_none_afterwards():
    learn = toy_learner()
    learn.profile(2)
    assert learn.opt is None


def test_an_error_takes_the_stopwatch_off_too():
    def fail(cb):
        raise ArithmeticError

    learn = toy_learner(cbs=ll.Callback(after_loss=fail))
    with pytest.raises(ArithmeticError):
        learn.profile(2)
    assert "one_batch" not in vars(learn) and not torch.overrides._get_current_function_mode_stack()


def test_a_training_is_the_same_with_it_and_without():
    def trained(cbs):
        learn = toy_learner(cbs=cbs)
        learn.fit(2)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

    assert torch.equal(trained([]), trained([ll.ProfileCallback()]))


def test_in_a_fit_it_measures_validation_and_what_acts_in_fits_only_too():
    learn = toy_learner(cbs=[profiler := ll.ProfileCallback(), ll.GradientStats()])
    learn.fit(2)
    report = profiler.report
    assert report.n_batch == learn.train_iter == 8
    assert "GradientStats.before_step" in report.parts
    assert set(report.others) == {"validation", "between the phases"}
    assert learn.profiler is profiler
    left_out = toy_learner(cbs=[ll.GradientStats()]).profile(2)
    assert "left out: GradientStats, which act in a whole fit only" in left_out.notes[0]


def test_callbacks_that_come_and_go_during_the_run_are_measured():
    class Late(ll.Callback):
        def after_pred(self):
            pass

    late = Late()

    def add(cb):
        if cb.learn.iter == 1 and late.learn is None:
            cb.learn.add_cb(late)

    learn = toy_learner(cbs=[profiler := ll.ProfileCallback(), ll.Callback(before_batch=add)])
    learn.fit(1)
    assert profiler.report.parts["Late.after_pred"].calls == 0.75  # three batches of four


def test_it_is_a_callback_like_others():
    check_callback(ll.ProfileCallback, events=["before_fit", "before_batch", "after_loss", "after_batch"])


# How it shows itself


def report():
    return toy_learner(cbs=[Reads()]).profile(4)


def test_it_shows_itself_as_text_and_as_a_table():
    found = report()
    lines = str(found).splitlines()
    assert lines[0].startswith("4 training batches on cpu, ")
    assert lines[2].split() == ["part", "ms/batch", "share", "calls", "to", "the", "host"]
    assert [line.split()[0] for line in lines[3:6]] == ["loader", "forward", "loss"]
    assert "brought to the host, 1 times a batch: __float__ in test_profile.py:" in str(found)
    assert found._repr_html_().startswith("<table><caption>4 training batches on cpu")


def test_the_trace_is_chromes_format(tmp_path):
    path = report().to_chrome(tmp_path / "deep" / "trace.json")
    trace = json.loads(path.read_text())
    whole = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["name"] for e in whole} >= {"loop", "forward", "loss", "backward", "step", "Reads.after_loss"}
    assert all(e["dur"] >= 0 and e["ts"] >= 0 and {"pid", "tid", "cat"} <= set(e) for e in whole)
    forwards = [e for e in whole if e["name"] == "forward"]
    loops = {e["args"]["batch"]: e for e in whole if e["name"] == "loop" and e["cat"] == "train,loop"}
    assert len(forwards) == 4
    for e in forwards:  # a batch lies around its parts
        around = loops[e["args"]["batch"]]
        assert around["ts"] <= e["ts"] and e["ts"] + e["dur"] <= around["ts"] + around["dur"]


def test_times_of_a_device_have_a_thread_of_their_own():
    part = Part("train", "forward")
    events = trace_events([Interval(part, 1000, 5000, 1), Interval(part, 2000, 9000, 1, on_device=True)])
    assert [e["args"] for e in events if e["ph"] == "M"] == [{"name": "host"}, {"name": "device"}]
    assert [(e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [(0, 0, 4), (1, 1, 7)]


def test_the_picture_has_a_bar_per_part_and_a_line_of_time():
    found = report()
    bars, line = found.plot().axes
    assert len(bars.patches) == len(found.parts)
    assert line.collections and [t.get_text() for t in line.get_yticklabels()] == ["host"]


def test_without_a_batch_it_is_empty():
    assert str(Profile("cpu", 0, 0.0, {})).splitlines()[0] == "0 training batches on cpu, 0 ms each"


@pytest.mark.parametrize("kwargs", [{"n": 0}, {"n": 2.5}, {"warmup": -1}])
def test_a_wrong_number_is_refused(kwargs):
    with pytest.raises(ValueError, match="pass a whole number of batches"):
        toy_learner().profile(**kwargs)
