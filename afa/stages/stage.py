"""The central idea: a denoiser is a list of stages.

A stage is one cut of the denoiser: a few of its own sub-modules, run one after another. An expert is one of
the models that are combined. A context holds what one expert carries through all stages besides its features.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn


@dataclass(kw_only=True)
class StageContext:
    """What one expert carries through a pass besides its features. A family adds what its sub-modules need.

    temb:        (B, E) time embedding of the expert; aggregators see it
    text:        (B, T, D) text states of the expert; aggregators see them
    text_mask:   (B, T) bool, False for padding; None: there is no padding
    text_tokens: (B, T, D') current text tokens, in families whose blocks change them; None elsewhere
    """

    temb: Tensor
    text: Tensor
    text_mask: Tensor | None = None
    text_tokens: Tensor | None = None


@dataclass(kw_only=True, eq=False)
class Stage(ABC):
    """One cut of a denoiser: a few of the model's own sub-modules, run one after another.

    name:       unique in the model, IN00 … OUT11; without dots
    channels:   channels of the output
    level:      the output has 1/2**level of the latent's height and width (rounded up)
    block:      the diffusers block the stage belongs to; None before the first and after the last block
    group:      the family's name for blocks of this kind (double, single …), used by placements; "" if the
                family has one kind only
    saves_skip: the output is pushed on the stack of skip connections
    takes_skip: the stage takes its skip connection from that stack
    upsamples:  the stage ends with an upsampler; `size` then sets the size of its output
    """

    name: str
    channels: int
    level: int
    block: str | None = None
    group: str = ""
    saves_skip: bool = False
    takes_skip: bool = False
    upsamples: bool = False

    @abstractmethod
    def run(
        self,
        hidden: Tensor,
        context: StageContext,
        skip: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, StageContext]:
        """Run the stage.

        hidden:  (B, C_in, H, W) features
        context: of this expert; never changed in place, since the backward pass may run a stage again
        skip:    (B, C_skip, H, W) if the stage takes a skip connection
        size:    (H', W') output size of an upsampler; None: twice the input
        Returns features (B, channels, H', W') and the context for the next stage.
        """

    @abstractmethod
    def modules(self) -> list[object]:
        """Return the model's own sub-modules that this stage runs, in order."""

    @property
    def attends(self) -> bool:
        """Whether the stage has attention, to the map itself or to the text."""
        found = (module for module in self.modules() if isinstance(module, nn.Module))
        parts = (part for module in found for part in module.modules())
        return any(hasattr(part, "to_q") or isinstance(part, AttentionModuleMixin) for part in parts)

    def unused_modules(self) -> list[object]:
        """Return those sub-modules inside `modules()` whose output does not influence the prediction."""
        return []

    def feed_forward(self) -> list[object]:
        """Return its feed-forward sub-modules of other classes than diffusers' FeedForward."""
        return []


def base_layer(layer: Any) -> Any:
    """Return the original layer, which has the sizes, if peft has wrapped it with a LoRA; else the layer."""
    return getattr(layer, "base_layer", layer)


def stage_of_names(names: Iterable[str], model: nn.Module, stages: Sequence[Stage]) -> dict[str, str]:
    """Map every parameter and buffer of a denoiser to the name of its stage.

    names:  names in the model, or names that a file holds for the model
    stages: stages of the model, in the order they run
    What no stage runs (embeddings of latents, time, text and added conditions) belongs to the first stage.
    Source: block-weighted merging (bbc-mc, sdweb-merge-block-weighted-gui).
    """
    places = {id(module): place for place, module in model.named_modules()}
    runs = {places[id(module)]: stage.name for stage in stages for module in stage.modules()}
    found = {}
    for name in names:
        around, found[name] = name, stages[0].name
        while "." in around:
            around = around.rpartition(".")[0]
            if around in runs:
                found[name] = runs[around]
                break
    return found
