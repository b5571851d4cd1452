"""The registry of objectives, and their settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from afa.training.noise import Noising
from afa.training.objective_settings import ObjectiveSettings
from afa.training.objectives import Anchor, Mse, Objective, Sparsity, Term, Total
from afa.training.reward_objectives import Decoder, DirectAlign, Draft, Reward, make_reward


@dataclass(frozen=True)
class Means:
    """What objectives are made of. decoder, reward: where images are judged."""

    settings: ObjectiveSettings
    noising: Noising
    decoder: Decoder | None = None
    reward: Reward | None = None

    def judge(self) -> tuple[Noising, Decoder, Reward]:
        assert self.decoder is not None and self.reward is not None
        return self.noising, self.decoder, self.reward


OBJECTIVES: dict[str, Callable[[Means], Objective]] = {
    "mse": lambda means: Mse(means.noising, means.settings.snr_gamma, means.settings.weighting),
    "reward": lambda means: DirectAlign(*means.judge(), means.settings.reward_reach),
    "draft": lambda means: Draft(
        *means.judge(),
        steps=means.settings.draft_steps,
        last=means.settings.draft_last,
        guidance=means.settings.draft_guidance,
        again=means.settings.draft_again,
    ),
}


@dataclass(frozen=True)
class Objectives:
    """training: what is minimised. held_out: the same where no sample's loss is weighed, which picks the best weights."""

    training: Total
    held_out: Total


def make_means(
    settings: ObjectiveSettings, noising: Noising, vae: Any, device: torch.device, checkpointing: bool
) -> Means:
    """Everything that is to be read for an objective. Raises UserError if the reward's weights are missing."""
    if not settings.rewarded:
        return Means(settings, noising)
    assert settings.reward is not None
    reward = make_reward(
        settings.reward, device, settings.reward_weights, settings.better or "", settings.worse or ""
    )
    return Means(settings, noising, Decoder(vae, checkpointing), reward)


def make_objectives(means: Means, parameters: Sequence[nn.Parameter]) -> Objectives:
    """parameters: what is trained, as it is when the run begins."""
    settings = means.settings
    weights = {name: 1.0 if name == "mse" else settings.reward_weight for name in settings.objectives}
    terms = [Term(name, weight, OBJECTIVES[name](means)) for name, weight in weights.items()]
    if settings.anchor:
        terms.append(Term("anchor", settings.anchor, Anchor(parameters)))
    if settings.sparsity:
        terms.append(Term("sparsity", settings.sparsity, Sparsity(settings.sparsity_top)))
    even = [
        Term(term.name, term.weight, Mse(means.noising)) if term.name == "mse" else term for term in terms
    ]
    return Objectives(Total(terms), Total(even))
