"""What a folder of explanations says of itself is checked before it is shown, and stays words on the page."""

import json

import numpy as np
import pytest
from hostile import WRONG, edit
from PIL import Image

from afa.errors import UserError
from afa.explanation.causes import Unused
from afa.explanation.explanation import read_entry
from afa.explanation.page import as_html
from afa.explanation.summary import as_json

MARKUP = "<script>alert(1)</script>"
FACTS = {
    "prompt": "a red star",
    "seed": 3,
    "files": {},
    "shares": {"groups": ["IN", "final"], "weights": [[[0.25, 0.75], [None, None], [0.5, 0.5], [1.0, 0.0]]] * 2},
    "words": [{"word": "red", "looked": 0.5, "lean": None, "hidden": 0.1, "hidden_pull": None, "omitted": 0.2, "omitted_pull": [0.1, -0.1]}],
    "word_remarks": ["No word was cut."],
    "passes_made_again": [0],
    "counterfactuals": [{"kind": "off", "title": "curves off", "rmse": 3.5}],
}


@pytest.fixture
def folder(tmp_path):
    """One explained image of two experts, two stages and one pass."""
    (tmp_path / "00000.json").write_text(json.dumps(FACTS))
    weights = np.full((1, 2, 2), 0.5, np.float32)
    np.savez(tmp_path / "00000.npz", means=weights, most=weights, timesteps=np.zeros(1, np.float32))
    for name in ("chart.png", "00000.sheet.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def page(folder):
    entries = [read_entry(folder, "00000")]
    unused = Unused(("curves", "angles"), ("IN00", "OUT00"), entries[0].most, np.ones(2))
    return as_html(folder, entries, unused, as_json({}, entries, unused, []), "1 step")


def test_good_facts_make_a_page(folder):
    shown = page(folder)
    assert "seed 3" in shown and "a red star" in shown and "curves off" in shown


@pytest.mark.parametrize(
    "path", [("prompt",), ("word_remarks", 0), ("words", 0, "word"), ("counterfactuals", 0, "title"), ("shares", "groups", 0)], ids=str
)
def test_markup_of_a_folder_stays_words(folder, path):
    edit(folder / "00000.json", *path, value=MARKUP)
    shown = page(folder)
    assert MARKUP not in shown and "alert(1)" in shown


def shown_or_refused(folder):
    try:
        return page(folder).lstrip()
    except UserError as error:
        return str(error)


WHERE = (
    *(("seed",), ("prompt",), ("shares",), ("words",), ("word_remarks",), ("counterfactuals",), ("shares", "groups"), ("shares", "weights")),
    *(("shares", "weights", 0, 0, 0), ("words", 0), ("words", 0, "omitted"), ("words", 0, "omitted_pull"), ("counterfactuals", 0, "rmse")),
)


@pytest.mark.parametrize("path", WHERE, ids=str)
def test_facts_of_another_kind_are_refused_by_file_and_key_or_fit(folder, path):
    for value in (*WRONG.values(), [[]], [1.5, "x"]):
        edit(folder / "00000.json", *path, value=value)
        said = shown_or_refused(folder)
        assert said.startswith("<!doctype html>") or ("00000.json" in said and "explained again" in said and len(said) < 600)
        assert MARKUP not in said or not said.startswith("<")
        (folder / "00000.json").write_text(json.dumps(FACTS))


@pytest.mark.parametrize("text", ["[" * 90_000, "", "{", "[]", '{"seed": NaN}', "\0", '"\\ud800"'])
def test_a_file_that_is_no_object_is_refused_in_a_sentence(folder, text):
    (folder / "00000.json").write_text(text)
    with pytest.raises(UserError, match=r"00000\.json.*explained again"):
        page(folder)


@pytest.mark.parametrize("change", ["missing", "text", "flat", "objects", "nan", "other passes", "no file"])
def test_arrays_of_another_shape_are_refused(folder, change):
    whole = {"means": np.full((1, 2, 2), 0.5), "most": np.full((1, 2, 2), 0.5), "timesteps": np.zeros(1)}
    changes = {
        "text": np.full((1, 2, 2), "x"),
        "flat": np.zeros(4),
        "objects": np.full((1, 2, 2), {}),
        "nan": np.full((1, 2, 2), np.nan),
        "other passes": np.zeros((2, 2, 2)),
    }
    whole |= {"means": changes[change]} if change in changes else {}
    if change == "missing":
        del whole["most"]
    (folder / "00000.npz").unlink()
    if change != "no file":
        np.savez(folder / "00000.npz", **whole)
    with pytest.raises(UserError, match=r"00000\.npz.*explained again"):
        page(folder)


def test_a_bomb_among_the_pictures_is_refused_in_a_sentence(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(UserError, match=r"chart\.png|sheet\.png"):
        page(folder)
