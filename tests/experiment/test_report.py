"""A training on one page."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from torch import nn

import learnloop as ll
from learnloop.testing import toy_learner

HOSTILE = "<script>alert('&')</script>"


@pytest.fixture
def learn(tmp_path):
    learn = toy_learner(n_train=16, n_valid=8, cbs=ll.RunRecord(), metrics=ll.mse)
    learn.path = tmp_path
    learn.fit_one_cycle(2, cbs=ll.EMA(0.9))
    return learn


class Page(HTMLParser):
    """Tags and text; every opened tag must be closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_curves_rows_settings_callbacks_and_the_loop(learn, tmp_path):
    path = ll.report(learn, tmp_path / "deep" / "run.html")
    page, text = Page(path), path.read_text()
    assert [t for t in page.text if t in ("Rows", "Settings", "Callbacks", "The loop as it ran")] == [
        "Rows",
        "Settings",
        "Callbacks",
        "The loop as it ran",
    ]
    assert f"<td>{learn.recorder.history[1]['valid_loss']:.6g}</td>" in text
    assert "<td>EMA</td><td>decay=0.9, warmup=False, apply_at_end=True</td>" in text
    assert re.search(r"before_batch +ParamScheduler", text)  # of the fit, gone from the learner since
    assert plt.get_fignums() == []


def test_it_needs_no_other_file(learn, tmp_path):
    page = Page(ll.report(learn, tmp_path / "run.html"))
    (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert not [tag for tag, attrs in page.tags if tag in ("script", "link") or "href" in attrs]


def test_everything_is_escaped(tmp_path):
    class Model(nn.Linear):
        pass

    Model.__name__ = HOSTILE
    cb = ll.SaveModelCallback(fname=HOSTILE.replace("/", ""))
    learn = toy_learner(model=Model(2, 1), cbs=[cb])
    learn.path = tmp_path
    learn.fit(1)
    text = ll.report(learn, tmp_path / "run.html", title=HOSTILE).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text


def test_without_a_record_the_callbacks_are_those_of_now_and_the_page_says_so(learn, tmp_path):
    learn.remove_cb(ll.RunRecord)
    text = ll.report(learn, tmp_path / "run.html").read_text()
    assert "a RunRecord keeps those of the fit, too" in text and "<td>EMA</td>" not in text


def test_a_run_can_be_reported_later(learn, tmp_path):
    (run,) = ll.runs(tmp_path / "runs")
    text = ll.report(run, tmp_path / "run.html").read_text()
    assert "it went to its end" in text and "<td>EMA</td>" in text and "data:image/png" in text


def test_an_earlier_page_stays_where_writing_fails(learn, tmp_path, monkeypatch):
    path = tmp_path / "run.html"
    path.write_text("earlier")
    monkeypatch.setattr("learnloop.plots.as_png", lambda figure: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ll.report(learn, path)
    assert path.read_text() == "earlier"
    assert [p.name for p in Path(tmp_path).iterdir() if p.suffix == ".tmp"] == []


def test_a_learner_that_was_not_trained_has_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match=r"there is no training to report: the Recorder has no row. Fit first"):
        ll.report(toy_learner(), tmp_path / "run.html")


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match="`report` takes a learner or a run, and got a str"):
        ll.report("runs")
