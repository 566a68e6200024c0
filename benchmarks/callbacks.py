"""What each callback costs, in µs per training batch: the same loop with it and without, one after the other.

A round runs every pair once, in random order; what is given are medians over the rounds, and the quartiles of the
paired ratios. The network is that of overhead.py, so small that nothing hides a callback. Time is CPU time of the one
thread that computes.
"""

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from functools import partial
from typing import Any

import overhead
import torch
from machine import cpu, versions
from overhead import BS, LR, N_BATCHES, Batches, Comparison, Loop, Row
from torch import nn
from torch.nn import functional as F

import learnloop as ll
from learnloop.integrations.tensorboard import TensorBoardCallback

#: Callbacks that take arguments, or that are worth more than one row. All others of the package are made without.
MAKERS: dict[str, Callable[[], Any]] = {
    "ParamScheduler, one hyper": lambda: ll.ParamScheduler({"lr": ll.SchedCos(LR, LR / 10)}),
    "GradientAccumulation(64), a step per batch": lambda: ll.GradientAccumulation(BS),
    "GradientAccumulation(256), a step per 4 batches": lambda: ll.GradientAccumulation(4 * BS),
    "MixedPrecision('bf16')": lambda: ll.MixedPrecision("bf16"),
    "MixedPrecision('fp16')": lambda: ll.MixedPrecision("fp16", init_scale=1024.0),
    "EMA()": lambda: ll.EMA(),
    "SWA(0, every=1)": lambda: ll.SWA(0, every=1),
    "HookCallback()": lambda: ll.HookCallback(),
    "ActivationStats()": lambda: ll.ActivationStats(),
    "ActivationStats(every=10)": lambda: ll.ActivationStats(every=10),
    "GradientStats()": lambda: ll.GradientStats(),
    "GradientStats(every=10)": lambda: ll.GradientStats(every=10),
    "FreezeUntil(0)": lambda: ll.FreezeUntil(0, groups=slice(None)),
    "BatchTransform(flip)": lambda: ll.BatchTransform(ll.transforms.flip),
    "ProgressiveResize": lambda: ll.ProgressiveResize(multiple=1),
    "SAM()": lambda: ll.SAM(),
    "MicroBatch()": lambda: ll.MicroBatch(),
    "MicroBatch(32), two parts": lambda: ll.MicroBatch(BS // 2),
    "SpikeGuard()": lambda: ll.SpikeGuard(),
    "SpikeGuard(grad_norm=None)": lambda: ll.SpikeGuard(grad_norm=None),
    "WeightedSampling": lambda: ll.WeightedSampling(torch.ones(N_BATCHES * BS)),
    "RNNCallback": lambda: ll.RNNCallback(),
    "RNNRegularizer(2, 1), RNNCallback and ModelResetter": lambda: ll.rnn_cbs(2, 1),
    "JSONLLogger()": lambda: ll.JSONLLogger(),
    "JSONLLogger(every=1), a line per step": lambda: ll.JSONLLogger(every=1),
    "TensorBoardCallback(trace_model=False)": lambda: TensorBoardCallback("runs", trace_model=False),
    "Notify, to a server that is not there": lambda: ll.Notify(retries=0),
}
#: Those that every loop here has, or that are no callback to put on a learner by hand.
LEFT_OUT = {"Callback", "TrainEvalCallback", "Recorder", "LRFinder", "MixHandler", "SkipToEpoch", "ShortEpochCallback"}


class Images(nn.Module):
    """The network on images of 10 pixels: for callbacks that want a height and a width."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = overhead.network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(F.adaptive_avg_pool2d(x, (2, 5)).flatten(1))  # some callbacks make images smaller


def image_batches(n: int = N_BATCHES) -> Batches:
    return Batches((x.view(BS, 1, 2, 5), y) for x, y in overhead.make_batches(n))


class Recurrent(nn.Module):
    """A recurrent network over 5 steps of 2 numbers, which returns what `RNNCallback` splits where that is there."""

    def __init__(self, returns_three: bool):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.RNN(2, 16, batch_first=True), nn.Linear(16, 2)
        self.returns_three = returns_three

    def forward(self, x: torch.Tensor) -> Any:
        out, _ = self.rnn(x)
        pred = self.head(out[:, -1])
        return (pred, out, out) if self.returns_three else pred

    def reset(self) -> None:
        """Nothing is carried from batch to batch."""


def sequence_batches(n: int = N_BATCHES) -> Batches:
    return Batches((x.view(BS, 5, 2), y) for x, y in overhead.make_batches(n))


class Stopwatch(ll.Callback):
    """`seconds` of the last training phase, for callbacks that put another loader in the place of the given one."""

    order = -1000
    seconds = 0.0

    def __len__(self) -> int:
        return N_BATCHES

    def before_train(self) -> None:
        self.start = overhead.clock()

    def after_train(self) -> None:
        self.seconds = overhead.clock() - self.start


OF_IMAGES = {"BatchTransform(flip)", "CutMix", "ProgressiveResize"}
OF_TENSORS = {"WeightedSampling", "SampleLosses"}  # they need a loader that they can ask for its samples
OF_SEQUENCES = {"ModelResetter", "RNNCallback", "RNNRegularizer(2, 1), RNNCallback and ModelResetter"}


def makers() -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name and a function for each row: those above, then every other callback that the package publishes."""
    named = {name.partition("(")[0].partition(",")[0] for name in MAKERS}
    yield from MAKERS.items()
    for name in ll.__all__:
        thing = getattr(ll, name)
        if isinstance(thing, type) and issubclass(thing, ll.Callback) and name not in named | LEFT_OUT:
            yield name, thing


def loop_with(name: str, make: Callable[[], Any] | None, batches: Batches | None = None) -> Loop:
    """A fit of one epoch of plain SGD with one more callback, or none."""
    if name in OF_TENSORS:
        return _loop_of_tensors(name, make)
    make_batches, model = _task_of(name, make)
    batches = make_batches() if batches is None else batches
    learn = overhead.quiet_learner(batches, cbs=None if make is None else make())
    learn.model = model
    return Loop(name, partial(learn.fit, 1), batches)


def _task_of(name: str, make: Callable[[], Any] | None) -> tuple[Callable[..., Batches], nn.Module]:
    """What makes the batches, and a network, for a callback of that name."""
    if name in OF_IMAGES:
        return image_batches, Images()
    if name in OF_SEQUENCES:
        return sequence_batches, Recurrent(returns_three=make is not None and name != "ModelResetter")
    return overhead.make_batches, overhead.network()


def _kind(name: str) -> str:
    """The callback whose loop is compared to the same bare loop."""
    kinds = {"CutMix": OF_IMAGES, "WeightedSampling": OF_TENSORS, "ModelResetter": OF_SEQUENCES}
    return next((kind for kind, names in kinds.items() if name in names), "")


def _loop_of_tensors(name: str, make: Callable[[], Any] | None) -> Loop:
    x, y = map(torch.cat, zip(*overhead.make_batches(), strict=True))
    watch = Stopwatch()
    learn = overhead.quiet_learner(overhead.make_batches(1), cbs=[watch, *([] if make is None else [make()])])
    learn.dls = ll.DataLoaders(ll.TensorLoader(x, y, bs=BS, shuffle=True), learn.dls.valid, device="cpu")
    return Loop(name, partial(learn.fit, 1), watch)  # type: ignore[arg-type]


def by_hand(batches: Batches, mode: str) -> Loop:
    """The hand-written loop under autocast: what of mixed precision is torch's own."""
    model = overhead.network()
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=mode == "fp16")
    dtype = torch.float16 if mode == "fp16" else torch.bfloat16

    def run() -> None:
        for x, y in batches:
            with torch.autocast("cpu", dtype=dtype):
                loss = overhead.loss_func(model(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

    return Loop(f"by hand, without learnloop: autocast in {mode}", run, batches)


def comparisons(only: str = "") -> tuple[list[Comparison], dict[str, str]]:
    """Every callback with the loop without it; and those that cannot run here, with the reason."""
    bare = {kind: loop_with(kind, None) for kind in ("", "CutMix", "WeightedSampling", "ModelResetter")}
    again = loop_with("nothing", None)._replace(name="the same loop again")
    found, refused = [Comparison("train", again, bare[""])], {}
    data = overhead.make_batches()
    hand = overhead.hand_written(data)
    found += [Comparison("train", by_hand(data, mode), hand) for mode in ("bf16", "fp16")]
    for name, make in makers():
        if only not in name:
            continue
        try:
            with_it = loop_with(name, make)
            with_it.run()
        except Exception as error:  # it needs something that is not here
            refused[name] = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        found.append(Comparison("train", with_it, bare[_kind(name)]))
    return found, refused


def host_reads(name: str) -> float:
    """Tensors that a callback brings to the host, per batch."""
    make = dict(makers()).get(name)
    if name == "WeightedSampling":
        return 0.0  # nothing of it runs in a batch
    if name.startswith("by hand"):
        return overhead.host_reads(partial(by_hand, mode=name[-4:]))
    made, _ = _task_of(name, make)
    counts = []
    for n in (30, 10):
        with overhead.HostReads() as reads:
            loop_with(name, make, made(n)).run()
        counts.append(reads.count)
    return (counts[0] - counts[1]) / 20


def report(rounds: int, only: str = "") -> dict[str, Any]:
    """Everything that is measured, as plain data."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), quiet():
        todo, refused = comparisons(only)
        rows = overhead.measure(todo, rounds)
        reads = {row.name: host_reads(row.name) for row in rows}
    return {
        "date": date.today().isoformat(),
        "cpu": cpu(),
        "versions": versions(),
        "rounds": rounds,
        "rows": [{**asdict(row), "host_reads": reads[row.name]} for row in rows],
        "not measured": refused,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is shown while callbacks run: some print, some warn."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def as_markdown(found: dict[str, Any]) -> str:
    """The report as one table."""
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = ["# What callbacks cost", "", f"{found['date']}; {found['cpu']}; {names}; {found['rounds']} rounds.", ""]
    lines += ["| with | µs over | ratio | quartiles | brought to the host |", "|---|---:|---:|---:|---:|"]
    for row in found["rows"]:
        reads = row.pop("host_reads")
        numbers = Row(**row)
        row["host_reads"] = reads
        quartiles = f"{numbers.quartiles[0]:.2f} to {numbers.quartiles[1]:.2f}"
        lines.append(f"| {numbers.name} | {numbers.over:.1f} | {numbers.ratio:.3f} | {quartiles} | {reads:g} |")
    if found["not measured"]:
        lines += ["", "Not measured: " + "; ".join(f"{n} ({why})" for n, why in found["not measured"].items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = overhead.option_parser("Measures a training loop with each callback beside one without it.", 200)
    parser.add_argument("--only", default="", metavar="NAME", help="rows whose name has this in it; writes no files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["WEBHOOK_URL"] = "http://127.0.0.1:9"  # where nobody listens
    found = report(options.rounds or (20 if options.quick else 200), options.only)
    overhead.publish("callbacks", found, as_markdown(found), options, to_files=not options.only)


if __name__ == "__main__":
    main()
