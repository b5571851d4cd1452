"""The images of a comparison: made once, from their own noise, refused if made otherwise; and what they cost."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from afa.devices import peak_megabytes
from afa.errors import UserError
from afa.evaluation.images import ImageSet, make_images
from afa.evaluation.results import Item
from afa.evaluation.tuning import Tuner
from afa.sampling.image_files import ImageFile
from afa.sampling.sample import Request, Sampling

ITEMS = [Item(index // 2, f"prompt {index // 2}", 10 + index) for index in range(6)]
SAMPLING = Sampling(steps=3, guidance=2.0)


class Painter:
    """A sampler whose images show their seed, and that counts them."""

    def __init__(self):
        self.made = []

    def __call__(self, requests, sampling):
        self.made += [request.seed for request in requests]
        return np.stack([np.full((4, 4, 3), request.seed, np.uint8) for request in requests])


def image_set(folder, **identity):
    return ImageSet(folder / "images", ITEMS, SAMPLING, {"method": "painter", **identity})


def test_every_image_is_made_from_its_own_seed_and_says_so(tmp_path):
    images, painter = image_set(tmp_path), Painter()
    make_images(images, lambda: painter, 4, "painter")
    assert painter.made == [10, 11, 12, 13, 14, 15]
    assert [int(images.read(index)[0, 0, 0]) for index in range(6)] == painter.made
    assert len(images.seconds()) == 6
    assert min(images.seconds()) >= 0


def test_what_is_there_is_not_made_again(tmp_path):
    images, painter = image_set(tmp_path), Painter()
    make_images(images, lambda: painter, 4, "painter")
    images.files[2].path.unlink()
    images.files[4].path.write_bytes(images.files[4].path.read_bytes()[:30])  # torn by a crash of the machine
    again = Painter()
    make_images(images, lambda: again, 4, "painter")
    assert again.made == [12, 14]


def test_nothing_is_loaded_when_everything_is_there(tmp_path):
    images = image_set(tmp_path)
    make_images(images, Painter, 4, "painter")
    make_images(images, lambda: pytest.fail("the model was made for nothing"), 4, "painter")


def test_images_made_otherwise_are_refused(tmp_path):
    make_images(image_set(tmp_path), Painter, 4, "painter")
    with pytest.raises(UserError, match="was made with made_by"):
        make_images(image_set(tmp_path, options={"scale": 0.5}), Painter, 4, "painter")


def test_pictures_of_changed_files_are_refused_and_older_ones_without_hashes_are_kept(tmp_path):
    file = ImageFile(tmp_path / "a.png", Request("a", 1), {"seed": 1}, {"expert 'x'": "a" * 64})
    assert file.found() is None
    file.save(np.zeros((4, 4, 3), np.uint8))
    assert file.found()["seed"] == 1
    with pytest.raises(UserError, match="was made with other files: expert 'x' has sha256"):
        replace(file, files={"expert 'x'": "b" * 64}).found()
    replace(file, files={}).save(np.zeros((4, 4, 3), np.uint8))
    assert file.found() is not None


def test_the_digest_is_that_of_pixels_and_captions(tmp_path):
    one, other = image_set(tmp_path / "a"), image_set(tmp_path / "b")
    for images in (one, other):
        make_images(images, Painter, 4, "painter")
    first = one.digest()
    assert first == one.digest()
    one.files[3].save(np.zeros((4, 4, 3), np.uint8), seconds=0.1)
    assert one.digest() != first


def test_live_bytes_are_those_alive_at_once():
    weight = torch.zeros(1000, 250)  # 1 MB, made before

    def work():
        for _ in range(5):
            one = torch.zeros(1000, 250)
            two = one + weight
            del one, two

    assert peak_megabytes(work) == pytest.approx(3, abs=0.1)  # one, two and the weight; not five times two


def test_views_are_not_counted_twice():
    assert peak_megabytes(lambda: torch.zeros(1000, 250).view(250, 1000).t()[:, :50] + 0) == pytest.approx(1.2, abs=0.05)


def tuner(folder, score=lambda pictures: float(np.mean([picture.image.mean() for picture in pictures]))):
    return Tuner(folder / "tuning", ["a", "b", "c"], SAMPLING, score, 2)


def level(options):
    return lambda requests, sampling: np.full((len(requests), 2, 2, 3), options["level"], np.uint8)


CANDIDATES = [{"level": 3}, {"level": 9}, {"level": 5}]


def test_the_best_candidate_is_chosen_and_nothing_is_scored_twice(tmp_path):
    assert tuner(tmp_path).best("row", CANDIDATES, level) == {"level": 9}
    assert tuner(tmp_path).best("row", CANDIDATES, lambda options: pytest.fail("scored again")) == {"level": 9}
    assert tuner(tmp_path).scores("row", [*CANDIDATES, {"level": 20}], level) == [3, 9, 5, 20]


def test_the_first_candidate_is_taken_where_nothing_can_be_told(tmp_path):
    assert tuner(tmp_path, score=None).best("row", CANDIDATES, level) == {"level": 3}


def test_candidates_are_judged_on_the_same_captions_and_noise(tmp_path):
    asked = []

    def make(options):
        def sampler(requests, sampling):
            asked.append([(request.prompt, request.seed) for request in requests])
            return np.zeros((len(requests), 2, 2, 3), np.uint8)

        return sampler

    tuner(tmp_path).best("row", CANDIDATES, make)
    assert asked[0:2] == asked[2:4] == asked[4:6]
