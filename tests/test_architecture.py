"""The architecture, read from the sources: who may import whom, and what must stay the only one of its kind."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import learnloop
from learnloop.loop.callback import Callback

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "learnloop"

#: From the bottom to the top: a module imports only from rows above its own in this list. A folder stands for those of
#: its modules that are named nowhere. `learnloop` is the package's own `__init__`.
LAYERS = (
    "html",
    "loop.events  loop.cancel  optim.schedules  data.batches  data.datasets  data.transforms  losses  plots  machine",
    "loop.layers",
    "modules  seeds  loop.ordering  loop.kept  loop.notes  data.keyed  data.tensors  data.show  metrics  insight.hooks",
    "data.ahead  data.loaders  optim  scores",
    "loop.callback  sklearn_scores  data.once",
    "loop.interrupt  loop.state  loop.dispatch",
    "loop.spans  loop.current  loop.identity",
    "loop.passes  loop.runs",
    "loop.fits",
    "loop.training_loop",
    "callbacks.modes  callbacks.recorder  callbacks.schedule  callbacks.journal  checkpoint",
    "stored  verify",
    "callbacks  export  insight",
    "integrations.packages",
    "integrations",
    "learner",
    "experiment",
    "learnloop",
    "checks",
    "testing",
    "all  __main__",
)
#: What the modules of a folder may import at all.
FOLDERS = {
    "data": {"data", "html", "plots"},
    "optim": {"optim", "html"},
    "loop": {"loop", "data", "html"},
    "callbacks": {
        *("callbacks", "insight", "loop", "data", "optim", "metrics", "losses", "plots", "checkpoint", "stored"),
        *("machine", "html"),
    },
    "insight": {"insight", "callbacks", "loop", "data", "optim", "metrics", "losses", "plots", "modules", "html"},
    "integrations": {"integrations", "callbacks", "loop", "data"},
    "experiment": {
        *("experiment", "learner", "insight", "callbacks", "loop", "data", "plots", "checkpoint", "machine", "seeds"),
        *("html",),
    },
}


def module_name(file):
    """`loop.spans` of learnloop/loop/spans.py; `learnloop` of the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__") or "learnloop"


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}
INITS = {name for name, file in FILES.items() if file.name == "__init__.py" and name != "learnloop"}
TESTING = ("testing", "checks")
SHIPPED = {name: tree for name, tree in TREES.items() if name.split(".")[0] not in TESTING}  # all but what tests use


def imports_of(name):
    """The modules of this package that a module imports, inside its functions too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("learnloop.") in FILES else node.module)
    return {m.removeprefix("learnloop.") for m in found if m == "learnloop" or m.startswith("learnloop.")}


def row_of(name):
    """The row of a module in LAYERS."""
    rows = [row.split() for row in LAYERS]
    for wanted in (name, name.rpartition(".")[0]):
        for i, row in enumerate(rows):
            if wanted in row:
                return i
    return None


# Imports


@pytest.mark.parametrize("name", sorted(set(FILES) - INITS))
def test_a_module_imports_only_downward(name):
    assert row_of(name) is not None, f"{name} has no place in LAYERS"
    upward = [other for other in imports_of(name) if row_of(other) is None or row_of(other) >= row_of(name)]
    same_folder = name.rpartition(".")[0]
    if same_folder and same_folder in LAYERS[row_of(name)].split():  # modules that a folder stands for
        upward = [other for other in upward if not (row_of(other) == row_of(name) and downward_inside(other, name))]
    assert upward == []


def downward_inside(other, name):
    """Whether two modules of one row, which a folder stands for, import in one direction only."""
    return name not in imports_of(other)


def test_every_module_in_the_layers_exists():
    named = " ".join(LAYERS).split()
    assert len(named) == len(set(named))
    assert [m for m in named if m not in FILES] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_it_may(folder):
    for name in FILES:
        if name.startswith(f"{folder}."):
            wrong = {other for other in imports_of(name) if other.split(".")[0] not in FOLDERS[folder]}
            assert not wrong, f"{name} imports {wrong}"


def test_nothing_imports_an_integration():
    found = {(n, other) for n in FILES for other in imports_of(n) if other.startswith("integrations")}
    assert [(n, other) for n, other in found if not n.startswith("integrations.")] == []


def test_nothing_imports_what_only_tests_use():
    found = {(n, other) for n in SHIPPED for other in imports_of(n) if other.split(".")[0] in TESTING}
    assert found == set()


def test_there_are_no_circles():
    done = set()

    def visit(name, path):
        assert name not in path, " → ".join([*path, name])
        if name not in done:
            for other in imports_of(name):
                visit(other, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


def test_there_are_no_star_imports():
    stars = [
        n
        for n, t in TREES.items()
        for node in ast.walk(t)
        if isinstance(node, ast.ImportFrom)
        for a in node.names
        if a.name == "*"
    ]
    assert stars == []


def test_the_init_of_a_folder_holds_a_docstring_and_nothing_else():
    assert set(FOLDERS) <= INITS
    for name in INITS:
        (only,) = TREES[name].body
        assert ast.get_docstring(TREES[name]) and isinstance(only, ast.Expr), name


def test_the_init_of_the_loop_says_what_it_may_not_import():
    first = ast.get_docstring(TREES["loop"]).splitlines()[0]
    assert "no concrete callback" in first and "nothing above" in first


def test_the_init_of_the_integrations_says_what_it_may_not_import():
    first = ast.get_docstring(TREES["integrations"]).splitlines()[0]
    assert "imports no learner" in first and "nothing above imports it" in first


def test_every_module_says_what_it_is_for():
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


LAZY = ("matplotlib", "fastprogress", "IPython", "pandas", "fastai", "torchvision", "tensorboard")


def test_importing_the_package_imports_neither_matplotlib_nor_fastprogress():
    code = f"import sys, learnloop; print([m for m in {LAZY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The public names


def public_list():
    (assigned,) = [
        node.value
        for node in TREES["learnloop"].body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    ]
    return ast.literal_eval(assigned)  # ValueError unless it is written out


def test_the_public_list_is_literal_and_sorted():
    names = public_list()
    assert names == learnloop.__all__
    assert names == sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert len(names) == len(set(names))


def test_what_the_package_imports_is_what_it_publishes():
    imported = {
        (a.asname or a.name) for node in TREES["learnloop"].body if isinstance(node, ast.ImportFrom) for a in node.names
    }
    defined = {n.name for n in TREES["learnloop"].body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert imported | {n for n in defined if not n.startswith("_")} == set(public_list())


def test_every_public_name_is_there():
    assert [name for name in public_list() if not hasattr(learnloop, name)] == []


# The only one of its kind


def calls_in(tree, attribute):
    """Calls of a method of that name."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == attribute
    ]


