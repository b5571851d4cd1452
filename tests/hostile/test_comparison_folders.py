"""Images of a comparison: every row has a folder of its own, and features of references are of pictures as they are opened now."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from afa.errors import UserError
from afa.evaluation.images import ImageSet, image_folder
from afa.evaluation.results import Item
from afa.evaluation.rows import MethodRow
from afa.images import CHUNK
from afa.metrics import cache
from afa.metrics.cache import cached_features
from afa.metrics.frechet import FrechetDistance
from afa.sampling.sample import Sampling


def folder(name, **at):
    return image_folder(Path("out"), MethodRow(name, "expert", name, lambda *_: None), 0, at).relative_to("out/images").as_posix()


ALIKE = ["a b", "a-b", "a, b", "a,b", "a  b", "a,  b", "a-10-steps", "a 10 steps", "a, 10 steps", "a,-b"]


def test_experts_of_names_that_are_alike_have_folders_of_their_own():
    names = ["a", *ALIKE]
    values = [{}, {"steps": 10}, {"guidance": 2.5}, {"guidance": 2.0}, {"steps": 10, "guidance": 2.0}]
    rows = [(f"single:{name}", at) for name in names for at in values]
    found = [folder(name, **at) for name, at in rows]
    for (one, first), (other, second) in combinations(zip(rows, found, strict=True), 2):
        assert first != second, (one, other)
    assert not any(set(place) & set('/\\:*?"<>|, ') for path in found for place in path.split("/"))


@pytest.mark.parametrize(
    ("name", "at", "place"),
    [
        ("afa", {}, "afa"),
        ("single:photo", {}, "single-photo"),
        ("single_in_ensemble:real-vision_v5.1", {}, "single_in_ensemble-real-vision_v5.1"),
        ("single:photo", {"steps": 10}, "single-photo-10-steps"),
        ("afa, no text", {}, "afa-no-text"),
        ("afa, 2 experts", {}, "afa-2-experts"),
        ("afa, objective mse+reward", {}, "afa-objective-mse+reward"),
    ],
)
def test_ordinary_rows_keep_their_folder_so_that_old_comparisons_go_on(name, at, place):
    assert folder(name, **at) == place


class Means(FrechetDistance):
    name, identity = "means", {"weights": "one"}

    def __init__(self):
        self.seen = 0

    def features(self, images):
        self.seen += len(images)
        return np.stack([image.mean((0, 1)) for image in images]).astype(np.float32)


def test_references_known_by_name_are_looked_at_again_when_pictures_open_differently(tmp_path, monkeypatch):
    before, after = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 9, np.uint8)
    metric = Means()
    cached_features(metric, lambda: list(before), tmp_path, "references")
    assert cached_features(metric, lambda: pytest.fail("read again"), tmp_path, "references").max() == 0
    monkeypatch.setattr(cache, "OPENER", cache.OPENER + 1)
    assert cached_features(metric, lambda: list(after), tmp_path, "references").min() == 9


@pytest.mark.parametrize("seconds", [None, "3", True, [], -1, 10**400])
def test_an_image_that_does_not_say_how_long_it_took_is_made_again(tmp_path, seconds):
    images = ImageSet(tmp_path, [Item(0, "a", 1)], Sampling(2, 1.0), {})
    images.files[0].save(np.zeros((2, 2, 3), np.uint8), seconds=0.5)
    assert images.missing() == [] and images.seconds() == [0.5]
    rewrite(images, seconds=seconds)
    assert images.missing() == [images.files[0]]


def test_a_long_setting_of_a_foreign_image_is_shortened(tmp_path):
    images = ImageSet(tmp_path, [Item(0, "a", 1)], Sampling(2, 1.0), {})
    images.files[0].save(np.zeros((2, 2, 3), np.uint8), seconds=0.5)
    rewrite(images, prompt="\x1b[2J" + "x" * 90_000)
    with pytest.raises(UserError, match="was made with prompt") as raised:
        images.missing()
    assert len(str(raised.value)) < 700 and "\x1b" not in str(raised.value)


def rewrite(images, **changes):
    """The picture again, with other settings in it."""
    with Image.open(images.files[0].path) as picture:
        picture.load()
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(CHUNK, json.dumps(json.loads(picture.info[CHUNK]) | changes))
    picture.save(images.files[0].path, pnginfo=chunk)
