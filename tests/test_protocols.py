"""Protocols: what every method is asked to do, from tables, folders and files of the real forms."""

import json

import numpy as np
import pytest
from PIL import Image

from afa.errors import UserError
from afa.evaluation.protocols import PROTOCOLS, ProtocolOptions, make_protocol


def write_image(path, size=(40, 30), colour=(200, 10, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def coco(tmp_path):
    """Two images of COCO's layout, one with two captions, and one image without any."""
    for name in ("000000000009.jpg", "000000000025.jpg", "000000000030.jpg"):
        write_image(tmp_path / "train2017" / name, size=(320, 300))
    images = [{"id": 25, "file_name": "000000000025.jpg"}, {"id": 9, "file_name": "000000000009.jpg"}, {"id": 30, "file_name": "000000000030.jpg"}]
    captions = [(7, 9, "a later caption"), (3, 9, " the first caption \n"), (5, 25, "another image")]
    annotations = [{"id": number, "image_id": image, "caption": caption} for number, image, caption in captions]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path


def drawbench(path, count=200):
    path.write_text("Prompts,Category\n" + "".join(f'"A thing, number {index}",Colors\n' for index in range(count)))
    return path


def test_scenes_need_nothing_and_never_share_noise():
    protocol = make_protocol("scenes", ProtocolOptions(prompts=12))
    assert len(protocol.items) == 12
    assert len({item.seed for item in protocol.items}) == 12
    assert protocol.metrics[0] == "attributes"


def test_scenes_that_are_judged_are_neither_tuned_on_nor_compared_with_themselves():
    protocol = make_protocol("scenes", ProtocolOptions())
    judged = {item.caption for item in protocol.items}
    assert len(judged & set(protocol.tuning)) <= 1  # the world is finite: the same words may be drawn twice
    assert next(iter(protocol.real.images())).shape == (64, 64, 3)


@pytest.fixture
def data(coco, tmp_path):
    """The data of the protocols that need some."""
    return {"coco2017": coco, "drawbench": drawbench(tmp_path / "drawbench.csv")}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_more_prompts_change_no_earlier_one(name, data):
    few, many = (make_protocol(name, ProtocolOptions(prompts=count, data=data.get(name))).items for count in (1, 2))
    assert many[: len(few)] == few and len(many) == 2 * len(few)


def test_a_coco_pair_is_an_image_and_its_first_caption(coco):
    protocol = make_protocol("coco2017", ProtocolOptions(data=coco))
    assert [item.caption for item in protocol.items] == ["the first caption", "another image"]
    wanted = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(coco.rglob("0000000000*.jpg")) if path.name.endswith(("09.jpg", "25.jpg"))]
    assert all((reference() == image).all() for reference, image in zip(protocol.references, wanted, strict=True))
    assert (protocol.sampling.width, protocol.sampling.height, protocol.sampling.steps) == (256, 256, 50)
    assert protocol.first == {"clip_i": 5000, "clip_t": 5000}


def test_cocos_real_images_are_squares_of_256_pixels(coco):
    assert [image.shape for image in make_protocol("coco2017", ProtocolOptions(data=coco)).real.images()] == [(256, 256, 3)] * 2


def test_a_number_of_pairs_can_be_asked_for(coco):
    protocol = make_protocol("coco2017", ProtocolOptions(data=coco, prompts=1))
    assert len(protocol.items) == 1
    assert len(list(protocol.real.images())) == 1


def test_drawbench_makes_four_images_of_each_of_its_200_prompts(tmp_path):
    protocol = make_protocol("drawbench", ProtocolOptions(data=drawbench(tmp_path / "drawbench.csv")))
    assert len(protocol.items) == 800
    assert [item.prompt for item in protocol.items[:5]] == [0, 0, 0, 0, 1]
    assert protocol.items[0].caption == "A thing, number 0"
    assert [item.seed for item in protocol.items] == list(range(800))


def test_a_file_of_prompts_is_a_protocol(tmp_path):
    (tmp_path / "mine.txt").write_text("a cat\n\na dog\n")
    protocol = make_protocol(str(tmp_path / "mine.txt"), ProtocolOptions(images_per_prompt=2, steps=3, guidance=2.0, seed=10, width=64, height=32))
    assert [(item.caption, item.seed) for item in protocol.items] == [("a cat", 10), ("a cat", 11), ("a dog", 12), ("a dog", 13)]
    assert (protocol.sampling.steps, protocol.sampling.guidance) == (3, 2.0)
    assert (protocol.sampling.width, protocol.sampling.height) == (64, 32)
    assert protocol.real is None


def test_captioned_images_are_prompts_and_references(tmp_path):
    for name in "ab":
        write_image(tmp_path / f"{name}.png")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "b.png")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{name}.png", "text": f"image {name}"}) + "\n" for name in "ab"))
    protocol = make_protocol(str(tmp_path), ProtocolOptions(images_per_prompt=2))
    wanted = [np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in "aabb"]
    assert all((reference() == image).all() for reference, image in zip(protocol.references, wanted, strict=True))
    assert not (wanted[1] == wanted[2]).all()
    assert np.asarray([image.shape for image in protocol.real.images()]).tolist() == [[30, 40, 3]] * 2


@pytest.mark.parametrize(
    ("name", "request_", "sentence"),
    [
        ("scene", ProtocolOptions(), "there is no protocol (or file of prompts, or folder of captioned images) 'scene'; did you mean 'scenes'?"),
        ("coco2017", ProtocolOptions(), "protocol 'coco2017' needs a folder with COCO 2017's"),
        ("drawbench", ProtocolOptions(), "protocol 'drawbench' needs DrawBench's table of 200 prompts"),
    ],
)
def test_what_is_missing_is_named(name, request_, sentence):
    with pytest.raises(UserError) as raised:
        make_protocol(name, request_)
    assert sentence in str(raised.value)


def test_a_table_that_is_not_drawbench_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(UserError, match="holds 7 prompts, DrawBench has 200"):
        make_protocol("drawbench", ProtocolOptions(data=drawbench(tmp_path / "few.csv", 7)))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is not DrawBench's table"):
        make_protocol("drawbench", ProtocolOptions(data=tmp_path / "other.csv"))


def test_a_coco_image_that_is_missing_is_named(coco):
    (coco / "train2017" / "000000000025.jpg").unlink()
    with pytest.raises(UserError, match=r"000000000025\.jpg is missing"):
        make_protocol("coco2017", ProtocolOptions(data=coco))


def test_data_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(UserError, match="--protocol-data .* does not exist"):
        make_protocol("coco2017", ProtocolOptions(data=tmp_path / "nowhere"))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_states_what_it_asked_of_all_methods(name, data):
    facts = make_protocol(name, ProtocolOptions(data=data.get(name))).facts()
    assert {"name", "prompts", "images", "steps", "guidance", "scheduler"} <= facts.keys()
