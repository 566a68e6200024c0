"""Samples as one looks at them: a batch, or predictions beside targets, as pictures where they are images."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from learnloop import plots
from learnloop.data.batches import describe, elements, find_bs, split
from learnloop.data.keyed import Key, batches, is_keyed, preserved_randomness
from learnloop.data.loaders import known_n_inp
from learnloop.data.once import label_of, nth, once


class OneBatch(list[Any]):
    """A loader of one ready batch, which says how many of its elements are inputs."""

    def __init__(self, batch: Any, n_inp: int | None):
        super().__init__([batch])
        if n_inp is not None:
            self.n_inp = n_inp


def first_batch(dls: Any, dl: Any) -> Any:
    """The first batch of a loader; moves no random generator."""
    with preserved_randomness():
        keyed = is_keyed(dl, getattr(dls, "keyed", True))
        stream = batches(dl, Key(getattr(dls, "seed", None) or 0, 0)) if keyed else iter(dl)
        for batch in stream:
            return batch
    raise ValueError(f"the {type(dl).__name__} is empty: it yields no batch.")


def show_batch(
    learn: Any,
    ds_idx: int | str = 0,  # which loader of `dls`, by number or name
    dl: Any = None,  # another loader
    max_n: int = 9,  # samples
    cols: int | None = None,  # in a row
    figsize: tuple[float, float] | None = None,  # inches
) -> Any:
    """Draws the first samples of a loader with their targets, and returns the figure; callbacks do not touch them."""
    loader = loader_of(learn, ds_idx, dl)
    xb, yb = split_batch(learn, loader, first_batch(learn.dls, loader))
    n = min(max_n, find_bs(xb))
    titles = [label_text(vocab_of(learn, loader), nth(yb, i)) for i in range(n)] if len(yb) else []
    return plots.plot_samples([drawable(nth(xb, i)) for i in range(n)], titles, cols=cols, figsize=figsize)


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
    loader = loader_of(learn, ds_idx, dl)
    batch = OneBatch(first_batch(learn.dls, once(loader)[0]), known_n_inp(learn.dls, loader))
    with learn.no_bar():
        _, targets, decoded = learn.get_preds(dl=batch, with_decoded=True, reorder=False)
    decoded, vocab = as_targets(decoded, targets), vocab_of(learn, loader)
    xb, _ = split_batch(learn, loader, batch[0])
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
    loader = learn._loader(ds_idx) if dl is None else dl
    if loader is None:
        raise ValueError("there is no validation loader: pass one to DataLoaders, or another with `dl=…`.")
    return loader


def split_batch(learn: Any, dl: Any, batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch, unwrapped where there is one of them; no targets are an empty tuple."""
    xb, yb = split(batch, known_n_inp(learn.dls, dl), getattr(learn.dls, "targets", None))
    return (xb[0] if len(xb) == 1 else xb), (yb[0] if len(yb) == 1 else yb)


def vocab_of(learn: Any, dl: Any) -> Any:
    """The names of the classes: of the loader or of `dls`; None where neither has any."""
    found = [getattr(owner, "vocab", None) for owner in (dl, learn.dls)]
    vocab = next((v for v in found if v is not None), None)
    if vocab is not None and len(vocab) and isinstance(vocab[-1], (list, tuple)):
        return vocab[-1]  # of texts: the words, then the classes
    return vocab


def as_targets(decoded: Any, targets: Any) -> Any:
    """Predictions in the form of the targets: where a plain loss left one number per class, the likeliest class."""
    if not isinstance(decoded, Tensor) or not isinstance(targets, Tensor):
        return decoded
    is_open = decoded.is_floating_point() and not targets.is_floating_point()
    return decoded.argmax(1) if is_open and decoded.ndim == targets.ndim + 1 and decoded.shape[1] > 1 else decoded


def label_text(vocab: Any, value: Any) -> str:
    """A target in a few words: the name of a class, a number, or what kind of thing it is."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        return f"{value.item():.3g}"
    if (isinstance(value, Tensor) and value.ndim > 1) or (isinstance(value, Tensor) and value.numel() > 64):
        return describe(value)
    named = label_of(vocab, value)
    if isinstance(named, Tensor):
        return str(named.item()) if named.numel() == 1 else ", ".join(f"{v:.3g}" for v in named.tolist())
    parts = None if isinstance(named, str) else elements(named)
    return str(named) if parts is None else ", ".join(label_text(None, part) for part in parts)


def drawable(sample: Any) -> Any:
    """What is drawn of a sample: its first tensor where that is a picture or a line, else its text."""
    if isinstance(sample, Tensor):
        if sample.ndim in (1, 2) and sample.numel() > 1 and _is_numeric(sample):
            return sample
        return sample if sample.ndim == 3 and sample.shape[0] in (1, 3, 4) else _text_of(sample)
    if isinstance(sample, (tuple, list)) and len(sample) and isinstance(sample[0], Tensor):
        return drawable(sample[0])
    return _text_of(sample)


def _is_numeric(sample: Tensor) -> bool:
    return sample.is_floating_point() or (sample.ndim == 2 and sample.dtype == torch.uint8)


def _text_of(sample: Any) -> str:
    keyed = sample if hasattr(sample, "items") else {}
    if keyed:
        return "\n".join(f"{name}: {_text_of(value)}" for name, value in keyed.items())
    if isinstance(sample, Tensor):
        return describe(sample) if sample.ndim > 1 else " ".join(_numbers(sample.reshape(-1).tolist()))
    return str(sample)


def _numbers(values: Sequence[Any]) -> Iterator[str]:
    return (f"{v:.3g}" if isinstance(v, float) else str(v) for v in values)
