"""What a fit is made of, so that a resume can tell whether it goes on with the same one."""

from collections.abc import Iterator
from typing import Any

from learnloop.data.keyed import length
from learnloop.loop.state import check_fits, plain, same, unplain

_TITLES = {"samples": "samples for training", "batches": "training batches"}
SHOWN = 5  # differences that an error lists


def identity(learn: Any, call: Any) -> dict[str, Any]:
    """What must be the same for a fit to go on exactly, beside what `check_fits` compares; plain data."""
    train = None if learn.dls is None else learn._loader(0)
    dataset = getattr(train, "dataset", None)
    found = {
        "n_epoch": call.n_epoch if call.n_step is None else None,
        "n_step": call.n_step,
        "valid_every": call.stretch,
        "start_epoch": call.start_epoch,
        "lr": _spelled(learn.lr if call.lr is None else call.lr),
        "wd": _spelled(learn.wd if call.wd is None else call.wd),
        "samples": None if dataset is None else length(dataset),
        "batches": length(train),
        "callbacks": sorted(type(cb).__name__ for cb in learn.cbs if not cb.reads_only),  # the others may come and go
        "settings": [[type(cb).__name__, settings] for cb in learn.cbs if (settings := cb.identity())],
    }
    return plain(found, "what identifies the fit")


def _spelled(value: Any) -> Any:
    """A hyper as it was written, in plain data."""
    return ["slice", value.start, value.stop] if isinstance(value, slice) else value


def check_same_fit(learn: Any, call: Any, state: dict[str, Any]) -> None:
    """ValueError that says what differs, where a state is not one of this call."""
    check_fits(learn, state)
    saved, here = state["identity"], identity(learn, call)
    if saved is None:
        raise ValueError("what is to be resumed was taken before any fit. Load it by `load_state_dict`, then fit.")
    problems = [
        *_number_differences(saved, here),
        *_callback_differences(saved["callbacks"], here["callbacks"]),
        *_setting_differences(saved["settings"], here["settings"]),
    ]
    if problems:
        raise ValueError(
            f"what is to be resumed is another fit: {'; '.join(problems[:SHOWN])}. Repeat the call as it was, or start "
            "anew without `resume`."
        )


def _number_differences(saved: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    for name in ("n_epoch", "n_step", "valid_every", "start_epoch", "lr", "wd"):
        if not same(saved[name], here[name]):
            yield f"`{name}={unplain(saved[name])}` then and `{name}={unplain(here[name])}` now"
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
    """By class; several of one class in the order of the list."""
    left = list(here)
    for name, settings in saved:
        mine = next((entry for entry in left if entry[0] == name), None)
        if mine is not None:  # else its callback is missing, and was named
            left.remove(mine)
            for key in dict.fromkeys([*settings, *mine[1]]):
                if not same(settings.get(key), mine[1].get(key)):
                    yield f"the {key} of {name} is another"
