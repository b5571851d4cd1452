"""What a denoising step costs in arithmetic, counted on the meta device: no memory, no waiting."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from afa.denoiser.base import EnsembleDenoiser


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one pass; a multiplication with an addition counts as two.

    Matrix products, convolutions and attention are counted; norms, activations and sums are not.
    aggregators: by stage name, included in the total.
    """

    total: int
    aggregators: dict[str, int]


def count_flops(denoiser: nn.Module, height: int, width: int, batch: int = 1, tokens: int = 77) -> Flops:
    """Count one pass of a U-Net or an ensemble of them that lies on the meta device.

    height, width: of the latent. batch: guidance doubles that of the pipeline. tokens: of the prompt.
    """
    call = call_of(denoiser, height, width, batch, tokens, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(**call)
    counts, stages = counter.get_flop_counts(), denoiser.fused if isinstance(denoiser, EnsembleDenoiser) else []
    name = type(denoiser).__name__
    aggregators = {stage: sum(counts.get(f"{name}.aggregators.{stage}", {}).values()) for stage in stages}
    return Flops(counter.get_total_flops(), aggregators)


def count_training_flops(denoiser: nn.Module, height: int, width: int, batch: int = 1, tokens: int = 77) -> int:
    """Floating point operations of one training step on the meta device: forward, and backward to whatever requires a gradient."""
    call = call_of(denoiser, height, width, batch, tokens, device="meta")
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        denoiser(**call).sample.sum().backward()
    return counter.get_total_flops()


def call_of(
    unet: Any, height: int, width: int, batch: int, tokens: int = 77, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """What a pipeline hands to a U-Net, or to an ensemble of them, without content."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    config = unet.config
    text = config.encoder_hid_dim or config.cross_attention_dim
    call: dict[str, Any] = {
        "sample": empty(batch, config.in_channels, height, width),
        "timestep": empty(),
        "encoder_hidden_states": empty(batch, tokens, text if isinstance(text, int) else text[0]),
    }
    if config.addition_embed_type == "text_time":
        times = 6  # SDXL: size, crop and target size, two numbers each
        pooled = unet.add_embedding.linear_1.in_features - times * config.addition_time_embed_dim
        call["added_cond_kwargs"] = {"text_embeds": empty(batch, pooled), "time_ids": empty(batch, times)}
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        call["class_labels"] = _labels(config, batch, empty)
    return call


def _labels(config: Any, batch: int, empty: Callable[..., Tensor]) -> Tensor:
    """Class labels as a U-Net's kind of class embedding takes them."""
    if config.class_embed_type in ("projection", "simple_projection"):
        return empty(batch, config.projection_class_embeddings_input_dim)
    if config.class_embed_type == "identity":
        return empty(batch, 4 * config.block_out_channels[0])
    return torch.zeros(batch, dtype=torch.long, device=empty().device)
