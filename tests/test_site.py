"""The site of `make docs`, as far as it can be checked without its packages: every page is found, every verb and option is on one, links lead somewhere."""

import dataclasses
import importlib
import posixpath
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import afa
from afa.cli.main import COMMANDS

ROOT = Path(afa.__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import site_pages  # noqa: E402

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
OWN = {page.relative_to(ROOT / "docs").as_posix(): page for page in (ROOT / "docs").rglob("*.md")}
MADE = site_pages.made_pages()
PAGES = {**{name: site_pages.turned(page.read_text(), f"docs/{name}", name) for name, page in OWN.items()}, **MADE}
FILES = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*") if path.is_file()}
FILES |= {*site_pages.BESIDE, *(f"examples/{path.name}" for path in (ROOT / "examples").iterdir())}


def entries(nav: object) -> list[str]:
    """The files of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [entry for one in (nav.values() if isinstance(nav, dict) else nav) for entry in entries(one)]


def test_the_navigation_names_every_page_once_and_only_pages_that_are_there():
    named = entries(CONFIG["nav"])
    assert len(named) == len(set(named)) and site_pages.CLI in named
    verbs = {f"{site_pages.CLI}{name}.md" for name in ("index", *COMMANDS)}
    assert {*named, *verbs} - {site_pages.CLI} == set(PAGES), "write every page of docs/ into nav of mkdocs.yml"
    assert not set(OWN) & set(MADE)


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_page_of_a_verb_has_all_its_options_and_examples(verb):
    page, module = MADE[f"{site_pages.CLI}{verb}.md"], importlib.import_module(COMMANDS[verb])
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for field in dataclasses.fields(module.Options.current()):
        name = field.metadata["also"] or f"--{field.name.replace('_', '-')}"
        written = field.name.upper().rstrip("S") if field.metadata["positional"] else name
        found = [row for row in rows if re.match(rf"\| `[^`]*{written}\b", row)]
        assert found and site_pages.words(field.metadata["help"])[:30] in found[0], field.name
    assert all(example in page for example in module.EXAMPLES)
    assert f"({verb}.md)" in MADE["cli/index.md"]
    lists = [name for lines in getattr(module, "LISTS", {}).values() for name, _ in lines()]
    assert all(f"`{name}`" in page for name in lists)


def test_every_public_name_is_on_the_page_of_the_python_api():
    page = MADE["api.md"]
    for package in site_pages.PACKAGES:
        module = importlib.import_module(package)
        assert all(f"::: {home}.{name}\n" in page for name, home in module._HOMES.items()), package
    assert "| `batch_size` | `8` |" in page


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_pages_and_files_of_the_site(page):
    text = site_pages.CODE.sub("", PAGES[page])
    targets = [link[2] for link in site_pages.LINK.finditer(text)] + re.findall(r'<img src="([^"]+)"', text)
    found = [posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) for target in targets]
    assert [target for target in found if target not in PAGES and target not in FILES] == []


@pytest.mark.parametrize("page", PAGES)
def test_lists_and_code_of_a_page_are_so_for_every_reader(page):
    """GitHub begins a list without an empty line before it, and code in a list at six spaces; the site does neither."""
    lines = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL).splitlines()
    item = re.compile(r"\s*([*-]|\d+\.) ")
    for number, (before, line) in enumerate(zip(["", *lines], lines, strict=False), 1):
        begins = item.match(line) and before.strip() and not before.startswith(" ") and not item.match(before)
        assert not begins, f"line {number}: {line[:60]}: put an empty line before the list"
        assert before.strip() or not re.match(r" {5,7}\S", line), f"line {number}: {line[:60]}: eight spaces are code in a list"


def test_links_are_turned_and_code_is_left_alone():
    text = "[a](docs/guide.md#x) ![p](docs/images/p.png) [b](CONTRIBUTING.md) [c](https://example.org/d.md) `[e](docs/f.md)`\n```\n[g](docs/h.md)\n```"
    turned = "[a](guide.md#x) ![p](images/p.png) [b](contributing.md) [c](https://example.org/d.md) `[e](docs/f.md)`\n```\n[g](docs/h.md)\n```"
    assert site_pages.turned(text, "README.md", "index.md") == turned
    assert site_pages.turned("[a](../README.md) [b](../examples/train.py)", "docs/guide.md", "guide.md") == "[a](index.md) [b](examples/train.py)"
    assert site_pages.turned("[a](guide.md)", "docs/guide.md", "cli/x.md") == "[a](../guide.md)"
    assert site_pages.turned("| `a\\|b` | c |\n`d\\|e`", "docs/guide.md", "guide.md") == "| `a|b` | c |\n`d\\|e`"


def test_text_of_helps_is_shown_as_text():
    assert site_pages.words("a <b>_c_</b> | [d](e) `<f>`") == "a &lt;b&gt;\\_c\\_&lt;/b&gt; \\| \\[d\\](e) `<f>`"


def test_a_docstring_becomes_a_list_and_paragraphs():
    docstring = "Blend.\n\nfeatures: (B, N)\n    of one stage\nt, h:     (B, E)\nReturns both. Raises UserError."
    made = site_pages.as_markdown(docstring)
    assert made == "Blend.\n\n\n* `features`: (B, N) of one stage\n* `t, h`: (B, E)\n\nReturns both. Raises UserError."


@pytest.mark.parametrize(
    ("html", "loads"),
    [
        ('<script src="https://unpkg.com/shim"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/css">', True),
        ("@font-face{src:url(https://fonts.example/a.woff2)}", True),
        ('<img alt="a" src=http://example.org/a.png>', True),
        ('<a href="https://arxiv.org/abs/2405.17082">paper</a>', False),
        ('<script src="assets/a.js"></script><link rel="canonical" href="https://afa.example/">', False),
    ],
)
def test_what_loads_from_another_host_is_seen(html, loads):
    assert bool(site_pages.LOADS.search(html)) == loads


def test_the_packages_of_the_site_are_an_extra_of_pinned_versions():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {re.match(r"[\w-]+", name)[0] for name in extras["docs"]} <= pinned
    assert CONFIG["strict"] is True and CONFIG["theme"]["font"] is False


def test_the_site_builds_without_a_warning(tmp_path, monkeypatch):
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="make docs installs the packages of the site")
    from mkdocs.__main__ import cli

    monkeypatch.chdir(ROOT)
    cli.main(["build", "--site-dir", str(tmp_path / "site")], standalone_mode=False)  # raises Abort at a warning, since it is strict
    assert (tmp_path / "site" / "cli" / "train.html").exists()
