"""The losses and learning rates of a fit, kept by the loop itself without bringing one to the host."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnloop.data.batches import n_beside

BLOCK = 1024  # losses in a block


class _Sent(NamedTuple):
    """Losses on their way to the host."""

    start: int  # the number of the first
    numbers: Tensor  # in pinned memory
    done: torch.cuda.Event


class Kept:
    """`losses.append` and `rates.append` are all that happens in a batch; the rest waits until somebody looks."""

    def __init__(self) -> None:
        self.losses: list[Any] = []  # since the last fold: detached tensors of one number, or numbers
        self.room = 0  # how many of them there may be; 0: not known yet
        self.rates: list[float] = []  # learning rate of the last group, one per recorded loss
        self.folded: list[Tensor] = []  # what came before, one dimension each, on the device
        self._block: Tensor | None = None  # the one that is being filled: the last of `folded` is its beginning
        self.n_folded = 0  # losses in there
        self._sent: _Sent | None = None

    def make_room(self, pred: Any) -> None:
        """Folds if there are as many losses as may be kept beside such predictions."""
        self.room = n_beside(pred)
        if len(self.losses) >= self.room:
            self.fold()

    def fold(self) -> None:
        """Puts the single losses into one tensor; nothing waits for the device."""
        if self.losses:
            self._put(_stacked(self.losses))
            self.n_folded += len(self.losses)
            self.losses = []
        if len(self.folded) > BLOCK:
            self._join()

    def _put(self, losses: Tensor) -> None:
        """Behind those in the block that is being filled, or in a new one."""
        block, kind = self._block, (losses.dtype, losses.device)
        n = 0 if block is None else len(self.folded[-1])
        if block is None or n + len(losses) > len(block) or (block.dtype, block.device) != kind:
            n, block = 0, losses.new_empty(max(BLOCK, len(losses)))
            self._block = block
            self.folded.append(block[:0])
        block[n : n + len(losses)] = losses
        self.folded[-1] = block[: n + len(losses)]

    def _join(self) -> None:
        if len(self.folded) > 1:
            self.folded = [torch.cat([block.to(self.folded[-1].device) for block in self.folded])]
            self._block = None

    def since(self, start: int) -> list[float]:
        """Losses from number `start` on, brought to the host."""
        return [loss for part in self._from(start) for loss in part.tolist()]

    def arrived(self, start: int) -> list[float]:
        """Those of them that are on the host already; the others are sent there, and nothing waits for them."""
        parts = self._from(start)
        if not parts or parts[-1].device.type != "cuda":
            return [loss for part in parts for loss in part.tolist()]
        sent, found = self._sent, []
        if sent is not None and sent.done.query():
            found, sent = sent.numbers[start - sent.start :].tolist(), None
        self._sent = _send(self._from(start + len(found)), start + len(found)) if sent is None else sent
        return found

    def _from(self, start: int) -> list[Tensor]:
        """Losses from number `start` on, on their device."""
        self.fold()
        parts, before = [], self.n_folded
        for block in reversed(self.folded):  # whoever looks after every batch is one loss behind
            if before <= start:
                break
            before -= len(block)
            parts.append(block[max(0, start - before) :].double())
        return parts[::-1]

    def __len__(self) -> int:
        return self.n_folded + len(self.losses)

    def state_dict(self) -> dict[str, Any]:
        self.fold()
        self._join()  # in a file each tensor costs as much as a thousand numbers
        return {"losses": [block.clone() for block in self.folded], "rates": list(self.rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.folded, self.rates, self._sent = [], list(state["losses"]), list(state["rates"]), None
        self._block = None
        self.n_folded = sum(len(block) for block in self.folded)


def _send(parts: list[Tensor], start: int) -> _Sent | None:
    if not parts:
        return None
    away = torch.cat([part.to(parts[-1].device) for part in parts])
    numbers = torch.empty(away.shape, dtype=away.dtype, pin_memory=True)
    numbers.copy_(away, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(away.device))
    return _Sent(start, numbers, done)


def _stacked(losses: list[Any]) -> Tensor:
    try:
        stacked = torch.stack(losses)
        if stacked.ndim == 1:
            return stacked
    except (TypeError, RuntimeError):  # not all of them are tensors, or of one shape, or on one device
        pass
    odd = [loss for loss in losses if _is_odd(loss)] or losses
    device = torch.as_tensor(odd[0]).device
    return torch.stack([torch.as_tensor(loss).detach().float().mean().to(device) for loss in losses])


def _is_odd(loss: Any) -> bool:
    return not isinstance(loss, Tensor) or loss.ndim > 0
