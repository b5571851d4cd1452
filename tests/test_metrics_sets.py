"""Metrics of whole sets: closed forms, the published implementation on the same features, and prompts drawn again."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore as PublishedScore
from torchmetrics.image.kid import KernelInceptionDistance as PublishedKid
from torchmetrics.image.kid import poly_mmd

from afa.metrics import frechet, mmd
from afa.metrics.base import SetMetric
from afa.metrics.frechet import (
    FrechetDistance,
    exact_replicates,
    frechet_distance,
    linear_replicates,
    moments,
)
from afa.metrics.inception import InceptionScore
from afa.metrics.mmd import ClipDiscrepancy, KernelInceptionDistance, gaussian

CPU = torch.device("cpu")


class Pixels(torch.nn.Module):
    """A feature extractor: what is shown to it, flattened."""

    num_features = 12

    def forward(self, images):
        return images.flatten(1).double() / 100


class Plain(FrechetDistance):
    """A Fréchet distance on features that are given."""

    name = "plain"
    identity = {}  # noqa: RUF012

    def features(self, images):
        return np.stack([image.ravel() for image in images])


class Given:
    """Stands where the networks stand: features are given, and the classifier leaves them as they are."""

    source, identity = "features that are given", {}

    def logits(self, features):
        return np.asarray(features, np.float64)


def kid():
    return KernelInceptionDistance(Given(), 2, CPU)


def cmmd():
    return ClipDiscrepancy(Given(), Given(), 2, CPU)


def inception_score():
    return InceptionScore(Given(), 2)


METRICS = {"frechet": Plain, "kid": kid, "cmmd": cmmd, "inception_score": inception_score}
COMPARING = ["frechet", "kid", "cmmd"]


def draw(n, width=6, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, width)) * np.linspace(0.5, 1.5, width) + shift


def gaussian_features(mean, covariance, n=60, seed=0):
    """Features whose mean and covariance are exactly these."""
    raw = np.random.default_rng(seed).normal(size=(n, len(mean)))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_fid_of_shifted_gaussians_is_the_squared_shift():
    covariance = np.cov(draw(50, 4, seed=3).T)
    shift = np.array([1.0, -2.0, 0.5, 0.0])
    one, other = gaussian_features(np.zeros(4), covariance), gaussian_features(shift, covariance, n=90, seed=1)
    assert frechet_distance(one, moments(other)) == pytest.approx(5.25, abs=1e-9)


def test_fid_of_scaled_gaussians_is_the_squared_difference_of_deviations():
    variances, others = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    one, other = gaussian_features(np.zeros(3), np.diag(variances)), gaussian_features(np.zeros(3), np.diag(others), seed=1)
    assert frechet_distance(one, moments(other)) == pytest.approx(1 + 0 + 4, abs=1e-9)


@pytest.mark.parametrize(("n", "width"), [(40, 6), (5, 30), (20, 20)])
def test_identical_sets_are_at_distance_zero(n, width):
    features = draw(n, width)
    assert frechet_distance(features, moments(features)) == pytest.approx(0, abs=1e-9)
    assert cmmd().value(features, cmmd().prepare(features)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", COMPARING)
def test_distances_are_symmetric(name):
    metric = METRICS[name]()
    one, other = draw(30), draw(45, seed=1, shift=0.3)
    assert metric.value(one, metric.prepare(other)) == pytest.approx(metric.value(other, metric.prepare(one)), rel=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_order_does_not_matter(name):
    metric = METRICS[name]()
    features, real = draw(30), draw(40, seed=1)
    turned = np.random.default_rng(2).permutation(30)
    assert metric.value(features[turned], metric.prepare(real[::-1])) == pytest.approx(
        metric.value(features, metric.prepare(real)), rel=1e-9
    )


@pytest.mark.parametrize("name", COMPARING)
def test_distances_grow_with_the_shift(name):
    metric = METRICS[name]()
    real = metric.prepare(draw(60))
    found = [metric.value(draw(60, seed=1, shift=shift), real) for shift in (0, 0.5, 1, 2)]
    assert found == sorted(found)


@pytest.mark.parametrize("name", COMPARING)
def test_a_single_image_has_no_distribution(name):
    metric = METRICS[name]()
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        metric.value(draw(1), metric.prepare(draw(10)))


def shown(n, seed):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, 2, 2), dtype=np.uint8))


def test_fid_agrees_with_torchmetrics():
    real, made = shown(50, 0), shown(40, 1) // 2
    published = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    published.update(real, real=True)
    published.update(made, real=False)
    own = frechet_distance(Pixels()(made).numpy(), moments(Pixels()(real).numpy()))
    assert own == pytest.approx(published.compute().item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*large memory footprint")
def test_kid_agrees_with_torchmetrics():
    real, made = shown(30, 0), shown(30, 1) // 2
    published = PublishedKid(feature=Pixels(), subsets=2, subset_size=30)  # subsets that are the whole
    published.update(real, real=True)
    published.update(made, real=False)
    own = kid().value(Pixels()(made).numpy(), kid().prepare(Pixels()(real).numpy()))
    assert own == pytest.approx(published.compute()[0].item(), rel=1e-6)


def test_the_mean_over_random_subsets_tends_to_the_kid_of_all_pairs():
    rng = np.random.default_rng(0)
    real, made = draw(60), draw(60, seed=1, shift=0.2)
    parts = [poly_mmd(*(torch.from_numpy(each[rng.permutation(60)[:20]]) for each in (real, made))).item() for _ in range(600)]
    own = kid().value(made, kid().prepare(real))
    assert own == pytest.approx(np.mean(parts), abs=4 * np.std(parts) / np.sqrt(600))


@pytest.mark.filterwarnings("ignore:.*large memory footprint")
def test_the_inception_score_agrees_with_torchmetrics():
    made = shown(40, 1)
    published = PublishedScore(feature=Pixels(), splits=1)
    published.update(made)
    with pytest.warns(UserWarning, match="degrees of freedom"):
        expected = published.compute()[0].item()
    assert inception_score().value(Pixels()(made).numpy(), None) == pytest.approx(expected, rel=1e-6)


def test_kid_of_one_distribution_is_zero_on_average():
    found = [kid().value(draw(20, 4, seed=k), kid().prepare(draw(30, 4, seed=1000 + k))) for k in range(200)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(200)
    assert min(found) < 0  # as an unbiased estimate of zero must be


def test_kid_of_two_pairs_by_hand():
    """k(x, y) = (x·y / 2 + 1)³ of (1, 1), (1, -1) against (0, 0), (2, 0)."""
    made, real = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[0.0, 0.0], [2.0, 0.0]])
    within, other, across = 1.0, 1.0, (1 + 8 + 1 + 8) / 4
    assert kid().value(made, kid().prepare(real)) == pytest.approx(within + other - 2 * across)


def test_cmmd_of_two_points_by_hand():
    """Single points counted twice: 1000 · (1 + 1 - 2 exp(-|x - y|² / 200))."""
    made, real = np.array([[1.0, 0.0]] * 2), np.array([[0.0, 1.0]] * 2)
    assert cmmd().value(made, cmmd().prepare(real)) == pytest.approx(2000 * (1 - np.exp(-0.01)))
    assert gaussian(*(torch.tensor([each]) for each in ([0.0, 3.0], [4.0, 0.0])))[0, 0] == pytest.approx(np.exp(-25 / 200))


def test_the_inception_score_of_certain_and_even_answers_is_the_number_of_classes():
    certain = np.tile(50.0 * np.eye(7), (3, 1))
    assert inception_score().value(certain, None) == pytest.approx(7, rel=1e-9)


def test_the_inception_score_of_identical_images_is_one():
    assert inception_score().value(np.tile(draw(1, 9), (12, 1)), None) == pytest.approx(1, abs=1e-12)


def test_the_inception_score_survives_certainty_without_a_bound():
    assert inception_score().value(np.array([[0.0, -1e4], [-1e4, 0.0]]), None) == pytest.approx(2)


def resampled(n=30, per_prompt=3, draws=8, width=6, seed=5):
    """Features of several images a prompt, mixed up, and prompts drawn again."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(n // per_prompt), per_prompt))
    return draw(n, width, seed), groups, rng.integers(n // per_prompt, size=(draws, n // per_prompt))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(("n", "width"), [(30, 6), (12, 40)])
def test_fast_replicates_are_values_of_the_images_drawn(name, n, width):
    metric = METRICS[name]()
    features, groups, draws = resampled(n, width=width)
    real = metric.prepare(draw(25, width, seed=1, shift=0.2))
    expected = SetMetric.replicates(metric, features, groups, real, draws)
    np.testing.assert_allclose(metric.replicates(features, groups, real, draws), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_drawing_every_prompt_once_is_the_value(name):
    metric = METRICS[name]()
    features, groups, _ = resampled()
    real = metric.prepare(draw(25, seed=1))
    found = metric.replicates(features, groups, real, np.random.default_rng(0).permutation(10)[None])
    assert found == pytest.approx([metric.value(features, real)], rel=1e-7)


def test_a_prompt_without_images_adds_nothing():
    features, groups, draws = resampled()
    there = groups != 4
    for name in METRICS:
        metric = METRICS[name]()
        real = metric.prepare(draw(25, seed=1))
        expected = SetMetric.replicates(metric, features[there], groups[there], real, draws)
        np.testing.assert_allclose(metric.replicates(features[there], groups[there], real, draws), expected, rtol=1e-6)


def test_linear_replicates_of_many_images_are_nearly_the_exact_ones():
    features, real = draw(600, 4), moments(draw(500, 4, seed=1, shift=0.5))
    groups = np.arange(600)
    draws = np.random.default_rng(3).integers(600, size=(200, 600))
    exact, linear = (function(features, groups, real, draws) for function in (exact_replicates, linear_replicates))
    assert np.corrcoef(exact, linear)[0, 1] > 0.99
    assert linear.std() == pytest.approx(exact.std(), rel=0.05)


def test_with_few_images_linear_replicates_spread_as_other_images_would():
    real = moments(draw(400, 20, seed=1))
    other = np.std([frechet_distance(draw(20, 20, seed=100 + k), real) for k in range(100)])
    groups, draws = np.arange(20), np.random.default_rng(3).integers(20, size=(200, 20))
    exact, linear = (
        np.mean([function(draw(20, 20, seed=500 + k), groups, real, draws).std() for k in range(4)])
        for function in (exact_replicates, linear_replicates)
    )
    assert other < linear < exact


@pytest.mark.parametrize("name", ["kid", "cmmd"])
def test_linear_replicates_of_discrepancies_are_nearly_the_exact_ones(name, monkeypatch):
    metric = METRICS[name]()
    features, real = draw(400, 4), metric.prepare(draw(300, 4, seed=1, shift=0.7))
    draws = np.random.default_rng(3).integers(400, size=(200, 400))
    exact = metric.replicates(features, np.arange(400), real, draws)
    monkeypatch.setattr(mmd, "EXACT_UP_TO", 399)
    linear = metric.replicates(features, np.arange(400), real, draws)
    assert np.corrcoef(exact, linear)[0, 1] > 0.97
    assert linear.std() == pytest.approx(exact.std(), rel=0.1)  # influences are measured against every second image


def test_blocks_do_not_change_anything(monkeypatch):
    features, real = draw(40), draw(50, seed=1)
    whole = [Plain().value(features, Plain().prepare(real)), kid().value(features, kid().prepare(real))]
    monkeypatch.setattr(mmd, "BLOCK", 300)
    monkeypatch.setattr(frechet, "BLOCK", 7)
    assert [Plain().value(features, Plain().prepare(real)), kid().value(features, kid().prepare(real))] == pytest.approx(
        whole, rel=1e-9
    )


def test_kernels_are_computed_where_there_is_double_precision():
    assert [mmd.double_device(torch.device(name)).type for name in ("cpu", "cuda", "mps")] == ["cpu", "cuda", "cpu"]


def test_features_in_single_precision_are_computed_with_in_double():
    features, real = draw(40) + 1000, draw(50, seed=1) + 1000  # far from zero, where single precision would cancel
    exact = frechet_distance(features.astype(np.float32).astype(np.float64), moments(real.astype(np.float32).astype(np.float64)))
    assert frechet_distance(features.astype(np.float32), moments(real.astype(np.float32))) == pytest.approx(exact, rel=1e-9)
