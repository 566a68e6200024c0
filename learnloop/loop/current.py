"""The batch in hand: its inputs and targets, the prediction, a loss to read and one to go back through."""

from typing import Any

import torch
from fastcore.basics import detuplify
from torch import Tensor, nn

from learnloop.data.batches import (
    exact_device,
    model_caller,
    on_device,
    pick_loss,
    pick_pred,
    split,
    to_detach,
    to_device,
)
from learnloop.data.keyed import length
from learnloop.data.loaders import known_n_inp
from learnloop.loop.dispatch import Dispatcher


class CurrentBatch(Dispatcher):
    """What a learner knows of the phase and the batch that it is in."""

    dls: Any  # `train`, `valid`, `[i]`: the loaders
    model: Any
    loss_func: Any  # (pred, *yb) -> one number; None where the model returns its own loss

    # The phase, from the moment before `before_train` or `before_validate`
    dl: Any  # its loader; None after a run, absent before the first
    dl_name: str | None = None  # 'train', 'valid' or the name of another set; None for a loader without one
    n_iter: int | None = None  # batches in `dl`; None where it does not say
    iter: int | None = None  # batch number within the phase, from 0; None before the first

    # The batch, from its split to the next one's; `(None,)` and None outside of a run
    batch: Any = None  # as the loader gave it; None once it is done
    xb: Any = (None,)  # inputs, a tuple
    yb: Any = (None,)  # targets, a tuple; empty where there are none
    pred: Any = None  # the model's output; None before it
    # loss, loss_grad: properties below, over the loss as it was computed and what callbacks made of it

    _raw_loss: Any = None  # with its graph, never handed out: what a callback does in place must not reach it
    _loss: Any = None  # what `loss` handed out or was set to in this batch
    _loss_grad: Any = None  # the same for `loss_grad`
    _last_loss: Any = torch.tensor(0.0)  # what `loss` shows before this batch has one
    _output_loss: Any = None  # a loss that came out of the model
    _device: torch.device | None = None  # where batches go in this phase
    _moves: bool | None = None  # whether they come from elsewhere; None before the phase's first
    _n_inp: int | None = None
    _caller: Any = None  # how the model is called with anything but tensors in this phase

    @property
    def x(self) -> Any:
        """The inputs, unwrapped where there is one."""
        return detuplify(self.xb)

    @property
    def y(self) -> Any:
        """The targets, unwrapped where there is one."""
        return detuplify(self.yb)

    @property
    def loss(self) -> Any:
        """The loss for reading and for the record, detached; setting it changes the record, not the gradient."""
        if self._loss is None:
            if self._raw_loss is None:
                return self._last_loss
            self._loss = self._raw_loss.detach().clone()
        return self._loss

    @loss.setter
    def loss(self, value: Any) -> None:
        self._loss = value

    @property
    def loss_grad(self) -> Any:
        """The loss with its graph, which `backward` uses; setting it changes the gradient, not the record."""
        if self._loss_grad is None:
            if self._raw_loss is None:
                raise AttributeError("`loss_grad` is there from `after_loss` on; this batch has made no loss yet.")
            # A clone: the backward of sqrt or exp needs the value they returned, whatever a callback makes of this one.
            self._loss_grad = self._raw_loss.clone()
        return self._loss_grad

    @loss_grad.setter
    def loss_grad(self, value: Any) -> None:
        self._loss_grad = value

    def _begin_phase(self, dl: Any, training: bool) -> None:
        """What is decided once per phase, not once per batch."""
        self.dl, self.training, self.n_iter, self.batch = dl, training, length(dl), None
        self._n_inp, self._caller, self._device = known_n_inp(self.dls, dl), None, self._find_device()
        self._moves = None

    def _find_device(self) -> torch.device:
        first = next(self._parameters(), None)
        return exact_device(getattr(self.dls, "device", None) or "cpu") if first is None else first.device

    def _parameters(self) -> Any:
        return self.model.parameters() if isinstance(self.model, nn.Module) else iter(())

    def _split(self, batch: Any) -> None:
        """Sets `xb` and `yb`, on the device; forgets prediction and loss of the batch before."""
        if self._moves is not False:
            batch = self._moved(batch)
        if type(batch) is tuple:  # the usual batch, without the calls that `split` needs for all the others
            n = self._n_inp or len(batch) - 1 or 1
            self.xb, self.yb = batch[:n], batch[n:]
        else:
            self.xb, self.yb = split(batch, self._n_inp, getattr(self.dls, "targets", None))
        self.pred = self._raw_loss = self._loss = self._loss_grad = self._output_loss = None

    def _moved(self, batch: Any) -> Any:
        """The batch on the device; whether batches have to be moved is decided by the first one of a phase."""
        device = self._device or self._find_device()
        if self._moves is None and self._device is not None:
            self._moves = not on_device(batch, device)
        return to_device(batch, device, non_blocking=device.type == "cuda")

    def _predict(self) -> None:
        xb = self.xb
        structured = len(xb) == 1 and not isinstance(xb[0], Tensor)
        output = self._call_model(xb) if structured else self.model(*xb)
        self.pred = output if isinstance(output, (Tensor, tuple)) else self._picked(output, structured)

    def _picked(self, output: Any, structured: bool) -> Any:
        """The prediction in an output that is more than tensors, whose loss is kept where it is the loss."""
        self._output_loss = pick_loss(output) if self.loss_func is None else None
        # Beside a `loss_func`, handlers of `after_pred` may want more of the output than its logits.
        return pick_pred(output) if structured or self.loss_func is None else output

    def _call_model(self, xb: Any) -> Any:
        """The model with a mapping or another structure, called in the way that its first batch showed."""
        if self._caller is None or self._caller[0] is not self.model:
            self._caller = self.model, model_caller(self.model, xb)
        return self._caller[1](xb)

    def _compute_loss(self) -> None:
        if self._output_loss is not None:
            self._raw_loss = self._output_loss
        elif self.loss_func is not None:
            self._raw_loss = self.loss_func(self.pred, *self.yb)
        elif self._loss_grad is None and self.task != "predict":
            raise ValueError(
                f"`loss_func` is None, and the output of `{type(self.model).__name__}` has no `loss`. "
                "Pass `Learner(…, loss_func=…)`, or let the model return an object or mapping with `loss`."
            )

    def _has_no_graph(self) -> bool:
        loss = self._raw_loss if self._loss_grad is None else self._loss_grad
        return not getattr(loss, "requires_grad", True)

    def _has_nothing_to_train(self) -> bool:
        return not any(p.requires_grad for p in self._parameters())

    def _checked(self, loss: Any) -> Tensor:
        """The loss that backward starts from, or an error that says why it cannot."""
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"backward needs a loss, and `loss_grad` is {loss!r}. Return a tensor from `loss_func`, "
                "or set `self.learn.loss_grad` in an `after_loss` handler."
            )
        if loss.numel() != 1:
            raise ValueError(
                f"`loss_func` returned shape {tuple(loss.shape)}; backward needs one number. "
                'Use `reduction="mean"`, or reduce the loss in an `after_loss` handler.'
            )
        if not loss.requires_grad:
            raise ValueError(
                "`loss_grad` has no graph to go back through: it was built from `learn.loss`, which is detached, or "
                "without gradients. Build it from `learn.loss_grad`."
            )
        return loss

    def _finished_loss(self) -> Any:
        """The batch's loss for the record, detached; None where none was made in it."""
        loss = self._raw_loss
        if self._loss is None and loss is not None:
            return loss.detach() if getattr(loss, "requires_grad", False) else loss
        return to_detach(self._loss, cpu=False)

    def _release_batch(self) -> None:
        self.dl, self.dl_name, self.batch, self.xb, self.yb, self.pred = None, None, None, (None,), (None,), None
        self._raw_loss = self._loss = self._loss_grad = self._output_loss = self._last_loss = None
        self._device = self._caller = self._moves = None
