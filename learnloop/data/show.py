"""Samples as people look at them: which part of a batch is one, what is drawn of it, how its label is written."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fastcore.foundation import L
from torch import Tensor

from learnloop import plots
from learnloop.data.batches import describe, elements, find_bs, rebuilt


def draw_batch(
    xb: Any,
    yb: Any,
    vocab: Any,  # names of the classes, or None
    max_n: int,
    cols: int | None = None,  # in a row
    figsize: tuple[float, float] | None = None,  # inches
) -> Any:
    """Draws the first samples of a batch with their targets, and returns the figure."""
    check_max_n(max_n)
    n = min(max_n, find_bs(xb))
    titles = [label_text(vocab, nth(yb, i)) for i in range(n)] if len(yb) else []
    return plots.plot_samples([drawable(nth(xb, i)) for i in range(n)], titles, cols=cols, figsize=figsize)


def check_max_n(max_n: Any) -> None:
    """Refuses a number of samples that is none."""
    if isinstance(max_n, bool) or not isinstance(max_n, int) or max_n < 1:
        raise ValueError(f"`max_n={max_n!r}`: pass how many samples to draw, 1 or more.")


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


def label_of(vocab: Any, decoded: Any) -> Any:
    """The name of a decoded prediction: of its class, or of the classes that are there; itself where none is known."""
    if vocab is None or not isinstance(decoded, Tensor) or decoded.is_floating_point():
        return decoded
    if decoded.dtype == torch.bool:
        return [name for name, there in zip(vocab, decoded.tolist(), strict=True) if there]
    return vocab[int(decoded)] if decoded.ndim == 0 else [vocab[i] for i in decoded.tolist()]


def nth(batch: Any, i: int | slice) -> Any:
    """A sample of a batch of any structure, or several; a list without tensors has an element per sample."""
    if isinstance(batch, Tensor):
        return batch[i] if batch.ndim else batch
    if isinstance(batch, (list, L)) and not any(map(_is_structured, batch)):
        return batch[i]
    return rebuilt(batch, lambda part: nth(part, i))


def _is_structured(x: Any) -> bool:
    return isinstance(x, Tensor) or elements(x) is not None
