"""Laws of folders as kohya's users have them: repeats, names as captions, first lines, lists beside them; what two sources say is told."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import experts, images, interrupt_after, settings  # noqa: F401 (fixtures)
from tiny import sd_pipeline

from afa.data.images import Crop
from afa.data.registry import open_source
from afa.data.sources import Columns, Skipped
from afa.errors import UserError
from afa.training.data import encode
from afa.training.order import images_of_step
from afa.training.prepare import encode_captions, find_data, training_images
from afa.training.run import train

BOM = "\ufeff"


def picture(index, mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(index).integers(0, 255, (16, 20, 3), dtype=np.uint8)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, files):
    for number, (name, data) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number) if data is None else data if isinstance(data, bytes) else data.encode())
    return str(folder)


def table(*rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("file_name", "text"), *rows])
    return text.getvalue()


KOHYA = {
    "10_ring gold/a.png": None,
    "10_ring gold/a.txt": "1girl, solo, (ring:1.2), masterpiece\n",
    "10_ring gold/b.png": None,
    "10_ring gold/close/c.jpg": None,
    "2_hat/d.webp": None,
    "2_hat/d.caption": "a hat\r\na hat on a table\n",
    "plain/e.png": None,
    "plain/e.txt": "as it is",
    "plain/f.png": None,
    "0_never/g.png": None,
}
COUNTS = {"a": 10, "b": 10, "c": 10, "d": 2, "e": 1}


def test_the_names_of_folders_are_repeats_and_captions_where_a_picture_has_none(tmp_path):
    source = open_source(write(tmp_path, KOHYA))
    assert {sample.name: (sample.repeats, sample.caption) for sample in source.samples} == {
        "10_ring gold/a.png": (10, "1girl, solo, (ring:1.2), masterpiece"),
        "10_ring gold/b.png": (10, "ring gold"),
        "10_ring gold/close/c.jpg": (10, "ring gold"),
        "2_hat/d.webp": (2, "a hat"),
        "plain/e.png": (1, "as it is"),
    }
    assert source.skipped.names == {"no caption": ["plain/f.png"], "its folder is repeated 0 times": ["0_never/g.png"]}
    assert source.summary().startswith("5 captioned images, which count as 33; 1 left out: ")


def test_what_is_told_of_images_that_are_used_is_one_line_each(tmp_path, capsys):
    open_source(write(tmp_path, KOHYA)).tell()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "2 of the images: no caption file, and the folder's name taken as caption (10_ring gold/b.png, …)" in told[0]
    assert "1 of the images: caption with more lines, of which the first with text is taken" in told[1]


def test_a_pass_counts_every_image_as_often_as_its_folder_says(tmp_path):
    samples = open_source(write(tmp_path, KOHYA)).samples
    data = encode([(sample, [Crop(16)]) for sample in samples], sd_pipeline().vae, 4, Skipped())
    once = encode([(replace(sample, repeats=1), [Crop(16)]) for sample in samples], sd_pipeline().vae, 4, Skipped())
    assert [data.groups[0].count(image) for image in range(5)] == list(COUNTS.values()) and len(data) == 5
    taken = [image for step in range(11) for image in images_of_step(data.groups, step, 3, 0)]
    assert [taken.count(image) for image in range(5)] == list(COUNTS.values())
    assert data.digest != once.digest and once.groups == [[0, 1, 2, 3, 4]] and once.repeats == ()


def test_held_out_images_are_never_trained_on_however_often_they_count(settings, tmp_path):  # noqa: F811
    files = {f"{1 + index}_x/{index}.png": None for index in range(10)}
    run = replace(settings, data=write(tmp_path / "data", files))
    source = find_data(run)
    kept = {sample.name: sample.repeats for sample in source.samples}
    captions, held_out = encode_captions(run, source, 32, 0)
    assert len(held_out) == 2 and training_images(source, run) == len(captions.captions)
    assert len(captions.captions) < sum(kept.values()) == 55
    record = train(replace(run, steps=2))
    assert record["training_images"] == 8


def test_a_run_whose_folders_were_renamed_is_not_gone_on_with(settings, tmp_path, monkeypatch):  # noqa: F811
    place = tmp_path / "data"
    files = {f"2_x/{index}.png": None for index in range(6)} | {f"y/{index}.png": None for index in range(4)}
    run = replace(settings, data=write(place, files | {f"y/{index}.txt": "y" for index in range(4)}))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    (place / "2_x").rename(place / "3_x")
    with pytest.raises(UserError, match="the images or captions of --data .* have changed"):
        train(run)


@pytest.mark.parametrize("name", ["2023_photos", "1001_x", "99999999999999999999_x"])
def test_a_year_is_not_taken_for_repeats_without_a_word(tmp_path, name):
    with pytest.raises(UserError, match=f'the folder "{name}", .*at most 1000 are possible; rename it'):
        open_source(write(tmp_path, {f"{name}/a.png": None, f"{name}/a.txt": "x"}))


@pytest.mark.parametrize("name", ["10", "_x", "x_10", "10-x", "1e3_x", "-3_x", "+3_x", "१०_x", "10_"])
def test_other_names_of_folders_say_nothing(tmp_path, name):
    source = open_source(write(tmp_path, {f"{name}/a.png": None, f"{name}/a.txt": "x", f"{name}/b.png": None}))
    assert [(sample.repeats, sample.caption) for sample in source.samples] == [(1, "x")]
    assert source.skipped.names == {"no caption": [f"{name}/b.png"]}


def test_the_innermost_name_decides(tmp_path):
    (sample,) = open_source(write(tmp_path, {"5_x/more/3_y/z/a.png": None})).samples
    assert (sample.repeats, sample.caption) == (3, "y")


# --- captions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        (f"{BOM}a cat", "a cat"),
        ("\n\n  a cat  \n\n", "a cat"),
        ("a cat\r\na dog\r\n", "a cat"),
        ("<script>alert(1)</script>\x1b[31m", "<script>alert(1)</script>\x1b[31m"),  # pages and terminals escape it; the model reads it as it is
        ("a, " * 300_000, ("a, " * 300_000).strip()),
    ],
)
def test_a_caption_is_the_first_line_with_text_as_it_is(tmp_path, text, caption):
    (sample,) = open_source(write(tmp_path, {"a.png": None, "a.txt": text})).samples
    assert sample.caption == caption


def test_captions_that_are_none_are_left_out_and_counted(tmp_path):
    files = {f"{name}.png": None for name in "abcd"} | {"e.png": None, "e.txt": "kept"}
    files |= {"a.txt": "a café".encode("latin-1"), "b.txt": "", "c.txt": "x" * (2**20 + 1), "d.txt": "a\0b"}
    source = open_source(write(tmp_path, files))
    assert [sample.caption for sample in source.samples] == ["kept"]
    assert source.skipped.names == {"its caption is no UTF-8 text": ["a.png", "c.png", "d.png"], "no caption": ["b.png"]}


def test_of_several_files_the_first_in_a_told_order_is_taken_unless_one_is_asked_for(tmp_path, capsys):
    place = write(tmp_path, {"a.png": None, "a.txt": "tags, of, a", "a.caption": "a sentence"})
    source = open_source(place)
    assert [sample.caption for sample in source.samples] == ["a sentence"]
    source.tell()
    assert "several caption files, of which the first in this order with text is taken (.caption, .txt) (a.png)" in capsys.readouterr().err
    asked = open_source(place, Columns(caption="txt"))
    assert [sample.caption for sample in asked.samples] == ["tags, of, a"] and not asked.skipped.told


def test_names_of_strangers_reach_no_terminal_as_they_are(tmp_path, capsys):
    name = "10_\x1b[31mred/\x1b[2Ja.png"
    source = open_source(write(tmp_path, {name: None, "b\x1b[1m.png": None, "b\x1b[1m.txt": " "}))
    source.tell()
    told = capsys.readouterr().err + source.summary()
    assert "\x1b" not in told and "\\u001b[2Ja.png" in told
    assert source.samples[0].caption == "\x1b[31mred"


# --- lists beside them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_is_read_as_the_hub_writes_it(tmp_path, encoding):
    rows = table(("a.png", 'a "red", round café'), ("in/b.png", "two\nlines"), ("c.png", ""))
    place = write(tmp_path, {"a.png": None, "in/b.png": None, "c.png": None, "metadata.csv": rows.encode(encoding)})
    for source in (open_source(place), open_source(f"{place}/metadata.csv")):
        assert [sample.caption for sample in source.samples] == ['a "red", round café', "two\nlines"]
        assert source.skipped.names == {"no caption": ["c.png"]}


def test_a_list_is_taken_before_files_beside_the_images_and_says_so(tmp_path, capsys):
    source = open_source(write(tmp_path, {"3_x/a.png": None, "3_x/a.txt": "of the file", "metadata.csv": table(("3_x/a.png", "of the list"))}))
    assert [(sample.caption, sample.repeats) for sample in source.samples] == [("of the list", 1)]
    source.tell()
    assert "captions in the list and in a file beside the image, of which the list's is taken (3_x/a.png)" in capsys.readouterr().err


def test_two_lists_are_refused(tmp_path):
    files = {"a.png": None, "metadata.csv": table(("a.png", "x")), "metadata.jsonl": '{"file_name": "a.png", "text": "y"}\n'}
    with pytest.raises(UserError, match=r"holds both metadata.jsonl and metadata.csv; give the list to read: .*metadata.jsonl or .*metadata.csv"):
        open_source(write(tmp_path, files))
    assert [sample.caption for sample in open_source(str(tmp_path / "metadata.csv")).samples] == ["x"]


def test_lists_in_folders_inside_are_named(tmp_path):
    files = {f"{split}/{name}": data for split in ("train", "test") for name, data in (("a.png", None), ("metadata.csv", table(("a.png", "x"))))}
    with pytest.raises(UserError, match='lists are in its folders "test", "train": give one of these'):
        open_source(write(tmp_path, files))


# --- pictures ------------------------------------------------------------------------------------------------------------


def test_hidden_colours_turned_photos_and_huge_pictures_in_kohyas_folders(tmp_path):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(buffer, "JPEG", exif=exif)
    clear, bomb = io.BytesIO(), io.BytesIO()
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(clear, "PNG")
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    place = write(tmp_path, {"4_x/turned.jpg": buffer.getvalue(), "4_x/clear.png": clear.getvalue(), "4_x/bomb.png": bomb.getvalue()})
    skipped = Skipped()
    work = [(sample, [Crop(16, bucket=(24, 16))]) for sample in open_source(place).samples]
    data = encode(work, sd_pipeline().vae, 2, skipped)
    assert skipped.names == {"not readable as an image": ["4_x/bomb.png"]} and data.repeats == (4, 4)
    assert data.sizes[:, :2].tolist() == [[20, 20], [40, 20]]
    white = encode([(work[1][0], [Crop(16, bucket=(24, 16))])], sd_pipeline().vae, 2, Skipped())
    assert torch.allclose(white.moments, data.moments[[0]], atol=1e-5)
