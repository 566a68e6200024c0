"""The golden traces: what fires in a fit of two epochs, beside fastai's, for each cancel raised at each event.

tests/data/fastai_traces.json holds fastai 2.8.12's, written by tests/data/make_fastai_traces.py. The cleanup events,
which fastai does not have, are left out of ours. Every other difference stands in DIFFERENCES with its reason.
"""

import json
from pathlib import Path

import pytest

import learnloop as ll
from learnloop.loop.events import EVENTS
from tests.toys import Heard, learner, loaders, raise_at

GOLDEN = json.loads((Path(__file__).parent / "data" / "fastai_traces.json").read_text())
LETTERS = {name: letter for letter, name in GOLDEN["letters"].items()}
FASTAI = {key: trace for trace, keys in GOLDEN["traces"].items() for key in keys}

CANCELS = {
    "CancelBackwardException": "backward",
    "CancelBatchException": "batch",
    "CancelEpochException": "epoch",
    "CancelFitException": "fit",
    "CancelStepException": "step",
    "CancelTrainException": "train",
    "CancelValidException": "validate",
}

ABSORBED = "a cancel raised in after_X or after_cancel_X of its own span is absorbed: the span is over anyway"

T, V = "efghjkmo", "efgo"  # a training and a validation batch, a letter per event as in GOLDEN["letters"]
E = f"cd{T}{T}qr{V}{V}tv"  # an epoch

# Scenario -> (our trace, reason)
DIFFERENCES = {
    "CancelBackwardException@after_cancel_backward/train": (f"abcdefghijkmo{T}qr{V}{V}tv{E}x", ABSORBED),
    "CancelBackwardException@after_backward/train": (f"ab{E}{E}x", ABSORBED),
    "CancelBatchException@after_cancel_batch/train": (f"abcdeno{T}qr{V}{V}tv{E}x", ABSORBED),
    "CancelBatchException@after_cancel_batch/validate": (f"abcd{T}{T}qreno{V}tv{E}x", ABSORBED),
    "CancelBatchException@after_batch/train": (f"ab{E}{E}x", ABSORBED),
    "CancelBatchException@after_batch/validate": (f"ab{E}{E}x", ABSORBED),
    "CancelEpochException@after_cancel_epoch": (f"abcuv{E}x", ABSORBED),
    "CancelEpochException@after_epoch": (f"ab{E}{E}x", ABSORBED),
    "CancelFitException@after_cancel_fit": ("abwx", ABSORBED),
    "CancelFitException@after_fit": (f"ab{E}{E}x", ABSORBED),
    "CancelStepException@after_cancel_step/train": (f"abcdefghjklmo{T}qr{V}{V}tv{E}x", ABSORBED),
    "CancelStepException@after_step/train": (f"ab{E}{E}x", ABSORBED),
    "CancelTrainException@after_cancel_train": (f"abcdpqr{V}{V}tv{E}x", ABSORBED),
    "CancelTrainException@after_train": (f"ab{E}{E}x", ABSORBED),
    "CancelValidException@after_cancel_validate": (f"abcd{T}{T}qrstv{E}x", ABSORBED),
    "CancelValidException@after_validate": (f"ab{E}{E}x", ABSORBED),
}


def ours(key, default_cbs):
    """The trace of a scenario `CancelException@event/phase` here."""
    cancel, _, place = key.partition("@")
    event, _, phase = place.partition("/")
    training = {"train": True, "validate": False, "": None}[phase]
    cbs = [raise_at(event, getattr(ll, cancel), training)] if key else []
    if event.startswith("after_cancel_"):
        span = event.removeprefix("after_cancel_")
        inner = next(name for name, cancelled in CANCELS.items() if cancelled == span)
        cbs.append(raise_at(f"before_{span}", getattr(ll, inner), training))
    heard, left = Heard(), ""
    try:
        learner([heard, *cbs], dls=loaders(2, 2), default_cbs=default_cbs).fit(2)
    except ll.CancelException as error:
        left = " " + type(error).__name__
    return "".join(LETTERS[e] for e in heard.events if not e.startswith("cleanup_")) + left


def test_the_traces_cover_each_cancel_at_each_event():
    assert GOLDEN["fastai"] == "2.8.12"
    fastais = [e for e in EVENTS if not e.startswith("cleanup_")]
    assert list(LETTERS) == fastais and len(fastais) == 24
    both = ("before_batch", "after_pred", "after_loss", "after_cancel_batch", "after_batch")
    in_batch = fastais[fastais.index("before_batch") : fastais.index("after_batch") + 1]
    places = {f"{e}/train" if e in in_batch else e for e in fastais} | {f"{e}/validate" for e in both}
    assert set(FASTAI) == {""} | {f"{cancel}@{place}" for cancel in CANCELS for place in places}
    assert len(FASTAI) == 1 + 7 * 29


def test_a_plain_fit_fires_what_fastai_fires():
    train = "before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch"
    valid = "before_batch after_pred after_loss after_batch"
    epoch = [
        *("before_epoch", "before_train", *train.split(), *train.split(), "after_train"),
        *("before_validate", *valid.split(), *valid.split(), "after_validate", "after_epoch"),
    ]
    names = ["after_create", "before_fit", *epoch, *epoch, "after_fit"]
    assert "".join(LETTERS[n] for n in names) == FASTAI[""] == ours("", default_cbs=False)


@pytest.mark.parametrize("default_cbs", [False, True], ids=["", "default_cbs"])
@pytest.mark.parametrize("cancel", CANCELS)
def test_a_cancel_at_each_event_fires_what_fastai_fires_but_for_the_listed_differences(cancel, default_cbs, capsys):
    keys = [key for key in FASTAI if key.startswith(cancel)]
    traces = {key: ours(key, default_cbs) for key in keys}
    different = {key: trace for key, trace in traces.items() if trace != FASTAI[key]}
    assert different == {key: here for key, (here, _) in DIFFERENCES.items() if key in traces}


def test_every_listed_difference_belongs_to_a_scenario_and_has_a_reason():
    assert set(DIFFERENCES) <= set(FASTAI)
    assert all(reason for _, reason in DIFFERENCES.values())


@pytest.mark.parametrize("key", [key for key, (_, reason) in DIFFERENCES.items() if reason == ABSORBED])
def test_an_absorbed_cancel_left_fastais_fit_and_ours_goes_on_as_if_it_had_not_been_raised(key):
    cancel, _, place = key.partition("@")
    assert FASTAI[key].endswith(f" {cancel}")
    assert place.partition("/")[0] in (f"after_{CANCELS[cancel]}", f"after_cancel_{CANCELS[cancel]}")
    here, _ = DIFFERENCES[key]
    assert here.startswith(FASTAI[key].removesuffix(f" {cancel}")) and here.endswith(LETTERS["after_fit"])
