"""From settings to the terms of a training loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from afa.lazy import load
from afa.training.noise import Noising
from afa.training.objective_registry import OBJECTIVES
from afa.training.objective_settings import ObjectiveSettings
from afa.training.objectives import Anchor, ObjectiveContext, Sparsity, Term, Total
from afa.training.reward_objectives import Decoder, make_reward


@dataclass(frozen=True)
class Objectives:
    """What a run minimises, and what it picks the best weights by.

    training: the weighted sum of all terms
    held_out: the same where no sample's loss is weighed
    """

    training: Total
    held_out: Total


def make_context(
    settings: ObjectiveSettings, noising: Noising, vae: Any, device: torch.device, checkpointing: bool
) -> ObjectiveContext:
    """Read all that an objective needs. Raises UserError if the reward's weights are missing."""
    if not settings.rewarded:
        return ObjectiveContext(settings, noising)
    assert settings.reward is not None
    reward = make_reward(
        settings.reward, device, settings.reward_weights, settings.better or "", settings.worse or ""
    )
    return ObjectiveContext(settings, noising, Decoder(vae, checkpointing), reward)


def make_objectives(context: ObjectiveContext, parameters: Sequence[nn.Parameter]) -> Objectives:
    """Make every term that the settings ask for.

    parameters: what is trained, as it is when the run begins
    Raises UserError for settings that do not go with the noise schedule or with each other.
    """
    settings = context.settings
    terms = []
    for name in settings.objectives:
        entry = OBJECTIVES[name]
        weight = settings.reward_weight if entry.rewarded else 1.0
        terms.append(Term(name, weight, load(entry.make)(context)))
    if settings.anchor:
        terms.append(Term("anchor", settings.anchor, Anchor(parameters)))
    if settings.sparsity:
        terms.append(Term("sparsity", settings.sparsity, Sparsity(settings.sparsity_top)))
    unweighted = [Term(term.name, term.weight, term.objective.unweighted()) for term in terms]
    return Objectives(Total(terms), Total(unweighted))
