"""Prompts in, pictures out, image by image. Importing this package loads no torch."""

from typing import TYPE_CHECKING

from afa.lazy import exports

if TYPE_CHECKING:
    from afa.generation.ray_data import DrawImages
    from afa.generation.run import generate
    from afa.generation.settings import GenerateSettings
    from afa.sampling.sample import Request, Sampling

__all__ = ["DrawImages", "GenerateSettings", "Request", "Sampling", "generate"]

_HOMES = {
    "DrawImages": "afa.generation.ray_data",
    "GenerateSettings": "afa.generation.settings",
    "Request": "afa.sampling.sample",
    "Sampling": "afa.sampling.sample",
    "generate": "afa.generation.run",
}
__getattr__, __dir__ = exports(__name__, _HOMES)
