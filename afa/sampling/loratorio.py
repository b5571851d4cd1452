"""LoRAtorio: at every patch, an expert counts the more, the less its prediction resembles the base model's.

Source: Foteinopoulou et al., LoRAtorio: An intrinsic approach to LoRA Skill Composition, arXiv:2508.11624.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from afa.denoiser.schedule import FLOW, Schedule, noise_of
from afa.ensemble import Ensemble
from afa.sampling.base import Combination, Predict
from afa.sampling.options import Loratorio
from afa.sampling.sample import PipelineSampler, in_frame


def similarities(predictions: Tensor, base: Tensor, patch: int) -> Tensor:
    """Return the cosine of the angle between each expert's patch and the base's, over channels and places.

    predictions: (B, N, C, H, W)
    base:        (B, C, H, W)
    patch:       side of the patches, which do not overlap; those at the right and lower edge may be smaller
    Returns (B, N, ceil(H / patch), ceil(W / patch)).
    """

    def patches(values: Tensor) -> Tensor:  # (…, C, H, W) -> (…, C·patch², rows, columns)
        missing = (0, -values.shape[-1] % patch, 0, -values.shape[-2] % patch)  # zeros change no cosine
        return F.pixel_unshuffle(F.pad(values, missing), patch)

    return F.cosine_similarity(patches(predictions), patches(base)[:, None], dim=2)


def patch_weights(predictions: Tensor, base: Tensor, patch: int, temperature: float) -> Tensor:
    """Return the experts' weights at every pixel, the softmax of -similarity / temperature: (B, N, H, W).

    Arguments as in similarities().
    """
    weights = torch.softmax(-similarities(predictions, base, patch) / temperature, dim=1)
    whole = weights.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return whole[..., : base.shape[-2], : base.shape[-1]]


def blend(predictions: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean at every pixel: (B, N, C, H, W) and (B, N, H, W) to (B, C, H, W).

    The mean of equal predictions is bit for bit the same prediction.
    """
    first = predictions[:, :1]
    shares = weights[:, :, None].to(predictions)
    return (first + (shares * (predictions - first)).sum(1, keepdim=True)).squeeze(1)


class Composed(Combination):
    """Blends the experts by patch, and mixes the base model into the unconditional prediction.

    The weights are those of the prediction with the prompt, for both predictions of guidance.
    joined:   the experts, and last the base model
    guidance: the sampler sets it before a pass
    """

    def __init__(self, joined: Ensemble, options: Loratorio) -> None:
        super().__init__(joined.denoiser)
        self.options = options
        self.schedule = Schedule.of(joined.frame.scheduler)
        self.guidance: float | None = None
        self._weights: Tensor | None = None  # of the last pass with the prompt

    @property
    def names(self) -> tuple[str, ...]:
        return self.ensemble.names[:-1]

    @property
    def doubled(self) -> bool:
        """Whether a stock pipeline makes both predictions of guidance in one pass, as halves of a batch."""
        reason = self.ensemble.interface.why_no_batched_guidance(self.ensemble.config)
        return (self.guidance or 0) > 1 and not reason

    def combine(self, predict: Predict, sample: Tensor, timestep: float) -> tuple[Tensor, Tensor | None]:
        *each, base = (predict(model) for model in range(len(self.names) + 1))
        experts = torch.stack(each, dim=1)  # (B, N, C, H, W)
        # Pipelines that make two passes make the one with the prompt first.
        if self._weights is None or not self.ensemble.in_uncond_pass:
            self._weights = self._weigh(experts, base, sample, timestep)
        weights = self._weights.repeat(2, 1, 1, 1) if self.doubled else self._weights
        blended = blend(experts, weights)
        centred = blended + self.options.recenter * (base - blended)
        if self.doubled:
            interface = self.ensemble.interface
            without, prompted = interface.split_guidance(centred)[0], interface.split_guidance(blended)[1]
            return interface.join_guidance(without, prompted), weights
        return centred if self.ensemble.in_uncond_pass else blended, weights

    def _weigh(self, experts: Tensor, base: Tensor, sample: Tensor, timestep: float) -> Tensor:
        """Return the weights of the predictions with the prompt, (B, N, H, W), computed in float32.

        Similarity is of noise, to which other predictions are converted; a flow's velocities are compared as
        they are, since of its first step all models claim the same noise.
        """
        experts, base, sample = experts.float(), base.float(), sample.float()
        if self.schedule.kind != FLOW:
            at = self.schedule.at(torch.tensor(timestep, dtype=torch.float64))
            signal, noise = (float(level) for level in at)
            experts = noise_of(self.schedule.kind, experts, sample[:, None], signal, noise)
            base = noise_of(self.schedule.kind, base, sample, signal, noise)
        if self.doubled:
            split = self.ensemble.interface.split_guidance
            experts, base = split(experts)[1], split(base)[1]
        return patch_weights(experts, base, self.options.patch, self.options.temperature)


def loratorio(ensemble: Ensemble, options: Loratorio, base: object) -> PipelineSampler:
    """Return a sampler of experts that are weighted by patch and by how far they depart from their base.

    base: the model that the experts were tuned from, as Ensemble.from_experts takes it
    Raises UserError for a base that does not fit the experts.
    """
    joined = ensemble.beside(base)
    denoiser = Composed(joined, options)
    return PipelineSampler(in_frame(joined, denoiser), guided=(denoiser,))
