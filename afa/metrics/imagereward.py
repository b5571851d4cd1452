"""ImageReward: how much people would like an image for its caption.

The network has BLIP's image and text encoders (from transformers) and a head on the first text state. Sizes
are read from the tensors; attention heads are 64 wide. The reward is standardised, (r - mean) / deviation,
with the numbers of its release.
Source: Xu et al., arXiv:2304.05977, version 1.0. Deviation: none.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from afa.errors import UserError
from afa.metrics.base import Differentiable, ImageMetric, Picture, Values, batches
from afa.metrics.clip_scores import ScoreHead
from afa.metrics.pixels import CLIP_MEAN, CLIP_STD, crop, fit_tensor, to_tensor
from afa.metrics.registry import Resources
from afa.metrics.weights import FoundPart, Part, find, network_loader, read_tensors, transformer_loader

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
LENGTH = 35  # tokens of a caption; longer ones are cut, shorter ones padded
WEIGHTS = Part("ImageReward", "ImageReward.pt", hub="THUDM/ImageReward/ImageReward.pt")
VOCABULARY = Part("BERT's vocabulary", "vocab.txt", hub="google-bert/bert-base-uncased/vocab.txt")


class ImageReward(ImageMetric, Differentiable):
    """ImageReward: about -2 to 2, 0 for an average image of its training data; higher is better."""

    names = ("imagereward",)

    def __init__(
        self, weights: FoundPart, vocabulary: FoundPart, batch_size: int, device: torch.device
    ) -> None:
        self.weights, self.vocabulary, self.batch_size, self.device = weights, vocabulary, batch_size, device
        self.source = (
            f"standardised reward of {weights}, shorter side resized, centre crop, "
            f"captions of {LENGTH} tokens; arXiv:2304.05977"
        )
        self._checkpoint = Checkpoint(read_tensors(weights.path), weights.path)
        self._tokenizer = word_pieces(vocabulary.path)
        words, known = self._tokenizer.get_vocab_size(), self._checkpoint.text_config.vocab_size
        if words > known:
            raise UserError(
                f"{vocabulary.path} has {words} words, {weights.path} knows {known}; "
                "they do not belong together"
            )

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "preprocessing": "crop",
            "weights": self.weights.identity,
            "vocabulary": self.vocabulary.identity,
        }

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
        """Return raw rewards (n,), before standardising."""
        side = self._checkpoint.image_config.image_size
        pixels = to_tensor([crop(picture.image, side) for picture in pictures], CLIP_MEAN, CLIP_STD)
        rewards = self._network(
            pixels.to(self.device), *self._read([picture.caption for picture in pictures])
        )
        found: Values = rewards.cpu().double().numpy()
        return found

    def _read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens and their mask, (n, T) each."""
        read = self._tokenizer.encode_batch(list(captions))
        tokens, mask = (
            torch.tensor([each.ids for each in read]),
            torch.tensor([each.attention_mask for each in read]),
        )
        return tokens.to(self.device), mask.to(self.device)


def word_pieces(vocabulary: Path) -> Any:
    """Make BERT's uncased tokenizer, which cuts and pads captions, from a file with its words.

    Raises UserError if the file is not BERT's vocabulary.
    """
    from tokenizers.implementations import BertWordPieceTokenizer

    try:
        tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"{vocabulary} is no vocabulary of BERT, one word a line ({error}); download it again"
        ) from error
    if tokenizer.token_to_id("[PAD]") is None or tokenizer.token_to_id("[CLS]") is None:
        raise UserError(
            f"{vocabulary} is no vocabulary of BERT: it has no [PAD] and [CLS]; download it again"
        )
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), length=LENGTH)
    return tokenizer


def make_imagereward(resources: Resources) -> ImageReward:
    """Make ImageReward from two parts: its weights, and BERT's vocabulary.

    Raises UserError if one is missing.
    """
    weights, vocabulary = find("imagereward", [WEIGHTS, VOCABULARY], resources.weights)
    return ImageReward(weights, vocabulary, resources.batch_size, torch.device(resources.device))


IMAGE, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
WIDTH = 64  # of an attention head
VISION = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
]


class Checkpoint:
    """ImageReward's tensors, sorted by sub-network. Raises UserError if some are missing."""

    def __init__(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        self.image = {_vision_name(name): tensor for name, tensor in _under(IMAGE, tensors).items()}
        self.text = {
            name: tensor
            for name, tensor in _under(TEXT, tensors).items()
            if name != "embeddings.position_ids"
        }
        try:
            self.image_config, self.text_config = self._image_config(), self._text_config()
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{where} is no checkpoint of ImageReward (looked for {error}); is it the right file?"
            ) from error
        self._loaders = (
            transformer_loader(BlipVisionModel, self.image_config, self.image, where),
            transformer_loader(BlipTextModel, self.text_config, self.text, where, add_pooling_layer=False),
            network_loader(lambda: ScoreHead(self.text_config.hidden_size), _under(HEAD, tensors), where),
        )

    def load(self, device: torch.device) -> "Reward":
        """Return the network with its weights."""
        return Reward(*(load(device) for load in self._loaders))

    def _image_config(self) -> Any:
        width, _, patch, _ = self.image["embeddings.patch_embedding.weight"].shape
        places = self.image["embeddings.position_embedding"].shape[1] - 1
        return BlipVisionConfig(
            **_sizes(self.image, r"encoder\.layers\.(\d+)\.", "encoder.layers.0.mlp.fc1.weight", width),
            image_size=round(places**0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )

    def _text_config(self) -> Any:
        words, width = self.text["embeddings.word_embeddings.weight"].shape
        unused = {"bos_token_id": 0, "eos_token_id": 0, "sep_token_id": 0}
        return BlipTextConfig(
            **_sizes(
                self.text, r"encoder\.layer\.(\d+)\.", "encoder.layer.0.intermediate.dense.weight", width
            ),
            **unused,
            vocab_size=words,
            max_position_embeddings=self.text["embeddings.position_embeddings.weight"].shape[0],
            encoder_hidden_size=self.image["post_layernorm.weight"].shape[0],
        )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _vision_name(name: str) -> str:
    for pattern, replacement in VISION:
        name = re.sub(pattern, replacement, name)
    return name


def _sizes(tensors: Mapping[str, Tensor], layer: str, inner: str, width: int) -> dict[str, int]:
    layers = {found[1] for name in tensors if (found := re.match(layer, name))}
    sizes = {"hidden_size": width, "num_hidden_layers": len(layers), "num_attention_heads": width // WIDTH}
    return {**sizes, "intermediate_size": tensors[inner].shape[0]}


class Reward(nn.Module):
    """ImageReward's network: pixels (B, 3, S, S), tokens and mask (B, T) to raw rewards (B,)."""

    def __init__(self, image: nn.Module, text: nn.Module, head: ScoreHead) -> None:
        super().__init__()
        self.image, self.text, self.head = image, text, head

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        seen = self.image(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,  # every word sees every other
        )
        return self.head(read.last_hidden_state[:, 0])[:, 0]
