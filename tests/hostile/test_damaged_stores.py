"""What a run keeps for going on is damaged: that is noticed and made again, or refused in a sentence; it never counts as made."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from afa.errors import UserError
from afa.evaluation.images import ImageSet
from afa.evaluation.results import Item
from afa.evaluation.tuning import Tuner
from afa.explanation.explanation import explained
from afa.files import json_or_none, read_arrays, sha256
from afa.fingerprint import NOTE, claim
from afa.images import read_made, save_picture
from afa.sampling.sample import Sampling
from afa.schema import Score
from afa.screening.predict import Answers, AnswerStore
from afa.store import RowStore, kept_json
from afa.training.cache import LatentCache, caption_key

KEYS = [caption_key(text) for text in "abc"]
ROWS = torch.arange(12.0).view(3, 4)


def flip(path, place):
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def cut(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def filled(folder):
    store = RowStore(folder, (4,), torch.float32)
    store.add(KEYS, ROWS)
    return folder


@pytest.mark.parametrize("place", [0, 20, 33, 47])
def test_a_flipped_bit_in_a_cached_row_costs_that_row(tmp_path, place):
    filled(tmp_path)
    flip(next(tmp_path.glob("*.bin")), place)
    store = RowStore(tmp_path, (4,), torch.float32)
    damaged = place // 16
    assert [key in store for key in KEYS] == [row != damaged for row in range(3)]
    with pytest.raises(UserError, match="damaged"):
        store.read(KEYS)
    store.add([KEYS[damaged]], ROWS[damaged : damaged + 1])
    for again in (store, RowStore(tmp_path, (4,), torch.float32)):
        assert all(key in again for key in KEYS)
        assert torch.equal(again.read(KEYS), ROWS)


@pytest.mark.parametrize("ending", [".keys", ".sums", ".bin"])
@pytest.mark.parametrize("damage", [lambda path: flip(path, 3), lambda path: cut(path, 0.5), lambda path: path.write_bytes(b"\xff" * 400)])
def test_damaged_files_of_a_cache_give_no_wrong_row(tmp_path, ending, damage):
    damage(next(filled(tmp_path).glob(f"*{ending}")))
    store = RowStore(tmp_path, (4,), torch.float32)
    there = [row for row in range(3) if KEYS[row] in store]
    assert torch.equal(store.read([KEYS[row] for row in there]), ROWS[there])
    missing = [row for row in range(3) if row not in there]
    store.add([KEYS[row] for row in missing], ROWS[missing])
    assert torch.equal(RowStore(tmp_path, (4,), torch.float32).read(KEYS), ROWS)


def test_a_cache_without_checksums_as_older_versions_wrote_it_is_read(tmp_path):
    next(filled(tmp_path).glob("*.sums")).unlink()
    assert torch.equal(RowStore(tmp_path, (4,), torch.float32).read(KEYS), ROWS)


def test_the_lock_of_a_process_that_was_killed_while_it_began_a_cache_is_removed(tmp_path):
    RowStore(tmp_path, (2,), torch.float32)
    (tmp_path / ".rows.json.afa-lock").touch()
    RowStore(tmp_path, (2,), torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_a_cache_whose_description_is_damaged_is_refused(tmp_path):
    cut(filled(tmp_path) / "rows.json", 0.3)
    with pytest.raises(UserError, match=r"rows\.json is damaged"):
        RowStore(tmp_path, (4,), torch.float32)


def test_a_store_is_opened_without_knowing_its_rows(tmp_path):
    assert RowStore.existing(tmp_path / "none") is None
    assert torch.equal(RowStore.existing(filled(tmp_path)).read(KEYS), ROWS)


@pytest.mark.parametrize("text", ['{"a": [1, NaN]}', '{"a": "high"}', '{"a": [true]}', "[1]", '{"a"', "", "\x00", "[" * 100_000])
def test_json_that_a_run_keeps_is_what_it_should_be_or_nothing(tmp_path, text):
    (tmp_path / "kept.json").write_text(text)
    found = kept_json(tmp_path / "kept.json", dict[str, list[Score]])
    assert found is None or (found["a"][0] == 1 and np.isnan(found["a"][1]))
    assert (found is None) == (text != '{"a": [1, NaN]}')
    assert kept_json(tmp_path / "none.json", dict[str, list[Score]]) is None


@pytest.mark.parametrize("text", [b"\xff\xfe\n", b"mark zz\n", b"a b\nc d e\n", b"\x00" * 200])
def test_damaged_marks_of_images_are_passed_over(tmp_path, text):
    (tmp_path / "images.txt").write_bytes(text)
    assert LatentCache(tmp_path, torch.nn.Linear(1, 1))._marks == {}


def answers(value):
    return Answers(torch.full((2, 3), float(value)), {"OUT": torch.full((2, 2), float(value))})


def answered(folder):
    store = AnswerStore(folder, (3, 2, 3))
    for image in range(3):
        store.add(image, answers(image))
    return folder


def test_answers_are_kept_as_they_were_given(tmp_path):
    store = AnswerStore(answered(tmp_path), (3, 2, 3))
    assert store.missing() == []
    assert [store.errors(image)[0, 0].item() for image in range(3)] == [0, 1, 2]
    assert store.features()["OUT"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (lambda folder: flip(folder / "errors" / "part-00000.bin", -20), [2]),
        (lambda folder: flip(folder / "errors" / "part-00000.bin", 20), [0]),
        (lambda folder: cut(folder / "errors" / "part-00000.bin"), [1, 2]),
        (lambda folder: (folder / "errors" / "part-00000.bin").write_bytes(b"nothing"), [0, 1, 2]),
        (lambda folder: (folder / "errors" / "part-00000.bin").unlink(), [0, 1, 2]),
        (lambda folder: cut(folder / "errors" / "part-00000.keys"), [1, 2]),
        (lambda folder: (folder / "errors" / "part-00000.keys").write_bytes(b"\xff\xff"), [0, 1, 2]),
        (lambda folder: cut(folder / "00001-features.npz"), [1]),
        (lambda folder: (folder / "00000-features.npz").unlink(), [0]),
    ],
)
def test_damaged_answers_of_a_screening_are_asked_again(tmp_path, damage, missing):
    damage(answered(tmp_path))
    store = AnswerStore(tmp_path, (3, 2, 3))
    assert store.missing() == missing
    for image in missing:
        store.add(image, answers(image))
    again = AnswerStore(tmp_path, (3, 2, 3))
    assert again.missing() == []
    assert [again.errors(image)[0, 0].item() for image in range(3)] == [0, 1, 2]


def test_a_picture_that_a_crash_cut_off_does_not_count_as_made(tmp_path):
    save_picture(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), {"seed": 1})
    assert read_made(tmp_path / "a.png")["seed"] == 1
    cut(tmp_path / "a.png", 0.9)
    assert Image.open(tmp_path / "a.png").info["afa"]  # its beginning is all there
    assert read_made(tmp_path / "a.png") is None
    assert read_made(tmp_path / "none.png") is None


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_comparison_makes_a_cut_picture_again(tmp_path, share):
    images = ImageSet(tmp_path, [Item(0, "a", 0), Item(1, "b", 1)], Sampling(2, 1.0), {"method": "x"})
    for index in range(2):
        images.files[index].save(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8), seconds=0.1)
    assert images.missing() == []
    cut(images.files[1].path, share)
    assert images.missing() == [images.files[1]]


@pytest.mark.parametrize("text", ['{"{\\"a\\": 1}": "high"}', "[1]", '{"{\\"a\\"', "", "\x00", "[" * 100_000])
def test_damaged_records_of_tuning_are_scored_again(tmp_path, text):
    tuner = Tuner(tmp_path, ["a"], Sampling(1, 1.0), lambda pictures: 0.5, 1)
    (tmp_path / "x.json").write_text(text)
    assert tuner.scores("x", [{"a": 1}], lambda options: lambda batch, sampling: [np.zeros((8, 8, 3), np.uint8)]) == [0.5]


@pytest.mark.parametrize("change", [lambda path: cut(path), lambda path: flip(path, 30), lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["00000.png", "00000.npz", "00000.json"])
def test_an_explanation_of_which_a_file_is_damaged_is_made_again(tmp_path, change, name):
    for file in ("00000.png", "00000.npz"):
        (tmp_path / file).write_bytes(os.urandom(100))
    (tmp_path / "00000.json").write_text(json.dumps({"files": {file: sha256(tmp_path / file) for file in ("00000.png", "00000.npz")}}))
    assert explained(tmp_path, "00000")
    change(tmp_path / name)
    assert not explained(tmp_path, "00000")


@pytest.mark.parametrize("text", [b"{", b"", b"[1]", b"\xff", b'{"sha256 of files": 3}'])
def test_a_damaged_note_of_what_was_begun_is_refused(tmp_path, text):
    claim(tmp_path, {"steps": 3}, "the search")
    (tmp_path / "made").touch()
    (tmp_path / NOTE).write_bytes(text)
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        claim(tmp_path, {"steps": 3}, "the search")


@pytest.mark.parametrize("text", [b"", b"PK\x03\x04", b"\x93NUMPY", b"nothing"])
def test_arrays_and_json_that_are_damaged_are_none(tmp_path, text):
    (tmp_path / "a").write_bytes(text)
    assert read_arrays(tmp_path / "a") is None
    assert json_or_none(tmp_path / "a") is None
