"""Models with random weights, made on the device, and what a pipeline hands to them: what a step costs does not depend on weights."""

from typing import Any

import torch
from torch import Tensor

from afa.aggregators.registry import Recipe
from afa.cost import call_of
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.lora import shared_copy
from afa.experts.description import ExpertDescription, describe_config
from afa.models.registry import FAMILIES, family_of
from afa.places import located


class RandomModels:
    """The parts of one architecture.

    config:  a shipped one, or a folder with a model_index.json
    experts: their number
    device:  on which they are made
    dtype:   in which they are made
    shared:  all experts have the same weights in memory, which costs the same time in less memory
    side:    of the latents; None: the model's own, else 128
    """

    def __init__(
        self, config: str, experts: int, device: str, dtype: torch.dtype, *, shared: bool = False, side: int | None = None
    ) -> None:
        self.device, self.dtype = device, dtype
        self.described: ExpertDescription = describe_config("expert", located(config))
        first = self.made()
        self.experts = [first, *(shared_copy(first) if shared else self.made() for _ in range(experts - 1))]
        self.family = FAMILIES[family_of(first)]
        self.side = side or self.family.interface.largest_side(first.config) or 128

    def made(self, part: str = "") -> Any:
        """Return a denoiser, or another part of the pipeline."""
        like: Any = self.described.components[part].model if part else self.described.expert.model
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                model = type(like).from_config(dict(like.config))
        finally:
            torch.set_default_dtype(torch.float32)
        return model.eval().requires_grad_(False)

    def call(self, batch: int) -> dict[str, Any]:
        """Return what a pipeline hands to the denoiser in one step, with random numbers. batch: guidance makes 2 of one image"""
        texts = [encoder.config for encoder in self.described.expert.text_encoders]
        tokens = self.family.interface.prompt_tokens(texts)
        where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        call: dict[str, Any] = _random(call_of(self.experts[0], self.side, self.side, batch, tokens, **where))
        return call

    def by_size(self, kind: str | None = None, options: dict[str, Any] | None = None, attention_up_to: int | None = None) -> Recipe:
        """Return the aggregators that `afa train` makes where an option is not given; arguments as of Recipe.by_size."""
        return Recipe.by_size(self.family.stages(self.experts[0]), self.side, kind, options, attention_up_to)

    def fused(self, recipe: Recipe, placement: str | None = None, dtype: torch.dtype | None = None) -> EnsembleDenoiser:
        """Return an ensemble of the experts, which it shares with all others. dtype: of the aggregators' weights; None: the experts'"""
        made: EnsembleDenoiser = self.family.denoiser(self.experts, None, recipe, placement)
        made.aggregators.to(dtype or self.dtype)
        return made.eval()


def _random(value: Any, name: str = "") -> Any:
    """Fill tensors with random numbers, vectors (timesteps) with one half; positions (ids) stay."""
    if isinstance(value, dict):
        return {name: _random(part, name) for name, part in value.items()}
    if name.endswith("_ids"):
        return value
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn_like(value) if value.ndim > 1 else torch.full_like(value, 0.5)
    return value
