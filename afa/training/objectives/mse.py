"""`mse`: the squared distance of the prediction to its target, ε, v, x0 or a flow's velocity."""

from torch import Tensor

from afa.errors import UserError
from afa.training.noise import Noising
from afa.training.objectives.base import Objective, Pass


class Mse(Objective):
    """The diffusion loss. snr_gamma: min-SNR-γ weighting. weighting: SD3's, of a flow. Neither: all steps count alike.

    Raises UserError for a weighting that is not the schedule's.
    """

    def __init__(self, noising: Noising, snr_gamma: float | None = None, weighting: str | None = None) -> None:
        if weighting is not None and not noising.is_flow:
            raise UserError(f"--weighting {weighting} weighs a flow, and these experts predict '{noising.kind}'; try --snr-gamma 5")
        self.noising, self.snr_gamma, self.weighting = noising, snr_gamma, weighting

    def loss(self, work: Pass) -> Tensor:
        error: Tensor = (work.prediction - self.noising.target(work.batch)).square().mean((1, 2, 3))
        return error if self.snr_gamma is None and self.weighting is None else error * self.weights(work.batch.steps)

    def weights(self, steps: Tensor) -> Tensor:
        """What a sample's error counts, (B,)."""
        if self.weighting is not None:
            return self.noising.flow_weighting(steps, self.weighting)
        assert self.snr_gamma is not None
        return self.noising.min_snr(steps, self.snr_gamma)
