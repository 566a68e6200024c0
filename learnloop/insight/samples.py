"""Samples as one looks at them: a batch, or predictions beside targets, as pictures where they are images."""

from typing import Any

from torch import Tensor

from learnloop import plots
from learnloop.data.batches import find_bs
from learnloop.data.loaders import first_batch, known_n_inp, show_batch_of, split_batch, vocab_of
from learnloop.data.once import once
from learnloop.data.show import check_max_n, drawable, label_text, nth


class OneBatch(list[Any]):
    """A loader of one ready batch, which says how many of its elements are inputs."""

    def __init__(self, batch: Any, n_inp: int | None):
        super().__init__([batch])
        if n_inp is not None:
            self.n_inp = n_inp


def show_batch(learn: Any, ds_idx: int | str = 0, dl: Any = None, max_n: int = 9, **kwargs: Any) -> Any:
    """Draws the first samples of a loader with their targets, and returns the figure; callbacks do not touch them."""
    return show_batch_of(learn.dls, loader_of(learn, ds_idx, dl), max_n, **kwargs)


def show_results(
    learn: Any,
    ds_idx: int | str = 1,
    dl: Any = None,
    max_n: int = 9,
    cols: int | None = None,
    figsize: tuple[float, float] | None = None,
) -> Any:
    """Draws the first samples of a loader with target and prediction, and returns the figure.

    A title is green where they agree, red where they do not, black where nobody can say.
    """
    check_max_n(max_n)
    loader = loader_of(learn, ds_idx, dl)
    batch = OneBatch(first_batch(learn.dls, once(loader)[0]), known_n_inp(learn.dls, loader))
    with learn.no_bar():
        _, targets, decoded = learn.get_preds(dl=batch, with_decoded=True, reorder=False)
    decoded, vocab = as_targets(decoded, targets), vocab_of(learn.dls, loader)
    xb, _ = split_batch(learn.dls, loader, batch[0])
    rows = range(min(max_n, find_bs(xb)))
    pairs = [(None if targets is None else nth(targets, i), nth(decoded, i)) for i in rows]
    titles, colors = zip(*(result_title(vocab, *pair) for pair in pairs), strict=True)
    return plots.plot_samples([drawable(nth(xb, i)) for i in rows], titles, colors=colors, cols=cols, figsize=figsize)


def result_title(vocab: Any, target: Any, decoded: Any) -> tuple[str, str | None]:
    """Target and prediction in two lines, and the color that says whether they agree."""
    predicted = label_text(vocab, decoded)
    if target is None:
        return predicted, None
    return f"{label_text(vocab, target)}\n{predicted}", color_of(target, decoded)


def color_of(target: Any, decoded: Any) -> str | None:
    """Green or red for class numbers, by whether they are the same; None for what is never exactly the same."""
    if not isinstance(target, Tensor) or not isinstance(decoded, Tensor) or target.shape != decoded.shape:
        return None
    if decoded.is_floating_point() or target.numel() > 64:
        return None
    return plots.RIGHT if bool((target == decoded).all()) else plots.WRONG


def loader_of(learn: Any, ds_idx: int | str, dl: Any) -> Any:
    """The loader that is meant; ValueError where there is none."""
    if not hasattr(learn, "_loader"):
        raise TypeError(f"this looks into a Learner, and got something of type {type(learn).__name__}.")
    loader = learn._loader(ds_idx) if dl is None else dl
    if loader is None:
        raise ValueError("there is no validation loader: pass one to DataLoaders, or another with `dl=…`.")
    return loader


def as_targets(decoded: Any, targets: Any) -> Any:
    """Predictions in the form of the targets: where a plain loss left one number per class, the likeliest class."""
    if not isinstance(decoded, Tensor) or not isinstance(targets, Tensor):
        return decoded
    is_open = decoded.is_floating_point() and not targets.is_floating_point()
    return decoded.argmax(1) if is_open and decoded.ndim == targets.ndim + 1 and decoded.shape[1] > 1 else decoded
