"""The table of metrics, their weights and their pixels: what is missing is said early, in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_models import clip_folder, dino_folder, images, resources
from PIL import Image
from transformers import CLIPImageProcessorPil, Dinov2Model

from afa.errors import UserError
from afa.files import sha256
from afa.metrics.base import ImageMetric, Memo
from afa.metrics.frechet import FrechetDistance
from afa.metrics.frechet import make_fd_dinov2 as make_dino
from afa.metrics.pixels import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, crop, pad, stretch, to_tensor
from afa.metrics.registry import METRICS, Resources, make_metric
from afa.metrics.weights import Part, find

FILE = Part("a test's weights", "weights.pth", url="https://example.org/weights.pth", sha256=("00ff",), also=("other.pth",))
FOLDER = Part("a test's model", "tiny-clip", hub="nobody/tiny-clip", folder=True)
OWN = ["attributes", "frechet", "near_attributes", "near_frechet", "near_probability"]  # their weights are shipped
ON_NO_HUB = ["fid", "kid", "inception_score", "lpips"]


@pytest.fixture(autouse=True)
def no_caches(tmp_path, monkeypatch):
    """As on a new machine, without a network."""
    import huggingface_hub.constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_no_two_metrics_share_what_is_kept_of_them():
    """Scores on disk are known by the metric's class and identity."""
    made = [make_metric(name, Resources(None, torch.device("cpu"))) for name in OWN]
    assert len({json.dumps([type(one).__qualname__, one.identity], sort_keys=True) for one in made}) == len(OWN)


def test_the_table_is_read_without_torch():
    code = "import sys; from afa.metrics.registry import METRICS; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


def test_an_unknown_metric_is_met_with_the_nearest_one():
    with pytest.raises(UserError, match="there is no metric 'clip-t'; did you mean 'clip_t'"):
        make_metric("clip-t", resources(None))


@pytest.mark.parametrize("name", [name for name in METRICS if name not in OWN])
def test_missing_weights_are_said_at_once_and_how_to_give_them(name):
    with pytest.raises(UserError) as raised:
        make_metric(name, resources(None))
    sentence = str(raised.value)
    assert sentence.startswith(f"metric '{name}' needs ")
    assert f"--metric-weights {name}=" in sentence
    assert ("download https://" in sentence) == (name in ON_NO_HUB)
    assert "\n" not in sentence


@pytest.mark.parametrize("name", OWN)
def test_the_embedded_worlds_metrics_bring_their_weights(name):
    metric = make_metric(name, resources(None))
    assert (metric.names[0] if isinstance(metric, ImageMetric) else metric.name) == name


@pytest.mark.parametrize("name", OWN)
def test_other_weights_than_the_shipped_ones_are_refused_not_ignored(name):
    with pytest.raises(UserError, match=f"metric '{name}' brings its own weights; leave out --metric-weights {name}=mine.pth"):
        make_metric(name, resources("mine.pth"))


@pytest.mark.parametrize("name", [name for name in METRICS if name not in OWN])
def test_a_place_that_does_not_exist_is_named(name):
    with pytest.raises(UserError, match=f"--metric-weights {name}=/nowhere/weights.pt: there is no such file or folder"):
        make_metric(name, resources("/nowhere/weights.pt"))


def test_every_metric_has_a_page():
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert [name for name in METRICS if f"| `{name}` | " not in page] == []


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.pth"
    torch.save({"a": torch.ones(2)}, path)
    return path


def test_a_file_is_taken_from_its_place_and_known_by_its_hash(file):
    (found,) = find("m", [FILE], str(file))
    assert found.path == file and found.hashes == {"mine.pth": sha256(file)}
    assert str(found) == f"a test's weights (mine.pth, sha256 {sha256(file)[:12]}, not 00ff as published)"


def test_a_folder_may_hold_several_parts_under_their_published_names(tmp_path, file):
    home = tmp_path / "home"
    clip_folder(home / "tiny-clip")
    file.rename(home / "other.pth")
    head, clip = find("m", [FILE, FOLDER], str(home))
    assert (head.path, clip.path) == (home / "other.pth", home / "tiny-clip")
    assert set(clip.hashes) == {"model.safetensors", "config.json"}


def test_several_places_are_given_in_order(tmp_path, file):
    clip_folder(tmp_path / "c")
    head, clip = find("m", [FILE, FOLDER], f"{file},{tmp_path / 'c'}")
    assert (head.path, clip.path) == (file, tmp_path / "c")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("{file},a/b,c/d", "names 3 places, 'm' needs 2"),
        ("{home}/empty", "holds none of weights.pth, tiny-clip"),
        ("{file},{file}", "is not a test's model: expected a folder of transformers, as tiny-clip"),
        ("{home}/empty,{home}", "is not a test's weights: expected a file, as weights.pth"),
        ("{file},nobody/there", "nobody/there is neither in the hub's cache nor can it be loaded (HF_HUB_OFFLINE is set)"),
        ("{file}", "nobody/tiny-clip is neither in the hub's cache nor can it be loaded (HF_HUB_OFFLINE is set)"),
    ],
)
def test_a_wrong_place_is_one_sentence(tmp_path, file, given, sentence):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as raised:
        find("m", [FILE, FOLDER], given.format(file=file, home=tmp_path))
    assert sentence in str(raised.value)


