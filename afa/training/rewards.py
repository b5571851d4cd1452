"""Rewards: differentiable judges of images, by name or from a user's file."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afa.errors import UserError
from afa.evaluation.metrics.base import Differentiable
from afa.evaluation.metrics.table import METRICS, Resources, make_metric
from afa.lookup import unknown
from afa.user_files import UserFile

# images (B, 3, H, W) about [-1, 1], captions -> (B,), higher is better, with gradients to the images
Reward = Callable[[Tensor, Sequence[str]], Tensor]

# name -> module:function(device) of a reward that brings its own weights; all others are metrics, with theirs
OWN = {"scenes": "afa.demo.reward:load"}
NAMES = (*OWN, "imagereward", "pickscore", "hpsv2", "aesthetic", "clip_t")


def make_reward(name: str, device: torch.device, weights: str | None = None, better: str = "", worse: str = "") -> Reward:
    """The reward of that name, or of a Python file with reward(images, captions).

    better, worse: words before the caption; with both, or one, the reward is that of the caption with the better words minus that
    with the worse: what the words alone explain (semantic relative preference, arXiv:2509.06942, section 3.2).
    Raises UserError for a name that is none, or weights that are missing.
    """
    reward = _file(Path(name)) if name.endswith(".py") else _named(name, device, weights)
    return Relative(reward, better, worse) if better or worse else reward


def is_small(name: str | None) -> bool:
    """Whether a reward can be tried on one image without reading large weights: the embedded one, a user's own."""
    return name is not None and (name in OWN or name.endswith(".py"))


def _named(name: str, device: torch.device, weights: str | None) -> Reward:
    if name in OWN:
        if weights is not None:
            raise UserError(f"reward '{name}' brings its own weights; leave out --reward-weights {weights}")
        module, _, function = OWN[name].partition(":")
        own: Reward = getattr(importlib.import_module(module), function)(device)
        return own
    if name not in NAMES:
        if name in METRICS:
            listed = ", ".join(NAMES)
            raise UserError(
                f"--reward {name} cannot be differentiated, or judges whole sets; take one of {listed}, or a Python file with reward(images, captions)"
            )
        raise UserError(f"--reward: {unknown(name, NAMES, 'reward')}, or give a Python file with reward(images, captions)")
    try:
        metric: Any = make_metric(name, Resources(weights, device))
    except UserError as error:
        raise UserError(str(error).replace(f"--metric-weights {name}=", "--reward-weights ")) from None
    assert isinstance(metric, Differentiable)
    return metric.reward


def _file(path: Path) -> Reward:
    """A user's own."""
    file = UserFile(path, "--reward")
    if not file.has("reward"):
        raise UserError(f"--reward {path} has no function reward(images, captions); it must return one number an image, with gradients")

    def checked(images: Tensor, captions: Sequence[str]) -> Tensor:
        found: Any = file.call("reward", images, list(captions))
        if not isinstance(found, Tensor) or found.shape != (len(images),):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"reward() of {path} returned {what} for {len(images)} images, expected a tensor ({len(images)},)")
        if images.requires_grad and not found.requires_grad:
            raise UserError(f"reward() of {path} returned a tensor without gradients to the images; do not detach them")
        return found

    return checked


class Relative:
    """A reward's difference between a caption with better and with worse words before it."""

    def __init__(self, reward: Reward, better: str, worse: str) -> None:
        self.reward, self.better, self.worse = reward, better, worse

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """As any reward."""
        return self.reward(images, self._with(self.better, captions)) - self.reward(images, self._with(self.worse, captions))

    @staticmethod
    def _with(words: str, captions: Sequence[str]) -> list[str]:
        return [f"{words}, {caption}" if words else caption for caption in captions]
