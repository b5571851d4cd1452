"""The Inception network: layer by layer as published, resized as TensorFlow 1 did, its weights file read and checked."""

import hashlib

import numpy as np
import pytest
import torch
from metric_models import images, resources
from torch.nn import functional as F
from torchmetrics.image.kid import KernelInceptionDistance as PublishedKid

from afa.errors import UserError
from afa.metrics.inception import SIDE, WEIGHTS, Inception, resize
from afa.metrics.registry import make_metric

# Every convolution of the published file: outputs, inputs, height, width.
STEM = {
    "1a_3x3": (32, 3, 3, 3),
    "2a_3x3": (32, 32, 3, 3),
    "2b_3x3": (64, 32, 3, 3),
    "3b_1x1": (80, 64, 1, 1),
    "4a_3x3": (192, 80, 3, 3),
}


def mixed_5(inputs, pooled):
    return {
        "branch1x1": (64, inputs, 1, 1),
        "branch5x5_1": (48, inputs, 1, 1),
        "branch5x5_2": (64, 48, 5, 5),
        "branch3x3dbl_1": (64, inputs, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (pooled, inputs, 1, 1),
    }


def mixed_6(c):
    return {
        "branch1x1": (192, 768, 1, 1),
        "branch7x7_1": (c, 768, 1, 1),
        "branch7x7_2": (c, c, 1, 7),
        "branch7x7_3": (192, c, 7, 1),
        "branch7x7dbl_1": (c, 768, 1, 1),
        "branch7x7dbl_2": (c, c, 7, 1),
        "branch7x7dbl_3": (c, c, 1, 7),
        "branch7x7dbl_4": (c, c, 7, 1),
        "branch7x7dbl_5": (192, c, 1, 7),
        "branch_pool": (192, 768, 1, 1),
    }


def mixed_7(inputs):
    return {
        "branch1x1": (320, inputs, 1, 1),
        "branch3x3_1": (384, inputs, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (448, inputs, 1, 1),
        "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (192, inputs, 1, 1),
    }


MIXED = {
    "5b": mixed_5(192, 32),
    "5c": mixed_5(256, 64),
    "5d": mixed_5(288, 64),
    "6a": {
        "branch3x3": (384, 288, 3, 3),
        "branch3x3dbl_1": (64, 288, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    },
    "6b": mixed_6(128),
    "6c": mixed_6(160),
    "6d": mixed_6(160),
    "6e": mixed_6(192),
    "7a": {
        "branch3x3_1": (192, 768, 1, 1),
        "branch3x3_2": (320, 192, 3, 3),
        "branch7x7x3_1": (192, 768, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7),
        "branch7x7x3_3": (192, 192, 7, 1),
        "branch7x7x3_4": (192, 192, 3, 3),
    },
    "7b": mixed_7(1280),
    "7c": mixed_7(2048),
}
# Channels and side after every layer, pooling included, of a 299 px image.
MAPS = [(32, 149), (32, 147), (64, 147), (64, 73), (80, 73), (192, 71), (192, 35), (256, 35), (288, 35), (288, 35)]
MAPS += [(768, 17)] * 5 + [(1280, 8), (2048, 8), (2048, 8)]


@pytest.fixture(scope="module")
def network():
    """Random weights, norms of which do something; drawn small enough that nothing overflows."""
    torch.manual_seed(0)
    with torch.device("meta"):
        made = Inception()
    state = {}
    for name, tensor in made.state_dict().items():
        fan = tensor[0].numel() if tensor.ndim > 1 else 1
        values = torch.randn(tensor.shape) * (2 / fan) ** 0.5 if tensor.ndim > 1 else 0.1 * torch.randn(tensor.shape)
        state[name] = values.abs() + 0.9 if name.endswith(("bn.weight", "running_var")) else values
        if not tensor.is_floating_point():
            state[name] = torch.zeros((), dtype=tensor.dtype)
    made.load_state_dict(state, assign=True)
    return made.eval()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    """The network's weights, as they are published."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_parameters_have_the_published_names_and_shapes(network):
    convolutions = {f"Conv2d_{name}": shape for name, shape in STEM.items()}
    convolutions |= {f"Mixed_{block}.{name}": shape for block, units in MIXED.items() for name, shape in units.items()}
    expected = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in convolutions.items():
        expected |= {f"{name}.conv.weight": shape, f"{name}.bn.num_batches_tracked": ()}
        expected |= {f"{name}.bn.{kind}": shape[:1] for kind in ("weight", "bias", "running_mean", "running_var")}
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == expected
    assert len(expected) == 566


def test_it_has_as_many_parameters_as_published(network):
    """27,161,264 of torchvision's, less 3,326,696 of its auxiliary head, and eight classes more."""
    assert sum(parameter.numel() for parameter in network.parameters()) == 27_161_264 - 3_326_696 + 8 * 2049


def test_every_layer_has_the_published_size(network):
    hidden, found = torch.zeros(1, 3, SIDE, SIDE), []
    with torch.no_grad():
        for stage in network.stages():
            hidden = stage(hidden)
            found.append((hidden.shape[1], hidden.shape[2]))
    assert found == MAPS


def test_batch_norm_adds_a_thousandth(network):
    assert {module.eps for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.001}


@pytest.mark.parametrize("block", ["Mixed_5b", "Mixed_5d", "Mixed_6b", "Mixed_6e", "Mixed_7b"])
def test_average_pooling_does_not_count_the_padding(network, block):
    ones = torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(getattr(network, block).pool(ones), ones)


def test_the_last_block_pools_by_maximum_and_the_one_before_by_mean(network):
    peak = torch.zeros(1, 1, 8, 8)
    peak[0, 0, 4, 4] = 9
    assert network.Mixed_7c.pool(peak).max() == 9 and network.Mixed_7c.pool(peak).sum() == 81
    assert network.Mixed_7b.pool(peak).max() == 1


def by_hand(network, block, hidden, pooled):
    """One of the two 8×8 blocks, written out."""
    unit = lambda name, x: getattr(getattr(network, block), name)(x)  # noqa: E731
    three, double = unit("branch3x3_1", hidden), unit("branch3x3dbl_2", unit("branch3x3dbl_1", hidden))
    three = [unit("branch3x3_2a", three), unit("branch3x3_2b", three)]
    double = [unit("branch3x3dbl_3a", double), unit("branch3x3dbl_3b", double)]
    return torch.cat([unit("branch1x1", hidden), *three, *double, unit("branch_pool", pooled)], 1)


@torch.no_grad()
def test_branches_are_joined_in_the_published_order(network):
    hidden = torch.randn(1, 1280, 8, 8, generator=torch.Generator().manual_seed(0))
    pooled = F.avg_pool2d(hidden, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(network.Mixed_7b(hidden), by_hand(network, "Mixed_7b", hidden, pooled))
    hidden = torch.randn(1, 768, 17, 17, generator=torch.Generator().manual_seed(1))
    block = network.Mixed_7a
    chain = block.branch7x7x3_4(block.branch7x7x3_3(block.branch7x7x3_2(block.branch7x7x3_1(hidden))))
    expected = torch.cat([block.branch3x3_2(block.branch3x3_1(hidden)), chain, F.max_pool2d(hidden, 3, 2)], 1)
    torch.testing.assert_close(block(hidden), expected)


@torch.no_grad()
def test_a_unit_is_convolution_norm_and_relu(network):
    pixels, unit = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0)), network.Conv2d_1a_3x3
    norm = unit.bn
    hidden = F.conv2d(pixels, unit.conv.weight, stride=2)
    scaled = (hidden - norm.running_mean[:, None, None]) / (norm.running_var + 0.001).sqrt()[:, None, None]
    torch.testing.assert_close(unit(pixels), (scaled * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0))


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2), (7, 5), (5, 5), (1, 3)])
def test_resizing_takes_point_i_at_i_times_old_over_new(old, new):
    row = torch.arange(float(old)) ** 2
    expected = []
    for index in range(new):
        place = index * old / new
        low, high = int(place), min(int(place) + 1, old - 1)
        expected.append(row[low] + (row[high] - row[low]) * (place - low))
    pixels = row.reshape(1, 1, 1, old) + 100 * row.reshape(1, 1, old, 1)
    found = resize(pixels, new)
    torch.testing.assert_close(found[0, 0, 0], torch.stack(expected))
    torch.testing.assert_close(found[0, 0, :, 0], 100 * torch.stack(expected))


