"""From settings to the terms of a training loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from afa.ensemble import Ensemble
from afa.latents import latents_of
from afa.lazy import load
from afa.training.noise import Noising
from afa.training.objective_registry import OBJECTIVES
from afa.training.objectives import Anchor, MeanAnchor, ObjectiveContext, Sparsity, Term, Total
from afa.training.reward_objectives import Decoder, make_reward
from afa.training.settings import LoopSettings


@dataclass(frozen=True)
class Objectives:
    """What a run minimises, and what it picks the best weights by.

    noising:  the forward process of all terms
    training: the weighted sum of all terms
    held_out: the same sum, in which all samples have the same weight
    """

    noising: Noising
    training: Total
    held_out: Total


def make_context(settings: LoopSettings, ensemble: Ensemble, device: torch.device) -> ObjectiveContext:
    """Make everything that objectives need.

    Raises UserError for a prediction type that cannot be trained, and if the reward's weights are missing.
    """
    vae = ensemble.frame.vae
    density, within = settings.timesteps, settings.timestep_range
    noising = Noising(ensemble.frame.scheduler, latents_of(vae), device, density, within)
    if settings.reward is None:
        return ObjectiveContext(settings, noising)
    reward = make_reward(
        settings.reward, device, settings.reward_weights, settings.better or "", settings.worse or ""
    )
    return ObjectiveContext(settings, noising, Decoder(vae, settings.gradient_checkpointing), reward)


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
        anchor = MeanAnchor() if settings.anchor_to == "mean" else Anchor(parameters)
        terms.append(Term("anchor", settings.anchor, anchor))
    if settings.sparsity:
        terms.append(Term("sparsity", settings.sparsity, Sparsity(settings.sparsity_top)))
    unweighted = [Term(term.name, term.weight, term.objective.unweighted()) for term in terms]
    return Objectives(context.noising, Total(terms), Total(unweighted))
