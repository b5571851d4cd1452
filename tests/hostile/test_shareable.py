"""Reports and cards that are shared: what came from outside stays words, and no path of this machine is in them."""

import pytest

from afa.checkpoint.card import model_card
from afa.checkpoint.manifest import read_manifest
from afa.demo.data import ASSETS, ENSEMBLE
from afa.places import csv_cell, markdown_words, public_place

HARMFUL = ("a|b", "`x`", "<img src=x>", "![a](http://x)", "[a](javascript:x)", "**a**", "a\n# b", "[a][b]", "[a]: http://x")


@pytest.mark.parametrize("text", HARMFUL)
def test_markdown_stays_words(text):
    words = markdown_words(text)
    assert "\n" not in words
    for sign in ("|", "`", "<", "](", "![", "][", "]:", "**"):
        assert sign not in words.replace("\\" + sign[0], "") or sign not in text


def test_numbers_and_intervals_stay_as_they_are():
    for text in ("+.211 [+.193, +.228] ▼", "-1.5", ".5 [.1, .9] (n = 8)", "plain words"):
        assert markdown_words(text) == text


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_spreadsheet_computes_nothing(text):
    assert csv_cell(text) == "'" + text


def test_numbers_of_a_csv_stay_numbers():
    assert [csv_cell(value) for value in (-1.5, 3, None, "AFA")] == [-1.5, 3, None, "AFA"]


@pytest.mark.parametrize(
    ("place", "public"),
    [
        ("/home/me/secret/photo.safetensors", "photo.safetensors"),
        ("../../../home/me/photo", "photo"),
        ("x=/home/me/photo+/home/me/style.safetensors*0.5", "x=photo+style.safetensors*0.5"),
        ("C:\\Users\\me\\photo", "photo"),
        ("~/photo", "photo"),
        ("org/name", "org/name"),
        ("p=org/name@main", "p=org/name@main"),
        (str(ASSETS / "curves"), "demo:curves"),
        (["/a/b", "/c/d"], ["b", "d"]),
        ("scenes:8", "scenes:8"),
        (None, None),
    ],
)
def test_a_place_is_named_without_folders(place, public):
    assert public_place(place) == public


def test_a_model_card_escapes_names_and_hides_folders():
    manifest = read_manifest(ENSEMBLE)
    manifest.experts[0].name, manifest.experts[0].source = "a|b <img src=x> ![x](y)", "../../../home/me/secret/photo"
    card = model_card(manifest)
    assert "a\\|b \\<img src=x\\>" in card
    assert "home/me" not in card
    assert "![x](" not in card
