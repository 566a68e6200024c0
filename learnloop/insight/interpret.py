"""What a trained model gets wrong: its largest losses, and which classes it takes for which."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fastcore.foundation import L
from torch import Tensor, nn

from learnloop import plots
from learnloop.data.batches import find_bs, rebuilt
from learnloop.data.keyed import is_plain
from learnloop.data.loaders import TensorLoader, split_batch, vocab_of
from learnloop.data.once import once, samples_at
from learnloop.data.show import drawable, label_text, nth
from learnloop.insight.samples import as_targets, color_of, loader_of, result_title


class Interpretation:
    """Predictions, targets and a loss for each sample of a set: `Interpretation.from_learner(learn)`.

    Samples are numbered as `get_preds` gives them: in the order of the dataset. Source: docs.fast.ai/interpret.
    """

    def __init__(
        self,
        learn: Any,
        dl: Any,  # a loader that gives each sample once
        losses: Tensor,  # one per sample
        act: Any = None,  # applied to the model's outputs; None: `loss_func.activation`
    ):
        self.learn, self.dl, self.losses, self.act = learn, dl, losses, act
        self.vocab = vocab_of(learn.dls, dl)
        self._gathered: tuple[Any, Any, Any] | None = None

    @classmethod
    def from_learner(
        cls,
        learn: Any,
        ds_idx: int | str = 1,  # which loader of `dls`, by number or name
        dl: Any = None,  # another loader
        act: Any = None,
    ) -> Any:
        """Predicts a whole set once; nothing of the learner moves."""
        loader = loader_of(learn, ds_idx, dl)
        fixed, _ = once(loader)
        if vocab_of(learn.dls, loader) is not None and not hasattr(fixed, "vocab") and hasattr(loader, "vocab"):
            fixed.vocab = loader.vocab
        preds, targets, decoded, losses = learn.get_preds(dl=fixed, with_decoded=True, with_loss=True, act=act)
        made = cls(learn, fixed, losses, act)
        made._gathered = preds, targets, as_targets(decoded, targets)
        return made

    def _results(self) -> tuple[Any, Any, Any]:
        if self._gathered is None:  # made by hand
            preds, targets, decoded = self.learn.get_preds(dl=self.dl, with_decoded=True, act=self.act)
            self._gathered = preds, targets, as_targets(decoded, targets)
        return self._gathered

    @property
    def preds(self) -> Any:
        """The model's outputs after the activation, a row per sample."""
        return self._results()[0]

    @property
    def targets(self) -> Any:
        return self._results()[1]

    @property
    def decoded(self) -> Any:
        """Predictions in the form of the targets, such as class numbers."""
        return self._results()[2]

    def __len__(self) -> int:
        return len(self.losses)

    def __getitem__(self, idxs: Any) -> tuple[Any, ...]:
        """Inputs, predictions, targets, decoded predictions and losses of some samples."""
        idxs = _as_list(idxs)
        rows = torch.tensor(idxs, dtype=torch.long)
        taken = [_rows(value, rows) for value in self._results()]
        return (self._inputs(idxs), *taken, self.losses[rows])

    def _inputs(self, idxs: list[int]) -> Any:
        batch = samples_at(self.dl, [self._place(i) for i in idxs])
        return split_batch(self.learn.dls, self.dl, batch)[0]

    def _place(self, i: int) -> int:
        """The number in the dataset of a sample in ours: the same, unless the loader has a part of it."""
        if is_plain(self.dl) and self.dl.batch_sampler is not None:
            if self._places is None:
                self._places = sorted(i for batch in self.dl.batch_sampler for i in batch)
            return self._places[i]
        return i

    _places: list[int] | None = None  # the dataset's numbers of our samples, once they are asked for

    def top_losses(
        self,
        k: int | None = None,  # how many; None: all of them
        largest: bool = True,  # False: the smallest
        items: bool = False,  # the dataset's samples too
    ) -> tuple[Any, ...]:
        """The largest losses and the numbers of their samples, the largest first: `(losses, idxs, [items])`."""
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"`k={k!r}`: pass how many samples, 1 or more, or None for all of them.")
        n = len(self.losses) if k is None else min(k, len(self.losses))
        losses, idxs = self.losses.topk(n, largest=largest)
        if not items:
            return losses, idxs
        places = [self._place(i) for i in idxs.tolist()]
        if isinstance(self.dl, TensorLoader) or is_plain(self.dl):
            return losses, idxs, L(self.dl.dataset[i] for i in places)
        batch = samples_at(self.dl, places)
        return losses, idxs, L(nth(batch, i) for i in range(len(places)))

    def plot_top_losses(
        self,
        k: int | Sequence[int],  # how many, or which places in the order: `range(9, 18)`
        largest: bool = True,
        cols: int | None = None,
        figsize: tuple[float, float] | None = None,
    ) -> Any:
        """Draws the samples with the largest losses, and returns the figure."""
        losses, idxs = self.top_losses(k if isinstance(k, int) else None, largest)
        if not isinstance(k, int):
            losses, idxs = losses[list(k)], idxs[list(k)]
        inputs, preds, targets, decoded, _ = self[idxs]
        samples, titles, colors = [], [], []
        for i, loss in enumerate(losses.tolist()):
            samples.append(drawable(nth(inputs, i)))
            titles.append(self._title(nth(preds, i), nth(targets, i), nth(decoded, i), loss))
            colors.append(color_of(nth(targets, i), nth(decoded, i)))
        fig = plots.plot_samples(samples, titles, colors=colors, cols=cols, figsize=figsize)
        fig.suptitle(self._heading(), fontsize="medium")
        return fig

    def _heading(self) -> str:
        return "prediction / actual / loss"

    def _title(self, pred: Any, target: Any, decoded: Any, loss: float) -> str:
        return f"{label_text(self.vocab, decoded)} / {label_text(self.vocab, target)}\n{loss:.2f}"

    def show_results(self, idxs: Any, cols: int | None = None, figsize: tuple[float, float] | None = None) -> Any:
        """Draws some samples with target and prediction, and returns the figure."""
        inputs, _, targets, decoded, _ = self[idxs]
        rows = range(find_bs(inputs))
        titles, colors = zip(*(result_title(self.vocab, nth(targets, i), nth(decoded, i)) for i in rows), strict=True)
        samples = [drawable(nth(inputs, i)) for i in rows]
        return plots.plot_samples(samples, titles, colors=colors, cols=cols, figsize=figsize)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} samples, mean loss {self.losses.mean().item():.4f})"


