"""What transformer families share: how blocks become stages, how the model is called, whose text is whose.

A family's file adds what differs: its lists of blocks, what the stock forward does before its first block
(`embed`), the signature of that forward, and what its pipelines do differently from others.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from torch import Tensor, nn

from afa.denoiser.base import EnsembleDenoiser, attention_options, split_joined
from afa.stages.interface import ModelInterface
from afa.stages.stage import Stage, StageContext, base_layer
from afa.stages.tokens import (
    LEVEL,
    Block,
    Head,
    TokenContext,
    as_map,
    as_tokens,
    fold,
    pack,
    set_steps,
    unfold,
    unpack,
)

TIMES = 1000  # timesteps of a flow's schedule; models of packed latents take a fraction of them, 0 to 1
# why one pass cannot predict with and without the prompt side by side
SEPARATE_PASSES = "the pipelines of these experts make its two passes one after another"


class TransformerInterface(ModelInterface):
    """How transformers are called: unpacked latents, text states, and pooled states if there are any.

    text_inputs: arguments of the denoiser that hold text, and the config key of the width of each; they are
                 also what is taken from the prompts, in this order
    """

    patch = 2**LEVEL
    text_inputs: ClassVar[Mapping[str, str]] = {
        "encoder_hidden_states": "joint_attention_dim",
        "pooled_projections": "pooled_projection_dim",
    }

    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        return dict(zip(self.text_inputs, parts, strict=True))

    def empty_conditions(
        self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]
    ) -> dict[str, Any]:
        lengths = {"encoder_hidden_states": (tokens,)}
        return {
            name: empty(batch, *lengths.get(name, ()), config[width])
            for name, width in self.text_inputs.items()
        }


class PackedInterface(TransformerInterface):
    """How transformers of packed latents are called: tokens of several pixels, timesteps from 0 to 1.

    token_side: of the square of latent pixels that is one token
    """

    token_side: int = 2

    @abstractmethod
    def grid(self, call: Mapping[str, Any]) -> tuple[int, int]:
        """Return the rows and columns of image tokens of a denoiser call."""

    def sample_size(self, config: Any) -> Any:
        return 128  # of latents of 1024 px, the default of the stock pipelines; no config records it

    def latent_channels(self, config: Any) -> int:
        return int(config.in_channels) // self.token_side**2

    def denoiser_kwargs(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        timestep = self.timestep_to_model(times.to(noisy.dtype))
        return {"hidden_states": pack(noisy, self.token_side), "timestep": timestep, **conditions}

    def timestep_from_model(self, timestep: Tensor | float | int) -> Tensor | float | int:
        return timestep * TIMES

    def timestep_to_model(self, times: Tensor) -> Tensor:
        return times / TIMES

    def latents(self, call: Mapping[str, Any]) -> Tensor:
        rows, columns = self.grid(call)
        size = (rows * self.token_side, columns * self.token_side)
        return unpack(call["hidden_states"], size, self.token_side)

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        set_steps(scheduler, steps, size[0] * size[1] // self.token_side**2)

    def to_latents(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        return unpack(output, size, self.token_side)

    def from_latents(self, prediction: Tensor) -> Tensor:
        return pack(prediction, self.token_side)


class RisingInterface(TransformerInterface):
    """How transformers are called whose time rises from 0 (noise) to 1 (image).

    They predict image minus noise. Schedulers of flows have it the other way round; so have predictions here,
    and the stage OUT. The pipelines change the sign before the scheduler's step.
    """

    def denoiser_kwargs(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        return super().denoiser_kwargs(config, noisy, self.timestep_to_model(times.float()), conditions)

    def timestep_from_model(self, timestep: Tensor | float | int) -> Tensor | float | int:
        return TIMES - timestep * TIMES

    def timestep_to_model(self, times: Tensor) -> Tensor:
        return (TIMES - times) / TIMES

    def to_latents(self, output: Any, size: tuple[int, int]) -> Tensor:
        prediction: Tensor = -output
        return prediction

    def from_latents(self, prediction: Tensor) -> Any:
        return -prediction

    def stepped_to_latents(self, prediction: Tensor, size: tuple[int, int]) -> Tensor:
        return prediction


@dataclass(frozen=True)
class BlockList:
    """One list of blocks of a transformer.

    name:   of the list in the model
    letter: of the names of its stages: J for J00, J01 …
    group:  of its stages, see Stage
    stage:  class of its stages
    feeds:  names of a block's feed-forward sub-modules that are not diffusers' FeedForward
    """

    name: str
    letter: str
    group: str = ""
    stage: type[Block] = Block
    feeds: tuple[str, ...] = ()


class TransformerEnsemble(EnsembleDenoiser):
    """The base of transformer drop-ins; latents are packed unless a family says otherwise.

    block_lists:    in the order in which the stock forward runs them
    patch_size:     of the config; another one is refused
    level:          of all stages, see Stage: 1 if a token stands for 2×2 latent pixels, 0 if for one
    unused_in_last: names of the layers in the last block whose output does not influence the prediction
    head:           class of the last stage
    """

    interface: ClassVar[TransformerInterface]
    block_lists: ClassVar[tuple[BlockList, ...]]
    patch_size: ClassVar[int] = 2**LEVEL
    level: ClassVar[int] = LEVEL
    unused_in_last: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[type[Head]] = Head

    @classmethod
    def read_stages(cls, model: Any, /) -> tuple[Stage, ...]:
        """Read a model as stages: its blocks, then the output head.

        Raises ValueError for another patch size.
        """
        patch_size = model.config.get("patch_size", cls.patch_size)
        if patch_size != cls.patch_size:
            raise ValueError(f"patch_size {patch_size} is not supported; only {cls.patch_size} is")
        blocks = [
            part.stage(
                name=f"{part.letter}{index:02}",
                channels=cls.hidden_size(model),
                level=cls.level,
                block=f"{part.name}.{index}",
                group=part.group,
                module=module,
                index=index,
                feeds=part.feeds,
            )
            for part in cls.block_lists
            for index, module in enumerate(getattr(model, part.name))
        ]
        blocks[-1].unused = cls.unused_in_last
        return (*blocks, cls.read_head(model))

    @classmethod
    def hidden_size(cls, model: Any) -> int:
        """Return the width of image tokens between blocks."""
        return int(model.inner_dim)

    @classmethod
    def read_head(cls, model: Any) -> Head:
        """Return the last stage."""
        channels = base_layer(model.proj_out).out_features
        return cls.head(name="OUT", channels=channels, level=cls.level, model=model)

    @property
    def widths(self) -> tuple[int, int]:
        width = self.hidden_size(self.experts[0])
        return width, width

    def split_by_expert(self, **states: Tensor) -> list[dict[str, Tensor]]:
        """Return each expert's arguments of text, from those for all experts or those of each in order."""
        experts, widths = len(self.experts), self.interface.text_inputs
        parts = {
            name: split_joined(found, (self.config[widths[name]],), experts, name)
            for name, found in states.items()
        }
        return [{name: parts[name][index] for name in parts} for index in range(experts)]

    def first_expert_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = {name: kwargs[name] for name in self.interface.text_inputs if kwargs.get(name) is not None}
        return args, {**kwargs, **self.split_by_expert(**states)[0]}

    def as_prediction(self, sample: Tensor, context: StageContext) -> Tensor:
        assert isinstance(context, TokenContext)
        return as_map(sample, context.grid)

    def as_output(self, prediction: Tensor) -> Tensor:
        return as_tokens(prediction)


