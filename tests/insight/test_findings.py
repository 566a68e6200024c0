"""The report of checks: text, HTML and data."""

import pytest

from learnloop.insight.findings import CheckReport, Finding


def report():
    return CheckReport(
        {
            "gradients": Finding("fault", "`0.weight` got no gradient.", 1, "Look for `detach()`."),
            "no leak": Finding("ok", "0 of 3 inputs.", 0),
            "modes": Finding("not applicable", "no such layer."),
        },
        seconds=1.25,
    )


def test_it_shows_itself_as_text():
    assert str(report()).splitlines() == [
        "1 of 3 checks found something, in 1.2 s",
        "gradients             fault: `0.weight` got no gradient.",
        "                      → Look for `detach()`.",
        "no leak               ok: 0 of 3 inputs.",
        "modes                 not applicable: no such layer.",
    ]
    assert repr(report()) == str(report())


def test_it_shows_itself_as_a_table():
    text = report()._repr_html_()
    assert text.startswith("<table><caption>1 of 3 checks found something, in 1.2 s</caption>")
    assert "<td>gradients</td><td>fault</td><td>1</td><td>`0.weight` got no gradient.</td>" in text


def test_it_is_data():
    found = report()
    assert (found["gradients"].verdict, found["gradients"].number) == ("fault", 1)
    assert list(found.problems) == ["gradients"] and not found and len(found) == 3
    assert CheckReport({"no leak": found["no leak"]})


def test_an_unknown_name_says_the_nearest():
    with pytest.raises(KeyError, match="Did you mean 'gradients'"):
        report()["gradient"]