class ClassificationInterpretation(Interpretation):
    """An `Interpretation` of one class per sample: which classes are taken for which.

    The classes are named by `dls.vocab`; without it they are called by their numbers. Where the loss has no activation
    of its own, as `nn.CrossEntropyLoss`, probabilities are the softmax of the outputs.
    """

    def _classes(self) -> tuple[Tensor, Tensor]:
        """Predicted and actual class numbers, one dimension each."""
        targets, decoded = self.targets, self.decoded
        if not isinstance(targets, Tensor) or not isinstance(decoded, Tensor) or decoded.shape != targets.shape:
            raise ValueError(
                f"a confusion matrix needs one class per sample; predictions are {_form(decoded)}, targets "
                f"{_form(targets)}. Use `Interpretation` for anything else."
            )
        if targets.is_floating_point() or decoded.is_floating_point():
            raise ValueError(
                f"a confusion matrix needs classes; predictions are {_dtype(decoded)}, targets {_dtype(targets)}. "
                "Use `Interpretation` for a regression."
            )
        if decoded.dtype == torch.bool and decoded.ndim > 1 and decoded.shape[1] > 1:
            raise ValueError("these samples have several labels each, and a confusion matrix needs one per sample.")
        return decoded.flatten().long(), targets.flatten().long()

    def _names(self) -> list[Any]:
        if self.vocab is not None:
            return list(self.vocab)
        decoded, targets = self._classes()
        known = self.preds.shape[1] if isinstance(self.preds, Tensor) and self.preds.ndim > 1 else 2
        return list(range(max(known, 2, int(torch.cat([decoded, targets]).max()) + 1)))

    def confusion_matrix(self) -> np.ndarray:
        """How often each class (rows: actual) was taken for each (columns: predicted), whole numbers."""
        decoded, targets = self._classes()
        n = len(self._names())
        if len(targets) and int(torch.cat([decoded, targets]).max()) >= n:
            raise ValueError(
                f"`vocab` names {n} classes, and there is a class {int(torch.cat([decoded, targets]).max())}."
            )
        return torch.bincount(targets * n + decoded, minlength=n * n).reshape(n, n).numpy()

    def plot_confusion_matrix(
        self,
        normalize: bool = False,  # parts of each actual class
        title: str = "Confusion matrix",
        cmap: Any = "Blues",
        norm_dec: int = 2,  # decimal places of parts
        plot_txt: bool = True,  # write the numbers
        figsize: tuple[float, float] | None = None,  # inches
    ) -> Any:
        """Draws the confusion matrix, and returns the figure."""
        matrix, names = self.confusion_matrix(), self._names()
        numbers = matrix / np.maximum(matrix.sum(1, keepdims=True), 1) if normalize else matrix
        side = min(12.0, max(4.0, 0.45 * len(names) + 1))
        fig, (ax,) = plots.subplots(1, figsize=figsize or (side, side))
        decimals = norm_dec if normalize else None
        plots.plot_matrix(ax, numbers.tolist(), names, title=title, cmap=cmap, decimals=decimals, with_text=plot_txt)
        return fig

    def most_confused(self, min_val: int = 1) -> list[tuple[Any, Any, int]]:
        """Classes confused at least `min_val` times: (actual, predicted, times), the most frequent first."""
        matrix, names = self.confusion_matrix(), self._names()
        np.fill_diagonal(matrix, 0)
        pairs = [
            (names[i], names[j], int(matrix[i, j])) for i, j in zip(*np.where(matrix >= max(min_val, 1)), strict=True)
        ]
        return sorted(pairs, key=lambda pair: -pair[2])

    def print_classification_report(self) -> None:
        """Prints precision, recall and F1 of each class, as scikit-learn computes them."""
        try:
            from sklearn.metrics import classification_report
        except ImportError as error:
            raise ImportError("the report needs scikit-learn: `pip install scikit-learn`.") from error
        decoded, targets = self._classes()
        names = self._names()
        labels = list(range(len(names)))
        print(
            classification_report(targets, decoded, labels=labels, target_names=list(map(str, names)), zero_division=0)
        )

    def _heading(self) -> str:
        return "prediction / actual / loss / probability"

    def _title(self, pred: Any, target: Any, decoded: Any, loss: float) -> str:
        title = super()._title(pred, target, decoded, loss)
        if not isinstance(pred, Tensor) or pred.ndim != 1 or decoded.ndim:
            return title
        return f"{title} / {self._probabilities(pred)[int(decoded)].item():.2f}"

    def _probabilities(self, pred: Tensor) -> Tensor:
        plain = self.act is None and not hasattr(self.learn.loss_func, "activation")
        return pred.softmax(0) if plain and isinstance(self.learn.loss_func, nn.CrossEntropyLoss) else pred


def _as_list(idxs: Any) -> list[int]:
    if isinstance(idxs, Tensor):
        return [int(i) for i in idxs.reshape(-1).tolist()]
    return [idxs] if isinstance(idxs, int) else [int(i) for i in idxs]


def _rows(value: Any, rows: Tensor) -> Any:
    if isinstance(value, (list, L)):
        return L(value[i] for i in rows.tolist())
    return value[rows] if isinstance(value, Tensor) else rebuilt(value, lambda part: _rows(part, rows))


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _form(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
