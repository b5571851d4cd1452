"""Laws of images in shards: the same pictures, in files that training and other libraries read, nothing lost and nothing drawn twice."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import ONE_LEVEL, sd_pipeline

from afa import UserError
from afa.data.registry import open_source
from afa.generation import run
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings
from afa.images import read_made, read_pixels

PROMPTS = ["a cat", "a dog", "ein Käse", "a", "b"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    place = tmp_path_factory.mktemp("packs") / "photo"
    sd_pipeline(0, **ONE_LEVEL).save_pretrained(place)
    small = {"steps": 1, "guidance": 1.0, "width": 32, "height": 32, "device": "cpu"}
    return GenerateSettings(sources=[str(place)], output=str(place.parent / "files"), prompt=PROMPTS, **small)


@pytest.fixture(scope="module")
def files(settings):
    """The same run without shards."""
    return generate(settings)


@pytest.fixture(params=["tar", "parquet"])
def packed(request, settings, tmp_path):
    return replace(settings, output=str(tmp_path / "packed"), pack=request.param, pack_size=2)


def names(settings):
    return sorted(path.name for path in Path(settings.output).iterdir() if not path.name.startswith("."))


def drawn(monkeypatch):
    """How many images are drawn from now on."""
    counts, draw_missing = [], run.draw_missing

    def counting(share, *others):
        counts.extend(image for image in share.images if image.found() is None)
        draw_missing(share, *others)

    monkeypatch.setattr(run, "draw_missing", counting)
    return counts


def test_shards_hold_the_very_pictures_with_their_prompts_and_settings(packed, files):
    kind = packed.pack
    shards = generate(packed)
    assert names(packed) == [f"0000000-0000001.{kind}", f"0000002-0000003.{kind}", f"0000004-0000004.{kind}"]
    assert names(packed) == [path.name for path in shards]
    source = open_source(packed.output)
    assert [sample.caption for sample in source.samples] == PROMPTS
    for sample, file in zip(source.samples, files, strict=True):
        assert np.array_equal(read_pixels(sample.read()), read_pixels(file))
        assert read_made(sample.read()) == read_made(file)


def test_what_is_packed_is_found_and_more_prompts_are_added(packed, monkeypatch, files):
    generate(packed)
    counts = drawn(monkeypatch)
    generate(packed)
    assert not counts
    shards = generate(replace(packed, prompt=[*PROMPTS, "c"]))
    assert [image.request.prompt for image in counts] == ["c"]
    assert [path.stem for path in shards] == ["0000000-0000001", "0000002-0000003", "0000004-0000005"]
    assert [sample.caption for sample in open_source(packed.output).samples] == [*PROMPTS, "c"]
    assert generate(replace(packed, prompt=PROMPTS[:3])) == shards  # what is there is kept
    with pytest.raises(UserError, match='00000-00.png in a shard of .* was made with prompt "a cat", now "another" is asked'):
        generate(replace(packed, prompt=["another"]))


def test_a_kill_between_a_shard_and_its_files_loses_nothing(packed, monkeypatch, tmp_path):
    generate(replace(packed, pack=None, pack_size=None))
    unlink, left = Path.unlink, []

    def killed(path, **options):
        if path.suffix == ".png":
            left.append(path)
            if len(left) == 2:
                raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(packed)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert f"0000000-0000001.{packed.pack}" in names(packed) and "00001-00.png" in names(packed)
    counts = drawn(monkeypatch)
    assert len(generate(packed)) == 3 and names(packed)[3:] == ["grid.png"]  # of the run whose images were files
    assert not counts


def test_a_kill_before_the_smaller_shard_goes_leaves_no_image_twice(packed, monkeypatch):
    smaller = generate(replace(packed, prompt=PROMPTS[:3]))[-1]
    before = smaller.read_bytes()
    generate(packed)
    assert not smaller.exists()
    smaller.write_bytes(before)  # as if the process had ended here
    assert smaller not in generate(packed)
    assert [sample.caption for sample in open_source(packed.output).samples] == PROMPTS


def test_parts_are_packed_by_the_last_one(packed, settings, files):
    assert [path.suffix for path in generate(replace(packed, shard="1/2"))] == [".png"] * 3
    assert len(generate(replace(packed, shard="2/2"))) == 3
    assert len(names(packed)) == 3


def test_a_tar_is_webdatasets(settings, tmp_path):
    (shard,) = generate(replace(settings, output=str(tmp_path / "tar"), pack="tar"))
    with tarfile.open(shard) as archive:
        assert archive.getnames()[:4] == ["00000-00.png", "00000-00.txt", "00000-00.json", "00001-00.png"]
        assert archive.extractfile("00002-00.txt").read().decode() == PROMPTS[2]
        assert json.loads(archive.extractfile("00002-00.json").read())["seed"] == 2


def test_a_parquet_is_a_data_set_with_pictures(settings, files, tmp_path):
    from datasets import load_dataset

    (shard,) = generate(replace(settings, output=str(tmp_path / "parquet"), pack="parquet"))
    table = load_dataset("parquet", data_files=str(shard), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["text"] == PROMPTS or list(table["text"]) == PROMPTS
    assert np.array_equal(np.asarray(table[4]["image"].convert("RGB")), read_pixels(files[4]))
    assert table[4]["seed"] == 4


@pytest.mark.parametrize("damage", ["cut off", "no archive"])
def test_a_damaged_shard_is_refused_and_drawn_again_once_it_is_deleted(packed, damage):
    shard = generate(packed)[0]
    shard.write_bytes(shard.read_bytes()[:700] if damage == "cut off" else b"nothing")
    with pytest.raises(UserError, match=f"{shard.name} holds 0 whole images, and its name says 2; delete it"):
        generate(packed)
    shard.unlink()
    assert shard in generate(packed)


def test_a_shard_that_names_files_elsewhere_reads_none_of_them(settings, files, tmp_path):
    import pyarrow
    import pyarrow.parquet

    packed = replace(settings, output=str(tmp_path / "packed"), pack="parquet")
    (shard,) = generate(packed)
    rows = [{"image": {"bytes": None, "path": str(files[place])}, "text": text} for place, text in enumerate(PROMPTS)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), shard)
    with pytest.raises(UserError, match="cannot be read .*is not in the shard.*; delete it, and its images are drawn again"):
        generate(packed)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pack": None, "pack_size": None}, "has its images in shards .*give --pack tar"),
        ({"pack": "parquet"}, "has its images in shards .*give --pack tar"),
        ({"pack_size": 3}, "holds 2 images, and --pack-size 3 is asked"),
        ({"pack_size": 1}, "holds 2 images, and --pack-size 1 is asked"),
    ],
)
def test_shards_of_another_kind_or_size_are_refused(settings, tmp_path, changes, sentence):
    packed = replace(settings, output=str(tmp_path / "packed"), pack="tar", pack_size=2)
    generate(packed)
    with pytest.raises(UserError, match=sentence):
        generate(replace(packed, **changes))
    assert len(names(packed)) == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pack": None}, "--pack-size 2 needs --pack tar or parquet"),
        ({"weights": True}, "--pack tar is for images alone, and --weights is given"),
        ({"grid": ["seed", "prompt"]}, "--pack tar is for images alone, and --grid is given"),
        ({"pack": "zip"}, "pack.*zip"),
    ],
)
def test_options_without_sense_are_refused(settings, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(settings, **({"pack": "tar", "pack_size": 2} | changes))