LOOPS = (ast.For, ast.AsyncFor, ast.While)


def test_there_is_one_loop_over_the_batches():
    loops = [
        name
        for name, tree in SHIPPED.items()
        for node in ast.walk(tree)
        if isinstance(node, LOOPS) and (calls_in(node, "one_batch") or calls_in(node, "_do_one_batch"))
    ]
    assert loops == ["loop.training_loop"]


def iterated(tree):
    """What is gone over by `for`, in statements and comprehensions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.comprehension)):
            yield ast.unparse(node.iter)


@pytest.mark.parametrize("source", ["dl", "dls.train", "dls.valid"])
def test_nobody_goes_over_a_loader_beside_it(source):
    found = [(n, e) for n, tree in SHIPPED.items() for e in iterated(tree) if e.endswith((f".{source}", f"({source})"))]
    assert found == []


def test_there_is_one_module_that_goes_back_through_a_loss():
    assert {name for name, tree in SHIPPED.items() for _ in calls_in(tree, "backward")} == {"loop.training_loop"}


def test_no_class_of_ours_is_patched():
    patched = [
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        for d in node.decorator_list
        if ast.unparse(d).startswith(("patch", "fastcore.basics.patch"))
    ]
    assert patched == []


def test_user_input_meets_no_assert():
    assert [name for name, tree in SHIPPED.items() for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []


# What is declared is read

#: Class attribute of Callback -> a test that fails when it is ignored.
READ = {
    "learn": "loop/test_callback.py::test_reading_looks_on_the_callback_then_the_learner_then_the_model",
    "order": "loop/test_ordering.py::test_callbacks_run_by_order",
    "run_before": "loop/test_ordering.py::test_who_declares_run_before_moves_directly_before_its_target",
    "run_after": "loop/test_ordering.py::test_who_declares_run_after_moves_directly_after_its_target",
    "run": "loop/test_dispatch.py::test_run_filters_all_events_but_cleanups",
    "run_train": "loop/test_dispatch.py::test_run_train_and_run_valid_filter_all_events_of_the_batch_span_but_cleanups",
    "run_valid": "loop/test_dispatch.py::test_run_train_and_run_valid_filter_all_events_of_the_batch_span_but_cleanups",
    "tasks": "loop/test_callback.py::test_it_takes_part_only_in_its_tasks_cleanups_included",
    "reads_only": "loop/test_identity.py::test_a_callback_that_only_reads_may_come_and_go",
    "acts_outside": "insight/test_explain.py::test_who_acts_outside_is_listed_and_not_called",
    "_stateattrs": "loop/test_callback.py::test_its_state_is_what_is_named_and_set",
    "_not_events": "loop/test_callback.py::test_not_events_silences_both",
}


def test_every_class_attribute_of_callback_has_a_test_that_fails_when_it_is_ignored():
    attributes = {
        name
        for name, value in vars(Callback).items()
        if not name.startswith("__") and not callable(value) and not isinstance(value, (property, staticmethod))
    }
    assert attributes == set(READ) == set(Callback.__annotations__)


@pytest.mark.parametrize("attribute", READ)
def test_that_test_is_there(attribute):
    file, _, test = READ[attribute].partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_file_stands_where_its_module_stands():
    """tests/loop/test_spans.py tests learnloop/loop/spans.py."""
    of_the_whole = {
        "schedule_verbs",
        "validation_sets",
        "architecture",
        "data_from_the_field",
        "event_trace",
        "packaging",
        "readme",
        "notebooks",
        "wild_callbacks",
        "lessons",
        "overhead",
        "callbacks_page",
        "common_sets",
        "fashion_mnist",
        "optimizer_speed",
        "main",
        "faults",
        "side_by_side",
        "security_page",
        "every_callback",
        "properties",
        "many_fits",
        "benchmarks",
        "mutants",
    }
    for file in (ROOT / "tests").rglob("test_*.py"):
        parts = file.relative_to(ROOT / "tests").with_suffix("").parts
        name = ".".join([*parts[:-1], parts[-1].removeprefix("test_")])
        assert name in FILES or name in of_the_whole, name
