"""The network of ImageReward: BLIP's image and text encoders from transformers, and a head on the first text state.

Sizes are read from the tensors; attention heads are 64 wide. Source: Xu et al., arXiv:2304.05977.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from afa.errors import UserError
from afa.evaluation.metrics.head import Head
from afa.evaluation.metrics.loading import check_network, check_transformer, load_network, load_transformer

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
    """ImageReward's tensors, sorted by the network they belong to. Raises UserError if they are not all there."""

    def __init__(self, tensors: Mapping[str, Tensor], where: Path) -> None:
        self.where = where
        self.image = {_vision_name(name): tensor for name, tensor in _under(IMAGE, tensors).items()}
        self.text = {name: tensor for name, tensor in _under(TEXT, tensors).items() if name != "embeddings.position_ids"}
        self.head = _under(HEAD, tensors)
        try:
            self.image_config, self.text_config = self._image_config(), self._text_config()
        except (KeyError, ValueError) as error:
            raise UserError(f"{where} is no checkpoint of ImageReward (looked for {error}); is it the right file?") from error
        check_transformer(BlipVisionModel, self.image_config, self.image, where)
        check_transformer(BlipTextModel, self.text_config, self.text, where, add_pooling_layer=False)
        check_network(self._build_head, self.head, where)

    def load(self, device: torch.device) -> "Reward":
        """The network with its weights."""
        image = load_transformer(BlipVisionModel, self.image_config, self.image, self.where, device)
        text = load_transformer(BlipTextModel, self.text_config, self.text, self.where, device, add_pooling_layer=False)
        return Reward(image, text, load_network(self._build_head, self.head, device))

    def _build_head(self) -> Head:
        return Head(self.text_config.hidden_size)

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
            **_sizes(self.text, r"encoder\.layer\.(\d+)\.", "encoder.layer.0.intermediate.dense.weight", width),
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
    """Pixels (B, 3, S, S), tokens and their mask (B, T) -> raw rewards (B,)."""

    def __init__(self, image: nn.Module, text: nn.Module, head: Head) -> None:
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
