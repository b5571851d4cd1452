"""Captioned images from strangers: text as it was meant, nothing from outside the folder, what is unusable left out by name."""

import csv
import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from afa.data.images import Crop
from afa.data.registry import open_source
from afa.data.shards import expand
from afa.data.sources import Columns, Skipped
from afa.errors import UserError
from afa.training.data import batches, check_skipped

CAFE = "a caf\u00e9 on white"


def picture(index, kind="PNG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(folder)


def listed(folder, *entries):
    """A folder with metadata.jsonl of entries, each a file's name or a whole entry."""
    lines = [entry if isinstance(entry, dict) else {"file_name": entry, "text": f"of {entry}"} for entry in entries]
    return write(folder, {"metadata.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})


def shard(path, members):
    """A tar of (name, bytes) or tarfile.TarInfo."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return str(path)


def captions(place, **options):
    return [sample.caption for sample in open_source(place, Columns(**options)).samples]


# --- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_form_reads_text_in_every_encoding_with_a_mark(tmp_path, encoding):
    line = json.dumps({"file_name": "a.png", "text": CAFE}, ensure_ascii=False) + "\n"
    table = f"file_name,text\na.png,{CAFE}\n"
    forms = {
        "lines": {"a.png": picture(0), "metadata.jsonl": line.encode(encoding)},
        "table": {"a.png": picture(0), "metadata.csv": table.encode(encoding)},
        "pairs": {"a.png": picture(0), "a.txt": CAFE.encode(encoding)},
        "described": {"a.png": picture(0), "a.json": json.dumps({"caption": CAFE}, ensure_ascii=False).encode(encoding)},
    }
    for name, files in forms.items():
        assert captions(write(tmp_path / name, files)) == [CAFE], name
    for name in ("pairs", "described"):
        assert captions(shard(tmp_path / f"{name}.tar", sorted(forms[name].items()))) == [CAFE]


def test_captions_that_are_no_text_are_left_out_by_name(tmp_path):
    files = {"a.png": picture(0), "a.txt": CAFE.encode(), "b.png": picture(1), "b.txt": CAFE.encode("latin-1")}
    files |= {"c.png": picture(2), "c.txt": b"a\0b", "d.png": picture(3), "d.txt": b"x" * (2**20 + 1)}
    found = [open_source(write(tmp_path / "x", files)), open_source(shard(tmp_path / "x.tar", sorted(files.items())))]
    for source, name in zip(found, ("b.png", "x.tar:b"), strict=True):
        assert [sample.caption for sample in source.samples] == [CAFE]
        assert source.skipped.counts() == {"its caption is no UTF-8 text": 3}
        assert name in source.skipped.names["its caption is no UTF-8 text"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (json.dumps({"file_name": "a.png", "text": CAFE}, ensure_ascii=False).encode("latin-1"), "not UTF-8"),
        (b'{"file_name": "a.png", "text": "a \\ud83d cat"}', "line 1 holds half a surrogate"),
        (b'{"file_name": "a.png", "text": ' + b"[" * 50_000, "line 1 is nested"),
        (b'{"file_name": "a.png", "text": "x", "weight": NaN}', "line 1 is not JSON"),
        (b'{"file_name": "a.png", "file_name": "b.png", "text": "x"}', "line 1 is not JSON.*twice"),
        (b'{"file_name": ["a.png"], "text": "x"}', 'line 1 has no "file_name"'),
        (b'["a.png", "x"]', "line 1 is no object"),
    ],
)
def test_a_list_that_is_none_names_its_line(tmp_path, line, named):
    place = write(tmp_path, {"a.png": picture(0), "metadata.jsonl": line})
    with pytest.raises(UserError, match=f"metadata.jsonl.*{named}|metadata.jsonl is {named}"):
        open_source(place)


def test_a_caption_may_hold_what_other_programs_take_for_line_ends(tmp_path):
    text = "one\u2028two\x85three\x0cfour"
    place = write(tmp_path, {"a.png": picture(0), "metadata.jsonl": json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)})
    assert captions(place) == [text]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("file_name", "text"), ("a.png", text)])
    assert captions(write(tmp_path / "table", {"a.png": picture(0), "metadata.csv": table.getvalue()})) == [text]


# --- images with captions beside them ----------------------------------------------------------------------------------


def test_a_folder_of_images_with_captions_beside_them_is_data(tmp_path):
    files = {f"10_ring/{name}": picture(index) for index, name in enumerate(("a.png", "b.JPG", "c.d.png", "e.webp", "f.png"))}
    files |= {"10_ring/a.txt": "A\n", "10_ring/b.txt": "B", "10_ring/c.d.txt": "C", "10_ring/e.caption": "E", "10_ring/f.txt": " "}
    files |= {"10_ring/._a.png": b"\0\5\x16\7", "10_ring/._a.txt": b"\0", ".DS_Store": b"", "__MACOSX/g.png": picture(9), "__MACOSX/g.txt": "G"}
    files |= {"readme.txt": "not a caption", "h.heic": b"?", "h.txt": "H"}
    source = open_source(write(tmp_path, files))
    assert [sample.caption for sample in source.samples] == ["A", "B", "C", "E"]
    assert source.skipped.names == {"no caption": ["10_ring/f.png"], "no image": ["h.heic"]}
    assert source.samples[0].read() == files["10_ring/a.png"]


def test_an_empty_text_hides_no_other_caption(tmp_path):
    files = {"a.png": picture(0), "a.txt": "", "a.json": json.dumps({"text": "", "caption": "C"})}
    assert captions(write(tmp_path / "x", files)) == ["C"]
    members = [(name, data if isinstance(data, bytes) else data.encode()) for name, data in sorted(files.items())]
    assert captions(shard(tmp_path / "x.tar", members)) == ["C"]


def test_images_without_any_caption_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"has no metadata.jsonl; .*\.txt beside every image"):
        open_source(write(tmp_path, {"a.png": picture(0), "b.txt": "of nothing"}))


# --- nothing from outside ----------------------------------------------------------------------------------------------


def test_images_outside_the_folder_are_left_out_unless_asked_for(tmp_path):
    secret = tmp_path / "secret.png"
    write(tmp_path, {"secret.png": picture(0), "data/a.png": picture(1)})
    data = tmp_path / "data"
    (data / "link.png").symlink_to(secret)
    (data / "inner.png").symlink_to("a.png")
    (data / "out").symlink_to(tmp_path)
    named = ["a.png", "inner.png", "link.png", "../secret.png", str(secret), "out/secret.png"]
    source = open_source(listed(data, *named))
    assert [sample.name for sample in source.samples] == named[:2]
    assert source.skipped.names == {"outside the data's folder, which needs --allow-outside": named[2:]}
    assert len(captions(str(data), allow_outside=True)) == 6
    assert len(captions(str(data / "metadata.jsonl"), allow_outside=True)) == 6
    with pytest.raises(UserError, match="no image to train on.*--allow-outside"):
        open_source(listed(data, *named[2:]))


def test_captions_and_images_beside_one_another_stay_inside_too(tmp_path):
    write(tmp_path, {"secret.txt": "a password", "secret.png": picture(0), "data/a.png": picture(1), "data/b.txt": "B"})
    (tmp_path / "data/a.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "data/b.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="2 left out: outside"):
        open_source(str(tmp_path / "data"))
    assert captions(str(tmp_path / "data"), allow_outside=True) == ["a password", "B"]


def test_devices_pipes_and_impossible_names_are_never_opened(tmp_path):
    write(tmp_path, {"a.png": picture(0), "f/x": ""})
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    odd = ["pipe.png", "f", "gone.png", "loop.png", "x" * 5000, "/dev/zero"]
    source = open_source(listed(tmp_path, "a.png", *odd), Columns(allow_outside=True))
    assert [sample.name for sample in source.samples] == ["a.png"] and len(source.skipped) == len(odd)


def parquet(path, images, texts=None):
    import pyarrow
    import pyarrow.parquet

    table = {"image": images, "text": pyarrow.array(texts or [f"of {index}" for index in range(len(images))])}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return str(path)


def test_paths_in_tables_lead_nowhere_else(tmp_path):
    write(tmp_path, {"secret.png": picture(0), "data/a.png": picture(1)})
    os.mkfifo(tmp_path / "data/pipe")
    named = ["a.png", "../secret.png", str(tmp_path / "secret.png"), "/dev/zero", "pipe", "", "gone.png"]
    place = parquet(tmp_path / "data/x.parquet", [{"bytes": None, "path": name} for name in named])
    skipped = Skipped()
    samples = open_source(place).samples
    read = [row for batch in batches([(sample, [Crop(16)]) for sample in samples], 2, skipped) for row in batch]
    assert [row.sample.caption for row in read] == ["of 0"]
    assert len(skipped) == 6 and len(skipped.names["outside the data's folder, which needs --allow-outside"]) == 3
    assert open_source(place, Columns(allow_outside=True)).samples[1].read() == picture(0)


def test_captions_of_tables_that_are_no_text_are_left_out(tmp_path):
    place = parquet(tmp_path / "x.parquet", [picture(index) for index in range(4)], ["a", "b\0c", "", "\ufeffd "])
    source = open_source(place)
    assert [sample.caption for sample in source.samples] == ["a", "d"]
    assert source.skipped.counts() == {"its caption is no UTF-8 text": 1, "no caption": 1}


# --- shards ------------------------------------------------------------------------------------------------------------


def test_shards_of_macos_and_of_newer_tars_are_as_plain_ones(tmp_path):
    plain = [(f"{index}.{end}", data) for index in range(3) for end, data in (("png", picture(index)), ("txt", b"of it"))]
    fork = b"\0\5\x16\7" + bytes(60)
    mac = [member for name, data in plain for member in ((f"._{name}", fork), (name, data))]
    nested = [(f"./x/{name}", data) for name, data in mac] + [("x/.DS_Store", fork), ("__MACOSX/x/0.png", fork)]
    for name, members in (("mac", mac), ("nested", nested)):
        source = open_source(shard(tmp_path / f"{name}.tar", members))
        assert [sample.read() for sample in source.samples] == [picture(index) for index in range(3)] and not source.skipped
    long = "x" * 200
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for end, data in (("png", picture(0)), ("txt", b"of it")):
            info = tarfile.TarInfo(f"{long}/0.{end}")
            info.size, info.pax_headers = len(data), {"comment": "caf\u00e9"}
            archive.addfile(info, io.BytesIO(data))
    assert captions(str(tmp_path / "pax.tar")) == ["of it"]


def odd(name, kind, **more):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def test_members_that_are_no_files_are_left_out(tmp_path):
    members = [("a.png", picture(0)), ("a.txt", b"A")]
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    for index, kind in enumerate(kinds):
        members += [odd(f"{index}.png", kind, linkname="/etc/passwd"), (f"{index}.txt", b"of it")]
    source = open_source(shard(tmp_path / "x.tar", members))
    assert [sample.caption for sample in source.samples] == ["A"]
    assert source.skipped.counts() == {"not a plain file": 4}


def test_a_sparse_file_is_not_read_as_if_its_bytes_were_there(tmp_path):
    info = odd("b.png", tarfile.GNUTYPE_SPARSE, size=0)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = b"%011o\0" % (2**30)  # the size it claims to unfold to
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:512]))
    place = shard(tmp_path / "x.tar", [("a.png", picture(0)), ("a.txt", b"A")])
    whole = (tmp_path / "x.tar").read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512) + bytes(block) + bytes(1024)
    (tmp_path / "x.tar").write_bytes(whole)
    source = open_source(place)
    assert [sample.caption for sample in source.samples] == ["A"] and source.skipped.counts() == {"not a plain file": 1}


def test_a_header_of_negative_size_ends_in_a_sentence(tmp_path):
    block = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 11 + b"\0"  # -256
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:512]))
    (tmp_path / "x.tar").write_bytes(bytes(block) + bytes(1024))
    with pytest.raises(UserError, match="cannot be read as a plain tar archive"):
        open_source(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("pattern", ["x-{0..99999999}.tar", "x-{0..999}-{0..999}.tar", "x-{0..%s}.tar" % ("9" * 5000), "{0..9}" * 9 + ".tar"])
def test_ranges_of_shards_are_bounded(pattern):
    with pytest.raises(UserError, match="at most 100,000"):
        expand(pattern)
    with pytest.raises(UserError, match="at most 100,000|cannot be read: File name too long"):
        open_source(pattern)


# --- pictures ----------------------------------------------------------------------------------------------------------


def bomb(width, height):
    """A PNG of some bytes that claims to be huge."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def test_pictures_that_cannot_be_used_are_counted_whatever_is_wrong_with_them(tmp_path):
    strip = io.BytesIO()
    Image.new("RGB", (1, 60_000)).save(strip, "PNG")  # as wide as a square it would be 512 × 30,720,000
    files = {"a.png": picture(0), "b.png": b"", "c.png": b"<html>", "d.png": bomb(60_000, 60_000), "e.png": strip.getvalue()}
    files |= {"f.png": picture(1, "JPEG")[:-60], "g.png": bomb(0, 3)}
    write(tmp_path, files)
    source = open_source(listed(tmp_path, *files))
    read = [row for batch in batches([(sample, [Crop(512)]) for sample in source.samples], 2, source.skipped) for row in batch]
    assert [row.sample.name for row in read] == ["a.png"]
    assert source.skipped.names == {"not readable as an image": list(files)[1:]}
    with pytest.raises(UserError, match="6 of the 7 images"):
        check_skipped(source, 0.5)


def test_sixteen_bits_and_hidden_colours_are_trained_on_as_they_look(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    hidden = np.concatenate([np.full((16, 16, 3), 7, np.uint8), np.zeros((16, 16, 1), np.uint8)], 2)
    arrays = {"a.png": grey, "b.png": grey.astype(np.uint16) * 257, "c.tif": grey.astype(np.float32) / 255, "d.png": hidden}
    for name, array in arrays.items():
        Image.fromarray(array).save(tmp_path / name)
    source = open_source(listed(tmp_path, *arrays))
    rows = [row for batch in batches([(sample, [Crop(16)]) for sample in source.samples], 9, source.skipped) for row in batch]
    assert torch.equal(rows[0].pixels, rows[1].pixels) and torch.equal(rows[0].pixels, rows[2].pixels)
    assert (rows[3].pixels == 1).all() and not source.skipped
