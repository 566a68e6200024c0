"""TensorBoard: curves and the graph of the model in a folder of event files."""

import copy
import io
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from learnloop.callbacks.reports import Reports, numbers_of_row
from learnloop.data.keyed import preserved_randomness
from learnloop.integrations.packages import imported

__all__ = ["TensorBoardCallback"]


class TensorBoardCallback(Reports):
    """Writes losses, hypers and metrics of a fit for TensorBoard, and once the graph of the model.

    `train_loss` (smoothed), `raw_loss`, `lr_0`, `mom_0` and their like every `every` batches, the columns of the record
    after each epoch, all over the number of training batches. Several fits of one callback share a folder, and their
    steps go on. `tensorboardX` serves where `tensorboard` is not installed. The model is traced as a copy, so that
    nothing of it moves. It acts in `before_fit`, `after_batch`, `after_epoch` and `cleanup_fit`.
    Source: docs.fast.ai/callback.tensorboard. Cost per batch: some 340 µs every `every` batches, in which it
    waits for the loss.
    """

    def __init__(
        self,
        log_dir: str | Path | None = None,  # None: `runs/` with time and machine, as SummaryWriter names it
        trace_model: bool = True,  # write the graph of the model
        every: int | None = 10,  # training batches from one report to the next; None: rows only
    ):
        super().__init__(every)
        self.log_dir, self.trace_model = log_dir, trace_model
        self._is_traced, self._n_fits = False, 0

    def begin(self) -> Any:
        log_dir = None if self.log_dir is None else str(self.log_dir)
        self._n_fits += 1  # tensorboardX writes two fits of one second over each other
        writer = _writer_class()(log_dir, filename_suffix=f".{self._n_fits}")
        self.log_dir = writer.log_dir if hasattr(writer, "log_dir") else writer.logdir
        return writer

    def write_step(self, step: int, numbers: dict[str, float]) -> None:
        self._write(step, {name: value for name, value in numbers.items() if name != "epoch"})

    def write_row(self, step: int, row: dict[str, Any]) -> None:
        self._write(step, numbers_of_row(row))
        self.target.flush()

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        if self.trace_model and not self._is_traced:
            self._is_traced = True
            self._trace()
        for name, value in numbers.items():
            self.target.add_scalar(name, value, step)

    def _trace(self) -> None:
        model, xb = self.learn.model, self.learn.xb
        if not isinstance(model, nn.Module):
            return
        try:
            if any(isinstance(x, Mapping) for x in xb):
                raise TypeError("its batches are mappings")
            with torch.no_grad(), preserved_randomness(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.target.add_graph(copy.deepcopy(model).eval(), xb)
        except Exception as error:
            warnings.warn(
                f"TensorBoard gets no graph of `{type(model).__name__}`, which cannot be traced "
                f"({str(error).partition(chr(10))[0][:100]}). Pass `trace_model=False`.",
                stacklevel=2,
            )

    def end(self, how: str) -> None:
        self.target.close()


def _writer_class() -> Any:
    try:
        return imported("torch.utils.tensorboard", "TensorBoardCallback", "tensorboard").SummaryWriter
    except ImportError:
        try:
            return imported("tensorboardX", "TensorBoardCallback", "tensorboard").SummaryWriter
        except ImportError as error:
            raise ImportError(
                "`TensorBoardCallback` needs tensorboard: `pip install 'learnloop[tensorboard]'`."
            ) from error
