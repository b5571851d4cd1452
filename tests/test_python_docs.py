"""What docs/python.md shows works, in the order in which it stands there, in an empty folder."""

import re
from pathlib import Path

import pytest

import afa
from afa.explanation import Explanation

PAGE = Path(afa.__file__).parent.parent / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_python_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(BLOCKS, 1):
        try:
            exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
        except Exception as error:
            pytest.fail(f"block {number}: {type(error).__name__}: {error}\n{block}")
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
