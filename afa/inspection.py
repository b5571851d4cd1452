"""What is known about experts, and about the ensemble they would make, before any weight is read."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afa.aggregators.registry import Recipe, count_parameters, find_aggregator
from afa.checkpoint.manifest import AGGREGATORS as AGGREGATORS_FILE
from afa.checkpoint.manifest import Manifest, read_manifest, recipe_of
from afa.checkpoint.sources import find_experts
from afa.cost import Flops, alike, count_flops, time_step
from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.placement import choices
from afa.denoiser.schedule import kind_of, noise_of_schedule
from afa.errors import UserError
from afa.experts.compatible import mismatches, only_predictions
from afa.experts.description import (
    ExpertDescription,
    describe_config,
    describe_expert,
    shared_text_encoders,
)
from afa.experts.donor import NO_DONOR, DonorSpec
from afa.experts.expert import Expert
from afa.experts.headers import check_fit, read_file
from afa.experts.lending import lend
from afa.experts.load import check_names
from afa.experts.lora import lora_numbers, place_of
from afa.experts.spec import ExpertSpec
from afa.latents import latents_of
from afa.memory import sampling_memory
from afa.models.registry import FAMILIES
from afa.places import as_typed
from afa.text_encoder import width_of

DTYPES = {"float32": 4, "float16": 2}  # bytes a number; bfloat16 is as large as float16
VAE_FACTOR = 8  # of all known VAEs of SD and SDXL; for denoisers that come without one


@dataclass(frozen=True)
class Subject:
    """What is inspected: experts, and how they are, or would be, fused.

    descriptions: of the experts, without weights
    recipe:       of the aggregators
    placement:    where aggregators stand; None: the family's default
    manifest:     of a saved ensemble
    folder:       of a saved ensemble
    """

    descriptions: list[ExpertDescription]
    recipe: Recipe
    placement: str | Sequence[str] | None
    manifest: Manifest | None = None
    folder: Path | None = None

    @classmethod
    def from_sources(
        cls,
        sources: Sequence[str],
        config: str | None,
        recipe: Recipe,
        placement: str | None,
        prediction_type: str | None = None,
        lent: DonorSpec = NO_DONOR,
    ) -> "Subject":
        """Experts as Ensemble.from_experts takes them.

        lent: what is given to experts that are denoisers alone
        Raises UserError for what is missing, broken or incomplete.
        """
        specs = [ExpertSpec.parse(source, prediction_type) for source in sources]
        check_names(specs)
        found = [describe_expert(spec, config) for spec in specs]
        return cls(lend(found, lent, config), recipe, placement)

    @classmethod
    def from_config(cls, config: str, count: int, recipe: Recipe, placement: str | None) -> "Subject":
        """`count` experts of a shipped architecture."""
        return cls([describe_config(f"expert_{index}", config) for index in range(count)], recipe, placement)

    @classmethod
    def from_ensemble(cls, folder: Path) -> "Subject":
        """A saved ensemble. Raises UserError if it, or one of its experts, is not complete."""
        manifest = read_manifest(folder)
        descriptions = []
        for entry, spec in zip(manifest.experts, find_experts(manifest, folder), strict=True):
            try:
                descriptions.append(describe_expert(spec, entry.config_in(folder)))
            except UserError as error:
                raise UserError(f"expert '{entry.name}' of {folder}: {error}") from None
        lent = [dataclasses.replace(one, lacking=None) for one in lend(descriptions, NO_DONOR, None)]
        return cls(lent, recipe_of(manifest), manifest.placement, manifest, folder)

    def sized(
        self, aggregator: str | None, options: Mapping[str, Any], attention_up_to: int | None
    ) -> "Subject":
        """The same with the aggregators that `afa train` would make; arguments as of Recipe.by_size."""
        first: Any = self.descriptions[0].expert.model
        family = FAMILIES[self.descriptions[0].expert.family]
        side, stages = family.interface.largest_side(first.config), family.stages(first)
        recipe = Recipe.by_size(stages, side, aggregator, options, attention_up_to)
        return dataclasses.replace(self, recipe=recipe)

    def denoiser(self) -> EnsembleDenoiser:
        """The ensemble on the meta device.

        Raises UserError if aggregators cannot be made, or a saved file does not fit.
        """
        experts = [description.expert for description in self.descriptions]
        models, names = [expert.model for expert in experts], [expert.name for expert in experts]
        try:
            denoiser = FAMILIES[experts[0].family].denoiser(models, names, self.recipe, self.placement)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None
        if self.folder is not None:
            _check_saved(denoiser.aggregators, self.folder / AGGREGATORS_FILE)
        return denoiser


def _check_saved(aggregators: nn.Module, file: Path) -> None:
    """Raises UserError if a file does not hold these aggregators."""
    if not file.is_file():
        raise UserError(f"{file.parent} is incomplete: it has no {file.name}")
    check_fit(aggregators, {name: entry.meta() for name, entry in read_file(file).items()}, str(file))


def facts(
    subject: Subject,
    resolution: int | None = None,
    batch_size: int = 1,
    time_on: torch.device | None = None,
    stores: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that `afa inspect` shows, ready for JSON.

    subject:    what is inspected
    resolution: side of the images in pixels; None: the experts' own
    batch_size: images at once
    time_on:    device on which a step is measured; None: none is
    stores:     ways to store the experts for which the memory of a step is counted
    Parts that only an ensemble has are None if the experts cannot be fused.
    """
    experts = [description.expert for description in subject.descriptions]
    reasons = _mismatches(subject, experts)
    denoiser = None if reasons else subject.denoiser()
    size = _size(subject, resolution)
    height, width = size["latent"]
    count = partial(count_flops, height=height, width=width, batch=batch_size, tokens=size["tokens"])
    everywhere = None if denoiser is None else _everywhere(subject, denoiser)
    whole = None if everywhere is None else count(everywhere)
    flops = None if denoiser is None or whole is None else whole.only(denoiser.fused)
    shared = shared_text_encoders(subject.descriptions)
    described = [
        _expert(description, same) for description, same in zip(subject.descriptions, shared, strict=True)
    ]
    weights = _memory(subject, described, denoiser)
    doubled = FAMILIES[experts[0].family].interface.default_cfg_scale(experts[0].settings) > 1
    return {
        "ensemble": None if subject.folder is None else as_typed(str(subject.folder)),
        "experts": described,
        "mismatches": reasons,
        "stages": _stages(subject.descriptions[0], denoiser, flops),
        "aggregators": None if denoiser is None else _aggregators(subject, denoiser),
        "placements": None
        if everywhere is None or whole is None or subject.folder
        else _placements(everywhere, whole),
        "cost": {
            **size,
            "batch_size": batch_size,
            "guidance_doubles": doubled,
            **weights,
            "flops": _flops(experts, count, flops),
            "time": None
            if denoiser is None or time_on is None
            else _time(denoiser, size, batch_size, time_on),
            "memory": None
            if denoiser is None or not stores
            else sampling_memory(denoiser, size, batch_size * (2 if doubled else 1), torch.bfloat16, stores),
        },
    }


