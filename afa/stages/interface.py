"""How the denoisers of a family are called, for training, evaluation and FLOP counts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from afa.errors import UserError


class ModelInterface(ABC):
    """How the denoisers of one family are called.

    `config`, an argument of many methods, is the denoiser's own config, with the `pipeline_settings` where
    guidance depends on them (see `with_settings`).

    pipeline_class:        class of the stock text-to-image pipeline
    pipeline_settings:     settings in that pipeline's own config that say how its denoiser is used, with the
                           pipeline's defaults; they must be equal in all experts
    latents_input:         argument of the denoiser's forward that takes the noisy latents
    timestep_input:        argument of it that takes the timestep
    max_sequence_length:   length of a prompt in tokens, as the stock pipelines pad it
    patch:                 the height and width of the latents must be multiples of it
    prompt_outputs:        indices of the results of the pipeline's encode_prompt that the denoiser takes;
                           indices past the last result are ignored
    prompt_names:          names of all these results as arguments of the pipeline, in order
    concat_text:           experts may have different text encoders; their states are then concatenated on the
                           feature axis
    changes_text:          blocks change text tokens together with image tokens
    frozen_text_encoders:  fine-tunes leave the text encoders unchanged; all experts have the same ones
    shared_config_keys:    config keys that must be equal in all experts: they change what features or
                           predictions mean, but not the stages
    guidance_scale:        default guidance strength; None: the models have no guidance
    guidance_from_zero:    the pipelines' own guidance_scale is smaller by 1: 0 is none
    variable_length:       the text states of a batch are as long as its longest prompt, and
                           `select_prompt_outputs` returns (states, mask)
    empty_prompt:          of guidance
    negative_outputs:      indices of the results of encode_prompt that hold the empty prompt of guidance,
                           where the pipeline encodes it otherwise than prompts; (): it is encoded like them
    prompt_first:          where one pass predicts with and without the prompt, the pipelines put the half of
                           the batch that has the prompt first
    marks_passes:          pipelines that make two passes for guidance say which one runs (cache_context)
    aggregator_tokenizers: indices of the pipeline's tokenizers whose text states the aggregators see
    prompt_offset:         tokens of a template that stand before the prompt in the text states
    weighted_prompts:      all text encoders are CLIP's, which take weights of words and prompts in chunks
    reads_values:          the stock forward reads values of its inputs, so it does not run on the meta device
    """

    pipeline_class: str
    pipeline_settings: ClassVar[Mapping[str, Any]] = {}
    latents_input: str = "hidden_states"
    timestep_input: str = "timestep"
    max_sequence_length: int
    patch: int = 1
    prompt_outputs: tuple[int, ...]
    prompt_names: tuple[str, ...] = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    concat_text: bool
    changes_text: bool = True
    frozen_text_encoders: bool = True
    shared_config_keys: tuple[str, ...]
    guidance_scale: float | None = None
    guidance_from_zero: bool = False
    variable_length: bool = False
    empty_prompt: str = ""
    negative_outputs: tuple[int, ...] = ()
    prompt_first: bool = False
    marks_passes: bool = True
    aggregator_tokenizers: tuple[int, ...] = (0,)
    prompt_offset: int = 0
    weighted_prompts: bool = False
    reads_values: bool = False

    def pipeline_name(self, text_encoders: int, config: Any = None) -> str:
        """Return the class name of the stock text-to-image pipeline.

        text_encoders: their number
        config:        None: any of the family's pipelines, for what they have in common
        """
        return self.pipeline_class

    def with_settings(self, config: Any, settings: Mapping[str, Any]) -> Any:
        """Return a denoiser's config with the settings of its pipeline that say how it is used.

        settings: of the pipeline, by name; for those that are missing, its defaults are taken
        """
        if not self.pipeline_settings:
            return config
        given = {name: settings.get(name) for name in self.pipeline_settings}
        used = {name: value for name, value in given.items() if value is not None}
        return FrozenDict({**config, **self.pipeline_settings, **used})

    def prompt_tokens(self, encoders: Sequence[Any]) -> int:
        """Return the length of a prompt in tokens. encoders: configs of the model's text encoders, if any."""
        return self.max_sequence_length

    def sample_size(self, config: Any) -> Any:
        """Return the side of the latents the model is made for, or (height, width); None if it is unknown."""
        return config.sample_size

    def largest_side(self, config: Any) -> int:
        """Return the larger side of the latents the model is made for; 0 if it is unknown."""
        found = self.sample_size(config)
        return int(found or 0) if isinstance(found, int | None) else max(found)

    def latent_channels(self, config: Any) -> int:
        """Return the number of channels of the latents."""
        return int(config.in_channels)

    def select_prompt_outputs(self, encoded: Sequence[Any]) -> tuple[Tensor, ...]:
        """Select from the results of the pipeline's encode_prompt what the denoiser takes, batch first."""
        return tuple(encoded[place] for place in self.prompt_outputs if place < len(encoded))

    def encode_prompts(
        self, encode: Callable[[list[str]], Sequence[Any]], captions: list[str]
    ) -> dict[str, Any]:
        """Encode captions and the empty prompt of guidance; return them as arguments of the pipeline.

        encode: the pipeline's encode_prompt
        """
        return dict(zip(self.prompt_names, encode(captions), strict=False))

    def as_read(self, config: Any, tokenizer: Any, prompt: str) -> str:
        """Return the text that the text encoder reads for a prompt, all of which the denoiser gets.

        It is the prompt, or a chat around it.
        """
        return prompt

    def prompt_room(self, tokenizer: Any, longest: int) -> int:
        """Return how many of `longest` tokens the pipeline's template leaves a prompt and special tokens."""
        return longest

    def guidance_kwargs(self, strength: float) -> dict[str, Any]:
        """Return the pipeline's argument for this guidance strength, for prompts that are encoded already."""
        return {"guidance_scale": max(strength - 1, 0.0) if self.guidance_from_zero else strength}

    def split_guidance(self, both: Any) -> tuple[Any, Any]:
        """Split the rows of a pass with and without the prompt, as the stock pipelines order them.

        both: (2B, …), or a list of 2B entries
        Returns the half without and the half with the prompt.
        """
        half = len(both) // 2
        first, second = both[:half], both[half:]
        return (second, first) if self.prompt_first else (first, second)

    def join_guidance(self, without: Tensor, prompted: Tensor) -> Tensor:
        """Join both halves of such a pass: the inverse of `split_guidance`."""
        return torch.cat([prompted, without] if self.prompt_first else [without, prompted])

    @abstractmethod
    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        """Return the arguments of a denoiser call that depend on the prompts, batch first.

        parts: the encoded prompts, see `select_prompt_outputs`
        sizes: (B, 6), SDXL's micro-conditioning
        """

    @abstractmethod
    def empty_conditions(
        self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]
    ) -> dict[str, Any]:
        """Return conditions without content, to count or measure. empty: makes a tensor of a given shape."""

    def denoiser_kwargs(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        """Return all keyword arguments of a denoiser call.

        noisy:      (B, C, H, W) latents
        times:      (B,) timesteps in the scheduler's unit
        conditions: see `conditions`
        """
        return {self.latents_input: noisy, self.timestep_input: times, **conditions}

    def with_prompt(
        self, config: Any, call: Mapping[str, Any], conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of a denoiser call with another prompt. conditions: see `conditions`"""
        times = torch.as_tensor(self.timestep_from_model(call[self.timestep_input]))
        made = self.denoiser_kwargs(config, self.latents(call), times, dict(conditions))
        return {**call, **{name: made[name] for name in conditions}}

    def timestep_from_model(self, timestep: Tensor | float | int) -> Tensor | float | int:
        """Convert the timestep of a denoiser call to the scheduler's unit."""
        return timestep

    def timestep_to_model(self, times: Tensor) -> Tensor:
        """Convert timesteps in the scheduler's unit to the unit of a denoiser call."""
        return times

    def latents(self, call: Mapping[str, Any]) -> Tensor:
        """Return the noisy latents of a call, (B, C, H, W)."""
        latents: Tensor = call[self.latents_input]
        return latents

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        """Set the scheduler's steps as the stock pipelines do. size: height and width of the latents."""
        scheduler.set_timesteps(steps)

    def scheduler_changes(self, config: Any) -> dict[str, Any]:
        """Return the settings that the stock pipelines use instead of those in the scheduler's config."""
        return {}

    def apply_guidance(self, uncond: Tensor, cond: Tensor, strength: float) -> Tensor:
        """Apply classifier-free guidance to two predictions.

        uncond, cond: (B, C, H, W) predictions without and with the prompt
        Source: Ho and Salimans, arXiv:2207.12598.
        """
        return uncond + strength * (cond - uncond)

    def to_latents(self, output: Any, size: tuple[int, int]) -> Tensor:
        """Convert the output of a denoiser to latents (B, C, H, W), in the scheduler's kind of prediction.

        output: a tensor, or a list with a tensor for each image
        size:   height and width of the latents
        """
        prediction: Tensor = output
        return prediction

    def from_latents(self, prediction: Tensor) -> Any:
        """Convert predicted latents to the form of a denoiser's output: the inverse of `to_latents`."""
        return prediction

    def stepped_to_latents(self, prediction: Tensor, size: tuple[int, int]) -> Tensor:
        """Convert what the stock pipeline gives to its scheduler to latents (B, C, H, W).

        It has the form of a denoiser's output, unless a family says otherwise.
        """
        return self.to_latents(prediction, size)

    def default_guidance(self, config: Any) -> float | None:
        """Return the stock pipeline's default guidance strength; None: the models have no guidance."""
        return self.guidance_scale

    def pipeline_guidance(
        self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None
    ) -> dict[str, Any]:
        """Return the stock pipeline's arguments for the guidance of `count` images.

        This version is for models with classifier-free guidance; others override it.
        strength: guidance strength; None: the default
        negative: negative prompt; None: none
        true:     strength of classifier-free guidance for models that also have a built-in one
        Raises UserError for what the models cannot do.
        """
        strength = self.default_guidance(config) if strength is None else strength
        if true is not None:
            raise UserError(
                f"true guidance {true:g} is for models whose own guidance is built in, "
                "and that of these models is not; use --guidance"
            )
        if negative is not None and strength is not None and strength <= 1:
            raise UserError(
                f"guidance {strength:g} turns guidance off, so a negative prompt changes nothing; "
                "give more than 1, or leave that out"
            )
        return {
            **({"guidance_scale": None} if strength is None else self.guidance_kwargs(strength)),
            "negative_prompt": None if negative is None else [negative] * count,
        }

    def default_cfg_scale(self, config: Any) -> float:
        """Return the default strength of guidance that needs two passes.

        It is 1 (no guidance) for models with built-in guidance or without guidance.
        """
        return self.default_guidance(config) or 1.0

    def why_no_batched_guidance(self, config: Any) -> str:
        """Say why one pass cannot predict with and without the prompt side by side; "" if it can.

        Returns the end of a sentence, for error messages.
        """
        return ""
