"""Twelve common sets of techniques on the digits: callbacks beside a hand-written loop that does the same with torch.

Both sides start from the same weights; what is drawn after that differs. So a set is judged by the seeds: the mean of
its accuracies must lie within the spread of those that the hand-written loop reaches.
"""

import argparse
import contextlib
import io
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import schedulefree
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import learnloop as ll

RESULTS = Path(__file__).parent / "results"
BS, MOMS = 32, (0.95, 0.85, 0.95)


class Techniques(NamedTuple):
    """What a training does beside stepping."""

    epochs: int = 4
    lr: float = 0.01  # the highest one
    opt: str = "adam"  # adam, sgd or schedulefree
    schedule: str = "one_cycle"  # one_cycle, flat_cos or flat
    precision: str = ""  # fp16 or bf16
    accumulate: int = 0  # batches per update
    clip: float = 0.0  # the norm of all gradients
    smoothing: float = 0.0  # of the labels
    mix: str = ""  # mixup or cutmix
    ema: float = 0.0  # its decay
    swa: float = 1.0  # the part of the training after which weights are averaged
    freeze_until: int = 0  # epochs in which the convolutions wait
    weigh: bool = False  # the even digits are rare, and drawn as often as the odd ones
    crop: int = 0  # pixels by which images are moved
    grow: bool = False  # images are small at first
    keep_best: bool = False  # the weights of the epoch with the lowest loss are kept
    plateau: bool = False  # the rate is divided by 10 after an epoch without a lower loss; the fit ends after three
    layout: str = "contiguous"  # or channels_last


SETS = {
    "fp16, accumulation, clipping, EMA, one cycle": Techniques(precision="fp16", accumulate=2, clip=1.0, ema=0.9),
    "bf16, MixUp, label smoothing, one cycle": Techniques(precision="bf16", mix="mixup", smoothing=0.1),
    "CutMix, momentum, clipping, one cycle": Techniques(mix="cutmix", opt="sgd", lr=0.1, clip=1.0),
    "SWA, momentum, one rate": Techniques(swa=0.5, opt="sgd", lr=0.05, schedule="flat"),
    "bf16, channels last, EMA, flat then cosine": Techniques(
        precision="bf16", layout="channels_last", ema=0.9, schedule="flat_cos", lr=0.003
    ),
    "accumulation, MixUp, EMA": Techniques(accumulate=2, mix="mixup", ema=0.9, schedule="flat_cos"),
    "convolutions frozen at first, clipping, one cycle": Techniques(freeze_until=1, clip=0.5),
    "weighted sampling, label smoothing, one cycle": Techniques(weigh=True, smoothing=0.1),
    "random crops, the best weights kept, one rate": Techniques(crop=1, keep_best=True, schedule="flat", lr=0.003),
    "plateau and early stopping, momentum": Techniques(plateau=True, opt="sgd", lr=0.1, schedule="flat", epochs=8),
    "growing images, bf16, clipping, one cycle": Techniques(grow=True, precision="bf16", clip=1.0, epochs=6),
    "schedule-free AdamW, accumulation, clipping": Techniques(opt="schedulefree", accumulate=2, clip=1.0),
}


# What both sides share


class Data(NamedTuple):
    """Images and classes."""

    x_train: Tensor
    y_train: Tensor
    x_valid: Tensor
    y_valid: Tensor


def data_for(t: Techniques) -> Data:
    """The digits; where sampling is weighed only every eighth of the even ones."""
    data = ll.datasets.digits()
    if not t.weigh:
        return Data(*data)
    is_kept = (data.y_train % 2 == 1) | (torch.arange(len(data.y_train)) % 8 == 0)
    return Data(data.x_train[is_kept], data.y_train[is_kept], data.x_valid, data.y_valid)


def sample_weights(y: Tensor) -> Tensor:
    """One per sample: rare classes weigh more."""
    return 1 / torch.bincount(y, minlength=10)[y]


def network() -> nn.Sequential:
    """Convolutions, then a head."""
    body = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
    )
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)))


class Score(NamedTuple):
    """On the validation set."""

    accuracy: float
    loss: float


# With callbacks


