"""How a family's denoiser is called: what training, measuring and counting need to know besides its stages."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from afa.errors import UserError


class Call(ABC):
    """A family's way of calling its denoisers. config: always the denoiser's own.

    tokens: of a prompt, as the stock pipelines pad it. patch: a side of the latents must divide by it.
    encoded: which results of the pipeline's encode_prompt a denoiser is given, as far as there are as many.
    named: what the pipeline calls them as arguments, all of them, in order.
    joined: whether experts may have different text encoders, whose states are then joined on the feature axis.
    streams: whether blocks change text tokens together with the image's.
    frozen_text: whether fine-tunes leave the text encoders as they were, so that experts have the same ones.
    alike: settings that experts must have in common, because they change what features or predictions mean, not the stages.
    guidance: its strength where nobody says; None: the models know none.
    varying: whether a batch's states are as long as its longest prompt, and parts are (states, a mask of them).
    nothing: the prompt that guidance takes for none.
    read: which of the pipeline's tokenizers the text states that aggregators see come from, one behind the other.
    """

    tokens: int
    patch: int
    encoded: tuple[int, ...]
    named: tuple[str, ...] = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    joined: bool
    streams: bool = True
    frozen_text: bool = True
    alike: tuple[str, ...]
    guidance: float | None = None
    varying: bool = False
    nothing: str = ""
    read: tuple[int, ...] = (0,)

    @abstractmethod
    def pipeline(self, text_encoders: int) -> str:
        """The stock text-to-image pipeline, by the number of text encoders."""

    def prompt_tokens(self, encoders: Sequence[Any]) -> int:
        """Of a prompt, given the configs of a model's own text encoders, if it brings some."""
        return self.tokens

    @abstractmethod
    def side(self, config: Any) -> Any:
        """Of the latents a model is made for, or (height, width); None if nobody says."""

    def latent_channels(self, config: Any) -> int:
        """Of the latents."""
        return int(config.in_channels)

    def parts(self, encoded: Sequence[Any]) -> tuple[Tensor, ...]:
        """What a denoiser is given of the results of the pipeline's encode_prompt, batch first."""
        return tuple(encoded[place] for place in self.encoded if place < len(encoded))

    def prompts(self, encode: Callable[[list[str]], Sequence[Any]], captions: list[str]) -> dict[str, Any]:
        """A pipeline's arguments for captions that are encoded already, guidance's empty prompt among them. encode: its encode_prompt."""
        return dict(zip(self.named, encode(captions), strict=False))

    def guiding(self, strength: float) -> dict[str, Any]:
        """A pipeline's argument for guidance of that strength, where the prompts are encoded already."""
        return {"guidance_scale": strength}

    @abstractmethod
    def conditions(self, config: Any, parts: Sequence[Tensor], sizes: Tensor) -> dict[str, Any]:
        """What of a call belongs to the prompts, batch first. parts: the encoded ones; sizes (B, 6): SDXL's micro-conditioning."""

    @abstractmethod
    def blank(self, config: Any, batch: int, tokens: int, empty: Callable[..., Tensor]) -> dict[str, Any]:
        """Conditions without content. empty: makes a tensor of a shape."""

    @abstractmethod
    def arguments(
        self, config: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Any]
    ) -> dict[str, Any]:
        """The call for noisy latents (B, C, H, W) at times (B,), as schedulers count them."""

    def counted(self, timestep: Tensor | float | int) -> Tensor | float | int:
        """A call's timestep as schedulers count it."""
        return timestep

    def told(self, times: Tensor) -> Tensor:
        """Times as schedulers count them, as a call has them: the inverse of counted."""
        return times

    @abstractmethod
    def latents(self, call: Mapping[str, Any]) -> Tensor:
        """The noisy latents of a call, (B, C, H, W)."""

    def schedule(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        """Set a scheduler's steps as the pipelines do for latents of that size."""
        scheduler.set_timesteps(steps)

    def combined(self, without: Tensor, told: Tensor, strength: float) -> Tensor:
        """Classifier-free guidance, of predictions (B, C, H, W) without and with the prompt. Source: Ho and Salimans, arXiv:2207.12598."""
        return without + strength * (told - without)

    def prediction(self, answer: Tensor, size: tuple[int, int]) -> Tensor:
        """A denoiser's answer as latents of that size, (B, C, H, W)."""
        return answer

    def answer(self, prediction: Tensor) -> Tensor:
        """Predicted latents as a denoiser answers them: the inverse of prediction."""
        return prediction

    def strength(self, config: Any) -> float | None:
        """Of guidance where nobody says: as the stock pipeline has it; None: the models know none."""
        return self.guidance

    def guided(
        self, config: Any, count: int, strength: float | None, negative: str | None, true: float | None
    ) -> dict[str, Any]:
        """The stock pipeline's arguments for guidance of `count` images.

        strength: None: as above. negative: what the images should not show. true: of classifier-free guidance beside the one
        that is built in. Raises UserError for what these models cannot do. Here: for models with classifier-free guidance.
        """
        strength = self.strength(config) if strength is None else strength
        if true is not None:
            raise UserError(
                f"true guidance {true:g} is for models whose own guidance is built in, and that of these models is not; use --guidance"
            )
        if negative is not None and strength is not None and strength <= 1:
            raise UserError(
                f"guidance {strength:g} turns guidance off, so a negative prompt changes nothing; give more than 1, or leave that out"
            )
        return {
            "guidance_scale": strength,
            "negative_prompt": None if negative is None else [negative] * count,
        }

    def classifier_free(self, config: Any) -> float:
        """Strength, where nobody says, of guidance by two passes: the same, 1 (none) where guidance is told to the model or unknown to it."""
        return self.strength(config) or 1.0

    def unpaired(self, config: Any) -> str:
        """Why no pass makes predictions with a prompt and without one side by side, as the end of a sentence; "" if they are so made."""
        return ""
