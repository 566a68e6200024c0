"""The text of a report."""

from learnloop.checks.report import CallbackReport, Verdict, remedies_for, said, shortened

KEPT = Verdict("trains")
BROKEN = Verdict("can be stored", {"its state can be stored and loaded": ["TypeError: a Linear"]})
LEFT_OUT = Verdict("only reads", left_out="does not say so")


def test_a_promise_is_a_line_with_a_verdict_and_a_broken_one_says_where_and_what_to_do():
    report = CallbackReport("Mine", 12, 0.25, (KEPT, BROKEN, LEFT_OUT), 0.5)
    assert str(report).splitlines() == [
        "Mine breaks 1 of 3 promises (12 runs, 0.2 s)",
        "  kept    trains",
        "  BROKEN  can be stored",
        "          its state can be stored and loaded: TypeError: a Linear",
        "          → Keep numbers, tensors, strings, lists and dicts, or write `state_dict()`.",
        "  -       only reads: does not say so",
        "  0.5     host reads per training batch",
    ]
    assert report.broken == {"its state can be stored and loaded": ["TypeError: a Linear"]}


def test_where_nothing_is_broken_the_first_line_says_so():
    assert str(CallbackReport("Mine", 3, 1.0, (KEPT,))) == "Mine keeps every promise (3 runs, 1.0 s)\n  kept    trains"


def test_of_many_places_three_are_named():
    assert shortened(["a", "b"]) == "a; b"
    assert shortened(list("abcde")) == "a; b; c; and 2 more"


def test_the_nearest_remedy_counts():
    assert remedies_for("leaves the hooks on the model as it was") == [
        "Remove them in `cleanup_fit`: `after_fit` does not come after an error."
    ]
    assert remedies_for("something else") == []


def test_an_error_is_said_in_one_line_of_bounded_length():
    assert said(ValueError("two\nlines")) == "ValueError: two lines"
    assert len(said(ValueError("x" * 1000))) < 260
