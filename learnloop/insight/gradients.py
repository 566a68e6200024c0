"""How large gradients and updates are, layer by layer, while a model trains."""

from typing import Any

import torch
from torch import Tensor, nn

from learnloop import plots
from learnloop.insight.series import Series
from learnloop.loop.callback import Callback

#: What is kept of a layer: norms of its gradients, of its update, and of its weights before that.
NUMBERS = ("gradient", "update", "weights")


class GradientStats(Callback):
    """Keeps for each layer the norm of its gradients and how far an update moves its weights, in parts of their norm.

    A layer is a module with parameters of its own. Gradients are those that the step uses, unscaled and clipped; they
    are measured in `before_step`, with a copy of the weights for the difference in `after_step`. A step that was
    cancelled counts for nothing. Source: Karpathy, CS231n notes, "Ratio of weights:updates", where 1e-3 is a good
    ratio. Cost per `every`-th update: a copy of the weights and four passes over them; nothing waits for the device.
    """

    order, run_valid, tasks, reads_only = 90, False, ("fit",), True

    def __init__(self, every: int = 1):  # updates from one that is measured to the next
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every={every!r}`: pass a whole number of updates, 1 or more.")
        self.every = every
        self.names: list[str] = []  # of the layers, in the model
        self._rows = Series()  # (layers, 3) each
        self._drop()

    def _drop(self) -> None:
        self._params: list[Tensor] = []  # those that this step moves
        self._before: list[Tensor] = []  # their values before it
        self._layer: dict[Tensor, int] = {}  # parameter -> number of its layer, while a fit goes on
        self._norms: list[Tensor] = []  # of gradients and weights, per layer

    def before_fit(self) -> None:
        self._drop()
        self.names, self._rows = [], Series()
        model = self.learn.model
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            own = [p for p in module.parameters(recurse=False) if p not in self._layer]
            if own:
                self._layer.update(dict.fromkeys(own, len(self.names)))
                self.names.append(name or type(module).__name__)

    @torch.no_grad()
    def before_step(self) -> None:
        self._params = []
        if self.learn.opt_iter % self.every:
            return
        self._params = [p for p in self._layer if p.grad is not None]
        if self._params:
            self._before = [p.detach().clone() for p in self._params]
            gradients: list[Any] = [p.grad for p in self._params]
            dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
            self._norms = [self._per_layer(dense), self._per_layer(self._before)]

    @torch.no_grad()
    def after_step(self) -> None:
        if self._params and self.learn.stepped:
            moved = list(torch._foreach_sub([p.detach() for p in self._params], self._before))
            of_gradients, of_weights = self._norms
            row = torch.stack([of_gradients, self._per_layer(moved), of_weights], 1)
            self._rows.append(self.learn.opt_iter - 1, row)
        self._params, self._before, self._norms = [], [], []

    def cleanup_step(self) -> None:
        self._params, self._before, self._norms = [], [], []

    def cleanup_fit(self) -> None:
        self._drop()

    def _per_layer(self, tensors: list[Tensor]) -> Tensor:
        """The norm of all tensors of each layer as one vector; NaN for a layer that has none among them."""
        norms = torch._foreach_norm([t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors])
        of_layer: list[list[Tensor]] = [[] for _ in self.names]
        for p, norm in zip(self._params, norms, strict=True):
            of_layer[self._layer[p]].append(norm.float().to(norms[0].device))
        nan = norms[0].new_full((), torch.nan, dtype=torch.float)
        return torch.stack([torch.linalg.vector_norm(torch.stack(n)) if n else nan for n in of_layer])

    # What survives a resume

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self.names), "rows": self._rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names = list(state["names"])
        self._rows.load_state_dict(state["rows"])

    # Looking at it

    @property
    def iters(self) -> list[int]:
        """The updates that were measured, counted through the fit from 0."""
        return self._rows.iters

    @property
    def norms(self) -> dict[str, list[float]]:
        """The norm of the gradients, by layer, a number per measured update; NaN where it had none."""
        return self._by_layer(self._numbers()[..., 0])

    @property
    def ratios(self) -> dict[str, list[float]]:
        """The norm of the update by that of the weights before it, by layer, a number per measured update."""
        numbers = self._numbers()
        return self._by_layer(numbers[..., 1] / numbers[..., 2])

    def _numbers(self) -> Tensor:
        return self._rows.numbers() if len(self._rows) else torch.empty(0, len(self.names), len(NUMBERS))

    def _by_layer(self, numbers: Tensor) -> dict[str, list[float]]:
        return {name: numbers[:, i].tolist() for i, name in enumerate(self.names)}

    def plot(self, figsize: tuple[float, float] = (12, 4)) -> Any:
        """Norms and ratios over the updates, on logarithmic axes, a line per layer; returns the figure."""
        if not self.iters:
            raise RuntimeError("no update was measured yet. Train first, with this callback on the learner.")
        fig, axes = plots.subplots(2, 2, figsize)
        plots.plot_layers(axes[0], self.iters, self.norms, "norm of the gradient", legend=False, log=True, x="update")
        plots.plot_layers(axes[1], self.iters, self.ratios, "update / weights", log=True, x="update", guide=1e-3)
        return fig
