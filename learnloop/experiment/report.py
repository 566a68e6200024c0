"""A training on one page that needs no other file: curves, rows, settings, the loop as it ran."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from learnloop import html, plots
from learnloop.callbacks.run_record import RunRecord, description_of_run
from learnloop.checkpoint import write_atomically
from learnloop.experiment.runs import Run
from learnloop.learner import Learner
from learnloop.loop.events import LOOP

__all__ = ["report"]

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 62em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid #ddd; padding: 0.2em 0.9em 0.2em 0; text-align: left; vertical-align: top; }
pre { background: #f6f6f4; padding: 0.8em; overflow-x: auto; font-size: 13px; }
img { max-width: 100%; }
"""


def report(
    learn: Learner | Run,  # after a fit; or a run of `runs()`
    path: str | Path = "run.html",
    title: str | None = None,  # None: the model's class
) -> Path:
    """Writes one HTML page about a training, whole or not at all, and returns its path.

    Pictures are inside of it. The callbacks are those of the fit where a RunRecord was among them; else those that are
    on the learner now, without the ones that came by `fit(cbs=…)` and have left. OSError names path and reason.
    """
    if not isinstance(learn, (Learner, Run)):
        raise TypeError(f"`report` takes a learner or a run, and got a {type(learn).__name__}.")
    path = Path(path)
    page = _page(*(_of_run(learn) if isinstance(learn, Run) else _of_learner(learn)), title)
    write_atomically(path, lambda file: file.write(page.encode()))
    return path


Parts = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]], str, list[Any]]


def _of_run(run: Run) -> Parts:
    """What it was, its rows, a note and its pictures."""
    end = {None: "it has no end: it was killed, or goes on", "done": "it went to its end"}.get(run.how, str(run.how))
    note = f"Began {run.at}; {end}{f' ({run.error})' if run.error else ''}."
    drawn = [plots.plot_histories({run.id: run.history})] if run.last else []
    return run.about, run.history, note, drawn


def _of_learner(learn: Learner) -> Parts:
    recorder = learn.__dict__.get("recorder")
    if recorder is None or not recorder.history:
        raise ValueError("there is no training to report: the Recorder has no row. Fit first.")
    kept = next((cb.record for cb in learn.cbs if isinstance(cb, RunRecord) and cb.record), None)
    note = "" if kept else "Callbacks and loop are those of the learner now; a RunRecord keeps those of the fit, too."
    return kept or description_of_run(learn), recorder.history, note, [recorder.plot()]


def _page(
    about: Mapping[str, Any], history: Sequence[Mapping[str, Any]], note: str, figures: Iterable[Any], title: str | None
) -> str:
    title = title or str(about.get("configuration", {}).get("model", "run"))
    rows = [[_cell(value) for value in row.values()] for row in history]
    parts = [
        f"<h1>{escape(title)}</h1>",
        html.paragraph(note) if note else "",
        *map(_picture, figures),
        _section("Rows", html.table(rows, list(history[0]) if history else ())),
        _section("Settings", html.table(_settings(about))),
        _section("Callbacks", html.table(_callbacks(about), ("callback", "settings"))),
        _section("The loop as it ran", html.code(loop_lines(about.get("loop", {})))),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!DOCTYPE html>\n<html><head>{head}</head><body>\n{chr(10).join(filter(None, parts))}\n</body></html>\n"


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}"


def _picture(figure: Any) -> str:
    encoded = base64.b64encode(plots.as_png(figure)).decode()
    return f'<img alt="curves of the training" src="data:image/png;base64,{encoded}">'


def _settings(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = list(about.get("configuration", {}).items())
    for part in ("code", "seed", "environment"):
        found += [(f"{part}: {name}", value) for name, value in about.get(part, {}).items()]
    found += [(f"data: {loader['name']}", _listed(loader, "name")) for loader in about.get("data", ())]
    return [(name, _cell(value)) for name, value in found if value not in (None, "")]


def _callbacks(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(cb["name"], _listed(cb["settings"])) for cb in about.get("callbacks", ())]


def _listed(values: Mapping[str, Any], *without: str) -> str:
    return ", ".join(f"{n}={_cell(v)}" for n, v in values.items() if n not in without and v is not None)


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def loop_lines(heard: Mapping[str, Sequence[str]]) -> str:
    """Every event in firing order, indented by its spans, with the callbacks that hear it."""
    out = io.StringIO()
    for event in LOOP:
        title = "  " * event.depth + event.name
        print(f"{title:<26} {', '.join(heard.get(event.name, ()))}".rstrip(), file=out)
    return out.getvalue()
