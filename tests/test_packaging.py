"""What a built wheel holds, and that it works where the source tree is not."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "models")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree, because building leaves files beside the sources."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools, which the extra `test` installs")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", ignore=NOT_SOURCE)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."],
        cwd=folder / "tree",
        check=True,
    )
    return next(folder.glob("*.whl"))


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name.lower(): requirement for requirement in requirements}


def test_the_wheel_is_named_after_the_version(wheel):
    assert wheel.name == "learnloop-0.1.0-py3-none-any.whl"


def test_the_wheel_contains_the_data_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "learnloop/data/digits.csv.gz" in names
    assert "learnloop/data/digits.LICENSE.txt" in names
    assert "learnloop-0.1.0.dist-info/licenses/LICENSE" in names


def test_the_wheel_contains_every_module_of_the_package_and_nothing_else(wheel):
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    in_tree = {str(file.relative_to(ROOT)) for file in (ROOT / "learnloop").rglob("*.py")}
    assert in_wheel == in_tree
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert top == {"learnloop", "learnloop-0.1.0.dist-info"}


def test_the_wheel_works_without_the_source_tree(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import learnloop as ll; print(ll.__file__); print(ll.datasets.digits())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        str(tmp_path / "site" / "learnloop" / "__init__.py"),
        "LabelledImages(x_train (1438, 1, 8, 8), y_train (1438,), x_valid (359, 1, 8, 8), y_valid (359,))",
    ]


def test_the_constraints_pin_every_dependency_to_a_version_in_its_range():
    for dependency in map(Requirement, pyproject()["dependencies"]):
        (pin,) = pins()[dependency.name].specifier
        assert pin.operator == "=="
        assert dependency.specifier.contains(pin.version), f"{dependency} against {pin}"


def test_torch_is_pinned_to_the_version_that_is_tested():
    assert str(pins()["torch"]) == "torch==2.13.0"
