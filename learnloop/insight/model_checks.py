"""Checks of the model and its loss: each takes a subject and returns a finding."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from learnloop.callbacks.dropout import MCDropoutCallback
from learnloop.callbacks.freezing import BnFreeze
from learnloop.data.batches import find_bs, rebuilt
from learnloop.insight.expected import Kind, knowing_all, name_of
from learnloop.insight.findings import FAULT, OK, WARNING, Finding, NotApplicable
from learnloop.insight.subject import Start, Subject
from learnloop.insight.trials import Probe, Ready, evaluate, modules_of, train
from learnloop.loop.cancel import CancelTrainException
from learnloop.optim.groups import as_groups, with_names

SHOWN = 4  # names in a text
ON_ONE_BATCH = 200  # updates, at most
UPDATES = 3  # after which every parameter has had a gradient: what starts at zero lets others have none at first


def loss_at_start(subject: Subject) -> Finding:
    """The first loss is about that of predictions that know nothing."""
    start = subject.start
    if start.loss is None:
        raise NotApplicable("the first training batch has no loss.")
    if not math.isfinite(start.loss):
        return Finding(
            FAULT, f"the first loss is {start.loss}.", start.loss, "Look for what is not a number in the data."
        )
    expected = start.expected()
    text = f"{start.loss:.4g}; predictions that know nothing have {expected:.4g}"
    too_much = 4.0 if start.kind is Kind.NUMBERS else 1.5
    if start.loss > too_much * expected + 0.1:
        return Finding(WARNING, f"{text}.", start.loss, _advice_for_start(start))
    if start.loss < 0.5 * expected:
        return Finding(OK, f"{text}: the model has learned already.", start.loss)
    return Finding(OK, f"{text}.", start.loss)


def _advice_for_start(start: Start) -> str:
    if start.kind is Kind.NUMBERS:
        y = start.yb[0].double()
        return (
            f"The targets have mean {y.mean():.4g} and deviation {y.std():.4g}: subtract the one, divide by the other; "
            "or set the bias of the last layer to the mean."
        )
    return "The last layer is sure of what it cannot know: normalise the inputs, or start its weights smaller."


def outputs_fit_the_loss(subject: Subject) -> Finding:
    """Predictions are what the loss takes: no softmax twice, no shapes that are broadcast, no range too small."""
    start = subject.start
    if start.kind is None or start.loss_func is None or not start.is_plain:
        raise NotApplicable("the loss is none that is known, or there are several predictions or targets.")
    problem = _misfit(start.kind, start.pred, start.yb[0], start.last, name_of(start.loss_func))
    if problem is None:
        return Finding(OK, f"`{name_of(start.loss_func)}` takes {start.kind.value}, and gets them.")
    return Finding(FAULT, problem[0], None, problem[1])


def _misfit(kind: Kind, pred: Tensor, y: Tensor, last: str, loss: str) -> tuple[str, str] | None:
    """(what is wrong, what to do), or None."""
    if kind is Kind.CLASSES and pred.ndim > 1:
        sums = pred.float().sum(-1)
        if pred.shape[-1] == 1 and pred.ndim == 2:
            return (
                f"`{loss}` over one class is always 0.",
                "Give it an output per class, or take a BCE loss.",
            )
        if bool((pred >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
            return f"`{loss}` takes a softmax, and the predictions have had one.", "Leave the model's own softmax out."
    if kind is Kind.LABELS and last == "Sigmoid":
        return f"`{loss}` takes a sigmoid, and the predictions have had one.", "Leave the model's own sigmoid out."
    if kind is Kind.LOG_PROBABILITIES and bool((pred.float().logsumexp(1).abs() > 1e-2).any()):
        return f"`{loss}` takes log probabilities, and these do not sum to 1.", "Use CrossEntropyLoss."
    if kind is Kind.NUMBERS:
        return _misfit_of_numbers(pred, y, last, loss)
    return None


_RANGES = {"Relu": (0.0, math.inf), "Sigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0)}


def _misfit_of_numbers(pred: Tensor, y: Tensor, last: str, loss: str) -> tuple[str, str] | None:
    if pred.shape != y.shape and not loss.endswith("Flat"):
        shapes = f"predictions of shape {list(pred.shape)} and targets of shape {list(y.shape)}"
        return f"`{loss}` broadcasts {shapes} against each other.", "Give both the same shape, as by `y[:, None]`."
    low, high = _RANGES.get(last, (-math.inf, math.inf))
    if float(y.min()) < low - 1e-6 or float(y.max()) > high + 1e-6:
        reach = f"from {float(y.min()):.4g} to {float(y.max()):.4g}"
        return f"targets reach {reach}, and the model ends in {last}.", "Leave that out, or scale the targets."
    return None


def gradients(subject: Subject) -> Finding:
    """Every trainable parameter is in the optimizer, and gets a gradient that is not zero."""
    learn = subject.learn
    named = {name: p for name, p in _named_parameters(learn) if p.requires_grad}
    states: dict[str, set[str]] = {name: set() for name in named}

    def note(learn: Any) -> None:
        for name, p in named.items():
            states[name].add(_state(p.grad))

    train(learn, subject.ready(), UPDATES, Probe(before_step=note))
    without = [n for n, seen in states.items() if seen <= {"none"}]
    if without:
        text = f"{_some(without)} got no gradient: {len(without)} of {len(named)} trainable parameters."
        advice = "Look for `detach()`, `no_grad()`, `.data`, numpy or `argmax` behind them, or for layers never called."
        return Finding(FAULT, text, len(without), advice)
    return _of_states(states, named, _optimized(learn))


def _of_states(states: dict[str, set[str]], named: dict[str, Any], optimized: set[int] | None) -> Finding:
    outside = [n for n, p in named.items() if optimized is not None and id(p) not in optimized]
    if outside:
        text = f"{_some(outside)}: trainable, but in no group of the optimizer ({len(outside)} of {len(named)})."
        return Finding(FAULT, text, len(outside), "Let `splitter` return them, or freeze them.")
    infinite = [n for n, seen in states.items() if seen == {"not finite"}]
    if infinite:
        text = f"{_some(infinite)}: gradients that are no finite numbers."
        return Finding(FAULT, text, len(infinite), "Lower the rate, look for a division by zero or a log of 0.")
    zero = [n for n, seen in states.items() if seen <= {"none", "zero"}]
    if zero:
        text = f"{_some(zero)}: gradients of exactly 0 in {UPDATES} batches ({len(zero)} of {len(named)} parameters)."
        return Finding(WARNING, text, len(zero), "Dead units, or a factor of zero on the way to the loss.")
    return Finding(OK, f"all {len(named)} trainable parameters get one.", 0)


def _state(grad: Any) -> str:
    if grad is None:
        return "none"
    values = grad.coalesce().values() if grad.is_sparse else grad
    if not bool(values.isfinite().all()):
        return "not finite"
    return "there" if bool(values.any()) else "zero"


def _named_parameters(learn: Any) -> Iterator[tuple[str, Any]]:
    return learn.model.named_parameters() if isinstance(learn.model, nn.Module) else iter(())


def _optimized(learn: Any) -> set[int] | None:
    """The ids of the parameters in the optimizer, as it is or would be made; None where that cannot be told."""
    try:
        lists = learn.opt.param_lists if learn.opt else as_groups(with_names(learn.splitter(learn.model), learn.model))
    except (TypeError, ValueError, AttributeError):
        return None
    return {id(p) for group in lists for p in group}


def _some(names: list[str]) -> str:
    return ", ".join(f"`{n}`" for n in names[:SHOWN]) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )


def modes(subject: Subject) -> Finding:
    """Dropout and batch norm are in train mode while the model trains and in eval mode while it is validated."""
    learn = subject.learn
    watched: dict[str, nn.Module] = {n: m for n, m in modules_of(learn).items() if isinstance(m, _MODAL)}
    if not watched:
        raise NotApplicable("the model has no layer for which the mode makes a difference.")
    frozen: list[str] = []
    active: list[str] = []
    train(learn, subject.ready(), 1, Probe(after_pred=lambda _: frozen.extend(_in_mode(watched, False))))
    evaluate(learn, subject.ready(), probe=Probe(after_pred=lambda _: active.extend(_in_mode(watched, True))))
    meant = _STATISTICS if _has(learn, BnFreeze) else ()
    frozen = [n for n in frozen if _is_trained(watched[n]) and not isinstance(watched[n], meant)]
    if active and not _has(learn, MCDropoutCallback):
        advice = "Let TrainEvalCallback set the mode, and call no `train()` in the model."
        return Finding(FAULT, f"{_some(active)}: in train mode during validation.", len(active), advice)
    if frozen:
        advice = "Call no `eval()` in the model, and let its `train()` reach them; where it is meant, use BnFreeze."
        return Finding(FAULT, f"{_some(frozen)}: in eval mode during training.", len(frozen), advice)
    return Finding(OK, f"{len(watched)} layers of dropout and batch norm change theirs with the phase.", 0)


_STATISTICS = (nn.modules.batchnorm._BatchNorm,)
_DROPOUT = (nn.modules.dropout._DropoutNd,)
_MODAL = (*_STATISTICS, *_DROPOUT)


def _in_mode(modules: dict[str, nn.Module], training: bool) -> list[str]:
    return [n for n, m in modules.items() if m.training is training]


def _is_trained(module: nn.Module) -> bool:
    """Whether a mode of eval in training is no part of freezing the layer."""
    own = list(module.parameters(recurse=False))
    return not own or any(p.requires_grad for p in own)


def _has(learn: Any, kind: type) -> bool:
    return any(isinstance(cb, kind) for cb in learn.cbs)


def samples_apart(subject: Subject) -> Finding:
    """In eval mode the prediction for a sample does not depend on the other samples of its batch."""
    learn, n = subject.learn, find_bs(subject.batch)
    if n < 2:
        raise NotApplicable("a batch has one sample only.")
    other = _with_first_as_last(subject.batch, n)
    (before, _), (again, _), (after, _) = (
        evaluate(learn, Ready([b], learn))[0] for b in (subject.batch,) * 2 + (other,)
    )
    if not all(isinstance(p, Tensor) and p.ndim and len(p) == n for p in (before, after)):
        raise NotApplicable("the predictions are no tensor with a row per sample.")
    noise, moved = _distance(before, again), _distance(before[1:], after[1:])
    if moved > max(1e-4 * float(before.double().std()), 10 * noise):  # some kernels add up in another order each time
        text = f"another first sample moves the predictions for the others, by up to {moved:.3g}."
        advice = (
            "Look for sums, means or a softmax over dimension 0, a `view` that mixes it, batch norm without statistics."
        )
        return Finding(FAULT, text, moved, advice)
    return Finding(OK, f"another first sample leaves the predictions for {n - 1} others alone.", moved)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _with_first_as_last(batch: Any, n: int) -> Any:
    """A copy of a batch in which the first sample is the last one again."""

    def change(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return rebuilt(x, change)
        if not x.ndim or len(x) != n:
            return x
        x = x.clone()
        x[0] = x[-1]
        return x

    return change(batch)


def one_batch(subject: Subject) -> Finding:
    """A training on one batch alone learns it by heart."""
    worst, goal = _way_to_go(subject)
    for lr in (1e-2, 1e-3):
        probe = Probe(subject.seconds, after_batch=lambda learn: _stop_below(learn, goal))
        with _without_dropout(subject.learn):
            losses = train(subject.learn, subject.ready(), ON_ONE_BATCH, probe, lr)
        best = min(losses, default=math.nan)
        text = f"the loss on one batch fell from {worst:.4g} to {best:.4g} in {len(losses)} updates"
        if best <= goal:
            return Finding(OK, f"{text}.", best)
    advice = "What cannot learn one batch by heart learns no set: look at the other findings, then at the targets."
    return Finding(FAULT if len(losses) >= ON_ONE_BATCH else WARNING, f"{text} only.", best, advice)


def _way_to_go(subject: Subject) -> tuple[float, float]:
    """The loss that a training on one batch begins with, or would without having learned, and one that is low."""
    learn, start = subject.learn, subject.start
    if start.loss is None:
        raise NotApplicable("the first training batch has no loss.")
    is_known = start.is_plain and learn.loss_func is not None
    floor = knowing_all(learn.loss_func, start.kind, start.pred, start.yb[0]) if is_known else 0.0
    try:
        worst = max(start.loss, start.expected())
    except NotApplicable:
        worst = start.loss
    return worst, floor + 0.3 * (worst - floor)


def _stop_below(learn: Any, goal: float) -> None:
    if learn.training and float(learn._finished_loss()) <= goal:
        raise CancelTrainException


def _without_dropout(learn: Any) -> Any:
    return _Rates([m for m in modules_of(learn).values() if isinstance(m, _DROPOUT)])


class _Rates:
    """A context in which layers of dropout drop nothing."""

    def __init__(self, layers: Iterable[Any]):
        self.former = [(m, m.p) for m in layers]

    def __enter__(self) -> None:
        for m, _ in self.former:
            m.p = 0.0

    def __exit__(self, *exc: object) -> None:
        for m, p in self.former:
            m.p = p