def with_callbacks(t: Techniques, seed: int) -> Score:
    """A Learner with a callback for each technique."""
    ll.set_seed(seed)
    data = data_for(t)
    train = ll.TensorLoader(data.x_train, data.y_train, bs=BS, shuffle=True)
    dls = ll.DataLoaders(train, ll.TensorLoader(data.x_valid, data.y_valid, bs=512), device="cpu")
    opts = {"adam": ll.Adam, "sgd": partial(ll.SGD, mom=0.9), "schedulefree": schedulefree.AdamWScheduleFree}
    with tempfile.TemporaryDirectory() as folder, quiet():
        learn = ll.Learner(
            *(dls, network(), nn.CrossEntropyLoss(label_smoothing=t.smoothing), opts[t.opt]),
            **{"lr": t.lr, "splitter": {"0.*": {}, "1.*": {}}, "cbs": list(callbacks(t, data)), "path": folder},
            metrics=ll.accuracy,
        )
        fits = {"one_cycle": learn.fit_one_cycle, "flat_cos": learn.fit_flat_cos, "flat": learn.fit}
        fits[t.schedule](t.epochs, t.lr)
        learn.loss_func = nn.CrossEntropyLoss()
        loss, accuracy = learn.validate()
    return Score(accuracy, loss)


def callbacks(t: Techniques, data: Data) -> Iterator[ll.Callback]:
    """Those that do what `t` names."""
    if t.precision:
        yield ll.MixedPrecision(t.precision)
    if t.accumulate:
        yield ll.GradientAccumulation(t.accumulate * BS)
    if t.clip:
        yield ll.GradientClip(t.clip)
    if t.mix:
        yield {"mixup": ll.MixUp, "cutmix": ll.CutMix}[t.mix]()
    if t.ema:
        yield ll.EMA(t.ema)
    if t.swa < 1:
        yield ll.SWA(t.swa)
    if t.freeze_until:
        yield ll.FreezeUntil(t.freeze_until)
    if t.weigh:
        yield ll.WeightedSampling(sample_weights(data.y_train))
    if t.crop:
        yield ll.BatchTransform(partial(ll.transforms.crop, padding=t.crop))
    if t.grow:
        yield ll.ProgressiveResize(multiple=2)
    if t.keep_best:
        yield ll.SaveModelCallback()
    if t.plateau:
        yield from (ll.ReduceLROnPlateau(patience=1), ll.EarlyStoppingCallback(patience=3))
    if t.layout == "channels_last":
        yield ll.ChannelsLast()
    if t.opt == "schedulefree":
        yield ll.ScheduleFreeCallback()


# By hand


def by_hand(t: Techniques, seed: int) -> Score:
    """The same in a loop of its own, with torch's tools."""
    ll.set_seed(seed)
    data, model = data_for(t), network()
    if t.layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    loop = HandWritten(t, data, model)
    for epoch in range(t.epochs):
        loop.train(epoch)
        if loop.validate(epoch):
            break
    return score(loop.finished(), data)


class HandWritten:
    """A training loop with an `if` for each technique."""

    def __init__(self, t: Techniques, data: Data, model: nn.Sequential):
        self.t, self.data, self.model = t, data, model
        self.n_iter = -(-len(data.x_train) // BS)
        self.opt = optimizer(t, model)
        self.scaler = torch.amp.GradScaler("cpu", enabled=t.precision == "fp16")
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(t.ema), use_buffers=True) if t.ema else None
        self.swa = AveragedModel(model) if t.swa < 1 else None
        self.best: tuple[float, Any] = (float("inf"), None)
        self.n_bad = 0  # epochs since the best one
        self.n_gathered = 0  # batches since the last update

    def train(self, epoch: int) -> None:
        self.model.train()
        if self.t.opt == "schedulefree":
            self.opt.train()
        freeze_convolutions(self.model, epoch < self.t.freeze_until)
        for i, index in enumerate(order(self.t, self.data.y_train)):
            progress = (epoch + i / self.n_iter) / self.t.epochs
            set_rate(self.opt, self.t, progress)
            self.batch(self.data.x_train[index], self.data.y_train[index], progress, i + 1 == self.n_iter)
        if self.swa is not None and (epoch + 1) / self.t.epochs >= self.t.swa:
            self.swa.update_parameters(self.model)

    def batch(self, x: Tensor, y: Tensor, progress: float, is_last: bool) -> None:
        t = self.t
        if t.crop:
            x = moved(x, t.crop)
        if t.grow:
            x = smaller(x, progress)
        x, y_other, weight = mixed(x, y, t.mix)
        dtype = torch.float16 if t.precision == "fp16" else torch.bfloat16
        with torch.autocast("cpu", dtype, enabled=bool(t.precision)):
            pred = self.model(x).float()
            single = partial(F.cross_entropy, pred, reduction="none", label_smoothing=t.smoothing)
            loss = (weight * single(y) + (1 - weight) * single(y_other)).sum() / (BS * max(1, t.accumulate))
        self.scaler.scale(loss).backward()
        self.n_gathered += len(x)
        if is_last or self.n_gathered >= BS * max(1, t.accumulate):
            self.step()

    def step(self) -> None:
        self.scaler.unscale_(self.opt)
        for p in self.model.parameters():
            if p.grad is not None:  # the sum was taken for full windows
                p.grad.mul_(BS * max(1, self.t.accumulate) / self.n_gathered)
        if self.t.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.t.clip)
        self.scaler.step(self.opt)
        self.scaler.update()
        self.opt.zero_grad()
        self.n_gathered = 0
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def validate(self, epoch: int) -> bool:
        """Whether that was the last epoch."""
        if self.t.opt == "schedulefree":
            self.opt.eval()
        if not (self.t.keep_best or self.t.plateau):
            return False
        loss = score(self.model, self.data).loss
        if loss < self.best[0]:
            self.best, self.n_bad = (loss, {k: v.clone() for k, v in self.model.state_dict().items()}), 0
            return False
        self.n_bad += 1
        if self.t.plateau:
            for group in self.opt.param_groups:
                group["lr"] /= 10
        return self.t.plateau and self.n_bad == 3

    def finished(self) -> nn.Module:
        """The model that the training is for."""
        if self.swa is not None:
            update_bn(self.data.x_train.split(BS), self.swa)
        if self.t.keep_best:
            self.model.load_state_dict(self.best[1])
        return self.ema or self.swa or self.model


