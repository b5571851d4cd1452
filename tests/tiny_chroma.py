"""Factories of tiny random Chroma transformers of the real class, and of their whole pipelines."""

from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel
from tiny_transformers import call, flow_scheduler, lively, t5_encoder, t5_tokenizer, vae

CHROMA = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 32,
    "approximator_layers": 2,
}
CHROMA_SMALL = {"num_layers": 1}  # D00, S00, S01, S02, OUT; for laws that every block obeys alike


def chroma_transformer(seed: int = 0, **changes: Any) -> ChromaTransformer2DModel:
    """Two double and three single blocks."""
    return lively(ChromaTransformer2DModel, seed, **{**CHROMA, **changes})


def chroma_inputs(lengths: tuple[int, ...] = (), **changes: Any) -> dict[str, Any]:
    """What a pipeline hands to such a model at one step. lengths: of the prompts, with the one token of padding that is kept."""
    found = call(chroma_transformer, **changes)
    batch, tokens = found["encoder_hidden_states"].shape[:2]
    text = torch.arange(tokens)[None] < torch.tensor(lengths or [tokens] * batch)[:, None]
    found["attention_mask"] = torch.cat([text.to(torch.float32), torch.ones(found["hidden_states"].shape[:2])], dim=1)
    return found


def chroma_pipeline(seed: int = 0, text_seed: int = 0, **transformer: Any) -> ChromaPipeline:
    """A whole Chroma pipeline: T5 and no CLIP."""
    return ChromaPipeline(
        transformer=chroma_transformer(seed, **transformer),
        text_encoder=t5_encoder(text_seed),
        tokenizer=t5_tokenizer(),
        vae=vae(seed),
        scheduler=flow_scheduler(),
    )
