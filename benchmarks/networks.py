"""The networks that the benchmarks train on Fashion-MNIST."""

import torch
from torch import nn


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


def residual_net() -> nn.Sequential:
    """The network of `examples/fashion_mnist.py`: 463,594 parameters."""
    return nn.Sequential(
        *(conv(1, 32), nn.MaxPool2d(2)),
        *(conv(32, 64), Residual(64)),
        *(conv(64, 128, stride=2), Residual(128)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    )


def strided_net() -> nn.Sequential:
    """Three strided convolutions: 24,058 parameters, so little work that everything around it is seen."""
    return nn.Sequential(
        *(conv(1, 16, 2), conv(16, 32, 2), conv(32, 64, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution of one pixel where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.convs = nn.Sequential(
            conv(n_in, n_out, stride), nn.Conv2d(n_out, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out)
        )
        changed = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        self.shortcut = nn.Identity() if (n_in, stride) == (n_out, 1) else changed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.convs(x) + self.shortcut(x))


def resnet18() -> nn.Sequential:
    """ResNet-18 (He et al., arXiv 1512.03385) for images of 32 by 32 pixels: 11,173,962 parameters."""
    sizes = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [BasicBlock(*args) for a, b, stride in sizes for args in ((a, b, stride), (b, b, 1))]
    return nn.Sequential(conv(3, 64), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
