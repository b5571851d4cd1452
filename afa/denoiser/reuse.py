"""What is used again in the next steps, so that not all experts run all stages in each of them.

Between two whole steps, either the inner stages of U-Nets are left out, since what they compute on small maps
hardly changes (DeepCache, Ma et al., arXiv:2312.00858; deviation: features are kept after fusion, so that
one decision serves all experts); or one expert runs alone, and what the ensemble predicted beyond this expert
in the last whole step is added to its prediction (ours).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from afa.defaults import OUTER_STAGES
from afa.errors import UserError, unknown
from afa.stages.stage import Stage


@dataclass(frozen=True)
class Reuse:
    """Which steps are whole, and what runs in the others.

    every: every `every`-th step is whole: all experts run all stages; 1: each is
    outer: stages at either end of a U-Net that run in all steps, where no expert leads
    lead:  name of the expert that runs alone between whole steps; None: the inner stages are left out
    """

    every: int
    outer: int = OUTER_STAGES
    lead: str | None = None

    def check(self, names: Sequence[str], stages: Sequence[Stage]) -> None:
        """Raise UserError if it does not fit experts of these names and stages."""
        if self.every < 1:
            raise UserError(f"every {self.every}th step cannot be whole; give at least 1")
        if self.lead is not None:
            if self.lead not in names:
                raise UserError(unknown(self.lead, names, "expert"))
            return
        joined = sum(stage.takes_skip for stage in stages)
        if not joined:
            raise UserError(
                "inner stages can be left out only in U-Nets, where the first and the last stages are joined "
                f"directly; let one expert lead instead: {', '.join(names)}"
            )
        if not 1 <= self.outer <= joined:
            raise UserError(f"there are 1 to {joined} outer stages, not {self.outer}")


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
    """Counts the passes of one image, knows when another begins, and keeps what is used again.

    An image ends where the noise does not fall, or where prompts, batch, size or experts are others. So
    schedulers that ask twice at one timestep (Heun) save less; the same latents asked again are no new image.
    beyond: (B, C, H, W), what the ensemble predicted beyond the leading expert in the last whole step
    """

    every: int
    inner: InnerStages
    beyond: Tensor | None = None
    about: tuple[Any, ...] = ()
    prompt: Tensor | None = field(default=None, repr=False)  # kept, so that its place stays its own
    latents: Tensor | None = field(default=None, repr=False)
    version: int = 0  # of these latents
    timestep: float = float("-inf")
    count: int = 0

    def is_whole(self, latents: Tensor, timestep: float, prompt: Tensor, experts: Sequence[int]) -> bool:
        """Return whether the next pass is a whole one.

        latents:  (B, C, H, W)
        timestep: in the scheduler's unit: falling from step to step
        prompt:   embeddings; pipelines pass the same tensor in all steps of an image
        """
        where = (prompt.data_ptr(), prompt._version, prompt.shape)
        about = (latents.shape, latents.dtype, latents.device, tuple(experts), where)
        again = latents is self.latents and latents._version == self.version
        if timestep > self.timestep or (timestep == self.timestep and not again) or about != self.about:
            self.count = 0
        whole = self.count % self.every == 0
        self.about, self.prompt = about, prompt
        self.latents, self.version = latents, latents._version
        self.timestep, self.count = timestep, self.count + 1
        return whole


Run = Callable[[Sequence[int], InnerStages | None], Tensor]  # (experts, inner stages) -> their prediction


class ReusesSteps:
    """The part of a drop-in denoiser that reuses what earlier steps computed."""

    names: tuple[str, ...]
    stages: Any
    in_uncond_pass: bool
    _reuse: Reuse | None = None

    @property
    def reuse(self) -> Reuse | None:
        """What is reused between steps; None, as at first: nothing.

        It acts where no gradients are asked for. Setting it raises UserError for what does not fit.
        """
        return self._reuse

    @reuse.setter
    def reuse(self, reuse: Reuse | None) -> None:
        if reuse is not None:
            reuse.check(self.names, self.stages)
        self._reuse = reuse
        self._steps: dict[bool, Steps] = {}  # by pass of guidance, if its two passes are separate

    def predict_reusing(
        self,
        run: Run,
        latents: Tensor,
        timestep: Tensor | float | int,
        prompt: Tensor,
        experts: Sequence[int],
    ) -> Tensor:
        """Return the prediction of one pass, with what earlier passes left.

        run:     runs some experts, with inner stages that may be left out
        experts: positions of those that run; the rest as of Steps.is_whole
        """
        reuse = self._reuse
        if reuse is None or reuse.every == 1 or torch.is_grad_enabled():
            return run(experts, None)
        if self.in_uncond_pass not in self._steps:
            inner = InnerStages(reuse.outer, len(self.stages) - reuse.outer)
            self._steps[self.in_uncond_pass] = Steps(reuse.every, inner)
        steps = self._steps[self.in_uncond_pass]
        time = float(torch.as_tensor(timestep).flatten()[0])
        whole = steps.is_whole(latents, time, prompt, experts)
        if reuse.lead is None:
            steps.inner.left_out = not whole
            return run(experts, steps.inner)
        if len(experts) == 1:
            return run(experts, None)
        lead = run([self.names.index(reuse.lead)], None)
        if whole:
            prediction = run(experts, None)
            steps.beyond = prediction - lead
            return prediction
        assert steps.beyond is not None
        return lead + steps.beyond
