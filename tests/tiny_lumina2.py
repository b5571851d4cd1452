"""Factories of tiny random Lumina 2 models of the real classes, and of their whole pipelines."""

import functools
import json
from typing import Any

import torch
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from tiny_transformers import WORDS, flow_scheduler, lively, vae
from tokenizers import processors, trainers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from afa.models.lumina2 import SYSTEM_PROMPT

LUMINA2 = {
    "sample_size": 16,
    "in_channels": 4,
    "hidden_size": 32,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 16,
    "axes_dim_rope": (4, 2, 2),
    "axes_lens": (300, 64, 64),
    "cap_feat_dim": 24,
}
LUMINA2_SMALL = {"num_layers": 2, "num_refiner_layers": 1}  # N00, L00, L01, OUT


def lumina2_transformer(seed: int = 0, **changes: Any) -> Lumina2Transformer2DModel:
    """Two blocks of the noise refiner, two of the context refiner, three layers; heads share keys and values."""
    return lively(Lumina2Transformer2DModel, seed, **{**LUMINA2, **changes})


def lumina2_inputs(
    batch: int = 2, height: int = 12, width: int = 16, seed: int = 0, lengths: tuple[int, ...] = (7,), tokens: int = 12, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """What a pipeline hands to such a model at one step.

    lengths: of the captions, again and again; tokens: to which they are padded
    """
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([lengths[index % len(lengths)] for index in range(batch)])
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": torch.randn(batch, tokens, 24, generator=generator).to(dtype),
        "encoder_attention_mask": (torch.arange(tokens)[None] < ends[:, None]).long(),
    }


@functools.cache
def gemma_tokenizer() -> GemmaTokenizer:
    """Byte pairs learnt from our words and those of the system prompt, each of which is one token; <bos> is put before a text."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [*WORDS, *SYSTEM_PROMPT.split()]
    learner = GemmaTokenizer()._tokenizer
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    learner.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    learnt = json.loads(learner.to_str())["model"]
    made = GemmaTokenizer(learnt["vocab"], [tuple(pair) for pair in learnt["merges"]])
    made._tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", made.bos_token_id)])
    return made


def gemma_encoder(seed: int = 0, width: int = 24) -> Gemma2Model:
    """Three layers, of which the pipeline uses two."""
    torch.manual_seed(5000 + seed)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "query_pre_attn_scalar": 12}
    shape = {"vocab_size": len(gemma_tokenizer()), "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3}
    return Gemma2Model(Gemma2Config(**heads, **shape, pad_token_id=0, max_position_embeddings=512)).eval()


def lumina2_pipeline(seed: int = 0, text_seed: int = 0, **transformer: Any) -> Lumina2Pipeline:
    """A whole Lumina 2 pipeline."""
    return Lumina2Pipeline(
        transformer=lumina2_transformer(seed, **transformer),
        text_encoder=gemma_encoder(text_seed),
        tokenizer=gemma_tokenizer(),
        vae=vae(seed),
        scheduler=flow_scheduler(),
    )