def _time(
    denoiser: EnsembleDenoiser, size: Mapping[str, Any], batch: int, device: torch.device
) -> dict[str, Any]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    height, width = size["latent"]
    found = time_step(denoiser, height, width, batch, size["tokens"], device=device, dtype=dtype)
    return {"device": str(device), "dtype": str(dtype).removeprefix("torch."), **dataclasses.asdict(found)}


def _mismatches(subject: Subject, experts: Sequence[Expert]) -> list[str]:
    """Why the experts cannot be fused. Raises UserError for a placement that does not exist."""
    try:
        return mismatches(experts, features=not only_predictions(subject.placement, experts[0]))
    except ValueError as error:
        raise UserError(str(error)) from None


def _everywhere(subject: Subject, denoiser: EnsembleDenoiser) -> EnsembleDenoiser:
    """The ensemble with aggregators at all stages, which is counted once for all placements.

    A saved one, whose placement is settled, as it is.
    """
    if subject.folder is not None or denoiser.fused == [stage.name for stage in denoiser.stages]:
        return denoiser
    return dataclasses.replace(subject, placement="layers").denoiser()


def _placements(denoiser: EnsembleDenoiser, flops: Flops) -> list[dict[str, Any]]:
    """What placements of the same aggregators would cost: parameters to train, operations a step.

    denoiser: with aggregators at all stages
    flops:    of it
    """
    parameters = {name: count_parameters(aggregator) for name, aggregator in denoiser.aggregators.items()}
    return [
        {
            "placement": name,
            "fused": len(fused),
            "parameters": sum(parameters[stage] for stage in fused),
            "flops": sum(flops.aggregators[stage] for stage in fused),
            "default": name == FAMILIES[denoiser.family].placement,
        }
        for name, fused in choices(denoiser.stages).items()
    ]


