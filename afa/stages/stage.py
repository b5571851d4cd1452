"""The one idea: a denoiser is a list of stages, and a trace is what one expert carries past them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(kw_only=True)
class Trace:
    """What one expert carries through a pass besides its features: its own conditions, embedded by its own layers.

    temb (B, E) time embedding, text (B, T, D) text states: the same for the whole pass, and what aggregators see.
    kept (B, T) bool: which of the text is no padding, where prompts are padded to the longest of a batch; None: all of it.
    stream (B, T, D'): where blocks change text tokens together with the image's, as they are now; None elsewhere.
    A family adds what its sub-modules ask for.
    """

    temb: Tensor
    text: Tensor
    kept: Tensor | None = None
    stream: Tensor | None = None


@dataclass(kw_only=True, eq=False)
class Stage(ABC):
    """One cut of a denoiser: a few of the model's own sub-modules, run one after another.

    name: unique in the model, IN00 … OUT11; no dots. channels: of the output. level: the output has 1/2**level of the
    latent's height and width (rounded up). block: the diffusers block the stage belongs to, None for what stands before
    or after all blocks. group: what a family calls blocks of that kind (double, single …), for placements; "" where all are of one.
    saves_skip / takes_skip: the output is kept for, or one is taken from, the stack of skip connections.
    upsamples: the stage ends with an upsampler, so that `size` says how large its output must be.
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
        self, hidden: Tensor, trace: Trace, skip: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Trace]:
        """Features in, features out: (B, C_in, H, W) -> (B, channels, H', W'), and the trace to go on with.

        The trace that came in is never changed: a stage may be run again in the backward pass.
        skip (B, C_skip, H, W) if the stage takes one. size (H', W') forces the output size of an upsampler; None
        doubles it.
        """

    @abstractmethod
    def modules(self) -> list[object]:
        """The model's own sub-modules this stage runs, in order."""

    def unheard(self) -> list[object]:
        """Those inside them that run without a say in the prediction, because nothing reads what they make."""
        return []


def plain(layer: Any) -> Any:
    """A layer itself, where peft has put one with a LoRA in front of it: what has the sizes."""
    return getattr(layer, "base_layer", layer)


def stage_of_names(names: Iterable[str], model: nn.Module, stages: Sequence[Stage]) -> dict[str, str]:
    """The stage of every parameter and buffer of a denoiser: name -> name of the stage.

    names:  the model's own, or those that a file holds for it
    stages: the model's, in the order they run
    What no stage runs (embeddings of latents, time, text and added conditions) belongs to the first stage, as in
    block-weighted merging (bbc-mc, sdweb-merge-block-weighted-gui).
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
