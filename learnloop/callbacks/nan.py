"""A guard against losses that are infinite or no number: it ends the fit before they reach the weights."""

import cmath
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from fastcore.basics import noop
from torch import Tensor, nn

from learnloop.data.batches import to_detach
from learnloop.data.keyed import preserved_randomness
from learnloop.insight.hooks import Hooks
from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelFitException


class TerminateOnNaNCallback(Callback):
    """Ends the fit before a loss that is infinite or no number can reach the weights, and says where it arose.

    It looks in `before_backward` of training batches, after every `after_loss` handler. What the forward pass moved in
    the model's buffers, such as running means, is put back; inputs and targets stay as a copy in host memory,
    `bad_batch`, and the layer with the first output that is not finite is named in `bad_layer`, both until the next
    fit. `lr_find` looks after itself. Source: docs.fast.ai/callback.tracker. Cost per `every`-th batch: one wait for
    the device, and a copy of the model's buffers.
    """

    order, run_valid, tasks = -9, False, ("fit",)
    bad_batch: Any = None  # (xb, yb)
    bad_layer: str | None = None  # its name in the model; None where no layer made it

    def __init__(self, every: int = 1):  # training batches from one look to the next
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every={every!r}`: pass a whole number of batches, 1 or more.")
        self.every = every
        self._slots: list[tuple[dict[str, Any], str]] = []  # where the model keeps its buffers
        self._buffers: list[Tensor] = []  # those that were there before this batch
        self._copies: list[Tensor] = []  # their values then
        self._autocast: tuple[Any, ...] = ()  # that of the forward pass

    def before_fit(self) -> None:
        self.bad_batch = self.bad_layer = None

    def before_train(self) -> None:
        modules = self.learn.model.modules() if isinstance(self.learn.model, nn.Module) else ()
        self._slots = [(m._buffers, name) for m in modules for name, b in m._buffers.items() if b is not None]

    def before_batch(self) -> None:
        if self._slots and not self.learn.train_iter % self.every:
            self._copy_buffers()

    @torch.no_grad()
    def _copy_buffers(self) -> None:
        self._slots = [(of, name) for of, name in self._slots if of.get(name) is not None]  # some models empty theirs
        self._buffers = [buffers[name] for buffers, name in self._slots]
        if [b.shape for b in self._buffers] == [c.shape for c in self._copies]:
            torch._foreach_copy_(self._copies, self._buffers)
        else:
            self._copies = [b.detach().clone() for b in self._buffers]

    def after_pred(self) -> None:
        learn = self.learn
        if not learn.train_iter % self.every:
            kind = (learn._device or learn._find_device()).type
            self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def before_backward(self) -> None:
        learn = self.learn
        if learn.train_iter % self.every:
            return
        loss = learn._raw_loss if learn._loss_grad is None else learn._loss_grad
        losses = [loss] if learn._loss is None else [loss, learn._loss]  # for the gradient, and for the record
        if not are_finite(losses):
            self._stop(next(value for value in losses if not are_finite([value])))

    def _stop(self, loss: Any) -> None:
        learn = self.learn
        self.bad_batch = copy.deepcopy(to_detach((learn.xb, learn.yb)))
        reason = self._reason()
        self._put_buffers_back()
        if learn.logger is not noop:
            value = f"{loss.item():g}" if isinstance(loss, Tensor) and loss.numel() == 1 else "not finite"
            print(f"The loss is {value} at epoch {learn.epoch}, batch {learn.iter}: {reason}. The fit ends here.")
        raise CancelFitException

    def _reason(self) -> str:
        if not are_finite([*_tensors_in(self.learn.xb), *_tensors_in(self.learn.yb)]):
            return "the batch itself is not finite"
        try:
            found = self._first_bad_layer()
        except Exception as error:  # a model may refuse to see a batch twice; that must not hide what was found
            return f"the forward pass could not be repeated to find the layer ({error!r})"
        if found is None:
            return "every layer's output is finite, so it arose in the loss"
        self.bad_layer, kind, had_finite_input = found
        where = "the first output that is not finite is that of" if had_finite_input else "it arose on the way into"
        return f"{where} `{self.bad_layer}` ({kind})"

    def _first_bad_layer(self) -> tuple[str, str, bool] | None:
        """Name and class of the layer, and whether its inputs were finite: the forward pass is run once more."""
        learn = self.learn
        layers = {m: name for name, m in _named_modules(learn.model) if not any(m.children())}
        found: list[tuple[str, str, bool]] = []

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not are_finite(_tensors_in(output)):
                found.append((layers[module], type(module).__name__, are_finite(_tensors_in(inputs))))

        device, dtype, enabled = self._autocast
        with self._undisturbed(), Hooks(layers, look), torch.autocast(device, dtype, enabled), torch.no_grad():
            learn._predict()
        return found[0] if found else None

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """The prediction and the random generators are afterwards what they were; a compiled model runs as written."""
        learn = self.learn
        former = learn.pred, learn._output_loss
        is_compiled = any(getattr(m, "_compiled_call_impl", None) for _, m in _named_modules(learn.model))
        stance = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
        try:
            with preserved_randomness(), stance:
                yield
        finally:
            learn.pred, learn._output_loss = former

    @torch.no_grad()
    def _put_buffers_back(self) -> None:
        for (buffers, name), buffer, before in zip(self._slots, self._buffers, self._copies, strict=False):
            buffer.copy_(before)
            buffers[name] = buffer

    def cleanup_train(self) -> None:
        self._slots, self._buffers, self._copies = [], [], []


def are_finite(values: Sequence[Any]) -> bool:
    """Whether no number in there is infinite or none; one look at the device, whatever their number."""
    if len(values) == 1 and getattr(values[0], "ndim", None) == 0:
        return cmath.isfinite(values[0].item())  # the usual loss: 0.2 µs, and 9 the way below
    tensors = [torch.as_tensor(v).detach() for v in values if v is not None]
    flags = [t.isfinite().all() for t in tensors if t.is_floating_point() or t.is_complex()]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a nested structure."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for v in values for t in _tensors_in(v)]


def _named_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    return model.named_modules() if isinstance(model, nn.Module) else iter(())
