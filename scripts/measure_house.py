"""Measure the house: files, lines, statements, sizes, helpers called once, repeated names, imports upwards.

The source is read with `ast` only; nothing of afa is imported.
"""

import argparse
import ast
import statistics
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

# Rooms from the ground up. A file may import from its own floor and from those below it.
FLOORS = (
    (
        "version defaults lazy errors places schema settings seeds text_files locks files store images prompts prompt_syntax stats "
        "significance devices user_files hub_files"
    ),
    "stages aggregators",
    "denoiser pictures",
    "models",
    "experts schedulers latents text_encoder",
    "frame lora_loading cost memory checkpoint fingerprint ensemble",
    "inspection sampling data metrics pages",
    "training generation",
    "evaluation screening explanation merging distillation",
    "demo",
    "webui comfyui cli",
    "__init__ __main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
WIDTH = 110


def module_name(root: Path, file: Path) -> str:
    """afa/models/unet.py -> afa.models.unet; a package's __init__.py is the package."""
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """afa.models.unet -> models; afa -> __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def imported_modules(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """The modules of the house that a file imports when it runs, wherever in the file; not those for type checkers only."""
    guarded = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(child) for node in guarded for statement in node.body for child in ast.walk(statement)}
    for node in (node for node in ast.walk(tree) if id(node) not in skipped):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
        yield from (name for name in names if name in modules)


def import_graph(root: Path) -> dict[str, set[str]]:
    """module -> the modules that it imports."""
    files = {module_name(root, file): file for file in sorted(root.rglob("*.py"))}
    known = set(files)
    return {
        name: set(imported_modules(ast.parse(file.read_text()), known)) - {name}
        for name, file in files.items()
    }


def upward_imports(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Pairs (file, imported file) in which the imported file stands on a higher floor."""
    pairs = sorted((name, other) for name, others in graph.items() for other in others)
    return [(a, b) for a, b in pairs if FLOOR.get(room(b), 99) > FLOOR.get(room(a), 99)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of imports: one of each knot, until none is left (the last import of a found circle is then ignored)."""
    graph, found = {name: set(others) for name, others in graph.items()}, []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]  # of predecessors: each is imported by the next
            found.append(circle[::-1])
            graph[circle[1]].discard(circle[0])
        else:
            return found


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def used_names(tree: ast.Module) -> Counter[str]:
    """How often each name or attribute is read or imported in a file."""
    names = [
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store)
    ]
    names += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [
        alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    return Counter(names)


def measure(root: Path) -> list[tuple[str, str]]:
    """The measurements of a package's folder as (title, value)."""
    paths = sorted(root.rglob("*.py"))
    texts = {path: path.read_text() for path in paths}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    sizes = [node.end_lineno - node.lineno + 1 for tree in trees.values() for node in functions(tree)]
    statements = sum(isinstance(node, ast.stmt) for tree in trees.values() for node in ast.walk(tree))
    used = sum((used_names(tree) for tree in trees.values()), Counter())
    private = [node.name for tree in trees.values() for node in functions(tree)]
    private = [name for name in private if name.startswith("_") and not name.startswith("__")]
    classes = Counter(
        node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    )
    repeated = sorted(name for name, count in classes.items() if count > 1)
    names = Counter(path.name for path in paths if path.name != "__init__.py")
    wide = sum(len(line) > WIDTH for text in texts.values() for line in text.splitlines())
    graph = import_graph(root)
    upward, knots = upward_imports(graph), circles(graph)
    large = [path for path in paths if lines[path] > 400]
    return [
        ("files", f"{len(paths)}"),
        ("lines", f"{sum(lines.values()):,}"),
        ("statements", f"{statements:,}"),
        ("lines over 110 columns", f"{wide:,}"),
        (
            "lines of a file, median and largest",
            f"{statistics.median(lines.values()):.0f}, {max(lines.values())}",
        ),
        (
            "files over 400 lines",
            ", ".join(f"{path.relative_to(root)} {lines[path]}" for path in large) or "none",
        ),
        ("lines of a function, median and largest", f"{statistics.median(sizes):.1f}, {max(sizes)}"),
        ("functions over 40 lines", f"{sum(size > 40 for size in sizes)} of {len(sizes):,}"),
        ("private helpers, used once", f"{len(private)}, {sum(used[name] == 1 for name in private)}"),
        (
            "class names used twice or more",
            f"{len(repeated)}" + (f": {', '.join(repeated)}" if repeated else ""),
        ),
        ("file names used twice or more", f"{sum(count > 1 for count in names.values())}"),
        ("imports upwards", "\n".join([f"{len(upward)}", *(f"{a} imports {b}" for a, b in upward)])),
        ("circles", "\n".join([f"{len(knots)}", *(" -> ".join(knot) for knot in knots)])),
    ]


def main() -> None:
    """Print the measurements of the checkout that is named, or of this one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).resolve().parent.parent
    parser.add_argument(
        "checkout", nargs="?", type=Path, default=here, help="a checkout of afa (default: this)"
    )
    checkout = parser.parse_args().checkout
    if not (checkout / "afa").is_dir():
        parser.error(f"{checkout} has no folder afa; give the folder of a checkout")
    for title, value in measure(checkout / "afa"):
        first, *rest = value.split("\n")
        print(f"{title:42}{first}", *(f"    {line}" for line in rest), sep="\n")


if __name__ == "__main__":
    main()
