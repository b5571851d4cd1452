"""Factories of tiny FLUX.2 models of the real classes, and of their whole pipelines: dev (guidance built in) and klein."""

import functools
import json
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tiny_transformers import WORDS, call, lively
from tokenizers import pre_tokenizers, trainers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

DEV = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": True,
}
KLEIN = DEV | {"guidance_embeds": False}
FLUX2_SMALL = {"num_layers": 1, "num_single_layers": 2}  # D00, S00, S01, OUT; for laws that every block obeys alike
LAYERS = 30  # of the text encoders: the pipelines read the states of layers 10, 20, 30 (dev) and 9, 18, 27 (klein)


def flux2_transformer(seed: int = 0, **changes: Any) -> Flux2Transformer2DModel:
    """Two double and three single blocks, with guidance embedded as in FLUX.2-dev."""
    return lively(Flux2Transformer2DModel, seed, **{**DEV, **changes})


def klein_transformer(seed: int = 0, **changes: Any) -> Flux2Transformer2DModel:
    """The same without guidance, as klein."""
    return lively(Flux2Transformer2DModel, seed, **{**KLEIN, **changes})


flux2_inputs = functools.partial(call, flux2_transformer)
klein_inputs = functools.partial(call, klein_transformer)


def patched_vae(seed: int = 0, **changes: Any) -> AutoencoderKLFlux2:
    """FLUX.2's: 1/8 of the image's side, a mean and a variance of every channel of 2×2 latents among its weights."""
    torch.manual_seed(2000 + seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    shape = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    made = AutoencoderKLFlux2(**shape, **blocks, **changes).eval()
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.3, 3.0)
    return made


@functools.cache
def chat_tokenizer() -> Qwen2Tokenizer:
    """Byte pairs learnt from our words and dev's system message. Its template takes klein's messages and dev's."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    learner = Qwen2Tokenizer()._tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([SYSTEM_MESSAGE, "system user assistant", *WORDS, *(f" {word}" for word in WORDS)], trainer)
    learnt = json.loads(learner.to_str())["model"]
    made = Qwen2Tokenizer(learnt["vocab"], [tuple(pair) for pair in learnt["merges"]], additional_special_tokens=special[1:])
    content = "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}"
    said = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + content + "<|im_end|>\n{% endfor %}"
    made.chat_template = said + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return made


TEXT = {"vocab_size": 512, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": LAYERS, "head_dim": 4}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}


def qwen3_encoder(seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """As many layers as klein reads, eight wide: three of them make the 24 of the transformers."""
    torch.manual_seed(4000 + seed)
    return Qwen3ForCausalLM(Qwen3Config(**TEXT | changes)).eval()


def mistral_encoder(seed: int = 0, **changes: Any) -> Mistral3ForConditionalGeneration:
    """The same of dev, with a tiny vision tower."""
    torch.manual_seed(5000 + seed)
    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    config = Mistral3Config(text_config={"model_type": "mistral", **TEXT | changes}, vision_config=vision)
    return Mistral3ForConditionalGeneration(config).eval()


def flux2_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Shifted by size and steps, as the published one."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def flux2_pipeline(seed: int = 0, text_seed: int = 0, **transformer: Any) -> Flux2Pipeline:
    """A whole pipeline of dev; a tokenizer stands for its processor, whose image part needs torchvision."""
    return Flux2Pipeline(
        transformer=flux2_transformer(seed, **transformer),
        text_encoder=mistral_encoder(text_seed),
        tokenizer=chat_tokenizer(),
        vae=patched_vae(seed),
        scheduler=flux2_scheduler(),
    )


def klein_pipeline(seed: int = 0, text_seed: int = 0, is_distilled: bool = False, **transformer: Any) -> Flux2KleinPipeline:
    """A whole pipeline of klein: a base model, or one distilled to do without guidance."""
    return Flux2KleinPipeline(
        transformer=klein_transformer(seed, **transformer),
        text_encoder=qwen3_encoder(text_seed),
        tokenizer=chat_tokenizer(),
        vae=patched_vae(seed),
        scheduler=flux2_scheduler(),
        is_distilled=is_distilled,
    )
