"""Batches that are copied to the GPU while the one before them computes."""

from collections.abc import Iterator
from typing import Any

import torch

from learnloop.data.batches import on_device, tensors_in, to_device


def ahead(stream: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """The batches of a stream on a CUDA device, each copied on a stream of its own while the one before it computes.

    From pinned memory the host does not wait for the copy either. Batches that are on the device already are passed on
    as they are. Source: docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA streams".
    """
    copying = torch.cuda.Stream(device)
    waiting: tuple[Any, bool] | None = None  # the batch on its way, and whether it has to move
    batch: Any = None
    failed: Exception | None = None
    try:
        while failed is None:
            try:
                batch = next(stream)
            except Exception as error:  # also of the end; the batch before it is used first
                failed = error
            else:
                is_moving = not on_device(batch, device)
                with torch.cuda.stream(copying):
                    batch = to_device(batch, device, non_blocking=True) if is_moving else batch
            if waiting is not None:
                yield _arrived(*waiting, copying, device)
            waiting = (batch, is_moving) if failed is None else None
            batch = None
        if not isinstance(failed, StopIteration):
            raise failed
    finally:
        batch = waiting = failed = None  # a traceback keeps this frame
        if hasattr(stream, "close"):
            stream.close()


def _arrived(batch: Any, is_moving: bool, copying: torch.cuda.Stream, device: torch.device) -> Any:
    """The batch, which the computation may use from here on."""
    if is_moving:
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for tensor in tensors_in(batch):
            tensor.record_stream(computing)  # else its memory could be given away while it is still read
    return batch