class UnpackedEnsemble(TransformerEnsemble):
    """The base of drop-ins of transformers that take and return latents as a map, not packed as tokens."""

    def as_prediction(self, sample: Tensor, context: StageContext) -> Tensor:
        return fold(sample)

    def as_output(self, prediction: Tensor) -> Any:
        return self.interface.from_latents(unfold(prediction))


def refuse_attention_options(options: Mapping[str, Any] | None, family: str) -> None:
    """Raise NotImplementedError for attention options beside the LoRA's scale, where blocks take none.

    family: for the message
    """
    rest, _ = attention_options(options)
    if rest:
        raise NotImplementedError(
            f"attention options {', '.join(rest)} change nothing in {family}; leave them out"
        )


def block_residuals(
    blocks: Sequence[Stage],
    controls: Sequence[Tensor] | None,
    grid: tuple[int, int],
    *,
    interval: float | None = None,
    repeat: bool = False,
) -> dict[str, Tensor]:
    """Assign ControlNet residuals to blocks: each serves several blocks in a row.

    blocks:   to which residuals are added
    controls: (B, S, C) residuals, at most one per block; None: none
    grid:     rows and columns of image tokens
    interval: number of blocks for one residual; None: as few as suffice
    repeat:   True: use all residuals in turn, again and again
    Returns stage name -> (B, C, H, W).
    """
    if not controls:
        return {}
    interval = interval or ceil(len(blocks) / len(controls))
    chosen = [index % len(controls) if repeat else int(index / interval) for index in range(len(blocks))]
    return {stage.name: as_map(controls[index], grid) for stage, index in zip(blocks, chosen, strict=True)}
