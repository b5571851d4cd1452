"""CLIP similarity of images with prompts (clip_t) and with reference images (clip_i): cosines of embeddings.

clip_i: is the image like the real image of the same caption?
Source: Radford et al., arXiv:2103.00020; used for generated images by Ruiz et al., arXiv:2208.12242.

clip_t: does the image fit its caption?
Source: Radford et al., arXiv:2103.00020; CLIPScore (arXiv:2104.08718) without its factor 2.5 and its cut
at zero.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.errors import UserError
from afa.experts.single_file import clip_tokenizer
from afa.metrics.base import Differentiable, ImageMetric, Memo, Picture, Values, batches, content_key
from afa.metrics.pixels import CLIP_MEAN, CLIP_STD, FITS, fit_tensor, to_tensor
from afa.metrics.registry import Resources
from afa.metrics.weights import Found, Part, check_folder, find, load_folder

LARGE = "openai/clip-vit-large-patch14"
VIT_L = Part("CLIP ViT-L/14", "clip-vit-large-patch14", hub=LARGE, folder=True)

Rows = NDArray[np.float32]


class Clip:
    """A CLIPModel of transformers, loaded when first used.

    All CLIPs share one tokenizer and normalisation.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load
        self._images, self._texts = Memo(), Memo()

    @cached_property
    def model(self) -> Any:
        return self._load()

    @cached_property
    def _tokenizer(self) -> Any:
        return clip_tokenizer()

    @property
    def scale(self) -> float:
        """What the model multiplies cosines by (exp of logit_scale, about 100 when trained)."""
        return float(self.model.logit_scale.exp())

    def images(self, images: Sequence[NDArray[np.uint8]], batch_size: int, fit: str = "crop") -> Rows:
        """Return unit vectors (n, D) of n images.

        fit: one of pixels.FITS; it resizes images to the model's size
        """
        keys = [(fit, content_key(image)) for image in images]
        return self._images.rows(
            keys, lambda places: self._embed([images[k] for k in places], batch_size, self._pixels(fit))
        )

    def texts(self, captions: Sequence[str], batch_size: int) -> Rows:
        """Return unit vectors (n, D) of n captions, each cut after 77 tokens."""
        return self._texts.rows(
            captions, lambda places: self._embed([captions[k] for k in places], batch_size, self._words)
        )

    def cosines(
        self, images: Sequence[NDArray[np.uint8]], captions: Sequence[str], batch_size: int, fit: str = "crop"
    ) -> Values:
        """Return the cosine of image k and caption k: (n,) in [-1, 1]."""
        return cosines(self.images(images, batch_size, fit), self.texts(captions, batch_size))

    def gradients(self, images: Tensor, fit: str = "crop") -> Tensor:
        """Return unit vectors (B, D) of images (B, 3, H, W) about [-1, 1], with gradients; see images()."""
        pixels = fit_tensor(images.to(self.model.device), self.model.config.vision_config.image_size, fit)
        vectors = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return torch.nn.functional.normalize(vectors, dim=1)

    def cosine_gradients(self, images: Tensor, captions: Sequence[str], fit: str = "crop") -> Tensor:
        """Return cosines (B,) with gradients to the images; see cosines()."""
        words = torch.from_numpy(self.texts(captions, len(captions)))
        return (self.gradients(images, fit) * words.to(self.model.device)).sum(1)

    @torch.no_grad()
    def _embed(self, items: Sequence[Any], batch_size: int, run: Callable[[Sequence[Any]], Tensor]) -> Rows:
        vectors = torch.cat([run(batch) for batch in batches(items, batch_size)])
        unit: Rows = torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()
        return unit

    def _pixels(self, fit: str) -> Callable[[Sequence[NDArray[np.uint8]]], Tensor]:
        def run(images: Sequence[NDArray[np.uint8]]) -> Tensor:
            side = self.model.config.vision_config.image_size
            pixels = to_tensor([FITS[fit](image, side) for image in images], CLIP_MEAN, CLIP_STD).to(
                self.model.device
            )
            return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

        return run

    def _words(self, captions: Sequence[str]) -> Tensor:
        """Tokenize and pad with the end token. CLIP reads the first one; the causal mask hides the others."""
        tokens = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        states = self.model.text_model(input_ids=tokens.input_ids.to(self.model.device))
        return self.model.text_projection(states.pooler_output)


def cosines(one: Rows, other: Rows) -> Values:
    """Return the dot product of each row of two arrays of unit vectors: (n,)."""
    return np.einsum("nd,nd->n", one.astype(np.float64), other.astype(np.float64))


def shared_clip(found: Found, device: torch.device) -> Clip:
    """Return the CLIP of a folder on a device; loaded once. Raises UserError if its weights do not fit."""
    return _shared(found.path.resolve(), tuple(found.identity), str(device))


@lru_cache(maxsize=4)
def _shared(folder: Path, hashes: tuple[str, ...], device: str) -> Clip:
    """Cache by hashes too: replaced files are another CLIP."""
    from transformers import CLIPModel

    check_folder(CLIPModel, folder)
    return Clip(lambda: load_folder(CLIPModel, folder, torch.device(device)))


class ClipImage(ImageMetric):
    """In [-1, 1], 1 for the real image itself; higher is better. Every picture needs its reference."""

    names = ("clip_i",)

    def __init__(self, clip: Clip, found: Found, batch_size: int) -> None:
        self.clip, self.found, self.batch_size = clip, found, batch_size
        self.source = (
            f"cosine of image and real image by {found}, shorter side resized, centre crop; arXiv:2103.00020"
        )

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": "crop", "weights": self.found.identity}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        real = [picture.reference for picture in pictures if picture.reference is not None]
        if len(real) < len(pictures):
            alone = next(picture.caption for picture in pictures if picture.reference is None)
            raise UserError(
                f"metric 'clip_i' compares with the real image of a caption, and there is none of '{alone}'; "
                "leave it out"
            )
        made = self.clip.images([picture.image for picture in pictures], self.batch_size)
        return {"clip_i": cosines(made, self.clip.images(real, self.batch_size))}


def make_clip_i(resources: Resources) -> ClipImage:
    """Make CLIP-I. Raises UserError if its weights are missing."""
    (found,) = find("clip_i", [VIT_L], resources.weights)
    return ClipImage(shared_clip(found, torch.device(resources.device)), found, resources.batch_size)


class ClipText(ImageMetric, Differentiable):
    """In [-1, 1], about 0.2 to 0.35 for captioned images; higher is better."""

    names = ("clip_t",)

    def __init__(self, clip: Clip, found: Found, batch_size: int) -> None:
        self.clip, self.found, self.batch_size = clip, found, batch_size
        self.source = (
            f"cosine of image and caption by {found}, shorter side resized, centre crop; arXiv:2103.00020"
        )

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": "crop", "weights": self.found.identity}

    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        images, captions = [picture.image for picture in pictures], [picture.caption for picture in pictures]
        return {"clip_t": self.clip.cosines(images, captions, self.batch_size)}

    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        return self.clip.cosine_gradients(images, captions)


def make_clip_t(resources: Resources) -> ClipText:
    """Make CLIP-T. Raises UserError if its weights are missing."""
    (found,) = find("clip_t", [VIT_L], resources.weights)
    return ClipText(shared_clip(found, torch.device(resources.device)), found, resources.batch_size)
