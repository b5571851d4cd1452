"""Factories of tiny random experts of the real classes, with weights large enough to make differences visible."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from afa.experts.single_file import clip_vocabulary

WORDS = 770  # of CLIP's 49,408 tokens: its bytes, 256 merges, its two marks; the whole takes most of a test's time to read

SD = {
    "sample_size": 16,
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SMALL = {  # two levels, one layer each: IN00 … IN03, M00, OUT00 … OUT03
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
ONE_LEVEL = {  # one level of one layer: IN00, IN01, M00, OUT00, OUT01; for laws of the loop, of resuming, of reading and comparing
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
SDXL = {
    "sample_size": 16,
    "block_out_channels": (16, 16, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 40,
    "attention_head_dim": (2, 2, 4),
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
SDXL_SMALL = {  # two levels, one layer each, as above
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
}


def sd_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A U-Net with SD 1.x's four levels and 25 stages, 16 to 32 channels wide."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**SD, **changes}).eval()


def sdxl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A U-Net with SDXL's three levels, 19 stages and added conditions."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**SDXL, **changes}).eval()


def inputs(batch: int = 2, height: int = 16, width: int = 16, text_width: int = 24, seed: int = 0) -> dict[str, Any]:
    """What a pipeline hands to a U-Net at one step."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 7, text_width, generator=generator),
    }


def sdxl_inputs(**changes: Any) -> dict[str, Any]:
    """The same for SDXL, with its micro-conditioning."""
    call = inputs(text_width=40, **changes)
    batch = call["sample"].shape[0]
    pooled = torch.randn(batch, 16, generator=torch.Generator().manual_seed(1))
    call["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * batch)}
    return call


def tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer with its first merges only."""
    vocabulary, merges = clip_vocabulary()
    tokens = [*list(vocabulary)[: WORDS - 2], "<|startoftext|>", "<|endoftext|>"]
    places = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=places, merges=merges[: WORDS - 2 - 512], model_max_length=77, pad_token=pad_token)


def text_encoder(seed: int = 0, width: int = 24, projected: bool = False, **changes: Any) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder of two layers for `tokenizer`."""
    torch.manual_seed(1000 + seed)
    marks = {"bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1, "pad_token_id": WORDS - 1}
    settings = {"hidden_act": "quick_gelu", "projection_dim": 16, "vocab_size": WORDS, **marks}
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(**{**settings, **shape, **changes})
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(seed: int = 0) -> AutoencoderKL:
    """Four levels, as SD's: 1/8 of the image's side."""
    torch.manual_seed(2000 + seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=128, **blocks).eval()


def scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """SD's noise schedule."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)


def sd_pipeline(seed: int = 0, text_seed: int | None = None, prediction_type: str = "epsilon", **unet: Any) -> StableDiffusionPipeline:
    """A whole SD 1.x pipeline with a U-Net of nine stages; equal text seeds give byte-identical text encoders."""
    return StableDiffusionPipeline(
        unet=sd_unet(seed, **{**SMALL, **unet}),
        text_encoder=text_encoder(seed if text_seed is None else text_seed),
        tokenizer=tokenizer(),
        vae=vae(seed),
        scheduler=scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(seed: int = 0, text_seed: int | None = None, **unet: Any) -> StableDiffusionXLPipeline:
    """A whole SDXL pipeline with a U-Net of nine stages and its two text encoders, 16 and 24 wide."""
    text_seed = seed if text_seed is None else text_seed
    return StableDiffusionXLPipeline(
        unet=sdxl_unet(seed, **{**SDXL_SMALL, **unet}),
        text_encoder=text_encoder(text_seed, width=16),
        text_encoder_2=text_encoder(50 + text_seed, width=24, projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        vae=vae(seed),
        scheduler=scheduler(),
    )


def quiet(pipe: Any) -> Any:
    """Without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
