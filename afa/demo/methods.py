"""The ways of combining the embedded experts that the demonstration compares, each as a stock pipeline."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from afa.demo.settings import DemoSettings
from afa.demo.world import EXPERTS
from afa.ensemble import Ensemble
from afa.training.run import train
from afa.training.settings import TrainSettings

# Small, as the experts are; the paper's 128 would be larger than they. Own paths: see docs/log.md.
AGGREGATORS = {"aggregator": "stitch", "hidden": 32, "heads": 4, "depth": 1}


def methods(settings: DemoSettings) -> dict[str, Callable[[], Ensemble]]:
    """Name -> how to make it. Trained ones are trained when asked for, or read if they are there."""
    output = Path(settings.output)
    sources = [str(path) for path in EXPERTS.values()]
    return {
        **{name: lambda source=str(path): Ensemble.from_experts([source], aggregator="mean") for name, path in EXPERTS.items()},
        "weight average": lambda: weight_average(sources),
        "untrained mean": lambda: Ensemble.from_experts(sources, aggregator="mean"),
        "prediction router": lambda: _trained(settings, sources, output / "router", "out"),
        "AFA": lambda: _trained(settings, sources, output / "ensemble", "layers"),
    }


def training(settings: DemoSettings, folder: Path, placement: str, sources: list[str]) -> TrainSettings:
    """How the demonstration trains: the same for AFA and for the router."""
    return TrainSettings(
        experts=sources,
        data=str(Path(settings.output) / "data"),
        output=str(folder),
        steps=settings.train_steps,
        batch_size=8,
        patience=100,  # as many steps as asked for: the comparison is at equal effort
        lr=2e-3,
        held_out=48,
        ema=0.98,
        seed=settings.seed,
        placement=placement,
        **AGGREGATORS,
    )


def _trained(settings: DemoSettings, sources: list[str], folder: Path, placement: str) -> Ensemble:
    train(training(settings, folder, placement, sources))
    return Ensemble.load(folder)


def weight_average(sources: list[str]) -> Ensemble:
    """One model whose denoiser and text encoder are the means of the experts' parameters.

    Source: Wortsman et al., Model soups, arXiv:2203.05482 (the uniform soup).
    """
    alone = [Ensemble.from_experts([source], aggregator="mean") for source in sources]
    networks = [nn.ModuleList([ensemble.denoiser.experts, *ensemble.text_encoders]) for ensemble in alone]
    with torch.no_grad():
        for same in zip(*(network.parameters() for network in networks), strict=True):
            same[0].copy_(torch.stack(same).mean(0))
    return alone[0]
