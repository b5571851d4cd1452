"""ImageReward: how much people would like the image as an answer to its caption, standardised over their data.

Source: Xu et al., arXiv:2304.05977, version 1.0; (r - mean) / deviation of its release. Deviation: none.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afa.errors import UserError
from afa.evaluation.metrics.base import Differentiable, ImageMetric, Values, batches
from afa.evaluation.metrics.loading import read_tensors
from afa.evaluation.metrics.pixels import CLIP_MEAN, CLIP_STD, crop, fit_tensor, to_tensor
from afa.evaluation.metrics.table import Resources
from afa.evaluation.metrics.weights import Found, Part, find
from afa.evaluation.pictures import Picture

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
LENGTH = 35  # tokens of a caption; longer ones are cut, shorter ones padded
WEIGHTS = Part("ImageReward", "ImageReward.pt", hub="THUDM/ImageReward/ImageReward.pt")
VOCABULARY = Part("BERT's vocabulary", "vocab.txt", hub="google-bert/bert-base-uncased/vocab.txt")


class ImageReward(ImageMetric, Differentiable):
    """About -2 to 2, 0 for an average image of its training data; higher is better."""

    names = ("imagereward",)

    def __init__(self, weights: Found, vocabulary: Found, batch_size: int, device: torch.device) -> None:
        from afa.evaluation.metrics.blip import Checkpoint

        self.weights, self.vocabulary, self.batch_size, self.device = weights, vocabulary, batch_size, device
        self.source = f"standardised reward of {weights}, shorter side resized, centre crop, captions of {LENGTH} tokens; arXiv:2304.05977"
        self._checkpoint = Checkpoint(read_tensors(weights.path), weights.path)
        self._tokenizer = word_pieces(vocabulary.path)
        words, known = self._tokenizer.get_vocab_size(), self._checkpoint.text_config.vocab_size
        if words > known:
            raise UserError(f"{vocabulary.path} has {words} words, {weights.path} knows {known}; they do not belong together")

    @property
    def identity(self) -> dict[str, Any]:
        return {"preprocessing": "crop", "weights": self.weights.identity, "vocabulary": self.vocabulary.identity}

    @cached_property
    def _network(self) -> Any:
        return self._checkpoint.load(self.device)

    @torch.no_grad()
    def score(self, pictures: Sequence[Picture]) -> dict[str, Values]:
        rewards = np.concatenate([self._rewards(batch) for batch in batches(pictures, self.batch_size)])
        return {"imagereward": (rewards - MEAN) / DEVIATION}

    def reward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        pixels = fit_tensor(images.to(self.device), self._checkpoint.image_config.image_size, "crop")
        found: Tensor = self._network(pixels, *self._read(captions))
        return (found - MEAN) / DEVIATION

    def _rewards(self, pictures: Sequence[Picture]) -> Values:
        """Image and caption of one picture go through the network side by side: (n,) before standardising."""
        side = self._checkpoint.image_config.image_size
        pixels = to_tensor([crop(picture.image, side) for picture in pictures], CLIP_MEAN, CLIP_STD)
        rewards = self._network(pixels.to(self.device), *self._read([picture.caption for picture in pictures]))
        found: Values = rewards.cpu().double().numpy()
        return found

    def _read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens and their mask, (n, T)."""
        read = self._tokenizer.encode_batch(list(captions))
        tokens, mask = torch.tensor([each.ids for each in read]), torch.tensor([each.attention_mask for each in read])
        return tokens.to(self.device), mask.to(self.device)


def word_pieces(vocabulary: Path) -> Any:
    """BERT's uncased tokenizer from its list of words, captions cut and padded. Raises UserError if it is no such list."""
    from tokenizers.implementations import BertWordPieceTokenizer

    try:
        tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{vocabulary} is no vocabulary of BERT, one word a line ({error}); download it again") from error
    if tokenizer.token_to_id("[PAD]") is None or tokenizer.token_to_id("[CLS]") is None:
        raise UserError(f"{vocabulary} is no vocabulary of BERT: it has no [PAD] and [CLS]; download it again")
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), length=LENGTH)
    return tokenizer


def make(resources: Resources) -> ImageReward:
    """ImageReward with its two parts: the weights, then BERT's vocabulary. Raises UserError if they are missing."""
    weights, vocabulary = find("imagereward", [WEIGHTS, VOCABULARY], resources.weights)
    return ImageReward(weights, vocabulary, resources.batch_size, torch.device(resources.device))
