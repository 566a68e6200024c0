"""The losses and learning rates of a fit, kept by the loop itself without bringing one to the host."""

from typing import Any

import torch
from torch import Tensor

FOLD = 1024  # single losses kept before they become one tensor: bounds the memory of long fits


class Kept:
    """`losses.append` and `rates.append` are all that happens in a batch; the rest waits until somebody looks."""

    def __init__(self) -> None:
        self.losses: list[Any] = []  # since the last fold: detached tensors of one number, or numbers
        self.rates: list[float] = []  # learning rate of the last group, one per recorded loss
        self.folded: list[Tensor] = []  # what came before, one dimension each, on the device
        self.n_folded = 0  # losses in there

    def fold(self) -> None:
        """Puts the single losses into one tensor; nothing waits for the device."""
        if self.losses:
            self.folded.append(_stacked(self.losses))
            self.n_folded += len(self.losses)
            self.losses = []
        if len(self.folded) > FOLD:  # somebody looks after every batch
            self._join()

    def _join(self) -> None:
        if len(self.folded) > 1:
            self.folded = [torch.cat([block.to(self.folded[-1].device) for block in self.folded])]

    def since(self, start: int) -> list[float]:
        """Losses from number `start` on, brought to the host."""
        self.fold()
        parts, before = [], self.n_folded
        for block in reversed(self.folded):  # whoever looks after every batch is one loss behind
            if before <= start:
                break
            before -= len(block)
            parts.append(block[max(0, start - before) :])
        return [loss for part in reversed(parts) for loss in part.double().tolist()]

    def __len__(self) -> int:
        return self.n_folded + len(self.losses)

    def state_dict(self) -> dict[str, Any]:
        self.fold()
        self._join()  # in a file each tensor costs as much as a thousand numbers
        return {"losses": list(self.folded), "rates": list(self.rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.folded, self.rates = [], list(state["losses"]), list(state["rates"])
        self.n_folded = sum(len(block) for block in self.folded)


def _stacked(losses: list[Any]) -> Tensor:
    tensors = [torch.as_tensor(loss).detach().reshape(-1).mean() for loss in losses if _is_odd(loss)]
    if not tensors:
        return torch.stack(losses)
    return torch.stack([torch.as_tensor(loss).float().mean().to(tensors[0].device) for loss in losses])


def _is_odd(loss: Any) -> bool:
    return not isinstance(loss, Tensor) or loss.ndim > 0
