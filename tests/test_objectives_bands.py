"""Laws of objectives that look at some timesteps, at guidance, or at the mean of the experts; and of dropout."""

from dataclasses import replace

import pytest
import torch
from test_objective import noising, rows
from test_objectives import ensemble, gradients, resumes_to_the_same_bits, work  # noqa: F401 (fixtures)
from test_training import experts, images, settings  # noqa: F401 (fixtures)

from afa import UserError
from afa.denoiser.hooks import only_expert
from afa.training.finetune_settings import LoraSettings
from afa.training.noise import Noising
from afa.training.objectives import MeanAnchor, Mse
from afa.training.run import plan, train


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_timesteps_are_drawn_within_their_range_and_measured_everywhere(density):
    def process(within):
        return Noising(noising().scheduler, None, torch.device("cpu"), density, within)

    part, (whole, same) = process((500, 749)), (process(within)._steps(9, torch.Generator().manual_seed(0)) for within in (None, (0, 999)))
    steps = part._steps(4000, torch.Generator().manual_seed(0))
    assert 500 <= int(steps.min()) < 520 and 730 < int(steps.max()) <= 749
    assert torch.equal(whole, same)
    part.latents = noising().latents
    ((_, batch),) = part.spread(rows(10), 7)
    assert sorted(batch.steps.tolist()) == list(range(50, 1000, 100))


def test_a_range_beyond_the_schedule_is_refused_before_training(settings):  # noqa: F811
    with pytest.raises(UserError, match="--timestep-range 500 1000 goes beyond the schedule; its last timestep is 999"):
        plan(replace(settings, timestep_range=[500, 1000]))


def test_bands_weigh_the_loss_and_not_the_measure(work):  # noqa: F811
    plain, banded = Mse(work.noising).loss(work), Mse(work.noising, bands=[0.0, 1.0, 1.0, 2.0])
    assert torch.allclose(banded.loss(work), plain * torch.tensor([1.0, 2.0]))  # steps 300 and 800, in bands 1 and 3
    assert torch.equal(banded.unweighted().loss(work), plain)


@pytest.fixture
def own(ensemble, work):  # noqa: F811
    """The experts' own predictions of the same noisy latents."""
    with torch.no_grad():
        found = []
        for name in ensemble.names:
            with only_expert(ensemble.denoiser, name):
                found.append(work.predict(ensemble.denoiser, work.noisy, work.timesteps, work.conditions))
    return torch.stack(found)


def test_the_mean_anchor_is_the_distance_to_the_mean_of_the_experts(ensemble, work, own):  # noqa: F811
    losses = MeanAnchor().loss(work)
    assert torch.allclose(losses, (work.prediction - own.mean(0)).square().mean((1, 2, 3)), atol=1e-6)
    assert losses.min() > 0 and gradients(ensemble, losses.sum()).abs().sum() > 0


CHOICES = {
    "mean": {"anchor": 0.5, "anchor_to": "mean", "timestep_range": [500, 999], "band_weights": [0.0, 1.0]},
    "dropout": {"dropout": 0.3, "accumulate": 2, "batch_size": 1},
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_run_with_them_resumes_to_the_same_bits(name, settings, monkeypatch, tmp_path):  # noqa: F811
    resumes_to_the_same_bits(replace(settings, steps=2, **CHOICES[name]), monkeypatch, tmp_path)


def test_dropout_changes_training_and_no_measurement(settings, tmp_path):  # noqa: F811
    plain, dropped = (train(replace(settings, steps=2, dropout=share, output=str(tmp_path / str(share)))) for share in (0.0, 0.5))
    assert plain["history"][0] == dropped["history"][0] and plain["history"][1] != dropped["history"][1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"timestep_range": [900, 100]}, "--timestep-range 900 100 is no range"),
        ({"timestep_range": [100]}, "--timestep-range 100 is no range"),
        ({"band_weights": [0.0, 0.0]}, "--band-weights 0 0 leave nothing to learn"),
        ({"band_weights": [-1.0, 1.0]}, "--band-weights -1 is too small"),
        ({"anchor_to": "mean"}, "give its weight, e.g. --anchor 0.1"),
        ({"dropout": 1.0}, "--dropout 1 is too large"),
    ],
)
def test_options_that_do_not_fit_are_refused(settings, changes, sentence):  # noqa: F811
    with pytest.raises(UserError, match=sentence):
        replace(settings, **changes)


def test_one_expert_has_no_mean_of_experts():
    with pytest.raises(UserError, match="mean is of several experts"):
        LoraSettings(expert="a", data="b", output="c", rank=2, anchor=1.0, anchor_to="mean")
