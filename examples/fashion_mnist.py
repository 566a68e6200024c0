"""Fashion-MNIST from beginning to end: a small convolutional network, one cycle, a table, the time it took.

    python examples/fashion_mnist.py [epochs]

Stop it, kill it, run it again: it goes on where it was (`models/checkpoints` holds where; remove that to begin anew).
"""

import sys
import time

import torch
from torch import nn

from learnloop import Checkpoint, DataLoaders, Learner, TensorLoader, accuracy
from learnloop.data.datasets import fashion_mnist

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 3

torch.manual_seed(0)
data = fashion_mnist()
dls = DataLoaders(
    TensorLoader(data.x_train, data.y_train, bs=64, shuffle=True),
    TensorLoader(data.x_valid, data.y_valid, bs=512),
)


def block(n_in: int, n_out: int) -> nn.Sequential:
    """Halves height and width."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


model = nn.Sequential(
    block(1, 16),  # 14 x 14
    block(16, 32),  # 7 x 7
    block(32, 64),  # 4 x 4
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(64, 10),
)

learn = Learner(dls, model, nn.CrossEntropyLoss(), metrics=accuracy)
began = time.perf_counter()
learn.fit_one_cycle(epochs, 1e-2, cbs=Checkpoint("500step"), resume=True)
print(f"{time.perf_counter() - began:.1f} s, accuracy {learn.recorder.values[-1][-1]:.4f}")
