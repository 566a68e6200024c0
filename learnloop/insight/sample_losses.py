"""The loss of every single training sample, epoch after epoch: those that stay large may have a wrong label."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from learnloop import plots
from learnloop.callbacks.mixing import MixHandler
from learnloop.data.batches import find_bs, to_detach
from learnloop.data.keyed import indices_of, preserved_randomness, random_states
from learnloop.data.loaders import split_batch, vocab_of
from learnloop.data.once import samples_at
from learnloop.data.show import drawable, label_text, nth
from learnloop.loop.callback import Callback
from learnloop.loop.passes import key_of, place
from learnloop.losses import per_sample, unreduced


class SampleLosses(Callback):
    """Keeps the loss of each training sample in each epoch; `plot_suspicious()` draws those that stay large.

    Which samples a batch holds is known of our loaders, of lists of batches, and of torch loaders with a sampler of
    torch's own; for all others `indices` tells. In `after_loss` the loss function is called once more, not reduced and
    without gradients; whether it draws random numbers is found out in the first batch, and such a one gets them back.
    What mixes or replaces samples (MixUp, OverfitBatch) leaves none that these numbers could belong to. Source: Huang
    et al., O2U-Net, ICCV 2019. Cost per batch: a second loss, about 60 µs for a small one; 4 bytes of host memory per
    sample and epoch; nothing waits for the device before the end of a phase.
    """

    run_valid, tasks, reads_only = False, ("fit",), True

    def __init__(
        self,
        indices: Callable[[Any], Sequence[int] | Tensor] | None = None,  # callback -> numbers of the batch's samples
    ):
        self.indices = indices
        self._forget()

    def _forget(self) -> None:
        self.epochs: list[int] = []  # in which losses were seen
        self._rows: list[Tensor] = []  # the losses of each of them, (samples,), NaN for one that was not seen
        self._totals, self._counts = torch.zeros(0), torch.zeros(0)  # of the epoch that goes on, per sample
        self._draws: bool | None = None  # whether the loss draws random numbers; None before the first batch
        self._drop()

    def _drop(self) -> None:
        self._taken: Any = None  # numbers and losses of the batch in hand
        self._recent: list[tuple[Any, Tensor]] = []  # those of the batches before, in this phase
        self._order: Any = None  # a loader, the number of a pass over it, and those of the samples in its batches

    # The events

    def before_fit(self) -> None:
        self._forget()
        if self.learn.loss_func is None:
            raise ValueError(
                "SampleLosses needs a loss per sample, but `loss_func` is None: the model reduces its own."
            )
        mixing = self.learn._grab_cbs(MixHandler)
        if mixing:
            raise ValueError(f"{mixing} mixes samples, which then have no loss of their own. Keep it or SampleLosses.")

    def before_epoch(self) -> None:
        self._totals, self._counts = torch.zeros(0), torch.zeros(0)

    def after_loss(self) -> None:
        learn = self.learn
        if len(learn.yb):
            self._taken = self._numbers(find_bs(learn.yb)), self._losses()

    def _losses(self) -> Tensor:
        if self._draws is False:
            return self._losses_now()
        with preserved_randomness():
            before = _state()
            losses = self._losses_now()
            self._draws = bool(self._draws) or before != _state()
        return losses

    @torch.no_grad()
    def _losses_now(self) -> Tensor:
        learn = self.learn
        with unreduced(learn.loss_func) as single:
            loss = single(to_detach(learn.pred, cpu=False), *learn.yb)
        return per_sample(loss.detach(), find_bs(learn.yb))

    def _numbers(self, n: int) -> Any:
        """The numbers of the samples in this batch."""
        numbers = self._told() if self.indices is None else self.indices(self)
        if len(numbers) != n:
            raise ValueError(
                f"SampleLosses: the batch has {n} samples, and {len(numbers)} numbers came for it. A callback that "
                "changes batches must not be there, or `SampleLosses(indices=…)` must know of it."
            )
        return numbers

    def _told(self) -> Any:
        dl, pass_number, number = place(self.learn)
        if self._order is None or self._order[0] is not dl or self._order[1] != pass_number:
            key = key_of(self.learn, dl, pass_number)
            order = indices_of(dl, key, getattr(self.learn.dls, "keyed", True))
            if order is None:
                raise ValueError(
                    f"SampleLosses needs to know which samples a batch holds, and {type(dl).__name__} does not tell. "
                    'Pass a function that does: `SampleLosses(indices=lambda cb: cb.x["index"])`.'
                )
            self._order = dl, pass_number, order
        return self._order[2][number]

    def after_batch(self) -> None:
        taken, self._taken = self._taken, None
        if taken is not None:
            self._recent.append(taken)

    def cleanup_batch(self) -> None:
        self._taken = None

    def after_train(self) -> None:
        self._settle()
        if len(self._counts):
            self.epochs.append(self.learn.epoch)
            self._rows.append(self._totals / self._counts)  # 0 / 0 is NaN: not seen

    def cleanup_train(self) -> None:
        self._drop()

    def _settle(self) -> None:
        """Adds up the losses since the last time: one transfer to the host."""
        if not self._recent:
            return
        numbers = torch.cat([torch.as_tensor(n, dtype=torch.long).cpu().reshape(-1) for n, _ in self._recent])
        losses = torch.cat([values for _, values in self._recent]).float().cpu()
        n = max(int(numbers.max()) + 1, len(self._counts))
        self._totals, self._counts = (torch.nn.functional.pad(t, (0, n - len(t))) for t in (self._totals, self._counts))
        self._totals.index_add_(0, numbers, losses)
        self._counts.index_add_(0, numbers, torch.ones_like(losses))
        self._recent = []

    # What survives a resume

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {
            "epochs": list(self.epochs),
            "rows": list(self._rows),
            "totals": self._totals.clone(),
            "counts": self._counts.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs, self._rows = list(state["epochs"]), list(state["rows"])
        self._totals, self._counts = state["totals"].clone(), state["counts"].clone()

    # Looking at it

    @property
    def losses(self) -> Tensor:
        """Shape (epochs, samples): the mean of a sample's losses in an epoch, NaN where it was not seen."""
        n = max(map(len, self._rows), default=0)
        nan = torch.nan
        rows = [torch.nn.functional.pad(row, (0, n - len(row)), value=nan) for row in self._rows]
        return torch.stack(rows) if rows else torch.empty(0, 0)

    def suspicious(
        self,
        k: int | None = None,  # how many; None: all that were seen
    ) -> tuple[Tensor, Tensor]:
        """`(scores, idxs)`, the most suspicious first; a score is the mean distance of a loss from its epoch's mean."""
        losses = self.losses
        if not losses.numel():
            raise RuntimeError("no loss was seen yet. Train first, with this callback on the learner.")
        scores = (losses - losses.nanmean(1, keepdim=True)).nanmean(0)
        seen = torch.nonzero(~scores.isnan()).flatten()
        order = scores[seen].sort(descending=True, stable=True).indices[:k]
        return scores[seen][order], seen[order]

    def plot_suspicious(
        self,
        k: int = 9,
        dl: Any = None,  # where the samples are read; None: the training loader
        cols: int | None = None,
        figsize: tuple[float, float] | None = None,
    ) -> Any:
        """Draws the most suspicious samples, each with its number, its label and its mean loss; returns the figure."""
        if self.learn is None:
            raise RuntimeError("SampleLosses is on no learner any more, from whose loader it would read the samples.")
        _, idxs = self.suspicious(k)
        dl = self.learn.dls.train if dl is None else dl
        xb, yb = split_batch(self.learn.dls, dl, samples_at(dl, idxs.tolist()))
        means, vocab = self.losses.nanmean(0), vocab_of(self.learn.dls, dl)
        rows = list(enumerate(idxs.tolist()))
        titles = [f"{i}: {label_text(vocab, nth(yb, row))}\n{means[i]:.2f}" for row, i in rows]
        fig = plots.plot_samples([drawable(nth(xb, row)) for row, _ in rows], titles, cols=cols, figsize=figsize)
        fig.suptitle("number: label / mean loss", fontsize="medium")
        return fig


def _state() -> tuple[Any, ...]:
    """Where the global generators stand, in a form that can be compared."""
    states = random_states()
    bits, of_torch = states["numpy"]["state"], [states["torch"], *states["cuda"]]
    return states["python"], bits["key"].tobytes(), bits["pos"], [t.tolist() for t in of_torch]
