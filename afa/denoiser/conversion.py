"""Experts of other kinds of prediction, or of another noise schedule: asked at equal signal-to-noise ratio, their answers converted.

Only whole predictions can be: features of experts that were told different things at a step have nothing in common.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from afa.denoiser.schedule import Schedule, clean_of, prediction_of


@dataclass(frozen=True, eq=False)
class Conversion:
    """One expert's way of predicting, `own`, seen from the one that the sampler works with, `frame`.

    noisy = signal · x0 + noise · ε in both, with levels of their own. Where both have the same noise at the same time, only
    the answer is converted. Past the end of the expert's schedule (a flow's first step is pure noise) it is asked at that end.
    """

    own: Schedule
    frame: Schedule

    def given(self, noisy: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """What the expert is handed instead of noisy latents (B, …) at times () or (B,): the same latents in its own convention.

        Noisy latents of equal ratio differ by a factor: √(signal² + noise²) of the one over that of the other.
        """
        if self.own.same_noise(self.frame):
            return noisy, times
        levels = self.frame.at(times)
        own_times = self.own.when(*levels)
        factor = torch.hypot(*self.own.at(own_times)) / torch.hypot(*levels)
        wide = _wide(noisy)
        return (noisy.to(wide) * _over(factor, noisy).to(wide)).to(noisy.dtype), own_times

    def answer(self, prediction: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
        """The expert's prediction as the frame's kind, through the clean latents it claims; noisy and times: the frame's."""
        wide = _wide(prediction)
        own_noisy, own_times = self.given(noisy.to(wide), times)
        own_signal, own_noise = (_over(level, noisy).to(wide) for level in self.own.at(own_times))
        clean = clean_of(self.own.kind, prediction.to(wide), own_noisy, own_signal, own_noise)
        signal, noise = (_over(level, noisy).to(wide) for level in self.frame.at(times))
        return prediction_of(self.frame.kind, clean, noisy.to(wide), signal, noise).to(prediction.dtype)


def conversion(own: Schedule, frame: Schedule) -> Conversion | None:
    """How an expert's predictions become the frame's; None where they are already."""
    return None if own.kind == frame.kind and own.same_noise(frame) else Conversion(own, frame)


def _over(levels: Tensor, latents: Tensor) -> Tensor:
    """One level for all, or one an image, as it broadcasts over latents (B, …)."""
    return levels if levels.ndim == 0 else levels.view(-1, *[1] * (latents.ndim - 1))


def _wide(latents: Tensor) -> torch.dtype:
    return torch.promote_types(latents.dtype, torch.float32)  # half precision would lose what is subtracted
