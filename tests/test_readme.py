"""The README's code runs as it stands, its links lead somewhere, its claims about the demo hold."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.S)


def test_the_code_blocks_run_one_after_the_other(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they write files
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert README.read_text().split('explain("before_step"))\n```\n\n```\n')[1].split("```")[0] in out
    printed = [line.split()[:-1] for line in out.splitlines()[:6]]
    promised = [
        line.split()[:-1] for line in README.read_text().split("prints, as it goes,\n\n```\n")[1].splitlines()[:6]
    ]
    assert printed[0] == promised[0]
    for ours, theirs in zip(printed[1:], promised[1:], strict=True):
        assert [float(x) for x in ours] == pytest.approx([float(x) for x in theirs], abs=0.02)


def test_every_picture_and_file_it_names_is_there():
    text = README.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (README.parent / target).exists(), target
    for lesson in re.findall(r"nbs/\d\d\w+", text):
        assert (README.parent / f"{lesson}.ipynb").exists(), lesson


def test_the_picture_of_the_loop_names_every_event_but_the_cleanups():
    from learnloop.loop.events import EVENTS

    picture = README.read_text().split("## The loop\n\n```")[1].split("```")[0]
    drawn = set(re.findall(r"(?:before|after)_\w+", picture))
    assert drawn == {name for name in EVENTS if not name.startswith("cleanup_")}


def test_the_map_names_files_that_are_there():
    package = README.parent / "learnloop"
    names = set(re.findall(r"(\w+\.py)", README.read_text().split("## Map of the code")[1]))
    assert names <= {path.name for path in package.rglob("*.py")}
