"""Training on mixtures of two samples: MixUp blends them, CutMix pastes a part of one into the other."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta

from learnloop.data.batches import describe, find_bs
from learnloop.loop.callback import Callback, check_alone
from learnloop.losses import reduce_loss, unreduced

_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)


class MixHandler(Callback):
    """What mixtures have in common: a weight drawn from Beta(alpha, alpha), and targets that follow the inputs.

    A subclass mixes `learn.xb` in its `before_batch` and then calls `mix_targets`. Where the loss takes class numbers
    (it has `y_int`, or is one of torch's cross entropies), the targets stay and the loss is blended: `lf` stands in for
    `learn.loss_func` from `before_train` to `after_train`. Else the targets are blended from `before_batch` until
    `after_batch`, where metrics see them as they were. All draws come from the global generators. Mixtures are for
    training only.
    """

    run_valid = False
    _batchattrs = ("lam", "yb1")
    stack_y = False  # the loss is blended, not the targets
    old_lf: Any = None  # the learner's own loss function, for which `lf` stands in
    lam: Any = None  # weight of each sample in its mixture, (n,), or of all, (1,); of the last batch
    yb1: tuple[Any, ...] = ()  # the targets of those that were mixed in, a tuple as `yb`; empty outside of a batch

    def __init__(self, alpha: float = 0.5):  # near 0 one of the two is nearly all of the mixture; 1: any weight
        if not alpha > 0:
            raise ValueError(f"`alpha` is {alpha}; it shapes Beta(alpha, alpha), so pass more than 0.")
        self.alpha = alpha
        self.distrib = Beta(torch.tensor(float(alpha)), torch.tensor(float(alpha)))
        self._yb: Any = None  # the batch's own targets, while blended ones are in their place

    def mix_targets(self, shuffle: Tensor, lam: Tensor) -> None:
        """Lets targets follow: sample `i` was mixed with sample `shuffle[i]`; its own weight is `lam[i]`, or `lam`."""
        learn = self.learn
        self.lam, self.yb1 = lam, tuple(y[shuffle] for y in learn.yb)
        if not self.stack_y:
            yb = tuple(self._in_floats(y) for y in learn.yb)
            self._yb, learn.yb = learn.yb, tuple(blend(y[shuffle], y, lam) for y in yb)

    def _in_floats(self, y: Tensor) -> Tensor:
        """Targets that can be blended."""
        if y.is_floating_point():
            return y
        if getattr(self.learn.loss_func, "floatify", False):
            return y.float()
        raise TypeError(
            f"{self!r} cannot blend targets {describe(y)}. If they are class numbers, say so on the loss: "
            "`loss_func.y_int = True`; else make them floating point, such as one-hot."
        )

    # The loss

    def before_train(self) -> None:
        learn = self.learn
        check_alone(MixHandler, learn, "mix what the other has mixed")
        self.stack_y = takes_classes(learn.loss_func)
        if self.stack_y:
            self.old_lf, learn.loss_func = learn.loss_func, _Blended(self, learn.loss_func)

    def lf(self, pred: Any, *yb: Any) -> Tensor:
        """The loss of both targets of each mixture, by their weights; outside of training the loss itself."""
        if not self.yb1 or not self.learn.training:
            return self.old_lf(pred, *yb)
        lam = torch.as_tensor(self.lam).reshape(-1)  # a subclass may have a plain number
        with unreduced(self.old_lf) as single:
            loss = blend_losses(single(pred, *self.yb1), single(pred, *yb), lam)
        return reduce_loss(loss, getattr(self.old_lf, "reduction", "mean"))

    def after_batch(self) -> None:
        if self._yb is not None:
            self.learn.yb, self._yb = self._yb, None

    def cleanup_batch(self) -> None:
        if self.learn.training:  # a validation nested in a training batch leaves that one's mixture alone
            self.yb1, self._yb = (), None

    def after_train(self) -> None:
        self._put_back()

    def cleanup_train(self) -> None:
        self._put_back()

    def cleanup_fit(self) -> None:
        self._put_back()  # where `before_train` was sent by hand

    def _put_back(self) -> None:
        learn = self.learn
        if isinstance(learn.loss_func, _Blended) and learn.loss_func.handler is self:
            learn.loss_func = self.old_lf


class MixUp(MixHandler):
    """Blends each sample with another one of its batch, by a weight of its own that is at least 0.5.

    It does so in `before_batch`; inputs are tensors of floating point numbers, all of them blended. Source: Zhang et
    al., arXiv 1710.09412. Cost per batch: a copy of the inputs, and a second loss.
    """

    def __init__(self, alpha: float = 0.4):  # near 0 hardly a mixture; 1: every weight is as likely
        super().__init__(alpha)

    def before_batch(self) -> None:
        learn = self.learn
        lam = self.distrib.sample((find_bs(learn.xb),))
        shuffle = torch.randperm(len(lam))
        for i, x in enumerate(learn.xb):
            _check_input(self, i, x)
        device = learn.xb[0].device
        lam, shuffle = (t.to(device, non_blocking=True) for t in (torch.maximum(lam, 1 - lam), shuffle))
        learn.xb = tuple(blend(x[shuffle], x, lam) for x in learn.xb)
        self.mix_targets(shuffle, lam)


class CutMix(MixHandler):
    """Pastes a box from another image of the batch into each image, the same box in all of them.

    It does so in `before_batch`. The first input is images, (n, …, height, width); others stay as they are. A sample's
    weight is the part of its area that is left. Source: Yun et al., arXiv 1905.04899. Cost per batch: a copy of the
    images, and a second loss.
    """

    def __init__(self, alpha: float = 1.0):  # near 0 the box is nothing or nearly all; 1: any area is as likely
        super().__init__(alpha)

    def before_batch(self) -> None:
        learn = self.learn
        x = learn.xb[0]
        _check_input(self, 0, x, least_ndim=3)
        height, width = x.shape[-2:]
        lam, shuffle = self.distrib.sample((1,)), torch.randperm(len(x))
        x1, y1, x2, y2 = random_box(width, height, lam)
        left = torch.tensor([1 - (x2 - x1) * (y2 - y1) / (width * height)])
        left, shuffle = (t.to(x.device, non_blocking=True) for t in (left, shuffle))
        mixed = x.clone()  # the loader may hand out the same tensor again
        mixed[..., y1:y2, x1:x2] = x[..., y1:y2, x1:x2][shuffle]
        learn.xb = (mixed, *learn.xb[1:])
        self.mix_targets(shuffle, left)

    def rand_bbox(self, W: int, H: int, lam: Tensor) -> tuple[Tensor, ...]:
        """What `random_box` draws, in tensors (1,), as fastai has them."""
        return torch.tensor(random_box(W, H, lam)).split(1)


def random_box(width: int, height: int, lam: Tensor) -> tuple[int, int, int, int]:
    """Left, top, right, bottom: `1 - lam` of the area around a random point, cut off at the edges; `lam` is (1,)."""
    (side,) = torch.sqrt(1.0 - lam).tolist()
    (x,), (y,) = torch.randint(0, width, (1,)).tolist(), torch.randint(0, height, (1,)).tolist()
    dx, dy = round(width * side) // 2, round(height * side) // 2
    return max(x - dx, 0), max(y - dy, 0), min(x + dx, width), min(y + dy, height)


class _Blended:
    """A handler's `lf` with the attributes of the loss that it stands in for: `activation`, `reduction`, …"""

    def __init__(self, handler: MixHandler, loss_func: Any):
        self.handler, self._loss_func = handler, loss_func

    def __call__(self, pred: Any, *yb: Any) -> Tensor:
        return self.handler.lf(pred, *yb)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss_func, name)


