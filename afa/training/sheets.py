"""Sample sheets: images that the ensemble draws while it is trained, with weight maps and a second metric."""

import functools
import inspect
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from afa.denoiser.base import EnsembleDenoiser
from afa.denoiser.hooks import record_weights
from afa.errors import UserError
from afa.experts.expert import TEXT_ENCODERS
from afa.files import replacing
from afa.images import over_white
from afa.metrics.base import ImageMetric, Picture
from afa.metrics.registry import Resources, make_metric
from afa.pictures import COLOURS, conditional, grid, heat, mean_over_stages
from afa.stats import difference
from afa.training.conditions import encode_prompt
from afa.training.settings import LoopSettings

FOLDER = "sheets"  # inside the output folder
SEED = 500  # of the first image's noise, the same at every step


def make_watch(settings: LoopSettings, device: torch.device) -> ImageMetric | None:
    """Return the metric of --watch; None without it.

    Raises UserError for the reward itself, and for metrics of whole sets, since a sheet has few images.
    """
    if settings.watch is None:
        return None
    if settings.watch == settings.reward:
        raise UserError(f"--watch {settings.watch} is the reward itself; choose another metric")
    metric = make_metric(settings.watch, Resources(settings.watch_weights, device), flag="--watch-weights")
    if not isinstance(metric, ImageMetric):
        raise UserError(
            f"--watch {settings.watch} judges whole sets, and sheets are small; choose a metric of single"
            " images"
        )
    return metric


class Sheets:
    """Draws the first held-out captions, always from the same noise, with the current weights.

    pipeline: used by nothing else. The captions' states are computed now, and its text encoders are removed,
              so that they may leave the memory
    side:     of the images, in pixels
    watch:    a metric of the images; None: none
    """

    def __init__(
        self,
        settings: LoopSettings,
        pipeline: Any,
        denoiser: EnsembleDenoiser,
        captions: Sequence[str],
        side: int,
        watch: ImageMetric | None,
    ) -> None:  # fmt: skip
        self.settings, self.pipeline, self.side, self.watch = settings, pipeline, side, watch
        self.denoiser = denoiser
        self.captions = list(dict.fromkeys(captions))[: settings.sheet_images]
        pipeline.set_progress_bar_config(disable=True)
        encode = functools.partial(encode_prompt, pipeline, device=pipeline._execution_device, guided=True)
        with torch.no_grad():
            prompt = denoiser.interface.encode_prompts(encode, self.captions)
        taken = inspect.signature(pipeline.__call__).parameters  # of several pipelines of a family
        self._prompt = {name: part for name, part in prompt.items() if name in taken}
        for name in TEXT_ENCODERS:
            if getattr(pipeline, name, None) is not None:
                setattr(pipeline, name, None)
        self._first: dict[str, NDArray[np.float64]] = {}
        self._warned = False

    def draw(self, step: int) -> dict[str, Any]:
        """Write the sheet of a step, and return the scores of the watching metric; {} without one."""
        routed = len(self.denoiser.names) > 1
        with torch.no_grad(), record_weights(self.denoiser) if routed else nullcontext() as maps:
            images = self._images()
        sheet = (
            _sheet(images, maps) if maps is not None else grid([list(images)], side=max(128, images.shape[2]))
        )
        file = self.settings.folder / FOLDER / f"step-{step:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            sheet.save(temporary, format="png")
        return self._watched(images)

    def _images(self) -> NDArray[np.uint8]:
        settings, interface = self.settings, self.denoiser.interface
        strength = settings.sheet_guidance
        if strength is None:
            strength = interface.default_guidance(self.denoiser.config)
        guidance = {} if strength is None else interface.guidance_kwargs(strength)
        noise = [torch.Generator().manual_seed(SEED + index) for index in range(len(self.captions))]
        drawn = self.pipeline(
            **self._prompt,
            num_inference_steps=settings.sheet_steps,
            **guidance,
            height=self.side,
            width=self.side,
            generator=noise,
            output_type="np",
        ).images
        return (over_white(np.asarray(drawn)) * 255).round().astype(np.uint8)

    def _watched(self, images: NDArray[np.uint8]) -> dict[str, Any]:
        """Return the scores; warn once if the main score has become worse since the first sheet."""
        if self.watch is None:
            return {}
        pictures = [
            Picture(image, caption, index)
            for index, (image, caption) in enumerate(zip(images, self.captions, strict=True))
        ]
        scores = self.watch.score(pictures)
        leading = self.watch.names[0]
        first = self._first.setdefault(leading, scores[leading])
        change = difference(scores[leading], first)
        worse = change.has_interval and (change.high < 0 if self.watch.higher_is_better else change.low > 0)
        if worse and not self._warned:
            self._warned = True
            worse_by = (
                f"{leading} of the sheet has become worse since training was begun, or gone on with"
                f" ({change}, n = {change.n})"
            )
            tqdm.write(f"afa: {worse_by}: the reward may be hacked", file=sys.stderr)
        return {"watched": {name: float(values.mean()) for name, values in scores.items()}}


def _sheet(images: NDArray[np.uint8], maps: Any) -> Image.Image:
    """Arrange one column for each image: the image, and below it each expert's mean weights."""
    size = images.shape[1:3]
    mean = (
        torch.stack([mean_over_stages(one, size) for one in conditional(maps, len(images))]).mean(0).numpy()
    )
    rows = [list(images)]
    rows += [
        [heat(weights[index], COLOURS[index % len(COLOURS)]) for weights in mean]
        for index in range(len(maps.experts))
    ]
    labels = ["", *(f"{name} {mean[:, index].mean():.2f}" for index, name in enumerate(maps.experts))]
    return grid(rows, labels=labels, side=max(128, size[1]))
