"""Options that are not given: those that the folder's run was begun with, else what afa.defaults chooses."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from afa import defaults
from afa.aggregators.registry import EVERYWHERE, Recipe, find_aggregator
from afa.denoiser.base import EnsembleDenoiser
from afa.experts.expert import Expert
from afa.models.registry import FAMILIES
from afa.training.settings import MADE, TrainSettings

STEPS_BEFORE = 1000  # the default of runs whose state does not record its steps
RETIRED = ("guided_scale", "guided_teacher")  # options that earlier versions had and recorded


def open_options() -> tuple[str, ...]:
    """Return the options that have no fixed default: they are chosen when a run is planned."""
    return ("aggregator", *TrainSettings.sized_options(), "attention_up_to", "steps", "lr")


def not_given(settings: TrainSettings) -> list[str]:
    """Return the open options that the user did not give, and that a run of these settings has."""
    made = {*MADE, *settings.option_fields()} if settings.start is not None else set()
    kind = find_aggregator(settings.aggregator or defaults.AGGREGATOR)
    lacked = {*settings.option_fields()} - {field.name for field in dataclasses.fields(kind.options)}
    names = [name for name in open_options() if name not in made | lacked]
    return [name for name in names if getattr(settings, name) is None]


def as_begun(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded options as this version spells them.

    recorded: option -> value, all of them or some; earlier runs also recorded options that there are no more,
              and meant the default of some by None
    """
    found = {name: value for name, value in recorded.items() if name not in RETIRED}
    if found.get("start") is not None:  # its aggregators were made before
        return {name: value for name, value in found.items() if name not in (*MADE, *open_options()[1:-2])}
    if found.get("attention_up_to", 0) is None:
        found["attention_up_to"] = EVERYWHERE
    return found


def following(settings: TrainSettings, begun: Mapping[str, Any] | None) -> TrainSettings:
    """Return the settings with the open options that are not given as the folder's run was begun.

    begun: what as_begun() returned; None: nothing was begun
    """
    found = {name: (begun or {}).get(name) for name in not_given(settings)}
    return dataclasses.replace(
        settings, **{name: value for name, value in found.items() if value is not None}
    )


def chosen(
    settings: TrainSettings,
    images: int,
    experts: Sequence[Expert] = (),
    denoiser: EnsembleDenoiser | None = None,
) -> TrainSettings:
    """Return the settings with all open options that are still not given as afa.defaults chooses them.

    images:   number of images that are trained on
    experts:  of the ensemble that will be made
    denoiser: of the ensemble to train, if it is made already
    """
    recipe = _recipe(settings, experts) if denoiser is None else _full(denoiser.recipe)
    # as torchrun and accelerate launch set it; processes that share the experts have the same images
    processes = 1 if settings.parallel else int(os.environ.get("WORLD_SIZE", "1"))
    a_step = settings.batch_size * settings.accumulate * processes
    every = {
        "aggregator": recipe.kind,
        "attention_up_to": recipe.attention_up_to,
        **recipe.options,
        "steps": defaults.steps(images, a_step),
        "lr": defaults.learning_rate(recipe.options.get("hidden")),
    }
    names = not_given(settings)
    return dataclasses.replace(settings, **{name: every[name] for name in names if name in every})


def _recipe(settings: TrainSettings, experts: Sequence[Expert]) -> Recipe:
    """Return the aggregators that the settings ask for, by the experts' size where they do not."""
    model: Any = experts[0].model
    family = FAMILIES[experts[0].family]
    side, stages = family.interface.largest_side(model.config), family.stages(model)
    given = settings.aggregator_options()
    return Recipe.by_size(stages, side, settings.aggregator, given, settings.attention_up_to)


def _full(recipe: Recipe) -> Recipe:
    """Return a recipe with every option, and a number for the side."""
    options = find_aggregator(recipe.kind).defaults() | dict(recipe.options)
    side = EVERYWHERE if recipe.attention_up_to is None else recipe.attention_up_to
    return dataclasses.replace(recipe, options=options, attention_up_to=side)
