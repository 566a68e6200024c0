"""Runs the tests that reach a mutant, in a copy of the repository and in a forked process.

A first run of all tests notes which of them reach which line, and that they pass. Then each mutant is a process forked
from one that has imported torch and whatever else takes long, with the tests of the mirror file first. One that hangs
is caught.
"""

import compileall
import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import pytest
from mutations import Mutant, changed_lines, statement_lines

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "learnloop/loop"
#: What tests the loop.
SUITE = (
    "tests/loop",
    "tests/test_event_trace.py",
    "tests/test_faults.py",
    "tests/test_learner.py",
    "tests/test_losses.py",
    "tests/test_seeds.py",
    "tests/test_validation_sets.py",
    "tests/callbacks/test_checkpoints.py",
    "tests/callbacks/test_lr_finder.py",
    "tests/insight/test_explain.py",
    "tests/insight/test_model_checks.py",
)
#: Seconds each: processes of their own, signals by the hundred, notebooks; for the modules that they are about.
LONG = (
    "test_real_signals",
    "test_another_process",
    "test_a_script_ends",
    "test_a_notebook_cell",
    "workers",
    "sigterm",
    "keeps_the_promises",
)
WITH_LONG = ("interrupt.py", "passes.py", "spans.py")
PYTEST = (
    *("-x", "-q", "--assert=plain", "--hypothesis-seed=0", "-o", "timeout=30"),
    *("-p", "no:cacheprovider", "-p", "no:xdist"),
)
MEMORY = 8 << 30  # bytes that a mutant may take
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "models", "docs", "nbs")


class Reached(NamedTuple):
    """What the tests do without a mutant."""

    tests: dict[str, dict[int, list[str]]]  # by file and line; none of a line that only an import runs
    seconds: dict[str, float]  # of each test
    modules: list[str]  # what they import that is not ours


class Outcome(NamedTuple):
    """A mutant, and the test that failed; None where all passed."""

    mutant: Mutant
    caught_by: str | None
    before: str  # the changed line
    after: str


# In the forked process


class Recording:
    """A plugin of pytest that notes which test ran which line, how long it took, and which failed."""

    def __init__(self, cov: coverage.Coverage):
        self.cov, self.seconds, self.failed = cov, {}, set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.cov.switch_context(item.nodeid)
        began = time.perf_counter()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.perf_counter() - began
            self.cov.switch_context("")


