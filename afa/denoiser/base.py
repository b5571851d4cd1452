"""What the drop-in denoisers of all families share: experts, aggregators, and the switches of a pass."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from afa.aggregators.base import Aggregator
from afa.aggregators.registry import Recipe
from afa.denoiser.forward import Adjuster, Answer, Column, Observer, Residuals, walk
from afa.denoiser.hooks import WeightMaps
from afa.denoiser.lora import DenoiserLoras, applied
from afa.denoiser.placement import fused_stages
from afa.denoiser.schedule import Conversion
from afa.places import check_name
from afa.stages.call import Call
from afa.stages.original_names import Layers, original_layers
from afa.stages.stage import Stage, Trace


class EnsembleDenoiser(DenoiserLoras, ModelMixin, ConfigMixin):
    """N frozen experts and their trainable aggregators, in the place of one diffusers denoiser.

    A family's subclass adds the stock forward. `config` is the first expert's, so pipelines find what they ask for.
    experts: the models, not copied; they are frozen and stay in evaluation mode.
    names: of the experts, in their order. placement: see placement.py. recipe: how the aggregators are made.
    text_widths: of the states of each text encoder, where a pipeline puts several side by side (SDXL).
    conversions: of experts whose predictions are of another kind than the frame's; None for the others. Only predictions can be.
    """

    family: ClassVar[str]
    call: ClassVar[Call]  # how the denoiser is called
    read_stages: ClassVar[Callable[[Any], tuple[Stage, ...]]]  # of one expert's model
    default_placement: ClassVar[str] = "layers"
    output: ClassVar[type] = Transformer2DModelOutput  # what the stock forward returns
    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["aggregators"]

    def __init__(
        self,
        experts: Sequence[nn.Module],
        names: Sequence[str] | None = None,
        recipe: Recipe | None = None,
        placement: str | Sequence[str] | None = None,
        text_widths: Sequence[int] = (),
        conversions: Sequence[Conversion | None] = (),
    ) -> None:
        super().__init__()
        self.names = tuple(
            check_name(name, "an expert")
            for name in names or [f"expert_{index}" for index in range(len(experts))]
        )
        if not experts or len(self.names) != len(experts) or len(set(self.names)) != len(experts):
            raise ValueError(
                f"{len(experts)} experts with names {list(self.names)}; give at least one, and each its own name"
            )
        first: Any = experts[0]
        self.register_to_config(**first.config)
        self.gradient_checkpointing = False
        self.experts = nn.ModuleList(experts).requires_grad_(False).eval()
        self.columns = _columns(self.read_stages, experts, self.names)
        self.placement = placement or self.default_placement
        self.text_widths = tuple(text_widths)
        self.recipe = recipe or Recipe()
        self.aggregators = nn.ModuleDict(self._aggregators())
        self.conversions = tuple(conversions) or (None,) * len(experts)
        self._check_conversions()
        if self.recipe.text_stream == "fused" and not self.call.streams:
            raise ValueError(
                f"text_stream fused is for blocks that change text tokens, and those of family {self.family} only read them; leave it out"
            )
        self._maps: WeightMaps | None = None
        self._watch: Observer | None = None
        self._adjust: Adjuster | None = None
        self.aside = False  # in a pass that guidance makes without the prompt, by itself (see cache_context)
        self._only: int | None = None

    def _original_layers(self, model: Any) -> dict[str, Layers]:
        """The publisher's names of one expert's layers."""
        return original_layers(model, self.family, self.read_stages(model))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, as the first expert has them; names, channels and levels hold for all."""
        return tuple(column[0] for column in self.columns)

    @property
    def fused(self) -> list[str]:
        """The names of the stages that are fused."""
        return list(self.aggregators)

    def _aggregators(self) -> dict[str, Aggregator]:
        """One aggregator per fused stage, on the experts' device, in float32 until someone casts the ensemble."""
        widths, side = self.widths, self.side
        chosen = fused_stages(self.placement, self.stages)
        device = next(self.experts[0].parameters()).device
        with device:
            return {
                stage.name: self.recipe.make(
                    stage, side, len(self.experts), *widths, last=stage is self.stages[-1]
                )
                for stage in self.stages
                if stage.name in chosen
            }

    def _check_conversions(self) -> None:
        """Raises ValueError where predictions would have to be converted that are not, or not only, latents."""
        converted = [
            name for name, found in zip(self.names, self.conversions, strict=True) if found is not None
        ]
        if not converted:
            return
        if self.fused != [self.stages[-1].name]:
            raise ValueError(
                f"the predictions of {', '.join(converted)} are of another kind than the frame's, so features have nothing in common;"
                f" only predictions can be combined: placement out, not {','.join(self.fused)}"
            )
        last = self.stages[-1]
        taken, answered = (
            self.call.latent_channels(self.config),
            last.channels // 4**last.level,
        )  # of a map, patches unfolded
        if taken != answered:
            raise ValueError(
                f"the predictions of {', '.join(converted)} are of another kind than the frame's, and those of models with"
                f" {taken} channels in and {answered} out (inpainting) are not converted; take experts of one kind"
            )

    @property
    def side(self) -> int:
        """The larger side of the latents the experts are made for; 0 if nobody says."""
        found = self.call.side(self.config)
        return int(found or 0) if isinstance(found, int | None) else max(found)

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the time embedding and of the text that aggregators see."""
        raise NotImplementedError

    def narrow(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook for a ControlNet: hand it the first expert's part of joined text. Here: the text that all share."""
        return args, kwargs

    def _run(
        self,
        begin: Callable[[int], tuple[Tensor, Trace]],
        timestep: Tensor | float | int,
        residuals: Residuals,
        odd_size: bool = False,
        skipped: Collection[str] = (),
        noisy: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """One pass. begin: starts the expert of that index. noisy: the call's latents as the last stage lays predictions out.

        The other arguments: see walk.
        """
        chosen = range(len(self.experts)) if self._only is None else (self._only,)
        hidden, traces = zip(*(begin(index) for index in chosen), strict=True)
        columns = self.columns
        aggregators = cast(Mapping[str, Aggregator], self.aggregators)  # a ModuleDict is one in all but name
        if self._only is not None:
            columns, aggregators = [(column[self._only],) for column in columns], {}
        if self._maps is not None and not self.aside:
            self._maps.begin(self.call.counted(timestep))
        observe = None if self._maps is None and self._watch is None else self._observe
        return walk(
            columns,
            aggregators,
            hidden,
            traces,
            residuals,
            odd_size=odd_size,
            observe=observe,
            checkpoint=self.gradient_checkpointing,
            skipped=skipped,
            blend_streams=self.recipe.text_stream == "fused",
            answers=self._answers(chosen, timestep, noisy),
            adjust=self._adjust,
        )

    def given(self, expert: int, noisy: Tensor, timestep: Tensor | float | int) -> tuple[Tensor, Any]:
        """What one expert is handed for a call's latents and timestep: the same, unless its predictions are of another kind."""
        found = self.conversions[expert]
        if found is None:
            return noisy, timestep
        own, times = found.given(noisy, self.times(timestep, noisy))
        return own, self.call.told(times.float())

    def _answers(
        self, chosen: Sequence[int], timestep: Tensor | float | int, noisy: Callable[[], Tensor] | None
    ) -> list[Answer]:
        """What becomes of the prediction of every expert that is run; none if they are of one kind."""
        if all(self.conversions[index] is None for index in chosen):
            return []
        if noisy is None:
            raise NotImplementedError(
                f"predictions of family {self.family} are not converted; take experts of one kind"
            )
        latents = noisy()
        times = self.times(timestep, latents)
        return [_answer(self.conversions[index], latents, times) for index in chosen]

    def times(self, timestep: Tensor | float | int, like: Tensor) -> Tensor:
        """A call's timestep as schedulers count it, () or (B,), where `like` is; half precision would round it once more."""
        told = torch.as_tensor(timestep, device=like.device)
        return torch.as_tensor(self.call.counted(told.to(torch.promote_types(told.dtype, torch.float32))))

    def _observe(self, stage: str, weights: Tensor) -> None:
        """Show a stage's weights to whoever wants them."""
        if self._maps is not None and not self.aside:
            self._maps.observe(stage, weights)
        if self._watch is not None:
            self._watch(stage, weights)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast; what experts share stays shared."""
        return applied(self, lambda: super(EnsembleDenoiser, self)._apply(fn, recurse))

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Here pipelines whose guidance makes a pass of its own say which one it is: cond or uncond, whose weights are not recorded.

        Nothing is cached (see enable_cache).
        """
        before, self.aside = self.aside, name == "uncond"
        try:
            yield
        finally:
            self.aside = before

    def train(self, mode: bool = True) -> "EnsembleDenoiser":
        """Only aggregators have a training mode; experts stay as they were frozen."""
        self.training = mode
        self.aggregators.train(mode)
        self.experts.eval()  # what was added to one, such as a LoRA, too
        return self

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None
    ) -> None:
        """Recompute each stage in the backward pass: memory of one stage, for one more forward.

        A function of the caller's own is refused: stages pass more than tensors.
        """
        if gradient_checkpointing_func is not None:
            raise NotImplementedError(
                "an ensemble checkpoints its stages itself; call enable_gradient_checkpointing() without a function"
            )
        self.gradient_checkpointing = True  # not the experts' own switches: that would recompute twice

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations again."""
        self.gradient_checkpointing = False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the inherited one would copy every expert."""
        raise NotImplementedError(
            "an ensemble is saved with Ensemble.save(folder), which refers to its experts instead of copying them"
        )

    def enable_freeu(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "FreeU is not supported on an ensemble: it rewrites features between stages"
        )

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "IP-Adapter is not supported on an ensemble: its projections belong to one model's attention"
        )

    def enable_cache(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "caches between steps (FirstBlockCache and others) are not supported on an ensemble: its blocks run by stages"
        )

    def lora_models(self) -> Sequence[Any]:
        """The experts, each of which gets the LoRAs that are loaded."""
        return list(self.experts)


