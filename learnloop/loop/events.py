"""The events, written down once in firing order; dispatcher, checks, printouts and tests derive from this list."""

from difflib import get_close_matches
from typing import NamedTuple

PICTURE = """
after_create                    the learner stands, its callbacks included; fires once
before_fit                      a fit begins
  before_epoch                  an epoch begins
    before_train                the training phase begins
      before_batch              a batch is split into xb and yb and lies on the device
        after_pred              pred is there
        after_loss              loss and loss_grad are there
        before_backward         gradients are about to be computed
        after_cancel_backward   the backward pass was cancelled
        after_backward          gradients are there
        cleanup_backward        the backward pass is over, whatever happened
        before_step             the optimizer is about to step
        after_cancel_step       the step was cancelled
        after_step              the weights have moved, gradients are still there
        cleanup_step            the step is over, whatever happened
      after_cancel_batch        the batch was cancelled
      after_batch               the batch is over, counted and recorded
      cleanup_batch             the batch is over, whatever happened
    after_cancel_train          the training phase was cancelled
    after_train                 the training phase is over
    cleanup_train               the training phase is over, whatever happened
    before_validate             the validation phase begins; its batches fire the events above, up to after_loss
    after_cancel_validate       the validation phase was cancelled
    after_validate              the validation phase is over
    cleanup_validate            the validation phase is over, whatever happened
  after_cancel_epoch            the epoch was cancelled
  after_epoch                   the epoch is over
  cleanup_epoch                 the epoch is over, whatever happened
after_cancel_fit                the fit was cancelled
after_fit                       the fit is over
cleanup_fit                     the fit is over, whatever happened
"""


class Event(NamedTuple):
    """One line of the picture."""

    name: str
    depth: int  # how many spans it lies in
    doc: str


def _read(picture: str) -> tuple[Event, ...]:
    lines = [line for line in picture.splitlines() if line]
    return tuple(
        Event(name, (len(line) - len(line.lstrip())) // 2, doc.strip())
        for line in lines
        for name, _, doc in [line.strip().partition(" ")]
    )


LOOP = _read(PICTURE)
EVENTS = tuple(e.name for e in LOOP)
DOCS = {e.name: e.doc for e in LOOP}
PREFIXES = ("before_", "after_", "cleanup_")

#: Events that `run_train` and `run_valid` filter: everything inside the batch span, its cancel included, no cleanups.
BATCH_EVENTS = tuple(
    n for n in EVENTS[EVENTS.index("before_batch") : EVENTS.index("cleanup_batch")] if not n.startswith("cleanup_")
)

#: What fastai called these events before, and the name of today.
FORMER_NAMES = {
    **{f"begin_{s}": f"before_{s}" for s in ("fit", "epoch", "train", "batch", "validate", "backward", "step")},
    "on_train_begin": "before_fit",
    "on_epoch_begin": "before_epoch",
    "on_batch_begin": "before_batch",
    "on_loss_begin": "after_pred",
    "on_backward_begin": "before_backward",
    "on_backward_end": "after_backward",
    "on_step_begin": "before_step",
    "on_step_end": "after_step",
    "on_batch_end": "after_batch",
    "on_epoch_end": "after_epoch",
    "on_train_end": "after_fit",
}


class _Events:
    """Every event as an attribute that equals its name, so that `event.<tab>` lists them and a typo fails at once."""

    def __getattr__(self, name: str) -> str:
        if name in DOCS:
            return name
        raise AttributeError(unknown_event(name))

    def __dir__(self) -> list[str]:
        return list(EVENTS)

    def __repr__(self) -> str:
        return "\n".join(f"{'  ' * e.depth}{e.name:<{30 - 2 * e.depth}} {e.doc}" for e in LOOP)


event = _Events()


def unknown_event(name: str) -> str:
    """The message for a name that is no event, with the nearest one that is."""
    if name in FORMER_NAMES:
        return f"`{name}` is an earlier name of an event; today it is `{FORMER_NAMES[name]}`."
    near = get_close_matches(name, EVENTS, n=1)
    return f"`{name}` is no event." + (f" Did you mean `{near[0]}`?" if near else " `event.<tab>` lists them.")


def one_edit_away(name: str) -> str | None:
    """The event that differs from `name` by one letter added, dropped or replaced, or by two neighbours swapped."""
    return next((e for e in EVENTS if _one_edit(name, e)), None)


def _one_edit(a: str, b: str) -> bool:
    if a == b:
        return False
    start = next((i for i, (p, q) in enumerate(zip(a, b, strict=False)) if p != q), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    swapped = rest_a[:2] == rest_b[:2][::-1] and rest_a[2:] == rest_b[2:]
    return swapped or rest_a[1:] == rest_b[1:] or rest_a == rest_b[1:] or rest_a[1:] == rest_b
