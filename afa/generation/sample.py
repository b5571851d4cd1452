"""Images from a stock pipeline, each from the noise of its own seed whatever the batch it is made in."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from afa.families.table import call_of_pipeline


@dataclass(frozen=True)
class Request:
    """One image to be made."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How all images of a run are made. Sides in pixels, None: the model's own."""

    steps: int
    guidance: float
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None


# Any way of making images from requests: a pipeline's, or one with a loop of its own.
Sampler = Callable[[Sequence[Request], Sampling], NDArray[np.uint8]]


def sample(pipeline: Any, requests: Sequence[Request], sampling: Sampling) -> NDArray[np.uint8]:
    """One batch: -> (n, H, W, 3) uint8. The noise comes from CPU generators, so it is the same on every device."""
    negative = None if sampling.negative_prompt is None else [sampling.negative_prompt] * len(requests)
    call = call_of_pipeline(pipeline)
    given = {"guidance_scale": sampling.guidance, "negative_prompt": negative}
    result = pipeline(
        [request.prompt for request in requests],
        **given if call is None else call.guided(sampling.guidance, negative, len(requests)),
        num_inference_steps=sampling.steps,
        height=sampling.height,
        width=sampling.width,
        generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
        output_type="np",
    )
    images: NDArray[np.uint8] = (result.images * 255).round().astype(np.uint8)
    return images


def sample_all(pipeline: Any, requests: Sequence[Request], sampling: Sampling, batch_size: int) -> Iterator[NDArray[np.uint8]]:
    """Batch after batch of images (n, H, W, 3) uint8, in order."""
    for start in range(0, len(requests), batch_size):
        yield sample(pipeline, requests[start : start + batch_size], sampling)