def test_pixels_enter_between_minus_one_and_one(network, monkeypatch):
    seen = []
    monkeypatch.setattr(network, "stages", lambda: [lambda hidden: seen.append(hidden) or hidden])
    network(torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(1, 1, 3, 1))
    assert (seen[0].min(), seen[0].max()) == (-1, 127 / 128)


def test_the_three_metrics_share_one_network_and_its_features(file):
    fid, kid, score = (make_metric(name, resources(file)) for name in ("fid", "kid", "inception_score"))
    assert fid.extract is kid.extract is score.extract
    assert fid.identity == kid.identity == score.identity
    assert fid.identity["weights"] == [hashlib.sha256(file.read_bytes()).hexdigest()]
    assert not fid.higher_is_better and not kid.higher_is_better and score.higher_is_better
    assert not score.needs_reference


def test_features_are_those_of_the_network_whatever_the_batch(file, network):
    shown = [*images(1, side=31), *images(1, side=40)]  # of different sizes
    with torch.no_grad():
        expected = torch.cat([network(torch.from_numpy(image).permute(2, 0, 1)[None]) for image in shown])
    found = make_metric("fid", resources(file, batch_size=2)).features(shown)
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_score_is_of_the_classifier_without_its_bias(file, network):
    metric = make_metric("inception_score", resources(file))
    features = np.abs(np.random.default_rng(0).normal(size=(6, 2048)))
    odds = torch.softmax(torch.from_numpy(features) @ network.fc.weight.double().T, 1)
    expected = (odds * (odds.log() - odds.mean(0).log())).sum(1).mean().exp()
    assert metric.value(features, None) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.filterwarnings("ignore:.*large memory footprint")
def test_the_network_serves_torchmetrics(file, network):
    shown = images(2, side=31)
    pixels = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)
    published = PublishedKid(feature=network, subsets=1, subset_size=2)
    with torch.no_grad():
        published.update(pixels, real=True)
    published.fake_features.append(3 * published.real_features[0])
    metric = make_metric("kid", resources(file))
    features = metric.features(shown)
    assert metric.value(3 * features, metric.prepare(features)) == pytest.approx(published.compute()[0].item(), rel=1e-3)


def test_a_file_that_lacks_weights_is_named_at_once(tmp_path, network):
    bad = tmp_path / "inception.pth"
    torch.save({name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc")}, bad)
    with pytest.raises(UserError, match=r"inception.pth lacks 2 of 566 weights \(first: fc.weight\)"):
        make_metric("fid", resources(bad))


def test_the_published_file_is_known_by_its_hash():
    assert WEIGHTS.name.removesuffix(".pth").endswith(WEIGHTS.sha256[0][:8])
