"""Tiny ensembles to explain, as if trained: their weights are not the mean."""

from functools import cache
from typing import Any

import torch
from tiny import sd_pipeline, sdxl_pipeline
from tiny_krea2 import krea2_pipeline
from tiny_lumina2 import lumina2_pipeline
from tiny_transformers import flux_pipeline, qwen_image_pipeline, sd3_pipeline

from afa import Ensemble
from afa.sampling.sample import Request, Sampling, in_frame

SMALL = {"hidden": 8, "heads": 2, "depth": 1}
MAKERS = {
    "sd": sd_pipeline,
    "sdxl": sdxl_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
    "qwen-image": qwen_image_pipeline,
    "krea2": krea2_pipeline,
    "lumina2": lumina2_pipeline,
}
SIDE = {"sd": 32, "sdxl": 32, "sd3": 64, "flux": 64, "qwen-image": 64, "krea2": 64, "lumina2": 64}
PROMPT = "a red bicycle, on a lawn"


@cache
def ensemble(family: str = "sd", aggregator: str = "sabw", seeds: tuple[int, ...] = (0, 1), **options: Any) -> Ensemble:
    """Of one expert a seed; equal seeds are equal experts. Made once: who looks on, or turns something off, leaves it as it was."""
    alike = {} if family in ("sd", "sdxl") else {"text_seed": 0}
    pipelines = [MAKERS[family](seed, **alike) for seed in seeds]
    sized = {**SMALL, **options} if aggregator in ("sabw", "stitch") else options
    made = Ensemble.from_experts(pipelines, aggregator=aggregator, **sized)
    torch.manual_seed(0)
    for part in made.aggregators.values():
        if hasattr(part, "conv_out"):
            torch.nn.init.normal_(part.conv_out.weight)
    return made


def asked(family: str = "sd", steps: int = 3, **more: Any) -> tuple[Request, Sampling]:
    """One image with guidance."""
    guided = {"true_guidance" if family == "flux" else "guidance": 3.0}
    return Request(PROMPT, 3), Sampling(steps, **{**guided, "height": SIDE[family], "width": SIDE[family], **more})


def pipeline(made: Ensemble) -> Any:
    """The ensemble's."""
    return in_frame(made, made.denoiser)