def score(model: nn.Module, data: Data) -> Score:
    model.eval()
    with torch.no_grad():
        pred = model(data.x_valid)
    accuracy = (pred.argmax(1) == data.y_valid).float().mean()
    return Score(accuracy.item(), F.cross_entropy(pred, data.y_valid).item())


def optimizer(t: Techniques, model: nn.Module) -> Any:
    """torch's, with the numbers of ours; biases and batch norm do not decay."""
    decays = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    if t.opt == "sgd":
        return torch.optim.SGD(model.parameters(), t.lr, momentum=0.9)
    if t.opt == "schedulefree":
        return schedulefree.AdamWScheduleFree(model.parameters(), t.lr)
    groups = [{"params": decays, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, t.lr, betas=(0.9, 0.99), eps=1e-5)


def set_rate(opt: Any, t: Techniques, progress: float) -> None:
    """Smith's one cycle, or a rate that stays for three quarters and falls along a cosine."""

    def cosine(start: float, end: float, part: float) -> float:
        return end + (start - end) * (1 + torch.cos(torch.tensor(part * torch.pi)).item()) / 2

    if t.schedule == "one_cycle":
        rises, part = progress < 0.25, progress / 0.25 if progress < 0.25 else (progress - 0.25) / 0.75
        lr = cosine(t.lr / 25, t.lr, part) if rises else cosine(t.lr, t.lr / 1e5, part)
        mom = cosine(MOMS[0], MOMS[1], part) if rises else cosine(MOMS[1], MOMS[2], part)
    elif t.schedule == "flat_cos":
        lr, mom = t.lr if progress < 0.75 else cosine(t.lr, t.lr / 1e5, (progress - 0.75) / 0.25), 0.9
    else:
        return
    for group in opt.param_groups:
        group["lr"] = lr
        group.update({"momentum": mom} if t.opt == "sgd" else {"betas": (mom, 0.99)})


def order(t: Techniques, y: Tensor) -> tuple[Tensor, ...]:
    """The indices of each batch."""
    drawn = torch.multinomial(sample_weights(y), len(y), replacement=True) if t.weigh else torch.randperm(len(y))
    return drawn.split(BS)


def freeze_convolutions(model: nn.Sequential, is_frozen: bool) -> None:
    for layer in model[0].modules():
        if isinstance(layer, nn.Conv2d):
            layer.requires_grad_(not is_frozen)


def mixed(x: Tensor, y: Tensor, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mixtures, the targets of those that were mixed in, and the weight of the own ones."""
    other = torch.randperm(len(x))
    if how == "mixup":
        weight = torch.distributions.Beta(0.4, 0.4).sample((len(x),))
        weight = torch.maximum(weight, 1 - weight)
        return weight.view(-1, 1, 1, 1) * x + (1 - weight.view(-1, 1, 1, 1)) * x[other], y[other], weight
    if how == "cutmix":
        side = (1 - torch.rand(())).sqrt().item()  # Beta(1, 1) is even
        height, width = x.shape[-2:]
        row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
        dy, dx = round(height * side) // 2, round(width * side) // 2
        mask = torch.zeros(height, width)
        mask[max(0, row - dy) : row + dy, max(0, column - dx) : column + dx] = 1
        return x * (1 - mask) + x[other] * mask, y[other], 1 - mask.mean()
    return x, y, torch.ones(())


def moved(x: Tensor, by: int) -> Tensor:
    """Each image shifted; what comes in is mirrored."""
    padded, size = F.pad(x, (by,) * 4, mode="reflect"), x.shape[-1]
    corners = torch.randint(0, 2 * by + 1, (len(x), 2)).tolist()
    return torch.stack([image[:, r : r + size, c : c + size] for image, (r, c) in zip(padded, corners, strict=True)])


def smaller(x: Tensor, progress: float) -> Tensor:
    """Half the size until half of the training is done, then growing; whole in its last fifth."""
    part = 0.5 if progress < 0.5 else min(1.0, 0.5 + 0.5 * (progress - 0.5) / 0.3)
    size = min(8, 2 * round(8 * part / 2))
    return x if size == 8 else F.interpolate(x, (size, size), mode="bilinear", antialias=True)


# The study


@dataclass
class Row:
    """What both sides reach with a set, over the seeds."""

    name: str
    callbacks: list[float]  # accuracies, a seed each
    by_hand: list[float]
    losses: tuple[list[float], list[float]]
    seconds: tuple[float, float]

    @property
    def difference(self) -> float:
        """Of the mean accuracies."""
        return statistics.mean(self.callbacks) - statistics.mean(self.by_hand)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds, the larger of both sides, and one image at least."""
        return max(statistics.stdev(self.callbacks), statistics.stdev(self.by_hand), 1 / 359)

    @property
    def agrees(self) -> bool:
        """Whether callbacks reach what the hand-written loop reaches, within the spread, or more."""
        return self.difference >= -self.spread


def measured(name: str, seeds: int) -> Row:
    """Both sides of one set, with the same seeds."""
    ours, theirs = (_timed(side, SETS[name], seeds) for side in (with_callbacks, by_hand))
    accuracies, losses = zip(*[list(zip(*scores, strict=True)) for scores, _ in (ours, theirs)], strict=True)
    return Row(name, list(accuracies[0]), list(accuracies[1]), tuple(map(list, losses)), (ours[1], theirs[1]))


def _timed(side: Callable[[Techniques, int], Score], t: Techniques, seeds: int) -> tuple[list[Score], float]:
    start = time.process_time()
    return [side(t, seed) for seed in range(seeds)], (time.process_time() - start) / seeds


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Fits show nothing."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def as_markdown(rows: list[Row], seeds: int) -> str:
    """The report as one table."""
    machine = f"{platform.machine().replace('_', '-')}, 1 thread; python {platform.python_version()}"
    about = f"{date.today().isoformat()}; {machine}, torch {torch.__version__}; {seeds} seeds."
    title = "| set | callbacks | by hand | difference | spread | loss | by hand | |"
    lines = ["# Twelve common sets", "", about, "", title, "|---" + "|---:" * 6 + "|---|"]
    for row in rows:
        ours, theirs = (100 * statistics.mean(side) for side in (row.callbacks, row.by_hand))
        losses = " | ".join(f"{statistics.mean(side):.3f}" for side in row.losses)
        numbers = f"{ours:.2f} % | {theirs:.2f} % | {100 * row.difference:+.2f} | {100 * row.spread:.2f} | {losses}"
        lines.append(f"| {row.name} | {numbers} | {'within' if row.agrees else 'below'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    rows = []
    for name in SETS:
        if options.only in name:
            rows.append(measured(name, options.seeds))
            print(f"{name}: {100 * rows[-1].difference:+.2f}, spread {100 * rows[-1].spread:.2f}", flush=True)
    if not options.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "common_sets.md").write_text(as_markdown(rows, options.seeds))
        (RESULTS / "common_sets.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the digits with sets of callbacks, and by hand with the same.")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="trainings of each set on each side")
    parser.add_argument("--only", default="", metavar="NAME", help="sets whose name has this in it; writes no files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
