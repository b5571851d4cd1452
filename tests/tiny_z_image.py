"""Factories of tiny random Z-Image models of the real classes, and of their whole pipelines."""

import functools
import json
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from tiny_transformers import WORDS, flow_scheduler, lively, vae
from tokenizers import pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

Z_IMAGE = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": [4, 6, 6],
    "axes_lens": [640, 64, 64],
}
Z_IMAGE_SMALL = {"n_layers": 2, "n_refiner_layers": 1}  # N00, Z00, Z01, OUT
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def z_image_transformer(seed: int = 0, **changes: Any) -> ZImageTransformer2DModel:
    """Two blocks of the noise refiner, two of the context refiner, three layers; pad tokens that matter."""
    return lively(ZImageTransformer2DModel, seed, **{**Z_IMAGE, **changes})


def z_image_inputs(
    batch: int = 2, height: int = 12, width: int = 16, seed: int = 0, lengths: tuple[int, ...] = (7,), dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """What a pipeline hands to such a model at one step: 48 image tokens, so 16 that pad them.

    lengths: of the captions, in tokens, again and again
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": list(torch.randn(batch, 4, 1, height, width, generator=generator).to(dtype)),
        "t": torch.full((batch,), 0.5),
        "cap_feats": [torch.randn(lengths[index % len(lengths)], 24, generator=generator).to(dtype) for index in range(batch)],
    }


@functools.cache
def qwen3_tokenizer() -> Qwen2Tokenizer:
    """Byte pairs learnt from our words, each of which is one token, with the template of a chat."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    learner = Qwen2Tokenizer()._tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(["user\n", "assistant\n", *WORDS, *(f" {word}" for word in WORDS)], trainer)
    learnt = json.loads(learner.to_str())["model"]
    made = Qwen2Tokenizer(learnt["vocab"], [tuple(pair) for pair in learnt["merges"]], additional_special_tokens=special[1:])
    made.chat_template = TEMPLATE
    return made


def qwen3_encoder(seed: int = 0, width: int = 24) -> Qwen3Model:
    """Three layers, of which the pipeline uses two."""
    torch.manual_seed(4000 + seed)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "pad_token_id": 0}
    shape = {"vocab_size": 512, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 1024}
    return Qwen3Model(Qwen3Config(**heads, **shape)).eval()


def z_image_pipeline(seed: int = 0, text_seed: int = 0, **transformer: Any) -> ZImagePipeline:
    """A whole Z-Image pipeline."""
    return ZImagePipeline(
        transformer=z_image_transformer(seed, **transformer),
        text_encoder=qwen3_encoder(text_seed),
        tokenizer=qwen3_tokenizer(),
        vae=vae(seed),
        scheduler=flow_scheduler(),
    )
