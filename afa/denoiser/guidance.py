"""One set of weights for both predictions of classifier-free guidance."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from afa.aggregators.registry import Recipe
from afa.denoiser.forward import Adjuster
from afa.errors import UserError
from afa.stages.interface import ModelInterface


class SharedGuidance:
    """The part of a drop-in denoiser that blends both predictions of guidance by the same weights.

    Left to themselves, aggregators weigh the experts once with the prompt and once without, and guidance
    multiplies the difference between the two predictions, and so the difference between the weights, too.
    """

    recipe: Recipe
    interface: ClassVar[ModelInterface]
    config: Any
    _adjust: Adjuster | None

    @property
    def share_guidance_weights(self) -> bool:
        """Whether both predictions of guidance are blended by the weights of the one with the prompt.

        It concerns passes whose batch is two halves of the same latents, without and with the prompt, as
        stock pipelines make them for guidance. It may be set at any time, and is saved with the ensemble.
        Setting it raises UserError for models whose pipelines make no such batch.
        """
        return self.recipe.shared_guidance

    @share_guidance_weights.setter
    def share_guidance_weights(self, share: bool) -> None:
        reason = self.interface.why_no_batched_guidance(self.config)
        if share and reason:
            raise UserError(
                "both predictions of guidance can share their weights only where one pass makes both, "
                f"and {reason}"
            )
        self.recipe = dataclasses.replace(self.recipe, shared_guidance=share)

    def adjuster(self, sample: Tensor) -> Adjuster | None:
        """Return what changes the weights of a pass: sharing, if that is on, and then adjust_weights.

        sample: (B, C, H, W) latents of the pass
        """
        adjust = self._adjust
        if not self.share_guidance_weights or not _is_guided(sample):
            return adjust

        def shared(stage: str, weights: Tensor) -> Tensor:
            _, prompted = self.interface.split_guidance(weights)  # of the rows, N a sample or one
            both = torch.cat([prompted, prompted])
            return both if adjust is None else adjust(stage, both)

        return shared


@contextmanager
def not_shared(denoiser: Any) -> Iterator[None]:
    """Inside the context, every prediction has its own weights, for passes that are not of guidance.

    denoiser: of a pipeline; one that shares nothing stays as it is
    """
    sharing = isinstance(denoiser, SharedGuidance) and denoiser.share_guidance_weights
    if sharing:
        denoiser.share_guidance_weights = False
    try:
        yield
    finally:
        if sharing:
            denoiser.share_guidance_weights = True


def _is_guided(sample: Tensor) -> bool:
    """Return whether a batch is two halves of the same latents; False for tensors without values."""
    half = len(sample) // 2
    if half == 0 or sample.is_meta or isinstance(sample, FakeTensor):
        return False
    return torch.equal(sample[:half], sample[half:])