def _expert(description: ExpertDescription, same: Sequence[str | None]) -> dict[str, Any]:
    expert = description.expert
    located = expert.located
    return {
        "name": expert.name,
        "source": as_typed(located.spec.source) if located else f"config {description.config}",
        "commit": located.commit if located else None,
        "config": description.config,
        "loras": [as_typed(str(lora)) for lora in located.spec.loras] if located else [],
        "family": expert.family,
        "class": type(expert.model).__name__,
        "parameters": count_parameters(expert.model),
        "dtype": description.denoiser.dtype,
        "prediction_type": None if expert.scheduler is None else kind_of(expert.scheduler),
        "noise": None if expert.scheduler is None else noise_of_schedule(expert.scheduler),
        "text_encoders": [
            _text_encoder(description, part, other)
            for part, other in zip(description.text_parts, same, strict=True)
        ],
        "vae": None if expert.vae is None else _vae(description, expert.vae),
        "lacking": description.lacking,
    }


def _text_encoder(description: ExpertDescription, part: str, same: str | None) -> dict[str, Any]:
    component = description.components[part]
    model: Any = component.model
    return {
        "part": part,
        "class": type(model).__name__,
        "width": width_of(model),
        "parameters": count_parameters(model),
        "dtype": None if description.loras_change_text else component.dtype,
        "same_as": same,
    }


def _vae(description: ExpertDescription, vae: Any) -> dict[str, Any]:
    latents = latents_of(vae)
    return {
        "class": type(vae).__name__,
        "parameters": count_parameters(vae),
        "dtype": description.components["vae"].dtype,
        "factor": latents.factor,
        "latent_channels": latents.channels,
        "scaling_factor": latents.scale if isinstance(latents.scale, int | float) else "per channel",
    }


def _stages(
    description: ExpertDescription, denoiser: EnsembleDenoiser | None, flops: Flops | None
) -> list[dict[str, Any]]:
    """The first expert's stages, and what stands at each in the ensemble."""
    fused: Any = {} if denoiser is None else denoiser.aggregators
    return [
        {
            "name": stage.name,
            "channels": stage.channels,
            "level": stage.level,
            "block": stage.block,
            "saves_skip": stage.saves_skip,
            "takes_skip": stage.takes_skip,
            "fused": None if denoiser is None else stage.name in fused,
            "aggregator_parameters": count_parameters(fused[stage.name]) if stage.name in fused else None,
            "aggregator_flops": flops.aggregators[stage.name]
            if flops is not None and stage.name in fused
            else None,
        }
        for stage in FAMILIES[description.expert.family].stages(description.expert.model)
    ]


def _aggregators(subject: Subject, denoiser: EnsembleDenoiser) -> dict[str, Any]:
    recipe = subject.recipe
    return {
        "kind": recipe.kind,
        "options": {
            name: value
            for name, value in (find_aggregator(recipe.kind).defaults() | dict(recipe.options)).items()
            if value is not None
        },
        "attention_up_to": recipe.attention_up_to,
        "placement": denoiser.placement if isinstance(denoiser.placement, str) else list(denoiser.placement),
        "fused": len(denoiser.fused),
        "parameters": count_parameters(denoiser.aggregators),
        "training": None if subject.manifest is None else subject.manifest.training,
    }


