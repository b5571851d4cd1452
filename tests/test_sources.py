"""Laws of data sources: every form gives the same images, what is broken is left out by name, nothing is unpacked."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_training import experts, images, interrupt_after, settings  # noqa: F401 (fixtures)
from tiny import sd_pipeline

from afa.data.images import Crop, cut
from afa.data.registry import open_source
from afa.data.shards import expand
from afa.data.sources import Columns, Skipped
from afa.errors import UserError
from afa.images import open_image as decode
from afa.training.data import Augmentation, check_skipped, encode
from afa.training.record import LEFT_OUT
from afa.training.run import train

CAPTIONS = [f"picture {index}" for index in range(6)]


def picture(index, kind="JPEG"):
    """An image as bytes; they differ in size and content."""
    pixels = np.random.default_rng(index).integers(0, 255, (40 + index, 56, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


PICTURES = [picture(index) for index in range(6)]


def write_folder(place):
    for index, data in enumerate(PICTURES):
        (place / f"{index}.jpg").write_bytes(data)
    lines = [json.dumps({"file_name": f"{index}.jpg", "text": text}) for index, text in enumerate(CAPTIONS)]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    return place


def write_jsonl(place):
    write_folder(place)
    lines = [json.dumps({"path": str(place / f"{index}.jpg"), "caption": text}) for index, text in enumerate(CAPTIONS)]
    (place / "list.jsonl").write_text("\n".join(lines))
    return place / "list.jsonl"


def write_parquet(place, column=lambda index: {"bytes": PICTURES[index], "path": None}):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [column(index) for index in range(6)], "text": CAPTIONS})
    pyarrow.parquet.write_table(table, place / "train.parquet", row_group_size=2)
    return place / "train.parquet"


def write_bytes_parquet(place):
    return write_parquet(place, lambda index: PICTURES[index])


def write_path_parquet(place):
    write_folder(place)
    return write_parquet(place, lambda index: f"{index}.jpg")


def write_shards(place, caption=lambda index: ("txt", CAPTIONS[index].encode())):
    for shard in range(2):
        with tarfile.open(place / f"part-{shard:02d}.tar", "w") as archive:
            for index in range(3 * shard, 3 * shard + 3):
                kind, text = caption(index)
                for ending, data in (("jpg", PICTURES[index]), (kind, text)):
                    member = tarfile.TarInfo(f"train/{index:04d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return place / "part-{00..01}.tar"


def write_json_shards(place):
    return write_shards(place, lambda index: ("json", json.dumps({"caption": CAPTIONS[index]}).encode()))


FORMS = [write_folder, write_jsonl, write_parquet, write_bytes_parquet, write_path_parquet, write_shards, write_json_shards]


@pytest.mark.parametrize("write", FORMS)
def test_every_form_gives_the_same_images_and_captions_in_order(tmp_path, write):
    source = open_source(str(write(tmp_path)))
    assert [sample.caption for sample in source.samples] == CAPTIONS
    assert [sample.read() for sample in source.samples] == PICTURES
    assert len({sample.name for sample in source.samples}) == 6 and len({sample.mark for sample in source.samples}) == 6
    assert not source.skipped and source.summary() == "6 captioned images"


def test_a_folder_of_shards_or_of_parquet_files_is_a_source(tmp_path):
    for write in (write_shards, write_parquet):
        place = tmp_path / write.__name__
        place.mkdir()
        write(place)
        assert [sample.caption for sample in open_source(str(place)).samples] == CAPTIONS


@pytest.mark.parametrize("write", [write_folder, write_jsonl, write_parquet, write_shards])
def test_only_the_first_images_are_taken(write, tmp_path):
    assert [sample.caption for sample in open_source(str(write(tmp_path)), limit=3).samples] == CAPTIONS[:3]


def test_samples_can_be_read_in_any_order(tmp_path):
    samples = open_source(str(write_parquet(tmp_path))).samples
    assert [samples[index].read() for index in (5, 0, 3, 3)] == [PICTURES[index] for index in (5, 0, 3, 3)]


@pytest.mark.parametrize(("pattern", "count"), [("a-{08..11}.tar", 4), ("a-{0..1}-{0..2}.tar", 6), ("a.tar", 1)])
def test_braces_are_ranges(tmp_path, pattern, count):
    assert len(expand(str(tmp_path / pattern))) == count
    assert expand("a-{08..11}.tar")[1].name == "a-09.tar"


def test_a_star_finds_what_is_there(tmp_path):
    write_shards(tmp_path)
    assert [path.name for path in expand(str(tmp_path / "part-*.tar"))] == ["part-00.tar", "part-01.tar"]


def test_columns_can_be_named(tmp_path):
    lines = [json.dumps({"where": "a.jpg", "says": "a square", "text": "other"})]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.jpg").write_bytes(PICTURES[0])
    assert open_source(str(tmp_path / "list.jsonl"), Columns("where", "says")).samples[0].caption == "a square"
    with pytest.raises(UserError, match="has no 'says' for the caption, only image, text; say which with --caption-column"):
        open_source(str(write_parquet(tmp_path)), Columns(caption="says"))


# --- what is broken ---------------------------------------------------------------------------------------------------


def test_a_sample_without_image_or_caption_is_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("a.jpg", PICTURES[0]), ("b.txt", b"alone"), ("c.jpg", PICTURES[1]), ("c.txt", b"both"), ("d.json", b"{"), ("d.jpg", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = open_source(str(tmp_path / "x.tar"))
    assert [sample.caption for sample in source.samples] == ["both"]
    assert source.skipped.names == {"no caption": ["x.tar:a", "x.tar:d"], "no image": ["x.tar:b"]}


@pytest.mark.parametrize("where", ["header", "data"])
def test_a_shard_that_was_cut_off_gives_what_came_before(tmp_path, where):
    write_shards(tmp_path)
    shard = tmp_path / "part-01.tar"
    with tarfile.open(shard) as archive:
        last = archive.getmembers()[-2]  # an image
    shard.write_bytes(shard.read_bytes()[: (last.offset if where == "header" else last.offset_data) + 100])
    source = open_source(str(tmp_path / "part-{00..01}.tar"))
    assert [sample.caption for sample in source.samples] == CAPTIONS[:5]
    assert list(source.skipped.names) == ["its shard is cut off"]
    assert [sample.read() for sample in source.samples] == PICTURES[:5]


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(UserError, match="x.tar cannot be read as a plain tar archive"):
        open_source(str(tmp_path / "x.tar"))


def test_a_file_that_is_no_parquet_is_one_sentence(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="x.parquet cannot be read as parquet"):
        open_source(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(("place", "sentence"), [("gone.tar", "there is no file"), ("here.txt", "is of no known form"), ("/no/such/place", "is not there")])
def test_a_place_that_is_none_is_one_sentence(tmp_path, place, sentence):
    (tmp_path / "here.txt").write_text("a")
    with pytest.raises(UserError, match=sentence):
        open_source(str(tmp_path / place))


def truncated(folder, index=1):
    """A folder with one JPEG whose header is whole and whose end is missing."""
    write_folder(folder)
    (folder / f"{index}.jpg").write_bytes(PICTURES[index][: len(PICTURES[index]) // 2])
    return folder


def test_a_truncated_image_is_left_out_where_it_is_decoded(tmp_path):
    source = open_source(str(truncated(tmp_path)))
    assert len(source.samples) == 6  # its header is fine
    encoded = encode([(sample, [Crop(32)]) for sample in source.samples], sd_pipeline().vae, 4, source.skipped)
    assert encoded.captions == [text for index, text in enumerate(CAPTIONS) if index != 1] and len(encoded.moments) == 5
    assert source.skipped.names == {"not readable as an image": ["1.jpg"]}
    check_skipped(source, 0.2)
    with pytest.raises(UserError, match=r"1 of the 6 images of .* cannot be used, more than --max-skipped 0.1 allows: .*1.jpg"):
        check_skipped(source, 0.1)


def test_a_set_without_any_image_is_one_sentence(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"none")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a"}')
    source = open_source(str(tmp_path))
    with pytest.raises(UserError, match="none of the images can be read"):
        encode([(sample, [Crop(32)]) for sample in source.samples], sd_pipeline().vae, 4, Skipped())


def test_training_goes_on_without_a_truncated_image_and_says_so(settings, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "data"
    folder.mkdir()
    record = train(replace(settings, data=str(truncated(folder)), held_out=1, max_skipped=0.5, steps=2))
    assert record["left_out"] == {"not readable as an image": 1}
    assert "1 left out: not readable as an image (1.jpg)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / LEFT_OUT).read_text()) == {"reason": "not readable as an image", "image": "1.jpg"}


def test_too_many_broken_images_stop_the_run_before_it_trains(settings, tmp_path):  # noqa: F811
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(UserError, match="more than --max-skipped 0.1 allows"):
        train(replace(settings, data=str(truncated(folder)), held_out=1))
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_changed_is_not_gone_on_with(settings, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "data"
    folder.mkdir()
    write_folder(folder)
    run = replace(settings, data=str(folder), held_out=1)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    (folder / "2.jpg").write_bytes(picture(77))
    with pytest.raises(UserError, match="the images or captions of --data .* have changed since the run"):
        train(run)
    (folder / "2.jpg").write_bytes(PICTURES[2])
    assert train(run)["steps"] == 6


# --- squares ----------------------------------------------------------------------------------------------------------


def test_a_crop_depends_on_its_place_in_the_set_alone():
    image = decode(PICTURES[5])
    crops = Augmentation(3, flip=True).of(32, seed=1, index=4)
    first, again = ([cut(image, crop) for crop in crops] for _ in range(2))
    assert all((one[0] == other[0]).all() and one[1] == other[1] for one, other in zip(first, again, strict=True))
    assert len({one[1] for one in first}) > 1
    assert crops != Augmentation(3, flip=True).of(32, seed=2, index=4) != Augmentation(3, flip=True).of(32, seed=2, index=5)


def test_crops_stay_inside_and_reach_both_edges():
    image = decode(PICTURES[0])  # 56 × 40, so 45 × 32 of which 32 are cut
    lefts = {cut(image, Crop(32, (0, index)))[1][3] for index in range(200)}
    assert lefts == set(range(14))


def test_half_of_the_crops_are_mirrored():
    image = Image.fromarray(np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2))
    mirrored = [float(cut(image, Crop(32, (0, index), flip=True))[0][0, 0, 0]) > 0 for index in range(200)]
    assert 70 < sum(mirrored) < 130
    assert not any(float(cut(image, Crop(32, (0, index)))[0][0, 0, 0]) > 0 for index in range(20))


def test_a_photo_that_lies_on_its_side_is_turned_upright():
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn by 90°
    Image.new("RGB", (20, 10)).save(buffer, format="JPEG", exif=exif)
    assert decode(buffer.getvalue()).size == (10, 20)


def test_every_crop_is_a_row_and_each_epoch_draws_among_them(tmp_path):
    import torch

    samples = open_source(str(write_folder(tmp_path))).samples
    crops = Augmentation(3)
    encoded = encode([(sample, crops.of(32, 0, index)) for index, sample in enumerate(samples)], sd_pipeline().vae, 4, Skipped())
    assert len(encoded) == 6 and encoded.moments.shape[0] == 18 and encoded.captions[3:6] == [CAPTIONS[1]] * 3
    rng = torch.Generator().manual_seed(0)
    drawn = [encoded.rows([0, 5], rng) for _ in range(50)]
    assert {row for rows in drawn for row in rows} == {0, 1, 2, 15, 16, 17}


def test_training_on_random_crops_resumes_to_the_same_bits(settings, tmp_path, monkeypatch):  # noqa: F811
    run = replace(settings, crops=2, flip=True)
    whole = train(replace(run, output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert train(run)["history"] == whole["history"]


def test_flip_without_crops_is_refused(settings):  # noqa: F811
    with pytest.raises(UserError, match="--flip mirrors random crops, and there are none; give --crops 1 or more"):
        replace(settings, flip=True)
