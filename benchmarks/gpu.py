"""On a GPU: images per second beside the hand-written loop, waits of the host for the device, and memory at most.

Two networks, that of `examples/fashion_mnist.py` and ResNet-18 for 32 by 32 pixels, in float32, float16 and bfloat16,
as they are and compiled; batches that are on the device already, the same plain torch SGD. Rounds run every loop
once, next to the hand-written one; given are medians of the paired ratios and their quartiles. fastai stands
beside where it is installed. Where there is no GPU, this says so and measures nothing.
"""

import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from typing import Any, NamedTuple

import overhead
import peers
import torch
from fastcore.basics import noop
from loops import Job
from machine import cpu, versions
from networks import residual_net, resnet18
from torch import nn

import learnloop as ll

BS = 512
N_BATCHES = 40  # in a pass
LR = 0.01
MODES = ("fp32", "fp16", "bf16")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: By name: the network and the shape of its images.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "the network of `examples/fashion_mnist.py`": (residual_net, (1, 28, 28)),
    "ResNet-18 at 32 by 32": (resnet18, (3, 32, 32)),
}


class Setting(NamedTuple):
    """What the loops of one table have in common."""

    network: str
    mode: str
    compiled: bool
    device: str = "cuda"
    bs: int = BS

    def job(self, n_batches: int) -> Job:
        make, shape = NETWORKS[self.network]
        torch.manual_seed(0)
        x = torch.randn(self.bs, *shape, device=self.device)
        y = torch.randint(0, 10, (self.bs,), device=self.device)
        model = make().to(self.device)
        return Job(model, nn.CrossEntropyLoss(), [(x, y) for _ in range(n_batches)], lr=LR)

    def __str__(self) -> str:
        return f"{self.network}, {self.mode}, {'compiled' if self.compiled else 'eager'}"


# The loops


def by_hand(setting: Setting, job: Job) -> Callable[[], Any]:
    model = torch.compile(job.model) if setting.compiled else job.model
    opt = job.optimizer()
    scaler = torch.amp.GradScaler(setting.device, enabled=setting.mode == "fp16")

    def run() -> None:
        for x, y in job.train:
            with autocast(setting):
                loss = job.loss_func(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

    return run


def autocast(setting: Setting) -> Any:
    if setting.mode == "fp32":
        return nullcontext()
    return torch.autocast(setting.device, dtype=DTYPES[setting.mode])


def learnloop(setting: Setting, job: Job) -> Callable[[], Any]:
    """With the default callbacks but the bar, and rows printed nowhere."""
    cbs: list[Any] = [ll.TrainEvalCallback(), ll.Recorder()]
    cbs += [ll.MixedPrecision(setting.mode)] if setting.mode != "fp32" else []
    cbs += [ll.Compile()] if setting.compiled else []
    dls = ll.DataLoaders(job.train, device=setting.device)
    learn = ll.Learner(dls, job.model, job.loss_func, job.opt_func, lr=job.lr, cbs=cbs, default_cbs=False)
    learn.logger = noop
    return partial(learn.fit, 1)


def fastai(setting: Setting, job: Job) -> Callable[[], Any]:
    from fastai.basics import default_device
    from fastai.callback.fp16 import AMPMode, MixedPrecision

    learn = peers.fastai_learner(job)
    default_device(setting.device != "cpu")
    learn.dls.device = torch.device(setting.device)
    if setting.mode != "fp32":
        learn.add_cb(MixedPrecision(amp_mode=AMPMode.FP16 if setting.mode == "fp16" else AMPMode.BF16))
    if setting.compiled:
        job.model.compile()
    return partial(learn.fit, 1)


BY_HAND = "hand-written"


def makers() -> dict[str, Callable[[Setting, Job], Callable[[], Any]]]:
    found = {BY_HAND: by_hand, "hand-written, again": by_hand, "learnloop": learnloop}
    return {**found, "fastai": fastai} if peers.why_not("fastai.callback.fp16") is None else found


# Measuring


@dataclass
class Row:
    """What came out for one loop."""

    setting: str
    name: str
    images: float  # per second
    ratio: float  # of the times
    quartiles: tuple[float, float]
    waits: float  # of the host for the device, per batch
    memory: float  # MB on the device at most


def measure(setting: Setting, rounds: int, n_batches: int = N_BATCHES) -> list[Row]:
    made = {name: make(setting, setting.job(n_batches)) for name, make in makers().items()}
    for run in made.values():
        run(), run()  # the first one compiles, chooses kernels and makes optimizers
    gc.collect()
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in made if name != BY_HAND}
    shuffle = random.Random(0).sample
    for _ in range(rounds):
        for name in shuffle(list(pairs), len(pairs)):
            times = {one: timed(made[one], setting) for one in shuffle([name, BY_HAND], 2)}
            pairs[name].append((times[name], times[BY_HAND]))
    hand = [(seconds, seconds) for found in pairs.values() for _, seconds in found]
    del made, run  # the memory of each loop is measured alone
    return [row_of(setting, name, found, n_batches) for name, found in {BY_HAND: hand, **pairs}.items()]


