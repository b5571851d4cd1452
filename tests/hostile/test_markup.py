"""Results of a stranger stay words on the pages made of them, wherever in results.json the markup is."""

import json
from dataclasses import asdict

import pytest
from made_results import made_results

from afa.evaluation.compare import analyse
from afa.evaluation.report.page import as_html
from afa.evaluation.results import FILE, FORMAT, Results

MARKUP = "\"'><img src=x onerror=alert(1)>"
KEYED = ("metrics", "scores", "sets", "versions", "protocol")  # objects whose keys are words, too
FIXED = ("group", "kind", "images")  # one of a few words, or a folder


def marked(value, key=""):
    """Every text of results.json with markup behind it, and every key that is a word."""
    if isinstance(value, dict):
        return {name + (MARKUP if key in KEYED else ""): marked(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [marked(inner, key) for inner in value]
    return value + MARKUP if isinstance(value, str) and value and key not in FIXED else value


@pytest.mark.parametrize("together", [1, 2])
def test_no_markup_of_results_reaches_the_page(tmp_path, together):
    whole = marked(asdict(made_results(prompts=6, runs=2, few=True, studies=True, resamples=50)))
    (tmp_path / FILE).write_text(json.dumps({"format": FORMAT, **whole}))
    results = Results.load(tmp_path)
    analyses = analyse([results] * together, [tmp_path] * together)
    page = as_html(analyses, [f"{MARKUP}{place}" for place in range(together)])
    assert "onerror=alert(1)" in page  # it is shown
    assert "<img src=x" not in page and "\"'>" not in page