class Chosen:
    """A plugin of pytest that runs some tests, in this order, and notes the first that fails."""

    def __init__(self, tests: Sequence[str]):
        self.places = {name: i for i, name in enumerate(tests)}
        self.failed: str | None = None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.places), key=lambda i: self.places[i.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


def record(tree: Path) -> dict[str, Any]:
    """Runs all tests once, and says what they reach; one that fails without any mutant is left out."""
    cov = coverage.Coverage(data_file=None, include=[f"{tree}/{PACKAGE}/*"], config_file=False)
    cov.start()
    plugin = Recording(cov)
    code = pytest.main([*PYTEST, "--maxfail=3", "-m", "not slow and not timing", *SUITE], plugins=[plugin])
    cov.stop()
    if code not in (0, 1) or len(plugin.failed) == 3:
        return {"error": "too many tests fail without any mutant"}
    tests = _reaching(cov.get_data(), tree, plugin.failed)
    seconds = {name: took for name, took in plugin.seconds.items() if name not in plugin.failed}
    ours = ("learnloop", "tests", "benchmarks", "conftest", "_pytest", "__main__", "__mp_main__")
    return {"tests": tests, "seconds": seconds, "modules": [m for m in sys.modules if not m.startswith(ours)]}


def _reaching(data: coverage.CoverageData, tree: Path, failed: set[str]) -> dict[str, dict[int, list[str]]]:
    return {
        os.path.relpath(file, tree): {line: sorted({*names} - {"", *failed}) for line, names in by_line.items()}
        for file in sorted(data.measured_files())
        for by_line in [data.contexts_by_lineno(file)]
    }


def run_tests(tests: Sequence[str]) -> dict[str, Any]:
    """Runs some tests in their order until one fails, and says which."""
    plugin = Chosen(tests)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    code = pytest.main([*PYTEST, *dict.fromkeys(name.partition("::")[0] for name in tests)], plugins=[plugin])
    return {"failed": plugin.failed or (None if code == 0 else "what could not be imported")}


def forked(tree: Path, work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any] | None:
    """What `work` returns in a process of its own, whose folder is `tree`; None where it dies or takes too long."""
    answer = tree.parent / f"{tree.name}.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _alone_in(tree)
            answer.write_text(json.dumps(work()))
        os._exit(0)
    _waited_for(child, time.monotonic() + seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # whatever it has left behind
    return json.loads(answer.read_text()) if answer.exists() else None


def _alone_in(tree: Path) -> None:
    os.setsid()
    os.chdir(tree)
    output = os.open(tree.parent / f"{tree.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.path.insert(0, str(tree))
    os.environ.update(MPLBACKEND="Agg", PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1")
    found = importlib.util.find_spec("learnloop")
    if "learnloop" in sys.modules or found is None or not str(found.origin).startswith(str(tree)):
        raise RuntimeError("`learnloop` would not be imported from the copy")


def _waited_for(child: int, until: float) -> None:
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


# In the process that forks


def copied(root: Path, tree: Path) -> Path:
    """A copy of the repository. It is compiled but for the loop, whose compiled files could be those of a mutant."""
    shutil.copytree(root, tree, ignore=NOT_COPIED)
    for folder in ("learnloop", "tests"):
        compileall.compile_dir(tree / folder, quiet=1)
    shutil.rmtree(tree / PACKAGE / "__pycache__", ignore_errors=True)
    return tree


def reached(tree: Path) -> Reached:
    """What each test reaches; the slow imports are done here too from then on."""
    found = forked(tree, partial(record, tree), seconds=1800)
    if found is None or "error" in found:
        text = (tree.parent / f"{tree.name}.txt").read_text()
        raise RuntimeError(f"{'it broke off' if found is None else found['error']}:\n{text[-3000:]}")
    for name in found["modules"]:
        with contextlib.suppress(BaseException):
            importlib.import_module(name)
    lines = {file: {int(n): names for n, names in of.items()} for file, of in found["tests"].items()}
    return Reached(lines, found["seconds"], found["modules"])


def tests_reaching(mutant: Mutant, source: str, known: Reached) -> set[str]:
    """Tests that run the mutant's statement; all, where only an import runs it.

    Those of the mirror file where none is seen to: it may be run in a process that a test starts.
    """
    by_line = known.tests.get(mutant.file, {})
    lines = statement_lines(source, mutant.line, mutant.last_line)
    names = {name for n in lines for name in by_line.get(n, ())}
    if names:
        return names
    return {n for n in known.seconds if _is_mirrored(n, mutant) or any(line in by_line for line in lines)}


def _is_mirrored(test: str, mutant: Mutant) -> bool:
    return test.startswith(f"tests/loop/test_{Path(mutant.file).name}::")


def tests_for(mutant: Mutant, source: str, known: Reached, seconds: float) -> tuple[list[str], list[str]]:
    """The tests of the mirror file that reach a mutant, then others, quick ones first, that take so many seconds."""
    names = tests_reaching(mutant, source, known)
    if Path(mutant.file).name not in WITH_LONG:
        names = {n for n in names if not any(part in n for part in LONG)}
    ordered = sorted(names, key=lambda n: (known.seconds[n], n))
    mirrored = [n for n in ordered if _is_mirrored(n, mutant)]
    others = [n for n in ordered if not _is_mirrored(n, mutant)]
    until = accumulate(known.seconds[n] for n in others)
    return mirrored, [n for n, t in zip(others, until, strict=True) if t < seconds]


def tried(mutant: Mutant, known: Reached, seconds: float, tree: Path) -> Outcome:
    """Runs the tests with one mutant in its place."""
    source = (tree / mutant.file).read_text()
    code = mutant.code(source)
    before, after = changed_lines(source, code)
    (tree / mutant.file).write_text(code)
    try:
        for tests in filter(None, tests_for(mutant, source, known, seconds)):
            found = forked(tree, partial(run_tests, tests), 30 + 5 * sum(known.seconds[n] for n in tests))
            failed = "a process that died or did not end" if found is None else found["failed"]
            if failed:
                return Outcome(mutant, failed, before, after)
    finally:
        (tree / mutant.file).write_text(source)
    return Outcome(mutant, None, before, after)


_tree: Path  # the copy that a process of the pool works in


def _open_tree(folder: Path) -> None:
    global _tree
    _tree = copied(folder / "first", folder / f"copy-{os.getpid()}")


def _tried_here(mutant: Mutant, known: Reached, seconds: float) -> Outcome:
    return tried(mutant, known, seconds, _tree)


def outcomes(mutants: Sequence[Mutant], seconds: float, jobs: int) -> Iterator[Outcome]:
    """Each mutant's end, as they come, with a line for each survivor."""
    sys.dont_write_bytecode = True
    importlib.import_module("torch").set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name).resolve()
        known = reached(copied(ROOT, folder / "first"))
        print(f"{len(known.seconds)} tests, {sum(known.seconds.values()):.0f} s", flush=True)
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(jobs, fork, _open_tree, (folder,)) as pool:
            for i, outcome in enumerate(pool.map(partial(_tried_here, known=known, seconds=seconds), mutants), 1):
                _say(i, len(mutants), outcome)
                yield outcome


def _say(i: int, n: int, outcome: Outcome) -> None:
    m = outcome.mutant
    change = f"{outcome.before}  →  {outcome.after}" if outcome.caught_by is None else f"caught by {outcome.caught_by}"
    print(f"{i} of {n}: {m.file}:{m.line} {m.operator}: {change}", flush=True)
