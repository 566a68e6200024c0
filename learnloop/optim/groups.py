"""Which parameters form a group: splitters, and the parameters that weight decay or freezing leaves alone."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from fastcore.foundation import L
from torch import Tensor, nn

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
#: How those are called that models bring along: LlamaRMSNorm, T5LayerNorm, RMSNormGated; no NormalizedLinear.
NORM_NAME = re.compile("Norm(?![a-z])")


class Group(list[Any]):
    """A list of parameters that knows what the model calls them.

    `names` and `layers` (the module that each belongs to) have one item per parameter, or none at all; `title` is what
    the group is called when it is printed; `hypers` are its own.
    """

    def __init__(
        self,
        params: Iterable[Any] = (),
        names: Iterable[str] = (),
        title: str = "",
        hypers: Mapping[str, Any] | None = None,
        layers: Iterable[nn.Module | None] = (),
    ):
        super().__init__(params)
        self.names, self.title, self.hypers, self.layers = list(names), title, dict(hypers or {}), list(layers)


# The parameters of a model


def params(model: Any) -> L:
    """All parameters of a model."""
    return L(model.parameters() if isinstance(model, nn.Module) else ())


def trainable_params(model: Any) -> L:
    """The parameters of a model that require a gradient: the splitter that makes one group."""
    return L(p for p in params(model) if p.requires_grad)


def norm_bias_params(model: nn.Module, with_bias: bool = True) -> L:
    """The parameters of normalization layers, and every bias unless `with_bias=False`.

    Such layers are torch's, and those with a class name like `LlamaRMSNorm`, of which the vectors count.
    """
    found: dict[int, Any] = {}
    for module in model.modules() if isinstance(model, nn.Module) else ():
        found |= {id(p): p for p in _norm_params(module)}
        if with_bias and isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            found[id(bias)] = bias
    return L(found.values())


def _norm_params(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's own parameters if it normalizes."""
    if isinstance(module, NORMS):
        yield from module.parameters(recurse=False)
    elif NORM_NAME.search(type(module).__name__):
        yield from (p for p in module.parameters(recurse=False) if p.ndim == 1)


bn_bias_params = norm_bias_params  # the name under which older code knows it


# By name


def by_name(*patterns: Any) -> Callable[[Any], list[Group]]:
    """A splitter that makes a group of the parameters whose names match: `by_name("backbone.*", "head.*")`.

    `*` stands for anything, dots too; a parameter goes to the first pattern that it matches, and each must match one.
    A dict `{"backbone.*": {"lr": 1e-4}, "head.*": {}}` gives hypers to groups: its `lr` is the rate of that group
    wherever none is passed, and `fit(…, lr=…)` sets all groups.
    """
    wanted: dict[str, Mapping[str, Any]] = {}
    for pattern in patterns:
        wanted |= pattern if isinstance(pattern, Mapping) else {pattern: {}}
    if not wanted or not all(isinstance(k, str) and isinstance(v, Mapping) for k, v in wanted.items()):
        raise TypeError(f"by_name{patterns!r}: pass patterns such as 'head.*', or a dict from pattern to hypers.")
    return _ByName(wanted)


class _ByName:
    """The splitter itself: a class, so that it can be pickled and shows what it does."""

    def __init__(self, wanted: Mapping[str, Mapping[str, Any]]):
        self.wanted = dict(wanted)

    def __call__(self, model: Any) -> list[Group]:
        named = dict(model.named_parameters())
        chosen = sorted_by_pattern(list(named), list(self.wanted))
        return [Group([named[n] for n in names], names, p, self.wanted[p]) for p, names in chosen.items()]

    def __repr__(self) -> str:
        plain = not any(self.wanted.values())
        return f"by_name({', '.join(map(repr, self.wanted)) if plain else self.wanted})"


