"""The pages of the site that are no files of docs/: a hook of mkdocs.yml gives them to MkDocs while it builds.

README, CHANGELOG, CONTRIBUTING and ARCHITECTURE, whose links are turned to the site's pages; the command line, read from its parsers; the Python API, by its
public names; the examples. Nothing of this is written into docs/.
"""

import argparse
import ast
import dataclasses
import html
import importlib
import json
import posixpath
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's own afa, also where another one is installed

from afa.cli.main import COMMANDS, EMBEDDED_HELP, build_parser  # noqa: E402

# A file of the repository -> its page
TAKEN = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "ARCHITECTURE.md": "architecture.md"}
BESIDE = ("LICENSE", "NOTICE", "CITATION.cff")  # files that pages link to
PACKAGES = ("afa", *(f"afa.{room}" for room in ("training", "generation", "evaluation", "merging", "screening", "explanation")))
CLI = "cli/"  # the entry of the navigation that stands for all verbs
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
# What makes a browser ask another host as it opens a page: not the links that people follow.
LOADS = re.compile(
    r"""<(?:script|img|iframe|source|link(?![^>]*rel="?canonical))\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>"""
    r"""|url\(["']?(?:https?:)?//[^)]*\)"""
)


def taken_pages() -> dict[str, str]:
    """Return page -> Markdown of what stands beside docs/, links turned."""
    return {page: turned((ROOT / source).read_text(), source, page) for source, page in TAKEN.items()}


