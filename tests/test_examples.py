"""Examples of the help and the docs work wherever afa is installed: no path of a checkout, no flag that is not there."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

import afa
from afa.cli.flags import read_flags
from afa.cli.main import COMMANDS, build_parser, main

ROOT = Path(afa.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in ("errors.md", "log.md"))]
CHECKOUT = re.compile(r"afa/demo/assets|\.venv/|benchmarks/|docs/|scripts/|tests/")
CODE = re.compile(r"```(?P<language>\w*)\n(?P<fenced>.*?)```|(?P<indented>(?:^ {4,}[^\n]*\n)+)", re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The lines of code blocks that call afa, joined where they end in \\; those with … in them say only where a flag goes."""
    blocks = [block["fenced"] or block["indented"] for block in CODE.finditer(page) if block["language"] != "python"]
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    called = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in called if line.startswith("afa ") and "…" not in line]


def read(command: str) -> None:
    """Parse a command as afa does, and check its values. Raises UserError or SystemExit."""
    words = shlex.split(command, comments=True)[1:]
    read_flags(importlib.import_module(COMMANDS[words[0]]).Options, build_parser(words).parse_args(words))


@pytest.mark.parametrize("verb", ["", *COMMANDS])
def test_help_names_no_file_of_a_checkout(verb):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        main([*([verb] if verb else []), "--help"])
    assert "usage: afa" in shown.getvalue() and CHECKOUT.findall(shown.getvalue()) == []


def test_commands_are_found_in_both_kinds_of_code_blocks():
    page = "    $ afa demo   # a remark\n\ntext afa train\n```\nafa ui\n```\n```python\nafa = 1\n```\n    afa train … --flip\n"
    page += "\ntext\n\n    afa inspect a \\\n        b\n"
    assert commands(page) == ["afa demo   # a remark", "afa ui", "afa inspect a b"]
    assert sum(len(commands(page.read_text())) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_docs_can_be_parsed(page):
    text = page.read_text()
    assert "afa/demo/assets" not in text
    for command in commands(text):
        try:
            read(command)
        except (afa.UserError, SystemExit) as error:
            pytest.fail(f"{command}: {error}")
