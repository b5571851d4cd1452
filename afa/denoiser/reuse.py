"""Fused features that are used again in the next steps, instead of running the inner stages in each.

What U-Nets compute on small maps hardly changes from step to step; DeepCache (Ma et al., arXiv:2312.00858)
keeps it for some steps. Deviation: features are kept after fusion, so that one decision serves all experts,
and aggregators of inner stages are left out with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afa.defaults import OUTER_STAGES
from afa.errors import UserError
from afa.stages.stage import Stage


@dataclass(frozen=True)
class Reuse:
    """Which steps run all stages, and which stages run in all steps.

    every: all stages run in every `every`-th step; 1: in each
    outer: stages at either end of the network that run in all steps
    """

    every: int
    outer: int = OUTER_STAGES

    def check(self, stages: Sequence[Stage]) -> None:
        """Raise UserError if the inner stages of this network cannot be left out."""
        joined = sum(stage.takes_skip for stage in stages)
        if not joined:
            raise UserError(
                "features are reused between steps only in U-Nets, where the first and the last stages "
                "are joined directly; leave out reuse"
            )
        if self.every < 1 or not 1 <= self.outer <= joined:
            raise UserError(
                f"all stages in every {self.every}th step and {self.outer} outer stages: "
                f"the first must be at least 1, the second from 1 to {joined}"
            )


@dataclass
class InnerStages:
    """The inner stages in one pass: left out, if there are features to use instead, or run and kept.

    first, end: positions of the first inner stage, and of the first one after them
    kept:       N × (B, C, H, W), what the inner stages handed on in their last pass; None: there is none
    """

    first: int
    end: int
    kept: list[Tensor] | None = None
    left_out: bool = False

    def handed_on(self, features: list[Tensor]) -> list[Tensor]:
        """Return the input of the first stage after them. features: what the stage before it put out"""
        if not self.left_out:
            self.kept = features
        assert self.kept is not None
        return self.kept


@dataclass
class Steps:
    """Counts the passes of one image, and knows when another begins.

    An image ends where the noise rises, or where prompts, batch, size or experts are others.
    """

    reuse: Reuse
    inner: InnerStages
    about: tuple[Any, ...] = ()
    prompt: Tensor | None = field(default=None, repr=False)  # kept, so that its place stays its own
    timestep: float = float("-inf")
    count: int = 0

    def next(self, latents: Tensor, timestep: float, prompt: Tensor, experts: Sequence[int]) -> InnerStages:
        """Return the inner stages for the next pass.

        latents:  (B, C, H, W)
        timestep: in the scheduler's unit: falling from step to step
        prompt:   embeddings; pipelines pass the same tensor in all steps of an image
        """
        where = (prompt.data_ptr(), prompt._version, prompt.shape)
        about = (latents.shape, latents.dtype, latents.device, tuple(experts), where)
        if timestep > self.timestep or about != self.about:
            self.count = 0
        self.inner.left_out = self.count % self.reuse.every != 0
        self.about, self.prompt = about, prompt
        self.timestep, self.count = timestep, self.count + 1
        return self.inner


class ReusesFeatures:
    """The part of a drop-in denoiser that reuses features between steps."""

    stages: Any
    in_uncond_pass: bool
    _reuse: Reuse | None = None

    @property
    def reuse(self) -> Reuse | None:
        """How features are reused between steps; None, as at first: not at all.

        It acts where no gradients are asked for. Setting it raises UserError for networks that have no inner
        stages to leave out.
        """
        return self._reuse

    @reuse.setter
    def reuse(self, reuse: Reuse | None) -> None:
        if reuse is not None:
            reuse.check(self.stages)
        self._reuse = reuse
        self._steps: dict[bool, Steps] = {}  # by pass of guidance, if its two passes are separate

    def inner_stages(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        prompt: Tensor | None,
        experts: Sequence[int],
    ) -> InnerStages | None:
        """Return the inner stages for this pass; None if all stages run. Arguments as of Steps.next."""
        reuse = self._reuse
        if reuse is None or prompt is None or reuse.every == 1 or torch.is_grad_enabled():
            return None
        if self.in_uncond_pass not in self._steps:
            inner = InnerStages(reuse.outer, len(self.stages) - reuse.outer)
            self._steps[self.in_uncond_pass] = Steps(reuse, inner)
        time = float(torch.as_tensor(timestep).flatten()[0])
        return self._steps[self.in_uncond_pass].next(latents, time, prompt, experts)
