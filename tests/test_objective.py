"""Laws of what is minimised."""

import pytest
import torch
from tiny import scheduler

from afa import UserError
from afa.training.objective import Objective


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_has_no_loss(kind):
    objective = Objective(scheduler(kind), 0.5, None, torch.device("cpu"))
    data = type("Data", (), {"moments": torch.randn(3, 8, 4, 4)})()
    batch = objective.draw(data, [0, 1, 2], torch.Generator().manual_seed(0))
    alpha = objective.noises.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    truth = {
        "epsilon": batch.noise,
        "sample": batch.latents,
        "v_prediction": alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * batch.latents,
    }[kind]

    def perfect(noisy, timesteps, return_dict):
        assert torch.allclose(noisy, alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * batch.noise, atol=1e-6)
        return (truth,)

    assert objective.loss(perfect, batch, {}, torch.float32).abs().max() < 1e-10
    wrong = objective.loss(lambda *args, **options: (truth + 0.5,), batch, {}, torch.float32)
    assert torch.allclose(wrong, torch.full((3,), 0.25), atol=1e-5)


def test_an_unknown_prediction_type_is_refused():
    strange = scheduler()
    strange.register_to_config(prediction_type="flow")
    with pytest.raises(UserError, match="'flow'"):
        Objective(strange, 1.0, None, torch.device("cpu"))


def test_the_measure_spreads_its_timesteps_evenly():
    objective = Objective(scheduler(), 1.0, None, torch.device("cpu"))
    data = type("Data", (), {"moments": torch.randn(10, 8, 4, 4), "__len__": lambda self: 10})()
    first, second = objective.spread(data, 7), objective.spread(data, 7)
    assert sorted(first.timesteps.tolist()) == list(range(50, 1000, 100))
    assert torch.equal(first.noise, second.noise) and torch.equal(first.timesteps, second.timesteps)
