"""How large gradients and updates are, layer by layer, while a model trains."""

from typing import Any

import torch
from torch import Tensor, nn

from learnloop import plots
from learnloop.insight.series import Series, joined
from learnloop.loop.callback import Callback

#: What is kept of a layer: norms of its gradients, of its update, and of its weights before that.
NUMBERS = ("gradient", "update", "weights")


class GradientStats(Callback):
    """Keeps for each layer the norm of its gradients and how far an update moves its weights, in parts of their norm.

    A layer is a module with parameters of its own. Gradients are those that the step uses, unscaled and clipped; they
    are measured in `before_step`, with a copy of the weights for the difference in `after_step`. A step that was
    cancelled counts for nothing. Source: Karpathy, CS231n notes, "Ratio of weights:updates", where 1e-3 is a good
    ratio. Cost per `every`-th update: a copy of the weights and four passes over them,
    25 µs for each small tensor on a CPU; nothing waits for the device.
    """

    order, run_valid, tasks, reads_only = 90, False, ("fit",), True

    def __init__(self, every: int = 1):  # updates from one that is measured to the next
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every={every!r}`: pass a whole number of updates, 1 or more.")
        self.every = every
        self.names: list[str] = []  # of the layers, in the model
        self._layers: list[int] = []  # the number of the layer of each parameter
        self._rows = Series()  # norms of gradients, updates and weights, (3 * parameters,), -1 for those that stay
        self._drop()

    def _drop(self) -> None:
        self._params: list[Tensor] = []  # of the model, while a fit goes on
        self._copies: list[Tensor] = []  # their values before this step
        self._moving: list[int] = []  # the numbers of those that this step moves
        self._norms: list[Tensor] = []  # of their gradients, then of their values

    def before_fit(self) -> None:
        self._drop()
        self.names, self._layers, self._rows = [], [], Series()
        model = self.learn.model
        seen: set[Tensor] = set()
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            own = [p for p in module.parameters(recurse=False) if p not in seen]
            if own:
                seen.update(own)
                self._params += own
                self._layers += [len(self.names)] * len(own)
                self.names.append(name or type(module).__name__)

    def before_step(self) -> None:
        self._moving = []
        if not self.learn.opt_iter % self.every:
            self._moving = [i for i, p in enumerate(self._params) if p.grad is not None]
            if self._moving:
                self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        params = [self._params[i] for i in self._moving]
        gradients: list[Any] = [p.grad for p in params]
        self._copies = [p.clone() for p in params]
        dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        self._norms = _norms([*dense, *self._copies])

    def after_step(self) -> None:
        if self._moving and self.learn.stepped:
            self._keep()
        self._moving, self._copies, self._norms = [], [], []

    @torch.no_grad()
    def _keep(self) -> None:
        n = len(self._moving)
        torch._foreach_sub_(self._copies, [self._params[i] for i in self._moving])
        found = [*self._norms[:n], *_norms(self._copies), *self._norms[n:]]
        row = joined(found)
        if n < len(self._params):
            whole = row.new_full((len(NUMBERS), len(self._params)), -1.0)
            whole[:, self._moving] = row.view(len(NUMBERS), n)
            row = whole.view(-1)
        self._rows.append(self.learn.opt_iter - 1, row)

    def cleanup_step(self) -> None:
        self._moving, self._copies, self._norms = [], [], []

    def cleanup_fit(self) -> None:
        self._drop()

    # What survives a resume

    def state_dict(self) -> dict[str, Any]:
        return {"names": list(self.names), "layers": list(self._layers), "rows": self._rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self._layers = list(state["names"]), list(state["layers"])
        self._rows.load_state_dict(state["rows"])

    # Looking at it

    @property
    def iters(self) -> list[int]:
        """The updates that were measured, counted through the fit from 0."""
        return self._rows.iters

    @property
    def norms(self) -> dict[str, list[float]]:
        """The norm of the gradients, by layer, a number per measured update; NaN where it had none."""
        return self._by_layer(self._numbers()[:, 0])

    @property
    def ratios(self) -> dict[str, list[float]]:
        """The norm of the update by that of the weights before it, by layer, a number per measured update."""
        numbers = self._numbers()
        return self._by_layer(numbers[:, 1] / numbers[:, 2])

    def _numbers(self) -> Tensor:
        """Norms of whole layers, shape (updates, 3, layers): the parameters of each as one vector."""
        rows = self._rows.numbers().reshape(len(self._rows), len(NUMBERS), len(self._layers)).double()
        layers = torch.tensor(self._layers, dtype=torch.long)
        stays = rows == -1
        nothing = torch.zeros(*rows.shape[:2], len(self.names), dtype=torch.double)
        norms = nothing.index_add(2, layers, rows.square().masked_fill(stays, 0.0)).sqrt()
        return norms.masked_fill(nothing.index_add(2, layers, (~stays).double()) == 0, torch.nan)

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


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each; of half precision too, without overflow."""
    small = (torch.float16, torch.bfloat16)
    return list(torch._foreach_norm([t.float() if t.dtype in small else t for t in tensors]))
