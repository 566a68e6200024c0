"""Fashion-MNIST to 92 % in two epochs, on a CPU with two cores: `python examples/fashion_mnist.py --bf16`.

Needs the data: `apt-get install dataset-fashion-mnist`, or a network connection.
"""

import argparse
import time

import torch
from torch import nn

import learnloop as ll

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--bs", type=int, default=64, help="images in a batch")
parser.add_argument("--n", type=int, help="train on so many images only")
precision = parser.add_mutually_exclusive_group()
precision.add_argument("--fp16", action="store_true", help="mixed precision in float16: for GPUs")
precision.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16: for GPUs and newer CPUs")
args = parser.parse_args()

ll.set_seed(args.seed)

# 60,000 images of clothes to train on and 10,000 to validate, in memory, scaled to mean 0 and deviation 1

data = ll.datasets.fashion_mnist()
mean, std = data.x_train.mean(), data.x_train.std()
dls = ll.DataLoaders(
    ll.TensorLoader((data.x_train[: args.n] - mean) / std, data.y_train[: args.n], bs=args.bs, shuffle=True),
    ll.TensorLoader((data.x_valid - mean) / std, data.y_valid, bs=1000),
)

# A small residual network: 28 x 28 pixels, then 14 x 14, then 7 x 7


def conv(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    """A convolution, batch norm, and what is above 0."""
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    """What two convolutions add to their input."""

    def __init__(self, n: int):
        super().__init__()
        self.convs = nn.Sequential(conv(n, n), conv(n, n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.convs(x)


model = nn.Sequential(
    *(conv(1, 32), nn.MaxPool2d(2)),
    *(conv(32, 64), Residual(64)),
    *(conv(64, 128, stride=2), Residual(128)),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
)

# One cycle of Adam. Two epochs are too short for augmentation to pay; in more of them flipped images do.

cbs: list[ll.Callback] = [ll.ChannelsLast()]
if args.fp16 or args.bf16:
    cbs.append(ll.MixedPrecision("fp16" if args.fp16 else "bf16"))
if args.epochs > 4:
    cbs.append(ll.BatchTransform(ll.transforms.flip))

loss_func = nn.CrossEntropyLoss(label_smoothing=0.05)
learn = ll.Learner(dls, model, loss_func, metrics=ll.accuracy, cbs=cbs)
start = time.perf_counter()
learn.fit_one_cycle(args.epochs, 0.006, pct_start=0.2)
print(f"accuracy {learn.final_record[-1]:.4f} after {args.epochs} epochs in {time.perf_counter() - start:.0f} seconds")
