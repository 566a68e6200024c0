"""Functions put around one step of a learner's loop, and taken away again in any order."""

from collections.abc import Callable
from functools import partial
from typing import Any

Layer = Callable[[Callable[[], None]], None]  # takes the step that it is around, and calls it or not


class _Layers:
    """Stands in the place of a learner's method."""

    def __init__(self, method: Callable[[], None]):
        self.method = method
        self.layers: list[Layer] = []  # from the inside to the outside

    def __call__(self) -> None:
        self._run(len(self.layers))

    def _run(self, n: int) -> None:
        if n:
            self.layers[n - 1](partial(self._run, n - 1))
        else:
            self.method()


def put_around(learn: Any, step: str, layer: Layer) -> None:
    """From now on `layer(inner)` runs where the learner's method `step` would; `inner()` is that, or an earlier layer.

    For what no event can do: to catch an error, or to act after the last handler of an event.
    """
    if step not in learn.__dict__:
        learn.__dict__[step] = _Layers(getattr(learn, step))
    learn.__dict__[step].layers.append(layer)


def take_away(learn: Any, step: str, layer: Layer) -> None:
    """Ends what `put_around` began; nothing where it did not."""
    around = learn.__dict__.get(step)
    if around is not None and layer in around.layers:
        around.layers.remove(layer)
        if not around.layers:
            del learn.__dict__[step]
