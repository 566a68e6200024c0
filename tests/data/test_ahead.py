"""Batches that are copied to the GPU while the one before them computes."""

import pytest
import torch

from learnloop import Callback, DataLoaders, TensorLoader
from learnloop.data.ahead import ahead
from learnloop.testing import toy_learner

CUDA = torch.device("cuda", 0)


def batches(n=3):
    return [(torch.full((4,), float(i)), {"y": torch.tensor(i)}) for i in range(n)]


@pytest.mark.gpu
def test_batches_come_whole_in_their_order_and_on_the_device():
    found = list(ahead(iter(batches()), CUDA))
    assert [(x.device, x.tolist(), y["y"].item()) for x, y in found] == [(CUDA, [float(i)] * 4, i) for i in range(3)]


@pytest.mark.gpu
def test_a_batch_that_is_there_already_is_passed_on_as_it_is():
    batch = (torch.ones(2, device=CUDA),)
    assert next(ahead(iter([batch]), CUDA)) is batch


@pytest.mark.gpu
def test_a_loader_that_fails_is_heard_after_the_batch_before():
    def failing():
        yield from batches(2)
        raise OSError("the disk is gone")

    stream, seen = ahead(failing(), CUDA), []
    with pytest.raises(OSError, match="the disk is gone"):
        for x, _ in stream:
            seen.append(x[0].item())
    assert seen == [0.0, 1.0]


@pytest.mark.gpu
def test_closing_it_closes_the_loader():
    closed = []

    def loader():
        try:
            yield from batches()
        finally:
            closed.append(True)

    stream = ahead(loader(), CUDA)
    next(stream)
    stream.close()
    assert closed == [True]


@pytest.mark.gpu
def test_a_training_on_batches_copied_ahead_is_that_on_data_that_lies_there():
    torch.manual_seed(0)
    x, y = torch.randn(64, 2), torch.randn(64, 1)
    losses = []
    for device in (None, "cuda"):
        learn = toy_learner()
        learn.dls = DataLoaders(TensorLoader(x, y, bs=8, shuffle=True, seed=1, device=device), device="cuda")
        learn.fit(2)
        losses.append(learn.recorder.raw_losses)
    assert losses[0] == losses[1]


def test_on_the_cpu_no_batch_is_drawn_before_the_one_in_hand_is_done():
    drawn, seen = [], []

    class Loader(TensorLoader):
        def keyed_batches(self, key, start=0):
            for i, batch in enumerate(super().keyed_batches(key, start)):
                drawn.append(i)
                yield batch

    learn = toy_learner(n_valid=0, cbs=Callback(after_batch=lambda cb: seen.append(len(drawn))))
    learn.dls = DataLoaders(Loader(torch.ones(6, 2), torch.ones(6, 1), bs=2))
    learn.fit(1)
    assert seen == [1, 2, 3]
