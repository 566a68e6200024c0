"""The loop's grammar, written down once more: whether a list of events is one that a loop may fire.

It shares nothing with the loop but the names of the events. Between them stand the exceptions that callbacks raised:
`Raised("batch")` for a CancelBatchException, `Raised("error")` for anything else. A span is begun by `before_X` and
gone with `cleanup_X`. In between it moves through the states of `STATES`; an exception leaves out everything but
cleanups until it comes to a span that absorbs it.
"""

from typing import NamedTuple


class Raised(NamedTuple):
    """A callback raised something in the event before."""

    kind: str  # the span that a cancel leaves; 'error' for an error


class Wrong(AssertionError):
    """This is no list of events that a loop may fire."""


#: Span -> the spans inside it, in their order; `*` for one that may come again.
INSIDE = {
    None: ["fit"],
    "fit": ["epoch*"],
    "epoch": ["train", "validate"],
    "train": ["batch*"],
    "validate": ["batch*"],
    "batch": ["backward", "step"],
    "backward": [],
    "step": [],
}
#: Events that are the beginning or the end of no span.
BARE = ["after_pred", "after_loss"]


class Open:
    """A span that has begun."""

    def __init__(self, name, is_training):
        self.name, self.is_training = name, is_training
        self.state = "before"  # then 'body', 'cancelled', 'after'
        self.n_inside = 0
        self.seen = []  # of its body: spans that were gone through, and bare events

    def may_begin(self, name):
        """Whether the body goes on with that span or event."""
        if self.name == "batch":
            body = [*BARE, "backward", "step"] if self.is_training else BARE
        else:
            body = INSIDE[self.name]
        if f"{name}*" in body:
            return True
        order = [n for n in body if not n.endswith("*")]
        # Each once and in order. What a cancel of the epoch's training leaves out is nothing: validation follows.
        return name in order and self.seen == order[: order.index(name)]


def check(trace, **sizes):
    """Raises Wrong, with the place, where a list of events and of what was raised in them is not in the grammar.

    `sizes` are the numbers of spans in one that goes to its end: `fit=2, train=4, validate=1`. Returns the reader, with
    `left`: what left the outermost span.
    """
    reader = Reader(sizes)
    for i, item in enumerate(trace):
        try:
            reader.read(item)
        except Wrong as wrong:
            around = " ".join(map(str, trace[max(0, i - 8) : i + 2]))
            raise Wrong(f"{wrong} at number {i}: … {around}") from None
    reader.end()
    return reader


class Reader:
    """Reads events one by one, with the spans that are open and what is flying through them."""

    def __init__(self, sizes):
        self.open = []
        self.flying = None  # what was raised and is not absorbed yet
        self.last = ""  # event
        self.left = None  # what left the outermost span
        self.sizes = sizes

    def read(self, item):
        if isinstance(item, Raised):
            self.raised(item.kind)
        elif item.startswith("cleanup_"):
            self.cleanup(item.removeprefix("cleanup_"))
        else:
            self.absorb(item)
            self.event(item)
        if not isinstance(item, Raised):
            self.last = item

    def raised(self, kind):
        if self.last.startswith("cleanup_"):  # the span is gone; there is nothing left to cancel
            self.flying = "error"
            if not self.open:
                self.left = "error"
        elif self.flying is None:
            self.flying = kind
        else:
            raise Wrong(f"{kind} raised while {self.flying} is flying")

    def absorb(self, item):
        """What is flying ends at its span: with `after_cancel_X`, or where that or `after_X` raised it, silently."""
        if self.flying is None:
            return
        if not self.open or self.open[-1].name != self.flying:
            raise Wrong(f"{item} while {self.flying} is flying")
        top = self.open[-1]
        if top.state in ("before", "body"):
            if item != f"after_cancel_{top.name}":
                raise Wrong(f"{item}, and not after_cancel_{top.name}, after {self.flying} was raised")
        elif top.state == "cancelled" and item != f"after_{top.name}":
            raise Wrong(f"{item} after a cancel in after_cancel_{top.name}")
        elif top.state == "after":
            raise Wrong(f"{item} after a cancel in after_{top.name}, and not its cleanup")
        if item != f"after_cancel_{top.name}":
            self.flying = None

    def event(self, item):
        top = self.open[-1] if self.open else None
        if item.startswith("before_"):
            self.begin(item.removeprefix("before_"), top)
        elif item.startswith("after_cancel_"):
            self.cancelled(item.removeprefix("after_cancel_"), top)
        elif item in BARE:
            if top is None or top.name != "batch" or top.state not in ("before", "body") or not top.may_begin(item):
                raise Wrong(f"{item} is out of place")
            top.state = "body"
            top.seen.append(item)
        else:
            self.after(item.removeprefix("after_"), top)

    def begin(self, name, top):
        parent = Open(None, None) if top is None else top
        if parent.state not in ("before", "body") or not parent.may_begin(name):
            raise Wrong(f"before_{name} is out of place")
        parent.state = "body"
        in_training = name == "train" or (parent.is_training and name != "validate")
        self.open.append(Open(name, in_training))

    def cancelled(self, name, top):
        if top is None or top.name != name or self.flying != name or top.state not in ("before", "body"):
            raise Wrong(f"after_cancel_{name}, and nothing cancelled it")
        top.state, self.flying = "cancelled", None

    def after(self, name, top):
        if top is None or top.name != name or top.state == "after":
            raise Wrong(f"after_{name} is out of place")
        if name == "batch" and top.state != "cancelled":
            missing = [n for n in ([*BARE, "backward", "step"] if top.is_training else BARE) if n not in top.seen]
            if missing:
                raise Wrong(f"after_batch, and there was no {missing[0]}")
        if name in self.sizes and top.state != "cancelled" and top.n_inside != self.sizes[name]:
            raise Wrong(f"after_{name} after {top.n_inside} spans")
        if name == "epoch" and top.state != "cancelled" and top.seen != ["train", "validate"]:
            raise Wrong(f"after_epoch after {top.seen}")
        top.state = "after"

    def cleanup(self, name):
        if not self.open or self.open[-1].name != name:
            raise Wrong(f"cleanup_{name} is out of place")
        top = self.open.pop()
        if self.flying is None and top.state != "after":
            raise Wrong(f"cleanup_{name} without after_{name}, and nothing is flying")
        if self.flying == top.name and top.state in ("before", "body"):
            raise Wrong(f"cleanup_{name} without after_cancel_{name}")
        if self.flying == top.name:  # raised in its `after_cancel_X` or `after_X`
            if top.state == "cancelled":
                raise Wrong(f"cleanup_{name} without after_{name}")
            self.flying = None
        if self.open:
            parent = self.open[-1]
            parent.n_inside += 1
            if f"{name}*" not in INSIDE[parent.name]:
                parent.seen.append(name)
        else:
            self.left = self.flying

    def end(self):
        if self.open:
            raise Wrong(f"{self.open[-1].name} is still open")
