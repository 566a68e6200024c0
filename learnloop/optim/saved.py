"""Whether a saved state belongs to an optimizer: compared before anything is changed."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

#: State that has one value per value of the parameter, by the names used here, in `torch.optim` and in `schedulefree`.
_LIKE_PARAM = {"grad_avg", "sqr_avg", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"}
_LIKE_PARAM |= {"square_avg", "acc_delta", "sum", "prev", "z"}


def shapes_of(param_lists: Sequence[Any]) -> list[list[list[int]]]:
    """The shape of each parameter, by group."""
    return [[list(p.shape) for p in group] for group in param_lists]


def check_fits(saved: Mapping[str, Any], param_lists: Sequence[Any], required: Sequence[str], title: str) -> None:
    """ValueError that names group and shape, where a saved state belongs to another model, splitter or algorithm."""
    if not {"state", "hypers"} <= set(saved):
        raise ValueError(
            f"an optimizer's state has `state` and `hypers`; this one has {', '.join(saved) or 'nothing'}."
        )
    problems = chain(
        _in_groups(saved, param_lists),
        _in_count(saved, param_lists),
        _in_shapes(saved, param_lists),
        _in_names(saved, required, title),
    )
    problem = next(problems, None)
    if problem is not None:
        raise ValueError(problem)


def _in_groups(saved: Mapping[str, Any], param_lists: Sequence[Any]) -> Iterator[str]:
    if len(saved["hypers"]) != len(param_lists):
        yield (
            f"the state has {len(saved['hypers'])} parameter groups, this optimizer {len(param_lists)}; "
            "make it with the splitter that was used when the state was saved."
        )


def _in_count(saved: Mapping[str, Any], param_lists: Sequence[Any]) -> Iterator[str]:
    here = [len(group) for group in param_lists]
    there = [len(group) for group in saved["shapes"]] if "shapes" in saved else []
    if len(saved["state"]) != sum(here) or (there and there != here):
        of_state = f" in groups of {', '.join(map(str, there))}" if there else ""
        yield (
            f"the state has {len(saved['state'])} parameters{of_state}, this optimizer {sum(here)} in groups of "
            f"{', '.join(map(str, here))}; it belongs to another model or splitter."
        )


def _in_shapes(saved: Mapping[str, Any], param_lists: Sequence[Any]) -> Iterator[str]:
    places = [(i, j, p) for i, group in enumerate(param_lists) for j, p in enumerate(group)]
    shapes = [shape for group in saved.get("shapes", ()) for shape in group]
    for number, (i, j, p) in enumerate(places[: len(saved["state"])]):
        state = saved["state"][number]
        found = {name: tuple(v.shape) for name, v in state.items() if name in _LIKE_PARAM and isinstance(v, Tensor)}
        if number < len(shapes):
            found = {"value": tuple(shapes[number]), **found}
        for name, shape in found.items():
            if shape != tuple(p.shape):
                yield (
                    f"`{name}` of parameter {j} in group {i} has shape {shape}, the parameter {tuple(p.shape)}; "
                    "the state belongs to another model or splitter."
                )


def _in_names(saved: Mapping[str, Any], required: Sequence[str], title: str) -> Iterator[str]:
    for i, hyper in enumerate(saved["hypers"]):
        missing = [name for name in required if name not in hyper]
        if missing:
            yield (
                f"group {i} of the state has no {', '.join(missing)}, which {title} needs; "
                "it belongs to another kind of optimizer."
            )


def copied(value: Any, device: torch.device) -> Any:
    """A copy of nested dicts, lists and tuples that shares no tensor with them; tensors come to `device`."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {k: copied(v, device) for k, v in value.items()}
    return type(value)(copied(v, device) for v in value) if isinstance(value, (list, tuple)) else value
