"""The formulas of the sampling-time methods, on cases that can be worked out by hand."""

import math

import pytest
import torch

from afa.denoiser.schedule import Schedule, noise_of
from afa.sampling.average import average
from afa.sampling.loratorio import blend, patch_weights, similarities
from afa.sampling.magicfusion import pick, saliency, winners
from afa.sampling.superdiff import (
    SdeStep,
    and_shares,
    and_velocity,
    log_density_change,
    or_shares,
    or_velocity,
    published_change,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(*rows):
    """A 4×4 map as (1, 1, 1, 4, 4): one image, one expert, one channel."""
    return torch.tensor(rows, dtype=torch.float64).view(1, 1, 1, 4, 4)


CORNER = one([16, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0])
# The 4×4 mean with padding 1 makes 3×3: [[1, 1, 0], [1, 1, 0], [0, 0, 0]]; brought back to 4, every line [1, 1, 0] is this:
LINE = torch.tensor([1, 1, 0.625, 0], dtype=torch.float64)


class TestLoratorio:
    """Two experts on a 4×4 map in patches of 2; the base predicts 1 everywhere."""

    # Along the base, against it, at a right angle (cosine 0), and at 1 / √2 to it.
    FIRST = one([2, 2, -3, -3], [2, 2, -3, -3], [1, -1, 1, 1], [1, -1, 0, 0])
    SECOND = one(*[[5, 5, 5, 5]] * 4)
    BASE = torch.ones(1, 1, 4, 4, dtype=torch.float64)

    def test_similarity_is_the_cosine_of_a_patch(self):
        found = similarities(torch.cat([self.FIRST, self.SECOND], dim=1), self.BASE, 2)
        first, second = torch.tensor([[1, -1], [0, 0.5**0.5]], dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
        assert torch.allclose(found, torch.stack([first, second])[None])

    def test_who_departs_from_the_base_weighs_more(self):
        weights = patch_weights(torch.cat([self.FIRST, self.SECOND], dim=1), self.BASE, 2, temperature=0.5)
        ahead = lambda cosine: 1 / (1 + math.exp((cosine - 1) / 0.5))  # noqa: E731
        rows = [[ahead(1)] * 2 + [ahead(-1)] * 2] * 2 + [[ahead(0)] * 2 + [ahead(0.5**0.5)] * 2] * 2
        assert torch.allclose(weights[0, 0], torch.tensor(rows, dtype=torch.float64))
        assert torch.allclose(weights.sum(1), torch.ones((), dtype=torch.float64)) and ahead(-1) > 0.98

    def test_patches_at_the_edge_may_be_smaller(self):
        predictions, base = random(2, 3, 4, 5, 7), random(2, 4, 5, 7, seed=1)
        found = patch_weights(predictions, base, 3, 0.1)
        alone = torch.cosine_similarity(predictions[:, :, :, 3:, 6:].flatten(2), base[:, None, :, 3:, 6:].flatten(2), dim=2)
        assert found.shape == (2, 3, 5, 7)
        assert torch.allclose(found[:, :, 4, 6], torch.softmax(-alone / 0.1, dim=1))

    def test_the_blend_takes_every_pixel_by_its_weights(self):
        predictions, weights = random(2, 3, 4, 2, 2), random(2, 3, 2, 2, seed=1).softmax(1)
        assert torch.allclose(blend(predictions, weights), torch.einsum("bnchw,bnhw->bchw", predictions, weights))


class TestAverage:
    def test_a_4x4_case_by_hand(self):
        first, second = one(*[[4, 0, 0, 0]] * 4), one(*[[0, 0, 0, 8]] * 4)
        expected = one(*[[3, 0, 0, 2]] * 4)[:, 0]
        assert torch.equal(average(torch.cat([first, second], dim=1), torch.tensor([0.75, 0.25])), expected)

    def test_every_image_may_have_its_own_weights(self):
        predictions = random(2, 3, 1, 4, 4)
        weights = torch.tensor([[0, 0, 1.0], [0.5, 0.5, 0]])
        got = average(predictions, weights)
        assert torch.allclose(got[0], predictions[0, 2]) and torch.allclose(got[1], predictions[1, :2].mean(0))

    def test_equal_predictions_stay_what_they_are_bit_for_bit(self):
        predictions = random(2, 1, 4, 4, 4).float().expand(-1, 3, -1, -1, -1)
        assert torch.equal(average(predictions, torch.full((3,), 1 / 3)), predictions[:, 0])


class TestNoise:
    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
    def test_every_prediction_type_names_the_same_noise(self, kind):
        clean, noise, s = random(1, 4, 4, 4), random(1, 4, 4, 4, seed=1), 0.3
        a = 1 - s if kind == "flow" else math.sqrt(1 - s**2)
        said = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean, "flow": noise - clean}
        assert torch.allclose(noise_of(kind, said[kind], a * clean + s * noise, a, s), noise)

    def test_alphas_between_timesteps_are_interpolated(self):
        schedule = Schedule("epsilon", 3, torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
        signal, noise = schedule.at(torch.tensor([0, 0.5, 2, 7]))
        assert (signal**2).tolist() == pytest.approx([0.9, 0.7, 0.1, 0.1]) and torch.allclose(signal**2 + noise**2, torch.ones(4).double())


class TestSaliency:
    def test_a_4x4_case_by_hand(self):
        got = saliency(CORNER, torch.zeros_like(CORNER), guidance=3.0)
        assert torch.allclose(got[0, 0], 3 * LINE[:, None] * LINE)

    def test_it_is_the_mean_over_channels_of_absolute_differences(self):
        reference = random(1, 1, 1, 4, 4)
        conditional = torch.cat([reference + CORNER, reference - CORNER, reference], dim=2)
        got = saliency(conditional, reference.expand(-1, -1, 3, -1, -1), guidance=1.0)
        assert torch.allclose(got[0, 0], 2 / 3 * LINE[:, None] * LINE)

    @pytest.mark.parametrize("size", [(4, 4), (5, 7), (2, 3), (64, 48)])
    def test_any_size_is_kept(self, size):
        assert saliency(random(2, 3, 4, *size), random(2, 1, 4, *size), 2.0).shape == (2, 3, *size)

    def test_each_wins_where_its_share_of_all_its_saliency_is_larger(self):
        """Softmax over positions: by hand for 2 positions, P = (e^a, e^b) / (e^a + e^b)."""
        general = torch.tensor([[[[5.0, 5.0]]]])  # P = 1/2, 1/2 although its saliency is larger everywhere
        expert = torch.tensor([[[[2.0, 0.0]]]])  # P = .88, .12
        both = torch.cat([general, expert], dim=1)
        assert winners(both, torch.tensor([1.0, 1.0])).tolist() == [[[1, 0]]]
        assert winners(both, torch.tensor([1.0, 0.0])).tolist() == [[[0, 0]]]  # a tie: the first

    def test_of_three_the_largest_wins(self):
        maps = torch.eye(3).view(1, 3, 1, 3)
        assert winners(maps, torch.ones(3)).tolist() == [[[0, 1, 2]]]

    def test_every_pixel_comes_from_its_winner(self):
        predictions, winner = random(1, 3, 2, 1, 3), torch.tensor([[[2, 0, 1]]])
        expected = torch.stack([predictions[0, 2, :, 0, 0], predictions[0, 0, :, 0, 1], predictions[0, 1, :, 0, 2]], dim=-1)
        assert torch.equal(pick(predictions, winner), expected.view(1, 2, 1, 3))


def a_step(experts=3, guidance=4.0, sigma=2.0, dsigma=-0.25, seed=0):
    unconditional, conditional = (random(2, experts, 1, 4, 4, seed=seed + k) for k in (0, 1))
    return SdeStep(unconditional, conditional, guidance, sigma, dsigma, random(2, 1, 4, 4, seed=seed + 2), 50)


def inner(one, other):
    return (one * other).flatten(1).sum(-1)


class TestSuperposition:
    def test_the_increment_by_hand(self):
        step = a_step(sigma=2.0, dsigma=-0.25)
        assert torch.allclose(step.increment(torch.ones(2, 1, 4, 4)), -0.5 + step.noise)  # √(2 · 0.25 · 2) = 1

    def test_the_change_of_a_log_density_by_hand(self):
        velocities, increment = torch.full((1, 1, 1, 4, 4), 2.0), torch.full((1, 1, 4, 4), -3.0)
        assert log_density_change(velocities, increment, 2.0, -0.5).item() == 16 * -(2 * (-3 + 0.5 * 2)) / 2
        assert published_change(velocities, increment, 2.0, -0.5).item() == 16 * -(2 * (-3 - 0.5 * 2)) / 2

    def test_the_estimated_density_of_a_gaussian_is_its_density(self):
        """Data N(m, 1) have density N(m, 1 + sigma²) and ε = sigma (x - m) / (1 + sigma²); any path will do."""
        generator = torch.Generator().manual_seed(0)
        means, count = torch.tensor([-1.0, 2.0]).double().view(1, 2, 1, 1, 1), 2_000
        sigmas = torch.linspace(5, 0.5, 501).double()
        log_density = lambda x, sigma: -((x[:, None] - means) ** 2 / (2 * (1 + sigma**2))).flatten(2).sum(-1) - math.log(1 + sigma**2) / 2  # noqa: E731
        x = 5 * torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)
        estimated, begun = torch.zeros(count, 2), log_density(x, 5.0)
        for sigma, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            velocities = sigma * (x[:, None] - means) / (1 + sigma**2)
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            step = SdeStep(velocities, velocities, 1.0, sigma, after - sigma, noise, 500)
            increment = step.increment(velocities.mean(1))
            estimated = estimated + log_density_change(velocities, increment, sigma, after - sigma)
            x = x + increment
        error = estimated - (log_density(x, 0.5) - begun)
        assert error.mean().abs() < 0.02 and error.std() < 0.15  # of steps; with dsigma for |dsigma| the mean is 4.8

    def test_or_shares_are_the_posterior_of_a_mixture(self):
        shares = or_shares(torch.tensor([[0.0, math.log(3)]]), torch.tensor([0.5, 0.5]).log(), 1.0)
        assert shares.tolist() == [pytest.approx([0.25, 0.75])]
        assert or_shares(torch.tensor([[0.0, 9.0]]), torch.tensor([0.5, 0.5]).log(), 0.0).tolist() == [[0.5, 0.5]]
        assert or_shares(torch.zeros(1, 2), torch.tensor([0.2, 0.8]).log(), 1.0).tolist() == [pytest.approx([0.2, 0.8])]

    def test_a_share_of_one_goes_that_experts_guided_way(self):
        step = a_step()
        guided = step.unconditional[:, 1] + 4.0 * (step.conditional[:, 1] - step.unconditional[:, 1])
        assert torch.allclose(or_velocity(step, torch.tensor([[0, 1.0, 0]] * 2)), guided)

    def test_two_experts_with_one_unconditional_share_as_published(self):
        drawn, lift = a_step(experts=2), 3.0
        step = SdeStep(drawn.unconditional[:, :1].expand(-1, 2, -1, -1, -1), *list(vars(drawn).values())[1:])
        base, a, b = step.unconditional[:, 0], step.conditional[:, 0], step.conditional[:, 1]
        alone = 2 * step.dsigma * (base + step.guidance * (b - base)) + math.sqrt(2 * 0.25 * 2.0) * step.noise
        kappa = 0.25 * inner(b - a, b + a) - inner(alone, a - b) + step.sigma * lift / 50
        kappa = kappa / (2 * step.dsigma * step.guidance * inner(a - b, a - b))
        assert torch.allclose(and_shares(step, lift), torch.stack([kappa, 1 - kappa], dim=1))
        published = base + step.guidance * ((b - base) + kappa.view(-1, 1, 1, 1) * (a - b))
        assert torch.allclose(and_velocity(step, and_shares(step, lift)), published)

    @pytest.mark.parametrize("experts", [2, 3, 5])
    def test_all_experts_find_the_and_increment_equally_likely(self, experts):
        step = a_step(experts)
        for lift in (0.0, 7.0):
            increment = step.increment(and_velocity(step, and_shares(step, lift)))
            change = log_density_change(step.conditional, increment, step.sigma, step.dsigma)
            assert torch.allclose(change[:, -1:] - change[:, :-1], torch.full((2, experts - 1), lift / 50).double(), atol=1e-6)

    @pytest.mark.parametrize("experts", [1, 2, 3])
    def test_equal_experts_are_one_whatever_their_shares(self, experts):
        single = a_step(1)
        step = SdeStep(*(part.expand(-1, experts, -1, -1, -1) for part in (single.unconditional, single.conditional)), *list(vars(single).values())[2:])
        for lift in (0.0, 2.0):
            shares = and_shares(step, lift)
            assert torch.equal(shares.sum(-1), torch.ones(2).double())
            assert torch.equal(and_velocity(step, shares), and_velocity(single, and_shares(single)))
        assert torch.equal(or_velocity(step, torch.full((2, experts), 1 / experts)), or_velocity(single, torch.ones(2, 1)))

    def test_the_order_of_experts_changes_nothing(self):
        step, order = a_step(3), [2, 0, 1]
        other = SdeStep(step.unconditional[:, order], step.conditional[:, order], *list(vars(step).values())[2:])
        assert torch.allclose(and_shares(step)[:, order], and_shares(other))
        assert torch.allclose(and_velocity(step, and_shares(step)), and_velocity(other, and_shares(other)))
        shares = or_shares(random(2, 3), torch.full((3,), 1 / 3).log().double(), 1.0)
        assert torch.allclose(or_velocity(step, shares), or_velocity(other, shares[:, order]))

    def test_two_copies_and_a_third_are_the_two_experts(self):
        """A singular system: the copies share what one of them would get."""
        step = a_step(2)
        copies = SdeStep(step.unconditional[:, [0, 1, 1]], step.conditional[:, [0, 1, 1]], *list(vars(step).values())[2:])
        base = step.unconditional[:, [0, 1, 1]].mean(1)
        two = SdeStep(base[:, None].expand(-1, 2, -1, -1, -1), *list(vars(step).values())[1:])
        assert torch.allclose(and_velocity(copies, and_shares(copies)), and_velocity(two, and_shares(two)))
