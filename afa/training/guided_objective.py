"""The objective `guided`: the prediction with classifier-free guidance, as sampling uses it, and a teacher.

Guidance multiplies the difference between the predictions with and without the caption. mse lowers the error
of both, and may shrink their difference; this objective sees the difference at the strength of sampling.
"""

from typing import Any

import torch
from torch import Tensor

from afa.denoiser.hooks import only_expert
from afa.training.objectives import Objective, ObjectiveContext, Pass
from afa.training.reward_objectives import joined


class Guided(Objective):
    """The squared distance of the guided prediction, uncond + g · (cond - uncond), to a teacher's.

    scale:  g, the strength of guidance
    target: whether the teacher is the target of the diffusion loss; otherwise it is the mean of the experts'
            own guided predictions, which takes two more passes of each, without gradients
    Every sample keeps its caption, also where mse drops it. It costs two passes instead of one.
    """

    def __init__(self, scale: float, target: bool = False) -> None:
        self.scale, self.target = scale, target

    def loss(self, work: Pass) -> Tensor:
        everywhere = torch.ones_like(work.dropped)
        varying = work.denoiser.interface.variable_length
        both = joined(work.encode(everywhere), work.encode(~everywhere), varying)
        own = self._guided(work, work.call, both)
        return (own - self._teacher(work, both)).square().mean((1, 2, 3))

    def _teacher(self, work: Pass, both: dict[str, Any]) -> Tensor:
        """Return what is aimed at, (B, C, h, w)."""
        if self.target:
            return work.noising.target(work.batch)
        names, mean = work.denoiser.names, torch.zeros_like(work.noisy, dtype=torch.float32)
        for name in names:
            with torch.no_grad(), only_expert(work.denoiser, name):
                mean += self._guided(work, work.denoiser, both) / len(names)
        return mean

    def _guided(self, work: Pass, call: Any, both: dict[str, Any]) -> Tensor:
        """Return the guided prediction of a denoiser, (B, C, h, w).

        both: conditions without and with captions, one after the other
        """
        noisy, timesteps = (torch.cat([part, part]) for part in (work.noisy, work.timesteps))
        without, with_caption = work.predict(call, noisy, timesteps, both).chunk(2)
        guided: Tensor = work.denoiser.interface.apply_guidance(without, with_caption, self.scale)
        return guided


def make_guided(context: ObjectiveContext) -> Guided:
    settings = context.settings
    return Guided(settings.guided_scale, settings.guided_teacher == "target")
