"""Mutants of the loop: which there are, which tests are chosen for them, and what is said of those that survive."""

import importlib
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray", reason="needs the extra `mutants`")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

SOURCE = '''"""Doc."""

LIMIT: int | None = None


def add(into: list, item: int | None = None) -> bool | None:
    """Adds 1."""
    total = 1
    if item is not None:
        into.append(item)
    return total > 0
'''


@pytest.fixture(scope="module")
def module():
    """Imports a benchmark by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # they import each other
        yield importlib.import_module


@pytest.fixture(scope="module")
def mutations(module):
    return module("mutations")


def changes(mutations, operator):
    """Lines before and after each mutant by an operator."""
    found = [m for m in mutations.mutants_of("a.py", SOURCE) if m.operator == operator]
    return [mutations.changed_lines(SOURCE, m.code(SOURCE)) for m in found]


def test_a_mutant_is_one_change_of_one_line(mutations):
    assert changes(mutations, "AddNot") == [("if item is not None:", "if not item is not None:")]
    assert changes(mutations, "NumberReplacer") == [
        ("total = 1", "total = 2"),
        ("total = 1", "total = 0"),
        ("return total > 0", "return total > 1"),
        ("return total > 0", "return total > -1"),
    ]


def test_a_call_for_its_effect_is_left_out_and_an_assignment_to_a_name_is_not(mutations):
    assert changes(mutations, "RemoveEffect") == [("into.append(item)", "pass")]


def test_annotations_have_no_mutants(mutations):
    assert changes(mutations, "ReplaceBinaryOperator_BitOr_BitAnd") == []


def test_a_sample_takes_of_each_module_in_proportion_and_is_the_same_for_a_seed(mutations):
    every = {
        file: [mutations.Mutant(file, "AddNot", i, i, i) for i in range(n)] for file, n in (("a.py", 80), ("b.py", 20))
    }
    drawn = mutations.sampled(every, 10, seed=3)
    assert [m.file for m in drawn] == ["a.py"] * 8 + ["b.py"] * 2
    assert mutations.sampled(every, 10, seed=3) == drawn != mutations.sampled(every, 10, seed=4)


def test_what_lies_beyond_a_sample_has_nothing_of_it(mutations):
    every = {"a.py": [mutations.Mutant("a.py", "AddNot", i, i, i) for i in range(30)]}
    first, beyond = mutations.sampled(every, 10, seed=3), mutations.sampled(every, 20, seed=3, beyond=10)
    assert sorted(first + beyond) == every["a.py"]


def test_a_mutants_tests_are_those_that_reach_its_statement_the_mirror_file_first(module, mutations):
    other, mirror = "tests/loop/test_b.py::one", "tests/loop/test_a.py::two"
    by_line = {9: [other, mirror], 10: ["tests/loop/test_b.py::three"]}
    seconds = {other: 0.1, mirror: 0.2, "tests/loop/test_b.py::three": 0.3}
    reached = module("mutant_tests").Reached({"learnloop/loop/a.py": by_line}, seconds, [])
    mutant = next(m for m in mutations.mutants_of("learnloop/loop/a.py", SOURCE) if m.operator == "AddNot")
    assert module("mutant_tests").tests_for(mutant, SOURCE, reached, seconds=1) == ([mirror], [other])


def test_the_page_gives_the_rate_and_for_each_survivor_its_reason_or_that_it_is_new(module):
    survivor = {"file": "learnloop/loop/a.py", "line": 3, "operator": "AddNot", "before": "if a:", "after": "if not a:"}
    page = module("mutants").page({"counts": {"learnloop/loop/a.py": [4, 3]}, "survivors": [survivor]}, "today")
    assert "| a.py | 4 | 3 | 75.0 % |" in page
    assert "- `learnloop/loop/a.py:3` `if a:` → `if not a:`: **new**" in page


def test_every_reason_is_about_a_mutant_that_there_is(module, mutations):
    for file, line, becomes in module("mutants").reasons():
        source = (BENCHMARKS.parent / file).read_text()
        lines = source.splitlines()
        near = [m for m in mutations.mutants_of(file, source) if lines[m.line - 1].strip() == line]
        assert (line, becomes) in [mutations.changed_lines(source, m.code(source)) for m in near], (file, line)