def _answer(conversion: Conversion | None, noisy: Tensor, times: Tensor) -> Answer:
    return (
        (lambda prediction: prediction)
        if conversion is None
        else lambda prediction: conversion.answer(prediction, noisy, times)
    )


def _columns(
    stages: Callable[[nn.Module], tuple[Stage, ...]], experts: Sequence[nn.Module], names: Sequence[str]
) -> list[Column]:
    """Stage k of every expert, for all k. Raises ValueError at the first stage where two experts differ."""
    walked = [stages(expert) for expert in experts]
    for name, other in zip(names[1:], walked[1:], strict=True):
        for mine, theirs in zip(walked[0], other, strict=False):
            if (mine.name, mine.channels) != (theirs.name, theirs.channels):
                raise ValueError(
                    f"'{name}' cannot join '{names[0]}': stage {theirs.name} has {theirs.channels} channels, expected {mine.name} with"
                    f" {mine.channels}. Experts must share one architecture; compare them with: afa inspect {names[0]} {name}"
                )
        if len(walked[0]) != len(other):
            raise ValueError(
                f"'{name}' cannot join '{names[0]}': it has {len(other)} stages, expected {len(walked[0])}."
                f" Experts must share one architecture; compare them with: afa inspect {names[0]} {name}"
            )
    return list(zip(*walked, strict=True))


