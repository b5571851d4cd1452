"""LPIPS diversity: torchvision's and LPIPS's own files, the published formula, and the groups it is a mean over."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
from metric_models import images, pictures, resources
from torch.nn import functional as F
from torchmetrics.functional.image.lpips import NetLinLayer, ScalingLayer, _normalize_tensor, _spatial_average

from afa.errors import UserError
from afa.metrics.base import Picture
from afa.metrics.registry import make_metric

PUBLISHED = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"  # the linear weights themselves
# torchvision's features: place of a convolution -> its weight's shape and stride; relu follows each, pooling stands between.
ALEXNET = {0: (64, 3, 11, 4), 3: (192, 64, 5, 1), 6: (384, 192, 3, 1), 8: (256, 384, 3, 1), 10: (256, 256, 3, 1)}
VGG16 = {
    0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256),
    17: (512, 256), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip
VGG_POOLS, VGG_TAPS = (4, 9, 16, 23), (2, 7, 14, 21, 28)


def trunk(kind):
    """A file as torchvision publishes it, classifier and all, with random weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        {k: (a, b, size, size) for k, (a, b, size, _) in ALEXNET.items()}
        if kind == "alex"
        else {k: (*ab, 3, 3) for k, ab in VGG16.items()}
    )
    tensors = {"classifier.1.weight": torch.ones(2, 2)}
    for place, shape in shapes.items():
        fan = shape[1] * shape[2] * shape[3]
        tensors[f"features.{place}.weight"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        tensors[f"features.{place}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return tensors


def maps(kind, tensors, pixels):
    """What LPIPS looks at, layer by layer as torchvision lists them."""
    found, hidden = [], ScalingLayer()(pixels)

    def run(place, x, **how):
        return F.conv2d(x, tensors[f"features.{place}.weight"], tensors[f"features.{place}.bias"], **how).relu()

    if kind == "alex":
        for place, (_, _, size, stride) in ALEXNET.items():
            if place in (3, 6):
                hidden = F.max_pool2d(hidden, 3, 2)
            hidden = run(place, hidden, stride=stride, padding=2 if size > 3 else 1)
            found.append(hidden)
        return found
    for place in range(29):
        if place in VGG_POOLS:
            hidden = F.max_pool2d(hidden, 2, 2)
        if place in VGG16:
            hidden = run(place, hidden, padding=1)
            found += [hidden] if place in VGG_TAPS else []
    return found


def published(kind, tensors, one, other):
    """The distance from torchmetrics' parts and the published linear weights."""
    linear = torch.load(PUBLISHED / f"{kind}.pth", map_location="cpu", weights_only=True)
    pixels = torch.from_numpy(np.stack([one, other])).permute(0, 3, 1, 2) / 127.5 - 1
    total = 0.0
    for index, seen in enumerate(maps(kind, tensors, pixels)):
        unit = _normalize_tensor(seen)
        layer = NetLinLayer(seen.shape[1], use_dropout=True).eval()
        layer.load_state_dict({"model.1.weight": linear[f"lin{index}.model.1.weight"]})
        total += _spatial_average(layer((unit[:1] - unit[1:]) ** 2)).item()
    return total


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The two files of each kind; names without a hash, as the weights are random."""
    home = tmp_path_factory.mktemp("lpips")
    for kind in ("alex", "vgg"):
        torch.save(trunk(kind), home / f"{kind}net.pth")
    return {kind: f"{home / f'{kind}net.pth'},{PUBLISHED / f'{kind}.pth'}" for kind in ("alex", "vgg")}


@pytest.mark.parametrize("kind", ["alex", "vgg"])
@torch.no_grad()
def test_the_distance_is_the_published_one(kind, folders):
    one, other = images(2, side=40)
    found = make_metric("lpips", resources(folders[kind])).score([Picture(one, "a", 0), Picture(other, "a", 0)])["lpips"]
    expected = published(kind, trunk(kind), one, other)
    assert expected > 0.01
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-4)


def test_an_images_value_is_its_mean_distance_to_the_others_of_its_prompt(folders):
    shown = pictures(6, per_prompt=3, side=40)
    metric = make_metric("lpips", resources(folders["alex"]))
    pair = lambda a, b: metric.score([Picture(shown[k].image, "a", 0) for k in (a, b)])["lpips"][0]  # noqa: E731
    expected = [np.mean([pair(k, other) for other in range(k // 3 * 3, k // 3 * 3 + 3) if other != k]) for k in range(6)]
    np.testing.assert_allclose(metric.score(shown)["lpips"], expected, rtol=1e-5)


def test_equal_images_are_not_diverse(folders):
    shown = [Picture(images(1, side=40)[0], "a", 0)] * 3
    assert make_metric("lpips", resources(folders["alex"])).score(shown)["lpips"] == pytest.approx(0, abs=1e-9)


def test_neither_batch_size_nor_order_matters(folders):
    shown = pictures(6, per_prompt=2, side=40)
    whole, single = (make_metric("lpips", resources(folders["alex"], size)).score(shown)["lpips"] for size in (6, 1))
    np.testing.assert_allclose(single, whole, rtol=1e-4)
    turned = make_metric("lpips", resources(folders["alex"])).score(shown[::-1])["lpips"]
    np.testing.assert_allclose(turned[::-1], whole, rtol=1e-4)


def test_a_prompt_with_one_image_is_refused(folders):
    with pytest.raises(UserError, match="'caption number 1' has only one; ask for --images-per-prompt 2 or more"):
        make_metric("lpips", resources(folders["alex"])).score(pictures(3, per_prompt=2, side=40))


def test_images_of_one_prompt_in_two_sizes_are_refused(folders):
    shown = [Picture(images(1, side=side)[0], "a", 0) for side in (40, 48)]
    with pytest.raises(UserError, match="have 2 sizes"):
        make_metric("lpips", resources(folders["alex"])).score(shown)


def test_linear_weights_of_another_classifier_are_refused(folders):
    mixed = f"{folders['alex'].split(',')[0]},{PUBLISHED / 'vgg.pth'}"
    with pytest.raises(UserError, match=r"vgg.pth: lin1.model.1.weight has shape \(1, 128, 1, 1\)"):
        make_metric("lpips", resources(mixed))


def test_the_source_names_the_hashes(folders):
    source = make_metric("lpips", resources(folders["alex"])).source
    assert "alex.pth, sha256 df73285e35b2)" in source  # the published file
    assert "not 7be5be791159 or 397923af as published" in source  # the random one
