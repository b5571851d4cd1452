"""References of a comparison: what cannot be used is named before anything is drawn, and titles are what was typed."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from afa.errors import UserError
from afa.evaluation.protocols import ProtocolOptions, make_protocol
from afa.experts.spec import ExpertSpec
from afa.files import given_name


def jpeg(index):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def folder(place, changed):
    """Six pictures with captions, some of them changed."""
    place.mkdir()
    files = {f"{index}.jpg": jpeg(index) for index in range(6)} | changed
    for name, data in files.items():
        (place / name).write_bytes(data)
    lines = [json.dumps({"file_name": name, "text": f"of {name}"}) for name in files]
    (place / "metadata.jsonl").write_text("\n".join(lines))
    return place


@pytest.mark.parametrize("broken", [b"", jpeg(2)[:-200], b"<html>404</html>"])
def test_a_broken_reference_is_left_out_by_name_with_its_prompt(tmp_path, broken):
    protocol = make_protocol(str(folder(tmp_path / "data", {"2.jpg": broken})), ProtocolOptions())
    assert [item.caption for item in protocol.items] == [f"of {index}.jpg" for index in (0, 1, 3, 4, 5)]
    assert protocol.left_out.names == {"not readable as an image": ["2.jpg"]}
    assert len(list(protocol.real.images())) == len([reference() for reference in protocol.references]) == 5


def test_references_outside_their_folder_need_the_option(tmp_path):
    place = folder(tmp_path / "data", {})
    (tmp_path / "secret.jpg").write_bytes(jpeg(9))
    (place / "2.jpg").unlink()
    (place / "2.jpg").symlink_to(tmp_path / "secret.jpg")
    assert len(make_protocol(str(place), ProtocolOptions()).items) == 5
    assert len(make_protocol(str(place), ProtocolOptions(allow_outside=True)).items) == 6


def test_too_few_references_are_one_sentence(tmp_path):
    place = folder(tmp_path / "data", {f"{index}.jpg": b"" for index in range(1, 6)})
    with pytest.raises(UserError, match=r"has 1 captioned image.*5 left out"):
        make_protocol(str(place), ProtocolOptions())


def coco(place, names, broken=b""):
    (place / "train2017").mkdir(parents=True)
    (place / "annotations").mkdir()
    for index, name in enumerate(names):
        if "/" not in name:
            (place / "train2017" / name).write_bytes(jpeg(index) if index else broken or jpeg(0))
    images = [{"id": index, "file_name": name} for index, name in enumerate(names)]
    notes = [{"id": index, "image_id": index, "caption": f"of {name}"} for index, name in enumerate(names)]
    text = json.dumps({"images": images, "annotations": notes})
    (place / "annotations/captions_train2017.json").write_text(text)
    return place


def test_coco_names_a_broken_image_and_one_from_elsewhere(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg(9))
    assert len(make_protocol("coco2017", ProtocolOptions(data=coco(tmp_path / "a", ["0.jpg", "1.jpg"]))).items) == 2
    with pytest.raises(UserError, match=r"1 of COCO's 2 images cannot be used.*0\.jpg"):
        make_protocol("coco2017", ProtocolOptions(data=coco(tmp_path / "b", ["0.jpg", "1.jpg"], jpeg(0)[:-200])))
    place = coco(tmp_path / "c", ["0.jpg", "../../secret.jpg"])
    with pytest.raises(UserError, match=r"secret\.jpg is outside.*--allow-outside"):
        make_protocol("coco2017", ProtocolOptions(data=place))
    assert len(make_protocol("coco2017", ProtocolOptions(data=place, allow_outside=True)).items) == 2


def test_a_link_is_called_by_its_own_name_in_every_place(tmp_path, monkeypatch):
    place = folder(tmp_path / "b1946ac9", {})
    (tmp_path / "my-pictures").symlink_to(place)
    assert make_protocol(str(tmp_path / "my-pictures"), ProtocolOptions()).name == "my-pictures"
    (tmp_path / "5891b5b5").write_text("a cat\n")
    (tmp_path / "my-prompts.txt").symlink_to(tmp_path / "5891b5b5")
    assert make_protocol(str(tmp_path / "my-prompts.txt"), ProtocolOptions()).name == "my-prompts"
    assert ExpertSpec.parse(str(tmp_path / "my-pictures")).name == "my-pictures"
    (tmp_path / "photo.safetensors").symlink_to(tmp_path / "5891b5b5")
    assert ExpertSpec.parse(str(tmp_path / "photo.safetensors")).name == "photo"
    monkeypatch.chdir(place)
    assert ExpertSpec.parse(".").name == "b1946ac9"
    assert given_name(type(place)(".")) == "b1946ac9"


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl"])
def test_a_table_of_prompts_may_have_any_mark_and_no_line_ends_of_its_own(tmp_path, name):
    prompt, split = "a cat\u2028on\x85 a mat", "\t" if name.endswith("tsv") else ","
    rows = [json.dumps({"Prompts": prompt}, ensure_ascii=False)] * 200
    text = "\n".join(rows if name.endswith("l") else [f"Category{split}Prompts", *[f"x{split}{prompt}"] * 200])
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    protocol = make_protocol("drawbench", ProtocolOptions(data=tmp_path / name))
    assert {item.caption for item in protocol.items} == {prompt}