# options of attention processors that belong to something an ensemble does not do
REFUSED = {"gligen": "GLIGEN", "ip_adapter_image_embeds": "IP-Adapter", "ip_hidden_states": "IP-Adapter"}


def split_joined(states: Tensor, widths: Sequence[int], experts: int, what: str) -> list[Tensor]:
    """Take apart states joined on the last axis as [encoder 1 of every expert | encoder 2 of every expert | …].

    (…, ΣD) belongs to every expert; (…, N·ΣD) gives each (…, ΣD). Any other width raises ValueError.
    """
    single = sum(widths)
    if states.shape[-1] == single:
        return [states] * experts
    if states.shape[-1] != experts * single:
        raise ValueError(
            f"{what} is {states.shape[-1]} wide; expected {single} (for all experts) or {experts * single} (for {experts} experts)"
        )
    per_encoder = [
        part.chunk(experts, dim=-1) for part in states.split([experts * width for width in widths], dim=-1)
    ]
    return [
        parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1) for parts in zip(*per_encoder, strict=True)
    ]


def first_parts(kwargs: Mapping[str, Any], widths: Mapping[str, int], experts: int) -> dict[str, Any]:
    """A call with the first expert's part of joined states, as far as they are there. widths: of one expert's, by argument."""
    own = {
        name: split_joined(kwargs[name], (width,), experts, name)[0]
        for name, width in widths.items()
        if kwargs.get(name) is not None
    }
    return {**kwargs, **own}


def attention_options(options: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, float]:
    """The attention processors' options without the LoRA scale, and that scale."""
    if options is None:
        return None, 1.0
    for name, what in REFUSED.items():
        if name in options:
            raise NotImplementedError(
                f"{what} (attention option '{name}') is not supported by an ensemble; leave it out"
            )
    rest = dict(options)
    scale = rest.pop("scale", 1.0)
    return rest, scale
