"""The house rules: imports point inward, help comes without torch, every verb explains itself."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import afa
from afa.cli.main import COMMANDS

ROOT = Path(afa.__file__).parent
CORE = {"families", "aggregators", "denoiser", "errors", "lookup", "options", "places", "schema", "naming"}
EDGES = {"cli", "webui", "__main__"}
DEMO = {"demo"}
ROOMS = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__", "__pycache__"}
HEAVY = ("torch", "diffusers", "transformers")


def room(module: str) -> str:
    """afa.families.unet -> families; the package itself, which is only a door, has none."""
    first = module.removeprefix("afa").removeprefix(".").partition(".")[0]
    return first if first in ROOMS else ""


def imported(file: Path) -> Iterator[str]:
    """Every module a file imports, wherever in the file; a public name of `afa` counts as the module it comes from."""
    package = ".".join(("afa", *file.relative_to(ROOT).parts[:-1]))
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [alias.name for alias in node.names]
            yield from (afa._HOMES.get(name, f"afa.{name}") for name in names) if module == "afa" else (module,)


def files(rooms: set[str]) -> list[Path]:
    """The files of some rooms."""
    return [file for name in sorted(rooms) for file in sorted([*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")])]


def imports_of(rooms: set[str], forbidden: set[str]) -> list[str]:
    """Who in some rooms imports what from others, as sentences."""
    found = [(file.relative_to(ROOT), module) for file in files(rooms) for module in imported(file) if f"{module}.".startswith("afa.")]
    return [f"{file} imports {module}" for file, module in found if room(module) in forbidden]


def test_the_rooms_are_all_there():
    assert CORE | EDGES | DEMO < ROOMS
    assert len(files(ROOMS)) == len([file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py"])


def test_the_core_imports_only_the_core():
    assert imports_of(CORE, ROOMS - CORE) == []


def test_work_imports_nothing_from_the_edges():
    assert imports_of(ROOMS - EDGES, EDGES) == []


def test_only_the_edges_import_the_demonstration():
    assert imports_of(ROOMS - EDGES - DEMO, DEMO) == []


def test_the_core_builds_on_torch_and_diffusers_alone():
    outside = {module.partition(".")[0] for file in files(CORE) for module in imported(file)} - set(sys.stdlib_module_names)
    assert outside <= {"afa", "torch", "diffusers"}


def test_the_core_touches_no_files_and_prints_nothing():
    core = CORE - {"places"}  # which knows where the package itself lies
    calls = [node for file in files(core) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    assert not {"open", "print", "input"} & {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    assert not {"os", "sys", "io", "pathlib", "shutil", "tempfile"} & {module for file in files(core) for module in imported(file)}


@pytest.mark.parametrize(
    "code",
    ["import afa", "from afa.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"],
    ids=["import afa", "afa --help"],
)
def test_torch_is_not_loaded_before_it_is_needed(code):
    report = f"import sys\nprint([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_every_public_name_can_be_imported():
    assert sorted(afa._HOMES) == sorted(afa.__all__)
    assert all(getattr(afa, name).__name__ == name for name in afa.__all__)


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_a_sentence_and_two_examples(verb):
    command = importlib.import_module(COMMANDS[verb])
    assert command.__doc__.strip()
    assert len(command.EXAMPLES) >= 2
    assert callable(command.run)


def test_the_citation_names_this_version():
    citation = ROOT.parent / "CITATION.cff"
    assert f"\nversion: {afa.__version__}\n" in citation.read_text()