def test_a_file_that_another_package_downloaded_is_found(tmp_path, file):
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "other.pth"
    cached.parent.mkdir(parents=True)
    file.rename(cached)
    assert find("m", [FILE], None)[0].path == cached


def test_a_folder_in_the_hubs_cache_is_found_without_a_network(tmp_path):
    home = tmp_path / "hub" / "models--nobody--tiny-clip"
    clip_folder(home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    assert find("m", [FOLDER], None)[0].path == home / "snapshots" / ("0" * 40)


def test_a_file_in_the_hubs_cache_is_found_without_a_network(tmp_path, file):
    home = tmp_path / "hub" / "models--nobody--weights"
    (home / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    file.rename(home / "snapshots" / ("0" * 40) / "a+b.pth")
    assert find("m", [FILE], "nobody/weights/a+b.pth")[0].path.name == "a+b.pth"


def test_a_published_file_that_is_not_what_its_name_promises_is_damaged(tmp_path, file):
    named = file.rename(tmp_path / "net-0123abcd.pth")
    sentence = r"net-0123abcd.pth is damaged: by its name its sha256 begins with 0123abcd, it is \w{8}…; download it again"
    with pytest.raises(UserError, match=sentence):
        find("m", [Part("a net", "net-0123abcd.pth")], str(named))


def test_a_published_file_that_is_what_its_name_promises_is_taken(tmp_path, file):
    named = file.rename(tmp_path / f"net-{sha256(file)[:8]}.pth")
    assert find("m", [Part("a net", named.name)], str(named))[0].path == named


def test_a_file_of_ones_own_may_end_in_a_date(tmp_path, file):
    named = file.rename(tmp_path / "head-20260101.pth")
    assert find("m", [FILE], str(named))[0].path == named


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"PK nonsense", b"\x80\x04\x95garbage", b"<html>404</html>"])
def test_a_file_that_is_no_weights_is_said_to_be_none(tmp_path, content):
    bad = tmp_path / "weights.pth"
    bad.write_bytes(content)
    with pytest.raises(UserError, match=r"weights.pth is no file of weights that can be read|holds no tensors by name"):
        make_metric("fid", resources(bad))


class Touch:
    """A pickle that would leave a file behind if it were run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_nothing_but_tensors_is_unpickled(tmp_path):
    bad = tmp_path / "weights.pth"
    torch.save({"a": Touch(tmp_path / "was here")}, bad)
    with pytest.raises(UserError, match="is no file of weights that can be read"):
        make_metric("fid", resources(bad))
    assert not (tmp_path / "was here").exists()


def test_fd_dinov2_looks_at_the_class_token(tmp_path):
    shown, folder = images(3, side=40), dino_folder(tmp_path / "dino")
    pixels = to_tensor([stretch(image, 224) for image in shown], IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(folder).eval()(pixels).last_hidden_state[:, 0]
    metric = make_dino(resources(folder))
    assert isinstance(metric, FrechetDistance) and not metric.higher_is_better
    np.testing.assert_allclose(metric.features(shown), expected, rtol=1e-4, atol=1e-5)


def test_cmmd_looks_at_the_whole_image_on_the_unit_sphere(tmp_path):
    metric = make_metric("cmmd", resources(clip_folder(tmp_path / "clip")))
    shown = [np.concatenate([image, 255 - image], axis=1) for image in images(4)]  # twice as wide as high
    found = metric.features(shown)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(metric.features([stretch(image, 16) for image in shown]), found, atol=1e-5)
    real = metric.prepare(metric.features(images(5, seed=3)))
    assert metric.value(found, real) > 0


def test_rows_that_are_known_are_not_computed_again_and_the_oldest_are_forgotten():
    memo, asked = Memo(limit=3), []

    def compute(places):
        asked.append(places)
        return np.asarray([[place] for place in places], np.float32)

    assert memo.rows(["a", "b", "a"], compute)[:, 0].tolist() == [0, 1, 0]
    assert memo.rows(["b", "c", "d"], compute)[:, 0].tolist() == [1, 1, 2]
    memo.rows(["a"], compute)
    assert asked == [[0, 1], [1, 2], [0]]


@pytest.mark.parametrize("shape", [(24, 24), (40, 20), (20, 33), (16, 16), (9, 12)])
def test_the_crop_is_that_of_transformers(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = processor(Image.fromarray(image), return_tensors="pt").pixel_values
    torch.testing.assert_close(to_tensor([crop(image, 16)], CLIP_MEAN, CLIP_STD), expected, atol=1e-5, rtol=0)


def test_padding_keeps_the_whole_image_and_stretching_fills_the_square():
    image = np.full((10, 20, 3), 200, np.uint8)
    padded = pad(image, 8)
    assert (padded[2:6] == 200).all() and (padded[:2] == 0).all() and (padded[6:] == 0).all()
    assert (stretch(image, 8) == 200).all()
