"""The algorithms: each is its steppers in a row, or torch's fused function in their place.

`fused=False` takes the steppers where there is a fused form too; both give the same numbers.
"""

from functools import partial
from typing import Any

from learnloop.optim.fused import fused_adam, fused_sgd
from learnloop.optim.lookahead import Lookahead
from learnloop.optim.optimizer import Optimizer
from learnloop.optim.steppers import (
    adam_step,
    average_grad,
    average_sqr_grad,
    l2_reg,
    lamb_step,
    larc_layer_lr,
    larc_step,
    lion_step,
    momentum_step,
    qhadam_step,
    radam_step,
    rms_prop_step,
    sgd_step,
    step_stat,
    weight_decay,
)

#: Both averages as Adam and its kin keep them.
_AVERAGES = (partial(average_grad, dampening=True), average_sqr_grad, step_stat)


class SGD(Optimizer):
    """Stochastic gradient descent; with `mom`, along a sum of gradients in which each step shrinks the older ones.

    Made with `mom=0` it stays without momentum, whatever is set later. The gradient enters the sum in full
    (undampened). `decouple_wd`: decay shrinks weights by `lr * wd` (Loshchilov and Hutter, arXiv 1711.05101);
    else `wd` times the weight is added to the gradient.
    """

    def __init__(
        self, params: Any, lr: Any, mom: Any = 0.0, wd: Any = 0.0, decouple_wd: bool = True, fused: bool = True
    ):
        has_mom = _moves(mom, params)
        cbs = [_decay(decouple_wd), *([average_grad, momentum_step] if has_mom else [sgd_step])]
        whole = partial(fused_sgd, has_momentum=has_mom, decouple_wd=decouple_wd)
        super().__init__(params, whole if fused else cbs, lr=lr, mom=mom, wd=wd)


class RMSProp(Optimizer):
    """The gradient, or with `mom` a sum of gradients, over the root of the average square (Hinton's lecture 6e)."""

    def __init__(
        self,
        params: Any,
        lr: Any,
        mom: Any = 0.0,
        sqr_mom: Any = 0.99,
        eps: Any = 1e-8,
        wd: Any = 0.0,
        decouple_wd: bool = True,
    ):
        averages = [average_grad, average_sqr_grad] if _moves(mom, params) else [average_sqr_grad]
        cbs = [_decay(decouple_wd), *averages, rms_prop_step]
        super().__init__(params, cbs, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


class Adam(Optimizer):
    """Adam (arXiv 1412.6980), with decoupled weight decay (AdamW, arXiv 1711.05101) unless `decouple_wd=False`.

    torch's update is fastai's, number for number: averages dampened, `eps` added after the correction of both.
    """

    def __init__(
        self,
        params: Any,
        lr: Any,
        mom: Any = 0.9,  # of the average of gradients
        sqr_mom: Any = 0.99,  # of the average of their squares
        eps: Any = 1e-5,
        wd: Any = 0.01,
        decouple_wd: bool = True,
        fused: bool = True,
    ):
        cbs = [_decay(decouple_wd), *_AVERAGES, adam_step]
        whole = partial(fused_adam, decouple_wd=decouple_wd)
        super().__init__(params, whole if fused else cbs, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


class RAdam(Optimizer):
    """Rectified Adam (arXiv 1908.03265): plain momentum at first, until the squares rest on enough steps."""

    def __init__(
        self,
        params: Any,
        lr: Any,
        mom: Any = 0.9,
        sqr_mom: Any = 0.99,
        eps: Any = 1e-5,
        wd: Any = 0.0,
        beta: Any = 0.0,  # above 0: SAdam, a softplus of that sharpness around the denominator
        decouple_wd: bool = True,
    ):
        cbs = [_decay(decouple_wd), *_AVERAGES, radam_step]
        super().__init__(params, cbs, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd, beta=beta)


class QHAdam(Optimizer):
    """Quasi-hyperbolic Adam (arXiv 1810.06801): mixes each average with the gradient of the moment."""

    def __init__(
        self,
        params: Any,
        lr: Any,
        mom: Any = 0.999,
        sqr_mom: Any = 0.999,
        nu_1: Any = 0.7,  # share of the average of gradients
        nu_2: Any = 1.0,  # share of the average of squares
        eps: Any = 1e-8,
        wd: Any = 0.0,
        decouple_wd: bool = True,
    ):
        cbs = [_decay(decouple_wd), *_AVERAGES, qhadam_step]
        super().__init__(params, cbs, lr=lr, nu_1=nu_1, nu_2=nu_2, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


class Larc(Optimizer):
    """SGD with a rate per parameter tensor from the norms of value and gradient (arXiv 1708.03888)."""

    def __init__(
        self,
        params: Any,
        lr: Any,
        mom: Any = 0.9,
        clip: bool = True,  # rates are at most `lr`: LARC; without: LARS
        trust_coeff: Any = 0.02,
        eps: Any = 1e-8,
        wd: Any = 0.0,
        decouple_wd: bool = True,
    ):
        cbs = [_decay(decouple_wd), *([average_grad] if _moves(mom, params) else []), partial(larc_layer_lr, clip=clip)]
        super().__init__(params, [*cbs, larc_step], lr=lr, mom=mom, trust_coeff=trust_coeff, eps=eps, wd=wd)


class Lamb(Optimizer):
    """Adam with steps scaled to the size of each parameter tensor, for large batches (arXiv 1904.00962)."""

    def __init__(
        self,
        params: Any,
        lr: Any,
        mom: Any = 0.9,
        sqr_mom: Any = 0.99,
        eps: Any = 1e-5,
        wd: Any = 0.0,
        decouple_wd: bool = True,
    ):
        cbs = [_decay(decouple_wd), *_AVERAGES, lamb_step]
        super().__init__(params, cbs, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


class Lion(Optimizer):
    """The sign of an average as the direction (arXiv 2302.06675): take a third of Adam's `lr`, thrice its `wd`."""

    def __init__(
        self,
        params: Any,
        lr: Any,
        mom: Any = 0.9,  # share of the average in the direction
        avg_mom: Any = 0.99,  # of the average itself
        wd: Any = 0.0,
        decouple_wd: bool = True,
    ):
        super().__init__(params, [_decay(decouple_wd), lion_step], lr=lr, mom=mom, avg_mom=avg_mom, wd=wd)


def ranger(
    params: Any,
    lr: Any,
    mom: Any = 0.95,
    wd: Any = 0.01,
    eps: Any = 1e-6,
    k: int = 6,  # steps from one look ahead to the next
    alpha: float = 0.5,  # how far the slow weights go towards the fast ones
    **kwargs: Any,  # of RAdam: sqr_mom beta decouple_wd
) -> Lookahead:
    """`Lookahead` over `RAdam` (github.com/lessw2020/Ranger-Deep-Learning-Optimizer)."""
    return Lookahead(RAdam(params, lr=lr, mom=mom, wd=wd, eps=eps, **kwargs), k=k, alpha=alpha)


def _decay(decoupled: bool) -> Any:
    return weight_decay if decoupled else l2_reg


def _moves(mom: Any, params: Any) -> bool:
    """Whether any group is given momentum, by the argument or by a hyper of its own."""
    own = [getattr(group, "hypers", {}).get("mom", 0) for group in params] if isinstance(params, (list, tuple)) else []
    given = list(mom) if hasattr(mom, "__iter__") else [mom]
    return any(v != 0 for v in [*given, *own])
