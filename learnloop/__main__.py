"""`python -m learnloop demo`: train a small network and draw its learning curve; `runs`: list records of fits."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

import learnloop as ll
from learnloop.data.batches import default_device

_PICTURES = (".jpg", ".pdf", ".png", ".svg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` and return the exit code.

    0: done; 1: the data or the folder cannot be had; 2: wrong arguments, told in one line; 130: stopped with Ctrl-C.
    """
    try:
        options = _parser().parse_args(arguments)
        return options.command(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


# -- the demo


def demo(options: argparse.Namespace) -> int:
    """Train on `options.data`, draw the learning curve, print the accuracy as the last line; returns the exit code."""
    os.environ["MPLBACKEND"] = "Agg"  # read when matplotlib is first imported: no window, no display needed
    try:
        data = getattr(ll.datasets, options.data)()
    except OSError as error:
        print(f"python -m learnloop demo: {error}", file=sys.stderr)
        return 1
    learn = train(data, options.epochs, options.lr, options.device, options.seed)
    learn.recorder.plot_loss().figure.savefig(options.out)
    print(f"learning curve in {options.out}")
    print(f"accuracy {learn.recorder.values[-1][-1]:.4f}")
    return 0


def train(
    data: ll.datasets.LabelledImages,
    epochs: int,
    lr: float,  # the highest of the one cycle
    device: torch.device,
    seed: int,  # of the weights at the start, the dropout and the order of the images
) -> ll.Learner:
    """A learner that has trained `small_cnn` on `data`."""
    torch.manual_seed(seed)
    dls = ll.DataLoaders(
        ll.TensorLoader(data.x_train, data.y_train, bs=64, shuffle=True),
        ll.TensorLoader(data.x_valid, data.y_valid, bs=256),
        device=device,
    )
    learn = ll.Learner(dls, small_cnn(), nn.CrossEntropyLoss(), metrics=ll.accuracy)
    learn.fit_one_cycle(epochs, lr)
    return learn


def small_cnn(n_classes: int = 10) -> nn.Sequential:
    """Three convolutions and a linear layer, 26,000 parameters, for grey images of 8 by 8 pixels or more."""

    def block(n_in: int, n_out: int) -> list[nn.Module]:
        return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16),
        *block(16, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 2 * 2, n_classes),
    )


# -- the records


def list_runs(options: argparse.Namespace) -> int:
    """List the records of fits in `options.folder`, newest first; returns the exit code."""
    try:
        found = ll.runs(options.folder)
    except OSError as error:
        print(f"python -m learnloop runs: {error}", file=sys.stderr)
        return 1
    print(found)
    return 0


# -- the arguments


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m learnloop", description="A training loop for PyTorch.")
    parser.set_defaults(command=lambda options: parser.exit(2, parser.format_usage()))
    commands = parser.add_subparsers(title="commands", metavar="command")
    _add_demo(commands.add_parser("demo", help="train a small network on real images and draw its learning curve"))
    _add_runs(commands.add_parser("runs", help="list the records that RunRecord has kept in a folder"))
    return parser


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=list_runs)
    parser.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="where they are (default: runs)")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.set_defaults(command=demo)
    add = parser.add_argument
    add("--data", choices=("digits", "fashion_mnist"), default="digits", help="what to train on")
    add("--epochs", type=_epochs, default=8, metavar="N", help="passes over the training set")
    add("--lr", type=_lr, default=0.01, metavar="X", help="the highest learning rate of the one cycle")
    add("--device", type=_device, default=default_device(), metavar="D", help="where to train: cpu, cuda, cuda:1, mps")
    add("--seed", type=_seed, default=42, metavar="S", help="the same seed trains the same network")
    add("--out", type=_picture, default="learning_curve.png", metavar="FILE", help="the picture to write")


def _epochs(text: str) -> int:
    try:
        epochs = int(text)
    except ValueError:
        epochs = 0
    if epochs < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number of epochs; give a whole number from 1 up")
    return epochs


def _lr(text: str) -> float:
    try:
        lr = float(text)
    except ValueError:
        lr = math.nan
    if not 0 < lr < math.inf:
        raise argparse.ArgumentTypeError(f"`{text}` is not a learning rate; give a number above 0, such as 0.01")
    return lr


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"`{text}` is not a seed; give a whole number from 0 to {2**32 - 1}")
    return seed


def _device(text: str) -> torch.device:
    try:
        torch.ones(1, device=text).item()  # a name may be right and the device not there: only using it tells
    except (RuntimeError, AssertionError, ImportError):
        message = f"`{text}` cannot be used on this machine; `{default_device()}` can"
        raise argparse.ArgumentTypeError(message) from None
    return torch.device(text)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"`{text}` does not end with {', '.join(_PICTURES)}")
    is_new = not path.exists()
    try:
        path.open("ab").close()  # before the training, not after it: permissions alone do not tell
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write `{text}`: {error.strerror}") from None
    if is_new:
        path.unlink()
    return path


if __name__ == "__main__":
    sys.exit(main())
