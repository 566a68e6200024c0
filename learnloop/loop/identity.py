"""What a fit is made of, so that a resume can tell whether it goes on with the same one."""

from collections.abc import Iterator
from typing import Any

from learnloop.data.keyed import length
from learnloop.loop.state import check_fits, plain

_TITLES = {"samples": "samples for training", "batches": "training batches"}


def identity(learn: Any, n_epoch: int | None, n_step: int | None, valid_every: int) -> dict[str, Any]:
    """What must be the same for a fit to go on exactly, beside what `check_fits` compares."""
    train = None if learn.dls is None else learn._loader(0)
    dataset = getattr(train, "dataset", None)
    return {
        "n_epoch": n_epoch if n_step is None else None,
        "n_step": n_step,
        "valid_every": valid_every,
        "samples": None if dataset is None else length(dataset),
        "batches": length(train),
        # Those that only read may come and go.
        "callbacks": sorted(type(cb).__name__ for cb in learn.cbs if not cb.reads_only),
        "settings": [[type(cb).__name__, plain(cb.identity())] for cb in learn.cbs if cb.identity()],
    }


def check_same_fit(learn: Any, call: Any, state: dict[str, Any]) -> None:
    """ValueError that says what differs, where a state is not one of this call."""
    check_fits(learn, state)
    saved, here = state["identity"], identity(learn, call.n_epoch, call.n_step, call.stretch)
    problems = [*_number_differences(saved, here), *_callback_differences(saved["callbacks"], here["callbacks"])]
    problems += _setting_differences(saved["settings"], here["settings"])
    if problems:
        raise ValueError(
            f"what is to be resumed is another fit: {'; '.join(problems[:5])}. Repeat the call as it was, or start anew "
            "without `resume`."
        )


def _number_differences(saved: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    for name in ("n_epoch", "n_step", "valid_every"):
        if saved[name] != here[name]:
            yield f"`{name}={saved[name]}` then and `{name}={here[name]}` now"
    name = "batches" if saved["samples"] == here["samples"] else "samples"
    if saved[name] != here[name]:
        yield f"{saved[name]} {_TITLES[name]} then and {here[name]} now"


def _callback_differences(saved: list[str], here: list[str]) -> Iterator[str]:
    for name in dict.fromkeys([*saved, *here]):
        if saved.count(name) > here.count(name):
            yield f"callback {name} was there then and is not now: add it first"
        elif saved.count(name) < here.count(name):
            yield f"callback {name} was not there then"


def _setting_differences(saved: list[list[Any]], here: list[list[Any]]) -> Iterator[str]:
    left = list(here)
    for name, settings in saved:
        mine = next((entry for entry in left if entry[0] == name), None)
        if mine is not None:  # else its callback is missing, and was named
            left.remove(mine)
            for key in dict.fromkeys([*settings, *mine[1]]):
                if settings.get(key) != mine[1].get(key):
                    yield f"the {key} of {name} is another"