def turned(markdown: str, source: str, page: str) -> str:
    """Turn links between files of the repository to links between pages of the site.

    markdown: of one page; code in it is left alone
    source:   its file, from the repository's root
    page:     its page, from the site's root
    """

    def turn(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        target = TAKEN.get(target, target.removeprefix("docs/"))
        return f"{link[1]}{posixpath.relpath(target, posixpath.dirname(page) or '.')}{link[3]}"

    made = ""
    for piece in CODE.split(markdown):
        in_table = made.rpartition("\n")[2].startswith("|")  # GitHub escapes a | of code there, the site does not
        made += LINK.sub(turn, piece) if not CODE.fullmatch(piece) else piece.replace("\\|", "|") if in_table else piece
    return made


# --- the command line ---


def cli_pages() -> dict[str, str]:
    """Return page -> Markdown: every verb with all its options, and their list."""
    parsers = {verb: verb_parser(verb) for verb in COMMANDS}
    rows = [(f"[`afa {verb}`]({verb}.md)", words(summary(verb))) for verb in COMMANDS]
    common = [option_row(action) for action in build_parser([])._actions if not isinstance(action, argparse._SubParsersAction)]
    first = [
        "# Command line",
        "Made from the parsers: `afa VERB --help` prints the same.",
        table(["command", "does"], rows),
        table(["option of all", "does"], common),
        words(EMBEDDED_HELP[0].upper() + EMBEDDED_HELP[1:]) + ".",
        "Results are printed on stdout, progress and messages on stderr. Exit codes: 0 done, 1 failed, 2 invalid input, 130 interrupted.",
    ]
    return {f"{CLI}index.md": "\n\n".join(first) + "\n"} | {f"{CLI}{verb}.md": verb_page(verb, parser) for verb, parser in parsers.items()}


def verb_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of one verb, with its flags."""
    verbs = next(action for action in build_parser([verb])._actions if isinstance(action, argparse._SubParsersAction))
    return verbs.choices[verb]


def verb_page(verb: str, parser: argparse.ArgumentParser) -> str:
    """Return the Markdown of one verb."""
    module: Any = importlib.import_module(COMMANDS[verb])
    actions = [action for action in parser._actions if action.dest not in ("help", "traceback")]
    needed = [spelled(action) for action in actions if action.option_strings and action.required]
    places = [spelled(action) for action in actions if not action.option_strings]
    help_text = described(module.__doc__ or "")
    listed = [block for block in help_text if block.startswith("```")]
    parts = [
        f"# afa {verb}",
        *(block for block in help_text if block not in listed),
        fenced(" ".join(["afa", verb, *places, *needed, "[OPTION …]"])),
        "## Examples",
        fenced("\n".join(module.EXAMPLES)),
        "## Options",
        table(["option", "what it is"], [option_row(action) for action in actions]),
        *(["## More of the help", *listed] if listed else []),
    ]
    for flag, lines in getattr(module, "LISTS", {}).items():
        parts += [f"## Names for --{flag}", table(["name", "what it is"], [(f"`{name}`", words(text)) for name, text in lines()])]
    return "\n\n".join(parts) + "\n"


def summary(verb: str) -> str:
    """Return the first line of a verb's help."""
    return (importlib.import_module(COMMANDS[verb]).__doc__ or "").strip().partition("\n")[0]


def spelled(action: argparse.Action) -> str:
    """Return how an option is written: -h, --steps INT, EXPERT …"""
    value = "" if action.nargs == 0 else str(action.metavar or "{" + ",".join(map(str, action.choices or ())) + "}")
    value += " …" if action.nargs in ("+", "*") else ""
    if not action.option_strings:
        return value if action.required else f"[{value}]"
    return f"{', '.join(action.option_strings)} {value}".strip()


def option_row(action: argparse.Action) -> tuple[str, str]:
    """Return an option and its help, for a table."""
    needed = "**needed**; " if action.option_strings and action.required else ""
    return f"`{spelled(action)}`", needed + words((action.help or "").replace("%%", "%"))


def described(text: str) -> list[str]:
    """Return the blocks of a help text as Markdown; blocks with indented lines are shown as they are."""
    first, _, rest = text.strip().partition("\n")
    blocks = [block.rstrip() for block in re.split(r"\n\s*\n", f"{first}\n{textwrap.dedent(rest)}")]
    return [fenced(block) if re.search(r"^ ", block, re.MULTILINE) else words(block) for block in blocks]


# --- Python ---


def api_page() -> str:
    """Return the Markdown of the Python API: every public name, by package; mkdocstrings reads its docstring and signature."""
    parts = ["# Python API", "Every public name. [Python, step by step](python.md) shows how they are used, with lines that run."]
    for package in PACKAGES:
        module: Any = importlib.import_module(package)
        parts.append(f"## {package}")
        for name in module.__all__:
            members = "\n    options:\n      members: false" if name.endswith("Settings") else ""
            parts.append(f"::: {module._HOMES[name]}.{name}{members}")
            if name.endswith("Settings"):
                parts.append(fields_table(getattr(module, name)))
    return "\n\n".join(parts) + "\n"


def fields_table(settings: Any) -> str:
    """Return the fields of a command's settings, which are its flags."""
    rows = []
    for field in dataclasses.fields(settings.current()):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        rows.append((f"`{field.name}`", "needed" if default is dataclasses.MISSING else f"`{default!r}`", words(field.metadata["help"])))
    return table(["field", "default", "what it is"], rows)


ARGUMENT = re.compile(r"^(\w+(?:, \w+)*):\s+(\S.*)$")
CLOSING = re.compile(r"^(Returns|Raises|Yields|Source|Called|Computed)\b")


def as_markdown(docstring: str) -> str:
    """Make Markdown of a docstring of ours: `name: what it is` lines become a list, what is returned and raised paragraphs."""
    made: list[str] = []
    for line in docstring.splitlines():
        if found := ARGUMENT.match(line):
            if not (made and made[-1].startswith("* ")):
                made.append("")
            made.append(f"* `{found[1]}`: {words(found[2])}")
        elif line.startswith(" ") and made and made[-1].startswith("* "):
            made[-1] += f" {words(line.strip())}"
        elif line.strip():
            after_list = bool(made) and made[-1].startswith("* ")
            made += [""] * (after_list or CLOSING.match(line) is not None) + [words(line.rstrip())]
        else:
            made.append("")
    return "\n".join(made)


# --- examples ---


def examples_page() -> str:
    """Return the Markdown of examples/: the scripts, and the cells of the notebook."""
    parts = [
        "# Examples",
        "Each runs in an empty folder, on the small models that come with afa; put your own checkpoints in their place. A test runs them all.",
    ]
    for script in sorted((ROOT / "examples").glob("*.py")):
        code = script.read_text()
        title = (ast.get_docstring(ast.parse(code)) or "").partition("\n")[0]
        parts += [f"## {title.rstrip('.')}", f"[examples/{script.name}](examples/{script.name})", fenced(code.rstrip(), "python")]
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        first, *cells = json.loads(notebook.read_text())["cells"]
        title, _, rest = "".join(first["source"]).partition("\n")
        parts += [f"## {title.lstrip('# ')}", rest.strip(), f"[examples/{notebook.name}](examples/{notebook.name})"]
        parts += [fenced("".join(cell["source"]), "python") if cell["cell_type"] == "code" else "".join(cell["source"]) for cell in cells]
    return "\n\n".join(parts) + "\n"


# --- Markdown ---


def words(text: str) -> str:
    """Return text with everything escaped that Markdown would read as markup, except `code`."""
    pieces = re.split(r"(`[^`\n]+`)", text)
    plain = [re.sub(r"([\\`*_{}\[\]|])", r"\\\1", html.escape(piece, quote=False)) for piece in pieces[::2]]
    return "".join(f"{before}{code}" for before, code in zip(plain, [*pieces[1::2], ""], strict=True))


def fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |" for cells in lines)


def made_pages() -> dict[str, str]:
    """Return page -> Markdown of all pages that are no files of docs/."""
    return {**taken_pages(), **cli_pages(), "api.md": api_page(), "examples.md": examples_page()}


# --- the hook ---


def on_config(config: Any) -> Any:
    """Write the verbs into the navigation, and name anchors as GitHub does."""
    from pymdownx.slugs import slugify

    for section in config.nav:
        for entry in [one for one in next(iter(section.values())) if isinstance(one, dict)]:
            if entry == {"Command line": CLI}:
                entry["Command line"] = [{"All commands": f"{CLI}index.md"}, *({f"afa {verb}": f"{CLI}{verb}.md"} for verb in COMMANDS)]
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the files that pages link to."""
    from mkdocs.structure.files import File

    for page, markdown in made_pages().items():
        files.append(File.generated(config, page, content=markdown))
    for path in [*(ROOT / name for name in BESIDE), *sorted((ROOT / "examples").glob("*.*"))]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a file of docs/."""
    uri = page.file.src_uri
    return markdown if page.file.generated_by else turned(markdown, f"docs/{uri}", uri)


def on_post_build(config: Any) -> None:
    """Refuse a site that would load something from another host."""
    from mkdocs.exceptions import PluginError

    for file in sorted(Path(config.site_dir).rglob("*")):
        if file.suffix in (".html", ".css") and (found := LOADS.search(file.read_text())):
            raise PluginError(f"{file} loads from another host: {found[0][:200]}")
