"""CLIP: unit vectors of images and captions. The metrics on them are in clip_scores.py."""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from afa.experts.single_file import clip_tokenizer
from afa.metrics.base import Memo, Values, batches, content_key
from afa.metrics.pixels import CLIP_MEAN, CLIP_STD, FITS, fit_tensor, to_tensor
from afa.metrics.weights import FoundPart, Part, folder_loader

LARGE = "openai/clip-vit-large-patch14"
VIT_L = Part("CLIP ViT-L/14", "clip-vit-large-patch14", hub=LARGE, folder=True)

Rows = NDArray[np.float32]


class Clip:
    """A CLIPModel of transformers, loaded when first used.

    All CLIPs share one tokenizer and normalisation.
    """

    def __init__(self, load: Callable[[torch.device], Any], device: torch.device) -> None:
        self._load, self._device = load, device
        self._images, self._texts = Memo(), Memo()

    @cached_property
    def model(self) -> Any:
        return self._load(self._device)

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

    def gradients(self, images: Tensor, fit: str = "crop") -> Tensor:
        """Return unit vectors (B, D) of images (B, 3, H, W) about [-1, 1], with gradients; see images()."""
        pixels = fit_tensor(images.to(self.model.device), self.model.config.vision_config.image_size, fit)
        vectors = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return torch.nn.functional.normalize(vectors, dim=1)

    def cosine_gradients(self, images: Tensor, captions: Sequence[str], fit: str = "crop") -> Tensor:
        """Return cosines (B,) with gradients to the images; with unit vectors of captions."""
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


def shared_clip(found: FoundPart, device: torch.device) -> Clip:
    """Return the CLIP of a folder on a device; loaded once. Raises UserError if its weights do not fit."""
    return _shared(found.path.resolve(), tuple(found.identity), str(device))


@lru_cache(maxsize=4)
def _shared(folder: Path, hashes: tuple[str, ...], device: str) -> Clip:
    """Cache by hashes too: replaced files are another CLIP."""
    from transformers import CLIPModel

    return Clip(folder_loader(CLIPModel, folder), torch.device(device))