def takes_classes(loss_func: Any) -> bool:
    """Whether a loss takes class numbers as targets: it has a true `y_int`, or is one of torch's that do."""
    said = getattr(loss_func, "y_int", None)
    if said is not None:
        return bool(said)
    if isinstance(loss_func, partial):
        return takes_classes(loss_func.func)
    return isinstance(loss_func, _OF_CLASSES) or loss_func is F.cross_entropy or loss_func is F.nll_loss


def blend(other: Tensor, own: Tensor, weight: Tensor) -> Tensor:
    """`weight` of `own` and the rest of `other`; `weight` is one per sample, (n,), or one for all, (1,)."""
    return torch.lerp(other, own, weight.to(own).view(-1, *[1] * (own.ndim - 1)))


def blend_losses(other: Tensor, own: Tensor, weight: Tensor) -> Tensor:
    """`blend` for unreduced losses, which may be flat: all those of the first sample, then those of the second."""
    if own.shape[:1] == weight.shape:
        return blend(other, own, weight)
    rows = other.reshape(len(weight), -1), own.reshape(len(weight), -1)
    return blend(*rows, weight).reshape(own.shape)


def _check_input(cb: Callback, i: int, x: Any, least_ndim: int = 0) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < least_ndim:
        wanted = "floating point images, (n, …, height, width)" if least_ndim else "tensors of floating point numbers"
        raise TypeError(f"{cb!r} mixes {wanted}, and input {i} is {describe(x)}. Convert it in the dataset.")
