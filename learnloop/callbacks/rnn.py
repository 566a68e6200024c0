"""Recurrent models: reset where a text begins, and regularized through what their layers put out."""

from typing import Any

from torch import Tensor, nn

from learnloop.loop.callback import Callback, check_alone

__all__ = ["ModelResetter", "RNNCallback", "RNNRegularizer", "rnn_cbs"]


class ModelResetter(Callback):
    """Calls the model's `reset` in `before_train`, `before_validate` and `after_fit`: a hidden state starts afresh.

    What such a model carries from batch to batch (tensors in attributes of its modules that are neither parameters nor
    buffers) is part of this callback's state, so that a resumed fit goes on with it, and is set aside while a run
    nested in the training validates or predicts. Source: docs.fast.ai/callback.rnn. Cost per batch: none.
    """

    def __init__(self) -> None:
        self._aside: dict[int, dict[str, Any]] = {}  # depth of a nested run -> what the model carried before it

    def before_fit(self) -> None:
        """Refuses a model without `reset`."""
        if not callable(getattr(self.learn.model, "reset", None)):
            raise TypeError(
                f"`ModelResetter` calls `reset()` of the model, and `{type(self.learn.model).__name__}` has none. "
                "Write one that drops the hidden state, or leave this callback out."
            )

    def before_train(self) -> None:
        self.learn.model.reset()

    def before_validate(self) -> None:
        learn = self.learn
        if learn._depth:
            self._aside[learn._depth] = carried_by(learn.model)
        learn.model.reset()

    def cleanup_validate(self) -> None:
        learn = self.learn
        if learn._depth in self._aside:
            learn.model.reset()
            put_back(learn.model, self._aside.pop(learn._depth))

    def after_fit(self) -> None:
        self.learn.model.reset()

    def state_dict(self) -> dict[str, Any]:
        """What the model carries now, by module and attribute."""
        carried = {} if self.learn is None else carried_by(self.learn.model)
        return {"carried": carried} if carried else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        put_back(self.learn.model, state.get("carried", {}))


def carried_by(model: Any) -> dict[str, Any]:
    """The hidden state of a model: `module.attribute` -> tensor, or a list or tuple of them however deep.

    A tensor with a graph is not carried over: the next batch could not go back through it.
    """
    modules = model.named_modules() if isinstance(model, nn.Module) else [("", model)]
    return {
        f"{name}.{attribute}": value
        for name, module in modules
        for attribute, value in vars(module).items()
        if _is_state(value)
    }


def put_back(model: Any, carried: dict[str, Any]) -> None:
    """Sets what `carried_by` found; modules that are gone are left out."""
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {"": model}
    for place, value in carried.items():
        name, _, attribute = place.rpartition(".")
        if name in modules:
            setattr(modules[name], attribute, value)


def _is_state(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_state, value))
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.grad_fn is None


class RNNCallback(Callback):
    """Lets a model return `(pred, raw_out, out)`: loss and metrics get `pred`, the others are kept for one batch.

    `raw_out` is what the last recurrent layer put out, `out` the same after dropout; of a list of layers the last
    counts. It acts in `after_pred`. Source: docs.fast.ai/callback.rnn. Cost per batch: under a microsecond.
    """

    run_after = ModelResetter

    raw_out: Any = None  # (bs, seq_len, n_hid) before dropout; None outside of a batch
    out: Any = None  # the same after dropout

    def before_fit(self) -> None:
        check_alone(RNNCallback, self.learn, "split what the model returns")

    def after_pred(self) -> None:
        learn = self.learn
        outputs = learn.pred
        if not isinstance(outputs, (tuple, list)) or len(outputs) != 3:
            raise ValueError(_not_three(learn.model, outputs))
        learn.pred, self.raw_out, self.out = [o[-1] if isinstance(o, (tuple, list)) else o for o in outputs]

    def cleanup_batch(self) -> None:
        self.raw_out = self.out = None


def _not_three(model: Any, outputs: Any) -> str:
    n = f"{len(outputs)} things" if isinstance(outputs, (tuple, list)) else f"a {type(outputs).__name__}"
    return (
        f"`RNNCallback` splits what the model returns into (pred, raw_out, out), and `{type(model).__name__}` "
        f"returned {n}. Return these three, or leave this callback out."
    )


class RNNRegularizer(Callback):
    """Adds activation regularization to `loss_grad`: `alpha` times the mean square of `out`, and `beta` times that of
    the change of `raw_out` from one step of the sequence to the next.

    The recorded loss stays without them. It acts in `after_loss` of training batches and needs an RNNCallback.
    Source: Merity, Keskar and Socher, arXiv 1708.02182, section 4.6 (AR and TAR). Cost per batch: the two means.
    """

    order, run_valid = RNNCallback.order + 1, False

    def __init__(self, alpha: float = 0.0, beta: float = 0.0):
        for name, rate in (("alpha", alpha), ("beta", beta)):
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate >= 0:
                raise ValueError(f"`{name}={rate!r}`: pass how much of the penalty is added, a number of 0 or more.")
        self.alpha, self.beta = alpha, beta

    def before_fit(self) -> None:
        """Refuses to run without the callback that it reads."""
        if not self.learn._grab_cbs(RNNCallback):
            raise ValueError("`RNNRegularizer` reads what `RNNCallback` keeps: add both, as `rnn_cbs(alpha, beta)`.")

    def after_loss(self) -> None:
        learn = self.learn
        rnn = learn._grab_cbs(RNNCallback)[-1]  # `learn.rnn` may be a part of the model
        if self.alpha:
            learn.loss_grad = learn.loss_grad + self.alpha * activation_penalty(rnn.out)
        if self.beta and rnn.raw_out.shape[1] > 1:
            learn.loss_grad = learn.loss_grad + self.beta * change_penalty(rnn.raw_out)


def activation_penalty(out: Tensor) -> Tensor:
    """The mean square of what a layer put out."""
    return out.float().pow(2).mean()


def change_penalty(out: Tensor) -> Tensor:
    """The mean square of the change along dimension 1, which is the sequence and is longer than 1."""
    return (out[:, 1:] - out[:, :-1]).float().pow(2).mean()


def rnn_cbs(alpha: float = 0.0, beta: float = 0.0) -> list[Callback]:
    """The callbacks of a recurrent model that returns `(pred, raw_out, out)`, with a regularizer if there is a rate."""
    return [ModelResetter(), RNNCallback(), *([RNNRegularizer(alpha, beta)] if alpha or beta else [])]
