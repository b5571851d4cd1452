"""The house rules: imports point inward, help comes without torch, every verb explains itself."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import afa
from afa.cli.main import COMMANDS

ROOT = Path(afa.__file__).parent
sys.path.insert(0, str(ROOT.parent / "scripts"))
import measure_house as house  # noqa: E402

HEAVY = ("torch", "diffusers", "transformers")
KERNEL = {"stages", "aggregators", "denoiser", "models"}


@pytest.fixture(scope="module")
def graph():
    return house.import_graph(ROOT)


def test_every_room_has_a_floor(graph):
    assert {house.room(module) for module in graph} - set(house.FLOOR) == set()


def test_imports_point_down(graph):
    assert house.upward_imports(graph) == []


def test_no_imports_go_in_a_circle(graph):
    assert house.circles(graph) == []


def test_an_upward_import_and_a_circle_would_be_found():
    graph = {"afa.errors": {"afa.cli.main"}, "afa.cli.main": {"afa.errors"}}
    assert house.upward_imports(graph) == [("afa.errors", "afa.cli.main")]
    assert len(house.circles(graph)) == 1


@pytest.mark.parametrize(("folder", "columns"), [("afa", 110), ("tests", 160), ("scripts", 160), ("benchmarks", 160), ("docs", 160), ("examples", 160)])
def test_lines_end_before_the_margin(folder, columns):
    files = sorted((ROOT.parent / folder).rglob("*.py"))
    lines = [(file, number, line) for file in files for number, line in enumerate(file.read_text().splitlines(), 1)]
    assert [f"{file}:{number}" for file, number, line in lines if len(line) > columns] == []


def test_only_the_edges_import_the_demonstration(graph):
    importers = {house.room(module) for module, others in graph.items() for other in others if house.room(other) == "demo"}
    assert importers <= {"demo", "cli", "webui"}


def imports_of_afa(file: Path) -> Iterator[str]:
    """Yield the dotted names of all modules, and of what is taken from them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "afa")
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "afa":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def there_is(name: str) -> bool:
    """Whether a module of this name exists, or a module that defines it, by its source alone."""
    place = ROOT.parent / name.replace(".", "/")
    if place.is_dir() or place.with_suffix(".py").is_file():
        return True
    file = place.parent.with_suffix(".py")
    file = file if file.is_file() else place.parent / "__init__.py"
    return file.is_file() and re.search(rf"\b{place.name}\b", file.read_text()) is not None


@pytest.mark.parametrize("folder", ["scripts", "benchmarks", "docs", "examples"])
def test_programs_outside_the_package_import_what_exists(folder):
    files = sorted((ROOT.parent / folder).rglob("*.py"))
    assert [f"{file.name}: {name}" for file in files for name in imports_of_afa(file) if not there_is(name)] == []
    assert not there_is("afa.controls.run") and not there_is("afa.training.run.walk_of_stages")


def kernel_files() -> Iterator[tuple[Path, ast.Module]]:
    for room in sorted(KERNEL):
        for file in sorted((ROOT / room).glob("*.py")):
            yield file, ast.parse(file.read_text())


def test_the_kernel_builds_on_torch_and_diffusers_alone():
    nodes = [node for _, tree in kernel_files() for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) <= {"afa", "torch", "diffusers"}
    assert not {"os", "sys", "io", "pathlib", "shutil", "tempfile"} & names


def test_the_kernel_touches_no_files_and_prints_nothing():
    calls = [node for _, tree in kernel_files() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {"open", "print", "input"} & {node.func.id for node in calls if isinstance(node.func, ast.Name)}


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


DOCS = [path for path in sorted([*ROOT.parent.glob("*.md"), *ROOT.parent.glob("docs/*.md")]) if path.name not in ("log.md", "CHANGELOG.md")]


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.name)
def test_every_file_that_a_page_names_is_there(page):
    names = set(re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)`", page.read_text()))
    assert [name for name in sorted(names) if not (ROOT / name).exists() and not (ROOT.parent / name).exists()] == []
    assert page.name != "ARCHITECTURE.md" or len(names) > 30


def test_a_walk_has_at_most_ten_files():
    text = (ROOT.parent / "ARCHITECTURE.md").read_text()
    walks = text.partition("## Four walks")[2].partition("## Files")[0].split("\n**")[1:]
    assert len(walks) == 4
    for walk in walks:
        steps = re.findall(r"^\d+\. ", walk, flags=re.MULTILINE)
        assert 5 <= len(steps) <= 10, walk.partition("\n")[0]
