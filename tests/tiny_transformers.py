"""Factories of tiny random transformers of the real classes, and of their whole pipelines."""

import functools
import json
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny import text_encoder, tokenizer
from tokenizers import pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from afa.cost import call_of

SD3 = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
SD3_SMALL = {"num_layers": 2, "dual_attention_layers": (0,)}  # J00, J01, OUT; for laws that every block obeys alike
FLUX_SMALL = {"num_layers": 1, "num_single_layers": 2}  # D00, S00, S01, OUT
QWEN_IMAGE_SMALL = {"num_layers": 2}  # Q00, Q01, OUT
QWEN_IMAGE = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
WORDS = ["a", "red", "bicycle", "on", "lawn", "cat", "dog", "blurry", "dark"]


def lively(kind: type[torch.nn.Module], seed: int, **config: Any) -> Any:
    """With weights that matter: as they are made, modulations are so small that blocks hardly change anything."""
    torch.manual_seed(seed)
    model = kind(**config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def sd3_transformer(seed: int = 0, **changes: Any) -> SD3Transformer2DModel:
    """Four joint blocks, two of them with the dual attention of 3.5-medium."""
    return lively(SD3Transformer2DModel, seed, **{**SD3, **changes})


def flux_transformer(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """Two double and three single blocks, with guidance embedded as in FLUX.1-dev."""
    return lively(FluxTransformer2DModel, seed, **{**FLUX, **changes})


def qwen_image_transformer(seed: int = 0, **changes: Any) -> QwenImageTransformer2DModel:
    """Four blocks."""
    return lively(QwenImageTransformer2DModel, seed, **{**QWEN_IMAGE, **changes})


def call(make: Any, batch: int = 2, height: int = 16, width: int = 16, seed: int = 0, tokens: int = 7) -> dict[str, Any]:
    """What a pipeline hands to such a model at one step, with random content."""
    generator = torch.Generator().manual_seed(seed)
    given = call_of(_asked(make), height, width, batch, tokens)
    found = {
        name: torch.randn(value.shape, generator=generator) if _is_content(name, value) else value
        for name, value in given.items()
    }
    scale = 1.0 if "img_ids" in found or "img_shapes" in found else 1000.0
    return {**found, "timestep": torch.full((batch,), 0.5 * scale)}


@functools.cache
def _asked(make: Any) -> Any:
    """One model of a kind, only to ask for what it is called with."""
    return make()


def _is_content(name: str, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not name.endswith("_ids")


def qwen_image_inputs(lengths: tuple[int, ...] = (), **changes: Any) -> dict[str, Any]:
    """The same for Qwen-Image. lengths: of the prompts, where they are padded to the longest."""
    found = call(qwen_image_transformer, **changes)
    if lengths:
        found["encoder_hidden_states_mask"] = torch.arange(found["encoder_hidden_states"].shape[1])[None] < torch.tensor(lengths)[:, None]
    return found


sd3_inputs = functools.partial(call, sd3_transformer)
flux_inputs = functools.partial(call, flux_transformer)


def vae(seed: int = 0) -> AutoencoderKL:
    """Four levels, 1/8 of the image's side, with a shift as SD3's and FLUX's."""
    torch.manual_seed(2000 + seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    shape = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    return AutoencoderKL(**shape, **blocks, scaling_factor=1.5, shift_factor=0.06, sample_size=128).eval()


def t5_tokenizer() -> T5Tokenizer:
    """A handful of words; everything else is unknown."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), *((f"▁{word}", -1.0) for word in WORDS)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def t5_encoder(seed: int = 0, width: int = 24) -> T5EncoderModel:
    """Two layers."""
    torch.manual_seed(3000 + seed)
    config = T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def flow_scheduler(shift: float = 3.0) -> FlowMatchEulerDiscreteScheduler:
    """SD3's."""
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def sd3_pipeline(seed: int = 0, text_seed: int = 0, **transformer: Any) -> StableDiffusion3Pipeline:
    """A whole SD3 pipeline with its three text encoders."""
    return StableDiffusion3Pipeline(
        transformer=sd3_transformer(seed, **transformer),
        text_encoder=text_encoder(text_seed, width=16, projected=True),
        text_encoder_2=text_encoder(50 + text_seed, width=24, projected=True),
        text_encoder_3=t5_encoder(text_seed, width=48),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        tokenizer_3=t5_tokenizer(),
        vae=vae(seed),
        scheduler=flow_scheduler(),
    )


def flux_pipeline(seed: int = 0, text_seed: int = 0, **transformer: Any) -> FluxPipeline:
    """A whole FLUX.1 pipeline: CLIP for pooled states, T5 for the rest."""
    return FluxPipeline(
        transformer=flux_transformer(seed, **transformer),
        text_encoder=text_encoder(text_seed, width=16),
        text_encoder_2=t5_encoder(text_seed),
        tokenizer=tokenizer(),
        tokenizer_2=t5_tokenizer(),
        vae=vae(seed),
        scheduler=flow_scheduler(),
    )


def frame_vae(seed: int = 0, **changes: Any) -> AutoencoderKLQwenImage:
    """Qwen-Image's: images as films of one frame, 1/8 of the image's side, a mean and a deviation of every channel."""
    torch.manual_seed(2000 + seed)
    shape = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    spread = {"latents_mean": [-0.7, 0.2, 0.9, -0.1], "latents_std": [2.8, 1.4, 0.6, 1.9]}
    return AutoencoderKLQwenImage(**shape | spread | changes).eval()


@functools.cache
def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte pairs learnt from the pipeline's template and our words: each word is one token, so the template is as long as the real one."""
    template = QwenImagePipeline(*[None] * 5).prompt_template_encode
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Qwen2Tokenizer()._tokenizer
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([template, *WORDS, *(f" {word}" for word in WORDS)], trainer)
    learnt = json.loads(learner.to_str())["model"]
    return Qwen2Tokenizer(learnt["vocab"], [tuple(pair) for pair in learnt["merges"]], additional_special_tokens=special[1:])


def qwen_encoder(seed: int = 0, width: int = 24) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of text, one of vision."""
    torch.manual_seed(4000 + seed)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}}
    shape = {"vocab_size": 512, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
    text = {**heads, **shape, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": width}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def qwen_image_pipeline(seed: int = 0, text_seed: int = 0, **transformer: Any) -> QwenImagePipeline:
    """A whole Qwen-Image pipeline."""
    return QwenImagePipeline(
        transformer=qwen_image_transformer(seed, **transformer),
        text_encoder=qwen_encoder(text_seed),
        tokenizer=qwen_tokenizer(),
        vae=frame_vae(seed),
        scheduler=flow_scheduler(),
    )
