"""The names people import: listed, found, known to type checkers, and cheap until they are used."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import afa

ROOT = Path(afa.__file__).parent
PACKAGES = ("afa", *(f"afa.{room}" for room in ("evaluation", "explanation", "generation", "merging", "screening", "training")))


def test_names_are_listed_before_torch_is_loaded():
    script = (
        f"import importlib, sys\nfor name in {PACKAGES}:\n    package = importlib.import_module(name)\n"
        "    assert set(package.__all__) <= set(dir(package)), name\n"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", PACKAGES)
def test_every_listed_name_is_there_and_explained(name):
    package = importlib.import_module(name)
    assert sorted(package._HOMES) == sorted(package.__all__)
    for public in package.__all__:
        found = getattr(package, public)
        assert found.__name__ == public and found.__module__ == package._HOMES[public]
        assert found.__doc__ and not found.__doc__.startswith(f"{public}(")  # not what a dataclass writes for itself


@pytest.mark.parametrize("name", PACKAGES)
def test_type_checkers_see_the_names_that_python_loads_late(name):
    tree = ast.parse(Path(importlib.import_module(name).__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == importlib.import_module(name)._HOMES


def test_a_name_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="'afa.training' has no attribute 'trane'"):
        _ = importlib.import_module("afa.training").trane


def test_an_installed_copy_has_its_data_and_says_that_it_is_typed():
    settings = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    data = settings["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data["afa"]
    for package, patterns in data.items():
        folder = ROOT.parent / package.replace(".", "/")
        assert all(any(folder.glob(f"{pattern}/*" if pattern.endswith("**") else pattern)) for pattern in patterns), package
    assert all(url.startswith("https://") for url in settings["project"]["urls"].values())
