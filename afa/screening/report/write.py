"""A screening's files: screen.json and report.html."""

import json
from pathlib import Path

from afa.files import write_atomically
from afa.screening.report.page import as_html
from afa.screening.report.tables import Facts

FACTS, PAGE = "screen.json", "report.html"


def write(facts: Facts, output: str) -> None:
    """Both, each whole."""
    folder = Path(output)
    write_atomically(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / PAGE, as_html(facts))
