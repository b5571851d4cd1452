"""What docs/python.md and docs/diffusers.md show works, in the order in which it stands there, in an empty folder."""

import re
from pathlib import Path

import pytest

import afa
from afa.explanation import Explanation

DOCS = Path(afa.__file__).parent.parent / "docs"
PAGE = DOCS / "python.md"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


BLOCKS = blocks(PAGE)


def run(page: Path) -> dict[str, object]:
    """Run the blocks of a page one after the other; returns what they define."""
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(page), 1):
        try:
            exec(compile(block, f"docs/{page.name}, block {number}", "exec"), names)
        except Exception as error:
            pytest.fail(f"block {number}: {type(error).__name__}: {error}\n{block}")
    return names


def test_the_diffusers_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "diffusers.md")
    assert names["ensemble"].names == ("expert_0", "expert_1") and list(tmp_path.iterdir()) == []
    assert "(1, 4, 16, 16)" in capsys.readouterr().out


def test_the_python_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(PAGE)
    assert isinstance(names["found"], dict) and Explanation.__name__ in PAGE.read_text()
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"scene.png", "mine", "soup", "trained", "out", "compared", "report.html", "report.md", "report.csv", "merged.safetensors"}


def test_the_python_page_names_every_public_name_and_every_command_that_has_one():
    page = PAGE.read_text()
    shown = {name for name in afa.__all__ if re.search(rf"\b{name}\b", "".join(BLOCKS))}
    assert shown == set(afa.__all__)
    for room in ("evaluation", "generation", "merging", "screening", "training", "explanation"):
        package = __import__(f"afa.{room}", fromlist=["__all__"])
        assert all(re.search(rf"\b{name}\b", page) for name in package.__all__), room
