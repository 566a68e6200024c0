"""Augmentation of whole batches of images, shape (n, channels, height, width), on the device where they lie.

Random numbers come from torch's global generator of that device. `BatchTransform` runs these in a training.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["crop", "cutout", "flip", "normalize", "resize"]


def flip(x: Tensor, p: float = 0.5) -> Tensor:
    """Each image mirrored from left to right with probability `p`."""
    is_flipped = torch.rand(len(x), device=x.device) < p
    return torch.where(is_flipped.view(-1, 1, 1, 1), x.flip(-1), x)


def crop(x: Tensor, padding: int = 4, mode: str = "reflect") -> Tensor:
    """Each image moved by up to `padding` pixels either way; `mode` of `torch.nn.functional.pad` fills the rest."""
    n, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4, mode=mode)
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=x.device)
    rows = (top + torch.arange(height, device=x.device)).view(n, 1, height, 1)
    columns = (left + torch.arange(width, device=x.device)).view(n, 1, 1, width)
    images = torch.arange(n, device=x.device).view(n, 1, 1, 1)
    channels = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    return padded[images, channels, rows, columns]


def cutout(x: Tensor, size: int = 8) -> Tensor:
    """Each image with a square of `size` pixels set to 0; its centre is any pixel, so that the edge may cut the square.

    DeVries and Taylor, arXiv 1708.04552.
    """
    n, _, height, width = x.shape
    rows, columns = _near(n, height, size, x.device), _near(n, width, size, x.device)
    return x.masked_fill(rows.view(n, 1, height, 1) & columns.view(n, 1, 1, width), 0)


def _near(n: int, length: int, size: int, device: torch.device) -> Tensor:
    """For each of `n` random centres, which of `length` pixels lie in the stretch of `size` around it."""
    start = torch.randint(0, length, (n, 1), device=device) - size // 2
    pixel = torch.arange(length, device=device)
    return (pixel >= start) & (pixel < start + size)


def normalize(x: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """`(x - mean) / std`, one number per channel; tensors on the device of `x` save a transfer per batch."""
    mean, std = (torch.as_tensor(v, dtype=x.dtype, device=x.device).view(-1, 1, 1) for v in (mean, std))
    return (x - mean) / std


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Every image at another size (height, width), interpolated linearly and smoothed before it is made smaller."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False, antialias=True)