def _size(subject: Subject, resolution: int | None) -> dict[str, Any]:
    """The image in pixels, its latent, and the length of a prompt in tokens.

    Raises UserError for a resolution that no latent has.
    """
    first = subject.descriptions[0].expert
    settings: Any = first.model.config
    interface = FAMILIES[first.family].interface
    factor = VAE_FACTOR if first.vae is None else latents_of(first.vae).factor
    side = interface.sample_size(settings)
    multiple = factor * interface.patch
    if resolution is not None and resolution % multiple:
        near = max(1, resolution // multiple) * multiple
        patches = "" if interface.patch == 1 else f" times patches of {interface.patch}"
        raise UserError(
            f"--resolution {resolution} is not a multiple of {multiple}, the factor of the VAE{patches}; "
            f"try {near}"
        )
    if resolution is None and side is None:
        raise UserError(f"'{first.name}' has no size of its own (sample_size); give --resolution")
    side = side if resolution is None else resolution // factor
    latent = [side, side] if isinstance(side, int) else list(side)
    texts = [encoder.config for encoder in first.text_encoders]
    return {
        "resolution": [factor * length for length in latent],
        "latent": latent,
        "tokens": interface.prompt_tokens(texts),
    }


def _memory(
    subject: Subject, described: Sequence[dict[str, Any]], denoiser: EnsembleDenoiser | None
) -> dict[str, Any]:
    """The number of parameters that have to be held, and their bytes; activations need memory besides.

    Equal text encoders count once, and so does a base that several LoRAs share.
    """
    places = [
        place_of(description.expert.located) or index
        for index, description in enumerate(subject.descriptions)
    ]
    firsts = [expert for index, expert in enumerate(described) if places[index] not in places[:index]]
    loras = [
        lora_numbers(description.expert.located)
        for description, place in zip(subject.descriptions, places, strict=True)
        if places.count(place) > 1
    ]
    texts = [text for expert in firsts for text in expert["text_encoders"] if text["same_as"] is None]
    held: dict[str, int | None] = {
        "experts": sum(expert["parameters"] for expert in firsts) + sum(loras),
        "aggregators": None if denoiser is None else count_parameters(denoiser.aggregators),
        "text_encoders": sum(text["parameters"] for text in texts),
        "vae": _vae_parameters(subject, described),
    }
    held["total"] = sum(value or 0 for value in held.values())
    sizes = {
        dtype: {name: None if value is None else value * width for name, value in held.items()}
        for dtype, width in DTYPES.items()
    }
    return {"parameters": held, "bytes": sizes}


def _vae_parameters(subject: Subject, described: Sequence[dict[str, Any]]) -> int | None:
    """Parameters of the one VAE that serves all experts; None if it is not an expert's."""
    choice = described[0]["name"] if subject.manifest is None else subject.manifest.frame.get("vae")
    vae = next((expert["vae"] for expert in described if expert["name"] == choice), None)
    return None if vae is None else int(vae["parameters"])


def _flops(
    experts: Sequence[Expert], count: Callable[[nn.Module], Flops], ensemble: Flops | None
) -> dict[str, Any]:
    """Of one denoising step."""
    models: list[Any] = [expert.model for expert in experts]
    if alike(models):  # as experts mostly are
        whole = count(models[0]).total if ensemble is None else ensemble.total
        own = 0 if ensemble is None else sum(ensemble.aggregators.values())
        single = [whole if ensemble is None else (whole - own) // len(experts)] * len(experts)
    else:
        single = [count(model).total for model in models]
    return {
        "each_expert": single,
        "experts": sum(single),
        "aggregators": None if ensemble is None else sum(ensemble.aggregators.values()),
        "ensemble": None if ensemble is None else ensemble.total,
    }
