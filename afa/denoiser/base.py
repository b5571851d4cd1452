"""The base class of the drop-in denoisers of all families: experts, aggregators, and hooks of a pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from afa.aggregators.base import Aggregator
from afa.aggregators.registry import Recipe
from afa.denoiser.forward import Adjuster, Converter, Observer, ParallelStages, PassOptions, run_stages
from afa.denoiser.guidance import SharedGuidance
from afa.denoiser.hooks import WeightMaps
from afa.denoiser.lora import DenoiserLoras, applied, lora_scaled
from afa.denoiser.parallel import ExpertGroup, share_experts
from afa.denoiser.placement import fused_stages
from afa.denoiser.reuse import InnerStages, ReusesSteps
from afa.denoiser.schedule import Conversion
from afa.places import check_name
from afa.stages.interface import ModelInterface
from afa.stages.original_names import Layers, original_layers
from afa.stages.stage import Stage, StageContext


class EnsembleDenoiser(DenoiserLoras, SharedGuidance, ReusesSteps, ModelMixin, ConfigMixin):
    """N frozen experts and their trainable aggregators, which replace one diffusers denoiser.

    The subclass of a family adds the stock forward. `config` is the first expert's, as pipelines expect.

    experts:     the models; not copied, frozen, always in evaluation mode
    names:       unique names of the experts; None: expert_0, expert_1 …
    recipe:      how the aggregators are made; None: the default
    placement:   which stages are fused, see placement.py; None: the family's default
    text_widths: width of each text encoder's states, for pipelines that join several (SDXL)
    conversions: for each expert, how its prediction becomes the frame's kind (the frame is the shared VAE,
                 tokenizers and scheduler); None for experts of the same kind. Only predictions can be
                 converted, not features
    """

    family: ClassVar[str]
    interface: ClassVar[ModelInterface]  # how the denoiser is called
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
                f"{len(experts)} experts with names {list(self.names)}; "
                "give at least one, and each its own name"
            )
        first: Any = experts[0]
        self.register_to_config(**first.config)
        self.gradient_checkpointing = False
        self.experts = nn.ModuleList(experts).requires_grad_(False).eval()
        self.parallel_stages = _parallel_stages(self.read_stages, experts, self.names)
        self.recomputed = frozenset(stage.name for stage in self.stages)  # with gradient checkpointing
        self.placement = placement or self.default_placement
        self.text_widths = tuple(text_widths)
        self.recipe = recipe or Recipe()
        self.aggregators = nn.ModuleDict(self._aggregators())
        self.conversions = tuple(conversions) or (None,) * len(experts)
        self._check_conversions()
        if self.recipe.text_stream == "fused" and not self.interface.changes_text:
            raise ValueError(
                "text_stream fused is for blocks that change text tokens, "
                f"and those of family {self.family} only read them; leave it out"
            )
        self.share_guidance_weights = self.recipe.shared_guidance
        self._maps: WeightMaps | None = None
        self._watch: Observer | None = None
        self._adjust: Adjuster | None = None
        self.reuse = None
        self.group: ExpertGroup | None = None
        self.in_uncond_pass = False  # True in guidance's separate pass without the prompt, see cache_context
        self._first_pass: tuple[Tensor, Tensor] | None = None  # latents and prompt, see note_pass
        self._solo_expert: int | None = None

    @classmethod
    def read_stages(cls, model: Any, /) -> tuple[Stage, ...]:
        """Read one expert's model as stages. Raises ValueError for a model that is not supported."""
        raise NotImplementedError

    def _original_layers(self, model: Any) -> dict[str, Layers]:
        """Map the publisher's names of one expert's layers to diffusers' layers."""
        return original_layers(model, self.family, self.read_stages(model))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The first expert's stages; their names, channels and levels are those of all experts."""
        return tuple(same_stage[0] for same_stage in self.parallel_stages)

    def share_experts(self) -> None:
        """Keep only this process's experts: the processes of torch.distributed share them evenly.

        Each then gets the features of all experts at every fused stage (see parallel.py).
        Raises UserError if the experts cannot be shared.
        """
        self.group = share_experts(self.experts)

    @property
    def fused(self) -> list[str]:
        """The names of the stages that are fused."""
        return list(self.aggregators)

    def _aggregators(self) -> dict[str, Aggregator]:
        """Make one aggregator per fused stage, on the experts' device, in float32."""
        widths, side = self.widths, self.side
        chosen = fused_stages(self.placement, self.stages)
        device = next(self.experts.parameters()).device
        with device:
            return {
                stage.name: self.recipe.make(
                    stage, side, len(self.experts), *widths, last=stage is self.stages[-1]
                )
                for stage in self.stages
                if stage.name in chosen
            }

    def _check_conversions(self) -> None:
        """Raise ValueError if experts need a conversion that their placement or channels rule out."""
        converted = [
            name for name, found in zip(self.names, self.conversions, strict=True) if found is not None
        ]
        if not converted:
            return
        if self.fused != [self.stages[-1].name]:
            raise ValueError(
                f"the predictions of {', '.join(converted)} are of another kind than the frame's, "
                "so features have nothing in common; only predictions can be combined: "
                f"placement out, not {','.join(self.fused)}"
            )
        last = self.stages[-1]
        channels_in = self.interface.latent_channels(self.config)
        channels_out = last.channels // 4**last.level  # of latents, after the patches are unfolded
        if channels_in != channels_out:
            raise ValueError(
                f"the predictions of {', '.join(converted)} are of another kind than the frame's, "
                f"and those of models with {channels_in} channels in and {channels_out} out (inpainting) "
                "are not converted; take experts of one kind"
            )

    @property
    def side(self) -> int:
        """The larger side of the latents the experts are made for; 0 if it is unknown."""
        return self.interface.largest_side(self.config)

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of the time embedding (E) and of the text states (D) that aggregators see."""
        raise NotImplementedError

    def first_expert_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of a ControlNet: give it the first expert's part of the joined text.

        This version is for families whose experts share one text.
        """
        return args, kwargs

    def _predict(
        self,
        embed: Callable[..., tuple[Tensor, StageContext]],
        sample: Tensor,
        timestep: Tensor | float | int,
        conditions: Sequence[Mapping[str, Any]],
        prompt: Tensor,
        options: PassOptions,
        attention_kwargs: Mapping[str, Any] | None,
        return_dict: bool,
    ) -> Any:
        """Run one pass and return what the stock forward returns.

        embed:      what the stock forward does before its first block: (model, sample, timestep; by keyword
                    conditions and attention_kwargs) -> input of the first stage, context
        sample:     noisy latents, as the pipeline passes them
        conditions: N, the arguments of `embed` that each expert has of its own
        prompt:     embeddings of the call; one tensor for all steps of an image
        options:    of the family; those of the ensemble are added
        """
        processor_options, lora_scale = attention_options(attention_kwargs)
        everyone: Sequence[int] = range(len(self.experts))
        options.fuse_text = self.recipe.text_stream == "fused"
        options.checkpoint = self.recomputed if self.gradient_checkpointing else ()
        options.adjust, options.observe = self.adjuster(sample), self._observe
        time = self.interface.timestep_from_model(timestep)
        if self._maps is not None and not self.in_uncond_pass:
            self._maps.begin(time)

        def start(index: int) -> tuple[Tensor, StageContext]:
            own_inputs = self.inputs_for_expert(index, sample, timestep)
            own = {**conditions[index], "attention_kwargs": processor_options}
            return embed(self.experts[index], *own_inputs, **own)

        def run(chosen: Sequence[int], inner: InnerStages | None) -> Tensor:
            shared = self.group is not None and chosen is everyone
            own = self.group.own if self.group is not None and shared else chosen
            options.group = self.group if shared else None
            stages = [tuple(same_stage[index] for index in own) for same_stage in self.parallel_stages]
            fused = dict(self.aggregators.items()) if chosen is everyone else {}
            hidden, contexts = zip(*map(start, own), strict=True)
            options.converters = self._converters(own, sample, timestep, contexts[0])
            options.inner = inner
            return run_stages(stages, cast(dict[str, Aggregator], fused), hidden, contexts, options)

        if self.group is not None and self.reuse and self.reuse.lead:
            raise NotImplementedError("no expert can lead where several processes share the experts")
        with lora_scaled(self.experts, lora_scale):
            if self._solo_expert is None:
                prediction = self.predict_reusing(run, sample, time, prompt, everyone)
            elif self.group is None:
                prediction = self.predict_reusing(run, sample, time, prompt, (self._solo_expert,))
            else:
                alone = self._solo_expert
                prediction = self.group.from_owner(alone, partial(run, (alone,), None), sample.device)
        output = self.as_output(prediction)
        return self.output(sample=output) if return_dict else (output,)

    def as_prediction(self, sample: Tensor, context: StageContext) -> Tensor:
        """Arrange the call's latents as the output of the last stage, to compare both place by place."""
        return sample

    def as_output(self, prediction: Tensor) -> Tensor:
        """Arrange the output of the last stage as that of the stock forward: the inverse of as_prediction."""
        return prediction

    def inputs_for_expert(
        self, expert: int, noisy: Tensor, timestep: Tensor | float | int
    ) -> tuple[Tensor, Any]:
        """Return one expert's latents and timestep for a call; they differ for another kind of prediction."""
        found = self.conversions[expert]
        if found is None:
            return noisy, timestep
        own, times = found.to_expert(noisy, self.times(timestep, noisy))
        return own, self.interface.timestep_to_model(times.float())

    def _converters(
        self, chosen: Sequence[int], sample: Tensor, timestep: Tensor | float | int, context: StageContext
    ) -> dict[str, list[Converter]]:
        """Return how the prediction of each chosen expert is converted; nothing if all are of one kind."""
        if all(self.conversions[index] is None for index in chosen):
            return {}
        noisy, times = self.as_prediction(sample, context), self.times(timestep, sample)
        return {self.stages[-1].name: [_converter(self.conversions[index], noisy, times) for index in chosen]}

    def times(self, timestep: Tensor | float | int, like: Tensor) -> Tensor:
        """Return a call's timestep in the scheduler's unit, () or (B,), on the device of `like`."""
        time = torch.as_tensor(timestep, device=like.device)
        wide = time.to(torch.promote_types(time.dtype, torch.float32))  # half precision would round again
        return torch.as_tensor(self.interface.timestep_from_model(wide))

    def _observe(self, stage: str, weights: Tensor) -> None:
        """Pass a stage's weights to record_weights and watch_weights, if they are on."""
        if self._maps is not None and not self.in_uncond_pass:
            self._maps.observe(stage, weights)
        if self._watch is not None:
            self._watch(stage, weights)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move or cast the ensemble; tensors that experts share stay shared."""
        return applied(self, lambda: super(EnsembleDenoiser, self)._apply(fn, recurse))

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Note which pass of guidance runs; pipelines with two separate passes call this.

        name: cond, or uncond, whose weights are not recorded
        Nothing is cached (see enable_cache).
        """
        before, self.in_uncond_pass = self.in_uncond_pass, name == "uncond"
        try:
            yield
        finally:
            self.in_uncond_pass = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.note_pass(kwargs)
        return super().__call__(*args, **kwargs)

    def note_pass(self, call: Mapping[str, Any]) -> None:
        """Note which pass of guidance runs, where pipelines with two separate passes do not say so.

        The pass with the prompt is the first one; the other has the same latents and another prompt.
        call: arguments of the denoiser
        """
        latents, prompt = call.get(self.interface.latents_input), call.get("encoder_hidden_states")
        if self.interface.marks_passes or latents is None or prompt is None:
            return
        if self._first_pass is None or self._first_pass[0] is not latents:
            self._first_pass = latents, prompt
        self.in_uncond_pass = self._first_pass[1] is not prompt

    def train(self, mode: bool = True) -> "EnsembleDenoiser":
        """Set the mode of the aggregators; the frozen experts stay in evaluation mode."""
        self.training = mode
        self.aggregators.train(mode)
        self.experts.eval()  # what was added to one, such as a LoRA, too
        return self

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None, largest_maps_only: bool = False
    ) -> None:
        """Recompute stages in the backward pass instead of keeping their activations.

        largest_maps_only: only those that compute on the largest maps, which keep most; else all
        Raises NotImplementedError if a function is given: stages pass more than tensors.
        """
        if gradient_checkpointing_func is not None:
            raise NotImplementedError(
                "an ensemble checkpoints its stages itself; "
                "call enable_gradient_checkpointing() without a function"
            )
        self.recomputed = frozenset(
            stage.name for stage in self.stages if not largest_maps_only or stage.level == 0
        )
        self.gradient_checkpointing = True  # not the experts' own switches: that would recompute twice

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass again."""
        self.gradient_checkpointing = False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError: the inherited method would copy every expert."""
        raise NotImplementedError(
            "an ensemble is saved with Ensemble.save(folder), "
            "which refers to its experts instead of copying them"
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
            "caches between steps (FirstBlockCache and others) are not supported on an ensemble: "
            "its blocks run by stages; set denoiser.reuse instead (docs/performance.md)"
        )

    def lora_models(self) -> Sequence[Any]:
        """The experts, each of which gets the LoRAs that are loaded."""
        return list(self.experts)


