"""What transformer families share: how blocks become stages, how the model is called, whose text is whose.

A family's file adds what differs: its lists of blocks, what the stock forward does before its first block
(`embed`), the signature of that forward, and what its pipelines do differently from others.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from math import ceil
from typing import Any, ClassVar
from weakref import ref

from torch import Tensor, nn

from afa.denoiser.base import EnsembleDenoiser, split_joined
from afa.stages.interface import ModelInterface
from afa.stages.stage import Stage, StageContext, base_layer
from afa.stages.tokens import LEVEL, Block, Head, TokenContext, as_map, as_tokens, pack, set_steps, unpack

TIMES = 1000  # timesteps of a flow's schedule; models of packed latents take a fraction of them, 0 to 1


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
    """How transformers of packed latents are called: 2×2 pixels a token, timesteps from 0 to 1."""

    @abstractmethod
    def grid(self, call: Mapping[str, Any]) -> tuple[int, int]:
        """Return the rows and columns of image tokens of a denoiser call."""

    def sample_size(self, config: Any) -> Any:
        return 128  # of latents of 1024 px, the default of the stock pipelines; no config records it

    def latent_channels(self, config: Any) -> int:
        return int(config.in_channels) // self.patch**2

    def denoiser_kwargs(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        timestep = self.timestep_to_model(times.to(noisy.dtype))
        return {"hidden_states": pack(noisy), "timestep": timestep, **conditions}

    def timestep_from_model(self, timestep: Tensor | float | int) -> Tensor | float | int:
        return timestep * TIMES

    def timestep_to_model(self, times: Tensor) -> Tensor:
        return times / TIMES

    def latents(self, call: Mapping[str, Any]) -> Tensor:
        rows, columns = self.grid(call)
        return unpack(call["hidden_states"], (rows * self.patch, columns * self.patch))

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        set_steps(scheduler, steps, size[0] * size[1] // self.patch**2)

    def to_latents(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        return unpack(output, size)

    def from_latents(self, prediction: Tensor) -> Tensor:
        return pack(prediction)


@dataclass(frozen=True)
class BlockList:
    """One list of blocks of a transformer.

    name:   of the list in the model
    letter: of the names of its stages: J for J00, J01 …
    group:  of its stages, see Stage
    stage:  class of its stages
    """

    name: str
    letter: str
    group: str = ""
    stage: type[Block] = Block


class TransformerEnsemble(EnsembleDenoiser):
    """The base of transformer drop-ins; latents are packed unless a family says otherwise.

    block_lists:    in the order in which the stock forward runs them
    patch_size:     of the config; another one is refused
    unused_in_last: names of the layers in the last block whose output does not influence the prediction
    """

    interface: ClassVar[TransformerInterface]
    block_lists: ClassVar[tuple[BlockList, ...]]
    patch_size: ClassVar[int] = 2**LEVEL
    unused_in_last: ClassVar[tuple[str, ...]] = ()

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
                level=LEVEL,
                block=f"{part.name}.{index}",
                group=part.group,
                module=module,
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
        return Head(name="OUT", channels=channels, level=LEVEL, model=model)

    def tell_passes_apart(self) -> None:
        """Set `in_uncond_pass` at every call, for pipelines that do not open a cache_context for each pass.

        Guidance's pass without the prompt comes second: it takes the same latents as the pass before, the
        same tensor, with another prompt.
        """
        self._last_call: tuple[Any, ...] = ()  # weak references to latents and prompt
        self.register_forward_pre_hook(TransformerEnsemble._note_pass, with_kwargs=True)

    def _note_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature(self.forward).bind(*args, **kwargs).arguments
        call = tuple(given[name] for name in (self.interface.latents_input, *self.interface.text_inputs))
        before = tuple(found() for found in self._last_call)
        if not before or before[0] is not call[0]:
            self.in_uncond_pass = False
        elif any(one is not other for one, other in zip(before[1:], call[1:], strict=True)):
            self.in_uncond_pass = True
        self._last_call = tuple(map(ref, call))

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
