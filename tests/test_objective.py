"""Laws of the forward process and of the diffusion loss."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny import scheduler

from afa import UserError
from afa.latents import Latents
from afa.models.unet import UNetInterface
from afa.training.data import Encoded
from afa.training.noise import Noising
from afa.training.objectives import Mse, Pass

KINDS = ["epsilon", "v_prediction", "sample", "flow"]


def of_kind(kind):
    return FlowMatchEulerDiscreteScheduler(shift=3.0) if kind == "flow" else scheduler(kind)


def noising(kind="epsilon", scale=1.0, **options):
    latents = Latents({"latent_channels": 4, "block_out_channels": (8,), "scaling_factor": scale})
    return Noising(of_kind(kind), latents, torch.device("cpu"), **options)


def rows(count=3):
    return Encoded(torch.randn(count, 8, 4, 4), [""] * count, torch.full((count, 6), 32.0))


class Oracle(torch.nn.Module):
    """A denoiser that answers what it is told to; it is called as a U-Net is."""

    interface, config = UNetInterface(), None

    def __init__(self, answer):
        super().__init__()
        self.experts, self.answer = torch.nn.Linear(1, 1), answer

    def forward(self, sample, timestep, return_dict):
        self.seen = sample, timestep
        return (self.answer,)


def a_pass(denoiser, process, batch):
    count = len(batch.steps)
    return Pass(denoiser, denoiser, process, batch, ["x"] * count, torch.zeros(count, dtype=torch.bool), lambda dropped: {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_has_no_loss_and_claims_the_clean_latents(kind):
    process = noising(kind, 0.5)
    batch = process.draw(rows(), [0, 1, 2], torch.Generator().manual_seed(0))
    truth = process.target(batch)
    work = a_pass(Oracle(truth), process, batch)
    assert Mse(process).loss(work).abs().max() < 1e-10
    assert torch.allclose(work.clean, batch.latents, atol=1e-4)
    wrong = Mse(process).loss(a_pass(Oracle(truth + 0.5), process, batch))
    assert torch.allclose(wrong, torch.full((3,), 0.25), atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_those_of_the_scheduler(kind):
    process, known = noising(kind), DDPMScheduler.from_config(scheduler(kind).config)
    batch = process.draw(rows(), [0, 1, 2], torch.Generator().manual_seed(0))
    assert torch.equal(process.noisy(batch.latents, batch.noise, batch.steps), known.add_noise(batch.latents, batch.noise, batch.steps))
    targets = {"epsilon": batch.noise, "sample": batch.latents, "v_prediction": known.get_velocity(batch.latents, batch.noise, batch.steps)}
    assert torch.equal(process.target(batch), targets[kind])
    assert torch.equal(process.timesteps(batch.steps), batch.steps)


def test_a_flow_is_noised_and_told_the_time_as_its_scheduler_does():
    process, known = noising("flow"), of_kind("flow")
    batch = process.draw(rows(), [0, 1, 2], torch.Generator().manual_seed(0))
    times = process.timesteps(batch.steps)
    assert torch.allclose(process.noisy(batch.latents, batch.noise, batch.steps), known.scale_noise(batch.latents, times, batch.noise), atol=1e-6)
    assert torch.equal(process.target(batch), batch.noise - batch.latents)
    assert process.timesteps(torch.tensor([0]))[0] < process.timesteps(torch.tensor([999]))[0]  # step 0 has the least noise, as everywhere


def test_an_unknown_prediction_type_is_refused():
    strange = scheduler()
    strange.register_to_config(prediction_type="flow")
    with pytest.raises(UserError, match="'flow'"):
        Noising(strange, None, torch.device("cpu"))


def test_the_measure_spreads_its_timesteps_evenly():
    data = rows(10)
    ((places, first),), ((_, second),) = noising().spread(data, 7), noising().spread(data, 7)
    assert places == list(range(10))
    assert sorted(first.steps.tolist()) == list(range(50, 1000, 100))
    assert torch.equal(first.noise, second.noise) and torch.equal(first.steps, second.steps)


def test_spare_noise_changes_nothing_else():
    data = rows()
    plain, spare = (noising().draw(data, [0, 1, 2], torch.Generator().manual_seed(3), count) for count in (0, 2))
    assert torch.equal(plain.noise, spare.noise) and torch.equal(plain.steps, spare.steps)
    assert plain.extra_noise is None and spare.extra_noise.shape == (3, 2, 4, 4, 4)


def test_the_densities_of_sd3_prefer_the_middle():
    def middle(density):
        steps = noising("flow", density=density).draw(rows(), [0] * 4000, torch.Generator().manual_seed(0)).steps
        assert steps.min() >= 0 and steps.max() <= 999
        return ((steps > 250) & (steps < 750)).float().mean()

    assert abs(middle("uniform") - 0.5) < 0.03
    assert middle("logit_normal") > 0.68  # P(|N(0,1)| < log 3) = .728
    assert middle("mode") > 0.55


# --- what steps count -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_bounds_what_a_sample_counts(kind):
    """In units of the error of x0, a weight is SNR below γ and γ above it."""
    process, steps = noising(kind), torch.tensor([1, 100, 400, 998])
    signal, noise = process.signal[steps], process.noise[steps]
    snr = (signal / noise) ** 2
    per_x0 = {"epsilon": snr, "v_prediction": noise**-2, "flow": noise**-2, "sample": torch.ones(4)}[kind]  # squared error of the target over x0's
    assert torch.allclose(process.min_snr(steps, 5.0) * per_x0, snr.clamp(max=5.0), rtol=1e-3)


def test_weights_of_a_flow_are_those_of_sd3():
    process, steps = noising("flow"), torch.tensor([100, 500, 900])
    sigma = process.noise[steps]
    assert torch.allclose(process.flow_weighting(steps, "sigma_sqrt"), sigma**-2.0)
    assert torch.allclose(process.flow_weighting(steps, "cosmap"), 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2)))
    with pytest.raises(UserError, match="--weighting cosmap weighs a flow"):
        Mse(noising(), weighting="cosmap")
