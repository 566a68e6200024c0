"""What a loop is in these benchmarks, and the smallest one: a tiny network on batches made beforehand."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

N_BATCHES = 100  # in a pass: some 15 ms, short enough that both of a pair see the same machine
BS = 64
LR = 0.01
LISTENERS = 20
EVENTS = ("before_batch", "after_pred", "after_loss", "after_backward", "after_step", "after_batch")

loss_func = nn.CrossEntropyLoss()
clock = time.thread_time  # not the wall's: other processes on the machine would be in it


class Batches(list):
    """Batches made beforehand, and a stopwatch: `seconds` is what the last pass over them took."""

    start = seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        self.start = clock()
        yield from super().__iter__()
        self.stop()

    def stop(self) -> None:
        self.seconds = clock() - self.start


class Loop(NamedTuple):
    """A loop that is ready to run over its batches."""

    name: str
    run: Callable[[], Any]  # one pass
    batches: Batches | None  # None: the run as a whole is one number, instead of one per batch


class Job(NamedTuple):
    """A training as any loop can do it."""

    model: nn.Module
    loss_func: nn.Module
    train: Any  # batches (x, y), with a length
    valid: Any = None  # the same; None: no validation
    opt_func: Any = torch.optim.SGD
    lr: float = LR
    n_epoch: int = 1
    listeners: int = 0  # callbacks with an empty handler for each event of the loop

    def optimizer(self) -> torch.optim.Optimizer:
        return self.opt_func(self.model.parameters(), lr=self.lr)


def make_batches(n: int = N_BATCHES) -> Batches:
    g = torch.Generator().manual_seed(0)
    return Batches((torch.randn(BS, 10, generator=g), torch.randint(0, 2, (BS,), generator=g)) for _ in range(n))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))


def tiny_job(batches: Batches, **changes: Any) -> Job:
    return Job(network(), loss_func, batches)._replace(**changes)


def right(pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether each prediction is right; the classes are dimension 1."""
    return pred.argmax(dim=1) == y


def listeners(base: type, n: int = LISTENERS, events: Iterable[str] = EVENTS, takes: str = "self") -> list[Any]:
    """Callbacks with an empty handler for each event. Source for each: copies of one function would share code."""
    handlers = "".join(f"    def {event}({takes}): pass\n" for event in events)
    scope: dict[str, Any] = {"Base": base}
    for i in range(n):
        exec(f"class Listener{i}(Base):\n{handlers}", scope)
    return [scope[f"Listener{i}"]() for i in range(n)]
