"""Laws of drawing with Ray Data: whoever draws a row, it is the picture of `afa generate`; an actor that is killed loses nothing.

The last law needs ray, which the tests' environment does not hold: pip install 'afa[ray]'.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import ONE_LEVEL, sd_pipeline

from afa import UserError
from afa.generation import DrawImages, GenerateSettings, generate
from afa.images import read_made, read_pixels

SMALL = {"steps": 1, "guidance": 2.0, "width": 32, "height": 32, "device": "cpu"}
PROMPTS = [f"picture {place}" for place in range(6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("ray") / "photo"
    sd_pipeline(0, **ONE_LEVEL).save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def files(place):
    """What `afa generate` draws."""
    return generate(GenerateSettings(sources=[place], output=f"{place}-drawn", prompt=PROMPTS, **SMALL))


def rows(first=0, last=6):
    return {"text": np.array(PROMPTS[first:last], object), "seed": np.arange(first, last)}


def test_a_batch_gets_the_pictures_of_generate_with_their_settings(place, files):
    draw = DrawImages(place, batch_size=2, **SMALL)
    batch = draw(rows(1, 4))
    assert list(batch["text"]) == PROMPTS[1:4]
    for picture, file in zip(batch["image"], files[1:4], strict=True):
        assert np.abs(read_pixels(picture).astype(int) - read_pixels(file)).max() <= 1  # batched sums may round differently
        assert read_made(picture) == read_made(file)


def test_options_of_files_and_rows_without_a_seed_are_refused(place):
    with pytest.raises(UserError, match="output is an option of afa generate alone"):
        DrawImages(place, output="out")
    with pytest.raises(UserError, match="no column 'seed' .it has text.; each row needs its prompt"):
        DrawImages(place, **SMALL)({"text": np.array(["a"], object)})


class Mortal(DrawImages):
    """Its process dies once, in the middle of its second batch."""

    def __init__(self, marker, *arguments, **options):
        self.marker, self.calls = Path(marker), 0
        super().__init__(*arguments, **options)

    def __call__(self, batch):
        self.calls += 1
        if self.calls == 2:
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os._exit(1)
        return super().__call__(batch)


def test_two_actors_of_which_one_is_killed_draw_every_row_once(place, files, tmp_path):
    ray = pytest.importorskip("ray")
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}})
    try:
        items = [{"text": text, "seed": seed} for seed, text in enumerate(PROMPTS)]
        drawn = ray.data.from_items(items, override_num_blocks=6).map_batches(
            Mortal, fn_constructor_args=(str(tmp_path / "killed"), place), fn_constructor_kwargs=SMALL, concurrency=2, batch_size=1
        )
        found = sorted(drawn.take_all(), key=lambda row: row["seed"])
    finally:
        ray.shutdown()
    assert (tmp_path / "killed").exists()
    assert [row["text"] for row in found] == PROMPTS
    for row, file in zip(found, files, strict=True):
        assert np.abs(read_pixels(row["image"]).astype(int) - read_pixels(file)).max() <= 1
