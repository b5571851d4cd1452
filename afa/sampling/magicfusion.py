"""MagicFusion: at every pixel, the prediction of the expert that guidance changes most (saliency).

Source: Zhao et al., MagicFusion, ICCV 2023, arXiv:2303.13126, section 3 and the published program.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from afa.denoiser.schedule import Schedule, noise_of
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.sampling.base import Combination, Predict
from afa.sampling.options import MagicFusion
from afa.sampling.sample import PipelineSampler, check_guidable, find_expert, in_frame


def saliency(conditional: Tensor, reference: Tensor, guidance: float) -> Tensor:
    """Return the saliency S = |s (c - u)|, smoothed, mean over channels: (B, N, H, W).

    conditional: c (B, N, C, H, W)
    reference:   u, of the same shape or with N = 1. The published program takes the general expert's u for
                 all experts; with each expert's own u it is the paper's formula
    guidance:    s
    Smoothing is a 4×4 mean with stride 1 and zero padding 1, resized to H×W.
    """
    strength = (guidance * (conditional - reference)).abs()
    pooled = F.avg_pool2d(strength.flatten(0, 1), kernel_size=4, stride=1, padding=1)
    smooth = F.interpolate(pooled, size=strength.shape[-2:], mode="bilinear", align_corners=False)
    return smooth.mean(1).unflatten(0, strength.shape[:2])


def winners(saliencies: Tensor, sharpness: Tensor) -> Tensor:
    """Return the expert with the largest P at every pixel, (B, H, W); the first of equal ones.

    saliencies: S (B, N, H, W)
    sharpness:  k (N,)
    P is the softmax of k S over positions (equation 4).
    """
    scaled = sharpness.to(saliencies).view(1, -1, 1) * saliencies.flatten(2)
    return torch.softmax(scaled, dim=-1).view_as(saliencies).argmax(1)


def pick(predictions: Tensor, winner: Tensor) -> Tensor:
    """Take every pixel from its winner: (B, N, C, H, W) and (B, H, W) to (B, C, H, W)."""
    index = winner[:, None, None].expand(-1, 1, *predictions.shape[2:])
    return predictions.gather(1, index).squeeze(1)


class Blended(Combination):
    """Returns, at every pixel, the winner's unconditional and conditional prediction.

    Guidance is linear, so the pipeline makes exactly the winner's guided prediction of them.
    Saliency is defined on ε: other kinds of predictions are converted to find the winner, and the winner's
    own prediction is returned. At a flow's first step, pure noise, all experts predict the same noise, and
    the general expert wins.
    guidance: the sampler sets it before a pass, above 1
    """

    def __init__(self, ensemble: Ensemble, options: MagicFusion) -> None:
        super().__init__(ensemble.denoiser)
        general = 0 if options.general is None else find_expert(ensemble, options.general)
        self.order = [
            general,
            *(expert for expert in range(len(self.names)) if expert != general),
        ]  # ties go to the general one
        self.options = options
        self.schedule = Schedule.of(ensemble.frame.scheduler)
        self.sharpness = torch.tensor([options.k_general] + [options.k_expert] * (len(self.names) - 1))
        self._guidance: float | None = None

    @property
    def guidance(self) -> float:
        if self._guidance is None:
            raise UserError(
                "magicfusion must know the strength of guidance; set denoiser.guidance to the pipeline's"
                " guidance_scale"
            )
        return self._guidance

    @guidance.setter
    def guidance(self, value: float) -> None:
        if value <= 1:
            raise UserError(
                f"magicfusion compares what guidance adds, and guidance {value:g} adds nothing; give one"
                " above 1"
            )
        self._guidance = value

    def combine(self, predict: Predict, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        above = timestep > self.options.t0
        if above == (self.options.mode == 1):
            return predict(self.order[0]), self.one_hot(self.order[0])
        predictions = torch.stack([predict(expert) for expert in self.order], dim=1)  # (2B, N, C, H, W)
        winner = self._winner(predictions, sample, timestep).repeat(
            2, 1, 1
        )  # for both halves of the doubled batch
        weights = torch.nn.functional.one_hot(winner, len(self.order)).movedim(-1, 1).float()
        return pick(predictions, winner), weights[:, torch.tensor(self.order).argsort()]

    def _winner(self, predictions: Tensor, sample: Tensor, timestep: float) -> Tensor:
        """Return the winners (B, H, W) as indices into self.order, from predictions (2B, N, C, H, W).

        Computed in float32, since the softmax is over many positions.
        """
        levels = (float(level) for level in self.schedule.at(torch.tensor(timestep, dtype=torch.float64)))
        noise = noise_of(self.schedule.kind, predictions.float(), sample.float()[:, None], *levels)
        unconditional, conditional = self.ensemble.interface.split_guidance(noise)
        reference = unconditional[:, :1] if self.options.saliency_reference == "general" else unconditional
        return winners(saliency(conditional, reference, self.guidance), self.sharpness)


def magicfusion(ensemble: Ensemble, options: MagicFusion) -> PipelineSampler:
    """Return a sampler of saliency-aware noise blending, with the published program's schedule and defaults.

    Source: arXiv:2303.13126, section 3. Deviation: the paper has two experts; with more, the winner is the
    argmax over all of them.
    Raises UserError for experts without an unconditional prediction.
    """
    check_guidable(ensemble, "magicfusion")
    denoiser = Blended(ensemble, options)
    return PipelineSampler(in_frame(ensemble, denoiser), guided=(denoiser,))
