"""A model layer by layer: what comes out of each, what it holds, what it costs. Nothing of the learner moves."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from fastcore.foundation import L
from torch import Tensor, nn

from learnloop import html
from learnloop.data.batches import elements, find_bs, get_model, rebuilt, split, tensors_in
from learnloop.data.keyed import preserved_randomness
from learnloop.data.loaders import known_n_inp
from learnloop.insight.hooks import Hooks, hook_outputs
from learnloop.loop.dispatch import listed
from learnloop.modules import checked_module, flatten_model, one_param
from learnloop.optim.groups import as_groups, with_names

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


@dataclass(frozen=True)
class LayerSummary:
    """One layer: a module without children, or one with parameters of its own beside them."""

    name: str  # in the model
    kind: str  # its class
    shape: Any  # of its output, a tuple; nested as the output is; None where it did not run
    n_params: int  # of its own, each counted once in the model
    n_trainable: int  # of these, those that require a gradient
    group: int | None  # number of its parameter group; None without parameters, or where they are in several or none
    n_bytes: int  # of its outputs in this batch, all calls together
    n_macs: int  # multiply-adds in this batch, all calls together


@dataclass(frozen=True, repr=False)
class ModelSummary:
    """What `learn.summary()` found; it shows itself as text in a terminal, as a table in a notebook."""

    model: str  # its class
    bs: int  # samples in the batch that was run
    input_shape: Any  # of the inputs, nested as they are
    layers: list[LayerSummary] = field(default_factory=list)
    n_params: int = 0
    n_trainable: int = 0
    n_param_bytes: int = 0
    n_buffer_bytes: int = 0
    notes: tuple[str, ...] = ()  # optimizer, loss, what is frozen, callbacks

    @property
    def n_macs(self) -> int:
        """Multiply-adds for the batch, forward only."""
        return sum(layer.n_macs for layer in self.layers)

    @property
    def n_output_bytes(self) -> int:
        """Bytes of all outputs of layers for the batch: about what a training keeps for the way back."""
        return sum(layer.n_bytes for layer in self.layers)

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, one row per layer."""
        return [_row(layer) for layer in self.layers]

    def totals(self) -> list[str]:
        """The lines below the table."""
        per_sample = f"{self.n_macs / max(self.bs, 1):,.0f} per sample"
        return [
            f"Total params: {self.n_params:,}",
            f"Total trainable params: {self.n_trainable:,}",
            f"Total non-trainable params: {self.n_params - self.n_trainable:,}",
            f"Memory: {_bytes(self.n_param_bytes + self.n_buffer_bytes)} of parameters and buffers, "
            f"{_bytes(self.n_output_bytes)} of outputs for a batch of {self.bs}",
            f"Multiply-adds, forward: {self.n_macs:,} for that batch, {per_sample}",
        ]

    def _title(self) -> str:
        return f"{self.model} (Input shape: {_shown(self.input_shape)})"

    def __str__(self) -> str:
        cells = [COLUMNS, *self.rows()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
        lines = [_line(row, widths) for row in cells]
        rule = "-" * max(map(len, lines))
        return "\n".join([self._title(), rule, lines[0], rule, *lines[1:], rule, *self.totals(), "", *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        below = "\n".join([*self.totals(), "", *self.notes])
        return html.table(self.rows(), COLUMNS, self._title()) + html.code(below)


COLUMNS = ("Layer", "Type", "Output shape", "Params", "Trainable", "Group", "Output", "Multiply-adds")
_RIGHT = (3, 5, 6, 7)  # numbers


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(w) if i in _RIGHT else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _row(layer: LayerSummary) -> tuple[str, ...]:
    n, trained = layer.n_params, layer.n_trainable
    trainable = "" if not n else "yes" if trained == n else "no" if not trained else "partly"
    group = "" if layer.group is None else str(layer.group)
    shape = "did not run" if layer.shape is None else _shown(layer.shape)
    costs = ("", "") if layer.shape is None else (_bytes(layer.n_bytes), f"{layer.n_macs:,}" if layer.n_macs else "")
    return (layer.name, layer.kind, shape, f"{n:,}" if n else "", trainable, group, *costs)


def _shown(shape: Any) -> str:
    """`64 x 10`; of several in brackets."""
    if isinstance(shape, dict):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in shape.items()) + "}"
    if isinstance(shape, tuple) and all(isinstance(n, int) for n in shape):
        return " x ".join(map(str, shape)) or "one number"
    return f"({', '.join(map(_shown, shape))})" if isinstance(shape, (tuple, list)) else str(shape)


def _bytes(n: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} GB"


# From a learner


def summarize(
    learn: Any,
    batch: Any = None,  # as a loader gives it; None: the first one for training
) -> ModelSummary:
    """The model of a learner after one batch in eval mode, with its callbacks; nothing of the learner changes."""
    with preserved_randomness():
        batch = _first_batch(learn) if batch is None else batch
        xb = split(batch, known_n_inp(learn.dls, learn.dls.train), getattr(learn.dls, "targets", None))[0]
        layers = _layers(learn, batch)
    model = get_model(learn.model)
    params = list(model.parameters()) if isinstance(model, nn.Module) else []
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    return ModelSummary(
        model=type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", repr(model)),
        bs=find_bs(xb),
        input_shape=_shape(xb[0] if len(xb) == 1 else xb),
        layers=layers,
        n_params=sum(p.numel() for p in params),
        n_trainable=sum(p.numel() for p in params if p.requires_grad),
        n_param_bytes=sum(p.nbytes for p in params),
        n_buffer_bytes=sum(b.nbytes for b in buffers),
        notes=tuple(_notes(learn)),
    )


def layer_info(learn: Any, *xb: Any) -> L:
    """What `xb` makes of each layer in turn: `(kind, params, trainable, shape, same)`, an `L` of such tuples.

    `same` says whether the output has the shape of the input, but for the first dimension. Of a layer without
    parameters `params` and `trainable` are empty strings, as in fastai.
    """
    if not hasattr(learn, "model") or not xb:
        given = "no input" if hasattr(learn, "model") else f"something of type {type(learn).__name__}"
        raise TypeError(f"`layer_info(learn, xb)` takes a Learner and inputs of its model, and got {given}.")
    found: list[LayerInfo] = []

    def note(m: nn.Module, inputs: Any, output: Any) -> None:
        ps = list(m.parameters())
        same = any(_alike(i, o) for i, o in zip(listed(inputs), listed(output), strict=False))
        n, trained = (sum(p.numel() for p in ps), any(p.requires_grad for p in ps)) if ps else ("", "")
        found.append(LayerInfo(type(m).__name__, n, trained, _shape(output), same))

    with preserved_randomness(), Hooks(flatten_model(learn.model), note):
        _run(learn, _Inputs([tuple(xb)], len(xb)))
    return L(found)


class LayerInfo(NamedTuple):
    """A row of `layer_info`."""

    kind: str  # the class
    params: int | str
    trainable: bool | str  # whether any of them is
    shape: Any  # of the output
    same: bool


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape[1:] == b.shape[1:]


class _Inputs(list[Any]):
    """A loader of one batch, which says how many of its elements are inputs."""

    def __init__(self, batches: list[Any], n_inp: int | None):
        super().__init__(batches)
        if n_inp is not None:
            self.n_inp = n_inp


def _first_batch(learn: Any) -> Any:
    if hasattr(learn.dls, "one_batch"):
        return learn.dls.one_batch()
    return next(iter(learn.dls.train))


def _run(learn: Any, loader: list[Any]) -> None:
    """One batch through the model as a prediction: eval mode, no gradients, callbacks, nothing shown or recorded."""

    def body() -> None:
        if isinstance(learn.model, nn.Module):
            learn.model.eval()  # also where no TrainEvalCallback does it; the run puts the modes back
        learn._do_epoch_validate(dl=loader)

    with learn.no_logging(), learn.no_mbar(), learn.no_bar():
        learn._run_beside("predict", None, body)


def _layers(learn: Any, batch: Any) -> list[LayerSummary]:
    model = get_model(learn.model)
    if not isinstance(model, nn.Module):
        return []
    named = _rows_of(model)
    with _counted(named) as seen:
        _run(learn, _Inputs([batch], known_n_inp(learn.dls, learn.dls.train)))
    groups, counted, found = _groups(learn), set[int](), []
    for module, name in named.items():
        own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        counted |= set(map(id, own))
        shape, n_bytes, n_macs = seen.get(module, (None, 0, 0))
        n_trainable = sum(p.numel() for p in own if p.requires_grad)
        numbers = {groups.get(id(p)) for p in own}
        group = numbers.pop() if len(numbers) == 1 else None
        n_params = sum(p.numel() for p in own)
        found.append(LayerSummary(name, type(module).__name__, shape, n_params, n_trainable, group, n_bytes, n_macs))
    return found


def _rows_of(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that are rows, by name, in the order of the model."""
    return {
        m: name or type(m).__name__
        for name, m in model.named_modules()
        if not any(True for _ in m.children()) or next(m.parameters(recurse=False), None) is not None
    }


@contextmanager
def _counted(modules: dict[nn.Module, str]) -> Iterator[dict[nn.Module, tuple[Any, int, int]]]:
    """For each module that runs inside: the shape of its first output, bytes of all of them, its multiply-adds.

    A module counts without what others do inside of it.
    """
    from torch.utils.flop_counter import FlopCounterMode

    seen: dict[nn.Module, tuple[Any, int, int]] = {}
    running: list[list[int]] = []  # per module that runs: operations before it, those of others inside, their number

    def enter(module: nn.Module, inputs: Any) -> None:
        running.append([counter.get_total_flops(), 0, 0])

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        before, claimed, n_inside = running.pop()
        within = counter.get_total_flops() - before
        if running:
            running[-1][1] += within
            running[-1][2] += 1
        shape, n_bytes, n_macs = seen.get(module, (_shape(output), 0, 0))
        size = 0 if n_inside else sum(t.nbytes for t in tensors_in(output))
        seen[module] = shape, n_bytes + size, n_macs + (within - claimed) // 2

    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(_visible_operations())
        stack.enter_context(counter)
        yield seen


@contextmanager
def _visible_operations() -> Iterator[None]:
    """Layers that torch would run as one outside of training run as the layers they are made of."""
    former = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # something was compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(former)


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of attention from the shapes (batch, heads, length, features): two products of matrices."""
    b, h, n, d = query
    return 2 * b * h * n * key[-2] * (d + value[-1])


def _recurrent(input: Any, *weights: Any, **kwargs: Any) -> int:
    """Operations of a recurrent layer: every row of the input, of every step, meets every matrix of weights once."""
    matrices = [w for w in _flat(weights) if len(w) == 2]
    return 2 * math.prod(input[:-1]) * sum(map(math.prod, matrices))


def _flat(shapes: Any) -> Iterator[Any]:
    """The shapes among arguments, those in lists too."""
    for shape in shapes:
        if isinstance(shape, torch.Size):
            yield shape
        elif isinstance(shape, (list, tuple)):
            yield from _flat(shape)


def _formulas() -> dict[Any, Callable[..., int]]:
    """What torch's counter does not know."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten.mkldnn_rnn_layer: lambda input, w_in, w_hidden, *args, **kwargs: _recurrent(input, w_in, w_hidden),
        aten._cudnn_rnn: lambda input, weights, *args, **kwargs: _recurrent(input, *weights),
    }


def _groups(learn: Any) -> dict[int, int]:
    """The number of the group of each parameter, by its id: of the optimizer, or as it would be made."""
    if learn.opt is not None:
        lists = learn.opt.param_lists
    else:
        try:
            lists = as_groups(with_names(learn.splitter(learn.model), learn.model))
        except (TypeError, ValueError):  # nothing to train, or nothing that an optimizer could be made for
            lists = []
    return {id(p): i for i, group in enumerate(lists) for p in group}


def _notes(learn: Any) -> Iterator[str]:
    yield f"Optimizer used: {_named(learn.opt_func)}"
    yield f"Loss function: {_named(learn.loss_func)}"
    if learn.opt is not None:
        n = learn.opt.frozen_idx
        yield f"Model {f'frozen up to parameter group {n}' if n else 'unfrozen'}"
    yield f"Callbacks: {', '.join(map(repr, learn.cbs.sorted('order'))) or 'none'}"


def _named(thing: Any) -> str:
    return getattr(thing, "__name__", None) or str(thing)


def _shape(output: Any) -> Any:
    """The shapes of the tensors in an output, nested as it is."""
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, (tuple, list, L)):
        return tuple(map(_shape, output))
    if elements(output) is None:
        return None if output is None else type(output).__name__
    return dict(rebuilt(output, _shape)) if hasattr(output, "keys") else tuple(map(_shape, elements(output)))


# Without a learner


def model_sizes(
    m: nn.Module,
    size: tuple[int, int] = (64, 64),  # height and width of an image
) -> list[Any]:
    """The shapes of the outputs of a model's children for one image of zeros; its modes stay as they were."""
    in_channels(checked_module(m, "model_sizes"))
    with hook_outputs(list(m.children())) as hooks, _evaluating(m), torch.no_grad():
        m(one_param(m).new_zeros(1, in_channels(m), *size))  # type: ignore[union-attr]
        return [_shape(hook.stored) for hook in hooks]


def in_channels(m: nn.Module) -> int:
    """How many channels an image must have for a model: those of its first convolution."""
    for layer in m.modules():
        if isinstance(layer, _CONVOLUTIONS) and layer.weight.ndim == 4:
            return layer.in_channels
    raise ValueError(f"{type(m).__name__} has no convolution over images, so nobody knows what size of input it takes.")


def num_features_model(m: nn.Module) -> int:
    """How many channels come out of a model of images: tried with larger and larger images, from 32 to 2048 pixels."""
    in_channels(checked_module(m, "num_features_model"))
    size = 32
    while True:
        try:
            return model_sizes(m, (size, size))[-1][1]
        except Exception:  # such as a kernel that is larger than what reaches it
            size *= 2
            if size > 2048:
                raise


@contextmanager
def _evaluating(m: nn.Module) -> Iterator[None]:
    """In eval mode, and back to what each module was in."""
    modes = [(module, module.training) for module in m.modules()]
    m.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