def sorted_by_pattern(names: Sequence[str], patterns: Sequence[str]) -> dict[str, list[str]]:
    """The names that each pattern matches first; ValueError for a name without pattern, a pattern without name."""
    chosen: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    left: list[str] = []
    for name in names:
        first = next((p for p in patterns if fnmatchcase(name, p)), None)
        (left if first is None else chosen[first]).append(name)
    for pattern, found in chosen.items():
        if not found:
            raise ValueError(f"no parameter is left for the pattern {pattern!r}; {_hint(pattern, names)}")
    if left:
        raise ValueError(
            f"{len(left)} parameters match no pattern, such as {', '.join(left[:3])}; add a pattern for them, "
            "or '*' as the last one for all the rest."
        )
    return chosen


def _hint(pattern: str, names: Sequence[str]) -> str:
    if any(fnmatchcase(name, pattern) for name in names):
        return "an earlier pattern has taken all that it matches: put the narrower one first."
    starts = list(dict.fromkeys(name.split(".")[0] for name in names))
    near = get_close_matches(pattern.split(".")[0], starts, n=1)
    return f"did you mean {near[0] + '.*'!r}?" if near else f"the names begin with {', '.join(starts[:8])}."


def with_names(groups: Any, model: Any) -> Any:
    """What a splitter returned, its groups as `Group`s with the model's names and layers; one flat list stays flat."""
    items = groups if isinstance(groups, Group) else listed(groups)
    owners = dict(_owners(model))
    if _is_nested(items):
        return [_named(group, owners) for group in items]
    return _named(items, owners)


def _named(group: Iterable[Any], owners: Mapping[Any, tuple[str, Any]]) -> Any:
    params = list(group)
    if not all(isinstance(p, Tensor) for p in params):
        return params  # refused where the optimizer is made
    found = [owners.get(p, ("", None)) for p in params]
    names, layers = [name for name, _ in found], [layer for _, layer in found]
    return Group(params, names, getattr(group, "title", ""), getattr(group, "hypers", None), layers)


def _owners(model: Any) -> Iterable[tuple[Any, tuple[str, nn.Module]]]:
    """Each parameter with its name and the module that it belongs to; one that several share counts for the first."""
    seen: set[Any] = set()
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        for name, p in module.named_parameters(recurse=False):
            if p not in seen:
                seen.add(p)
                yield p, (f"{path}.{name}" if path else name, module)


# What an optimizer is given


def as_groups(params: Any) -> list[Group]:
    """Parameters, or lists of them, as groups; no parameter at all and one that is given twice are errors."""
    items = params if isinstance(params, Group) else listed(params)
    groups = [_as_group(item) for item in (items if _is_nested(items) else [items])]
    where: dict[Tensor, int] = {}
    for i, group in enumerate(groups):
        for p in group:
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"parameter group {i} holds {type(p).__name__}; pass a list of parameters or a list of such lists."
                )
            if p in where:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is in group {where[p]} and again in group {i}; "
                    "let the splitter name each parameter once."
                )
            where[p] = i
    if not where:
        raise ValueError("an optimizer needs at least one parameter, but got none; is the whole model frozen or empty?")
    return groups


def _as_group(items: Iterable[Any]) -> Group:
    if isinstance(items, Group):
        return items
    items = list(items)
    if items and all(isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor) for item in items):
        return Group([p for _, p in items], [name for name, _ in items])  # as `named_parameters()` gives them
    return Group(items)


def listed(params: Any) -> list[Any]:
    """What an optimizer was given, as a list: of parameters, of groups, or of torch's dicts."""
    if not isinstance(params, Iterable):
        raise TypeError(f"an optimizer needs a list of parameters, but got {type(params).__name__}.")
    return [params] if isinstance(params, Tensor) else list(params)


def _is_nested(items: Sequence[Any]) -> bool:
    return bool(items) and all(_is_group(item) for item in items)


def _is_group(item: Any) -> bool:
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        return False  # a name and its parameter
    return isinstance(item, Iterable) and not isinstance(item, (Tensor, Mapping, str, nn.Module))


def summary_of(names: Sequence[str]) -> str:
    """Names in a few words: all that begin alike as `start.*`, else the first and the last."""
    if len(names) < 2:
        return "".join(names)
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return ".".join([*parts[0][:common], "*"]) if common else f"{names[0]} … {names[-1]}"
