"""Rows of numbers that a callback keeps batch by batch: they stay on their device until somebody looks."""

from typing import Any

import torch
from torch import Tensor

FOLD = 256  # single rows kept before they become one tensor: bounds the memory of long fits


def joined(numbers: list[Tensor]) -> Tensor:
    """Single numbers and vectors as one vector, on the device of the last where a model lies on several."""
    device = numbers[-1].device
    if any(n.device != device for n in numbers):
        numbers = [n.to(device) for n in numbers]
    return torch.hstack(numbers) if any(n.ndim for n in numbers) else torch.stack(numbers)


class Series:
    """Tensors of one shape, each with the number of its training batch; `numbers()` brings them to the host at once."""

    def __init__(self) -> None:
        self.iters: list[int] = []  # the training batch of each row, counted through the fit
        self._recent: list[Tensor] = []  # rows since the last fold
        self._folded: list[Tensor] = []  # what came before, (rows, …) each

    def append(self, iter: int, row: Tensor) -> None:
        """Keeps a row; nothing waits for the device."""
        self.iters.append(iter)
        self._recent.append(row)
        if len(self._recent) == FOLD:
            self._fold()

    def _fold(self) -> None:
        if self._recent:
            self._folded.append(torch.stack(self._recent))
            self._recent = []

    def numbers(self) -> Tensor:
        """All rows, shape (rows, …), in host memory; of shape (0,) before the first."""
        self._fold()
        if len(self._folded) > 1:
            self._folded = [torch.cat([block.to(self._folded[-1].device) for block in self._folded])]
        return self._folded[0].cpu() if self._folded else torch.empty(0)

    def __len__(self) -> int:
        return len(self.iters)

    def state_dict(self) -> dict[str, Any]:
        return {"iters": list(self.iters), "numbers": self.numbers()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iters, self._recent = list(state["iters"]), []
        self._folded = [state["numbers"]] if self.iters else []