def timed(run: Callable[[], Any], setting: Setting) -> float:
    synchronize(setting)
    start = time.perf_counter()
    run()
    synchronize(setting)
    return time.perf_counter() - start


def synchronize(setting: Setting) -> None:
    if setting.device != "cpu":
        torch.cuda.synchronize()


def row_of(setting: Setting, name: str, pairs: list[tuple[float, float]], n_batches: int) -> Row:
    ratios = [own / other for own, other in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    images = n_batches * setting.bs / statistics.median(own for own, _ in pairs)
    make = makers()[name]
    return Row(
        setting=str(setting),
        name=name,
        images=images,
        ratio=statistics.median(ratios),
        quartiles=(low, high),
        waits=waits_per_batch(setting, make, n_batches),
        memory=peak_mb(setting, make, n_batches),
    )


def waits_per_batch(setting: Setting, make: Callable[[Setting, Job], Callable[[], Any]], n_batches: int) -> float:
    """What a pass waits more often than one of half the length."""
    half = n_batches // 2
    counts = [waits(setting, make(setting, setting.job(n))) for n in (n_batches, half)]
    return (counts[0] - counts[1]) / (n_batches - half)


def waits(setting: Setting, run: Callable[[], Any]) -> int:
    """How often the host waits for the device in a pass, as far as torch notices."""
    run()  # the first one compiles and makes the optimizer
    if setting.device == "cpu":
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


def peak_mb(setting: Setting, make: Callable[[Setting, Job], Callable[[], Any]], n_batches: int) -> float:
    """What the tensors of a second pass take at most, with all that is there by then."""
    gc.collect()
    run = make(setting, setting.job(n_batches))
    run()
    if setting.device == "cpu":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 1e6


# Showing


def report(settings: list[Setting], rounds: int, n_batches: int) -> dict[str, Any]:
    """Everything that is measured, as plain data."""
    with peers.silent():
        rows = [row for setting in settings for row in measure(setting, rounds, n_batches)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "date": date.today().isoformat(),
        "gpu": device,
        "cpu": cpu(torch.get_num_threads()),
        "versions": versions("fastai"),
        "rounds": rounds,
        "batches": n_batches,
        "rows": [asdict(row) for row in rows],
    }


def as_markdown(found: dict[str, Any]) -> str:
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    machine = f"{found['gpu']}; {found['cpu']}"
    lines = ["# What the loop costs on a GPU", "", f"{found['date']}; {machine}; {names}; {found['rounds']} rounds."]
    lines += ["", f"{found['batches']} batches of {BS} images in a pass."]
    rows = [Row(**row) for row in found["rows"]]
    for setting in dict.fromkeys(row.setting for row in rows):
        lines += ["", f"| {setting} | images per second | ratio of times | quartiles | waits per batch | MB at most |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        lines += [_line(row) for row in rows if row.setting == setting]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    quartiles = "" if row.name == BY_HAND else f"{row.quartiles[0]:.2f} to {row.quartiles[1]:.2f}"
    cells = [f"{row.images:,.0f}", f"{row.ratio:.3f}", quartiles, f"{row.waits:g}", f"{row.memory:,.0f}"]
    return f"| {row.name} | {' | '.join(cells)} |"


def main() -> None:
    parser = overhead.option_parser("Measures the loop on a GPU beside a hand-written one and fastai.", 15)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU that torch can use: nothing was measured.")
        return
    rounds = options.rounds or (3 if options.quick else 15)
    settings = [
        Setting(network, mode, compiled) for network in NETWORKS for mode in MODES for compiled in (False, True)
    ]
    found = report(settings[:1] if options.quick else settings, rounds, N_BATCHES)
    overhead.publish("gpu", found, as_markdown(found), options)


if __name__ == "__main__":
    main()