def _converter(conversion: Conversion | None, noisy: Tensor, times: Tensor) -> Converter:
    return (
        (lambda prediction: prediction)
        if conversion is None
        else lambda prediction: conversion.to_frame(prediction, noisy, times)
    )


def _parallel_stages(
    stages: Callable[[nn.Module], tuple[Stage, ...]], experts: Sequence[nn.Module], names: Sequence[str]
) -> list[ParallelStages]:
    """Return stage k of every expert, for all k. Raises ValueError at the first stage that differs."""
    by_expert = [stages(expert) for expert in experts]
    first = by_expert[0]
    for name, other in zip(names[1:], by_expert[1:], strict=True):
        advice = f"Experts must share one architecture; compare them with: afa inspect {names[0]} {name}"
        for mine, theirs in zip(first, other, strict=False):
            if (mine.name, mine.channels) != (theirs.name, theirs.channels):
                raise ValueError(
                    f"'{name}' cannot join '{names[0]}': stage {theirs.name} has {theirs.channels} channels, "
                    f"expected {mine.name} with {mine.channels}. {advice}"
                )
        if len(first) != len(other):
            raise ValueError(
                f"'{name}' cannot join '{names[0]}': it has {len(other)} stages, "
                f"expected {len(first)}. {advice}"
            )
    return list(zip(*by_expert, strict=True))


# options of attention processors that belong to unsupported features
REFUSED = {"gligen": "GLIGEN", "ip_adapter_image_embeds": "IP-Adapter", "ip_hidden_states": "IP-Adapter"}


def split_joined(states: Tensor, widths: Sequence[int], experts: int, what: str) -> list[Tensor]:
    """Split states that are joined on the last axis.

    The order is: encoder 1 of every expert, encoder 2 of every expert, …
    states:  (…, ΣD) for all experts, or (…, N·ΣD)
    widths:  D of each encoder
    experts: N
    what:    name of the states, for messages
    Returns N tensors (…, ΣD). Raises ValueError for any other width.
    """
    single = sum(widths)
    if states.shape[-1] == single:
        return [states] * experts
    if states.shape[-1] != experts * single:
        raise ValueError(
            f"{what} is {states.shape[-1]} wide; "
            f"expected {single} (for all experts) or {experts * single} (for {experts} experts)"
        )
    per_encoder = [
        part.chunk(experts, dim=-1) for part in states.split([experts * width for width in widths], dim=-1)
    ]
    return [
        parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1) for parts in zip(*per_encoder, strict=True)
    ]


def attention_options(options: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, float]:
    """Split the attention processors' options into the options without the LoRA scale, and that scale."""
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
