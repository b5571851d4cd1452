"""Factories of a tiny Qwen-Image 2.1, of the real classes, and of its whole pipeline."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
from tiny_transformers import call, flow_scheduler, lively, qwen_tokenizer
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from afa.experts.text_processor import TextProcessor

QWEN_IMAGE_21 = {
    "in_channels": 6,
    "out_channels": 6,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": 24,
    "mlp_ratio": 2,
    "axes_dims_rope": (4, 6, 6),
}
QWEN_IMAGE_21_SMALL = {"num_layers": 2}  # Q00, Q01, OUT


def qwen_image_21_transformer(seed: int = 0, **changes: Any) -> QwenImage21Transformer2DModel:
    """Four blocks."""
    return lively(QwenImage21Transformer2DModel, seed, **{**QWEN_IMAGE_21, **changes})


def qwen_image_21_inputs(lengths: tuple[int, ...] = (), height: int = 8, width: int = 8, **changes: Any) -> dict[str, Any]:
    """What the pipeline hands over. lengths: of the prompts, where they are padded to the longest."""
    found = call(qwen_image_21_transformer, height=height, width=width, **changes)
    if lengths:
        found["encoder_hidden_states_mask"] = torch.arange(found["encoder_hidden_states"].shape[1])[None] < torch.tensor(lengths)[:, None]
    return found


def transparent_vae(seed: int = 0, **changes: Any) -> AutoencoderKLQwenImage21:
    """Images with transparency as films of one frame, 1/16 of the image's side, a mean and a deviation of every channel."""
    torch.manual_seed(2000 + seed)
    shape = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 6, "dim_mult": [1, 1, 2, 2, 2], "num_res_blocks": 1}
    spread = {"latents_mean": [-0.7, 0.2, 0.9, -0.1, 0.4, 0.0], "latents_std": [2.8, 1.4, 0.6, 1.9, 1.0, 2.2]}
    return AutoencoderKLQwenImage21(**shape | spread | changes).eval()


def qwen3_tokenizer() -> Qwen2Tokenizer:
    """Qwen-Image's tiny one, with the chat template of Qwen3-VL for a system message, and its token of an image."""
    tokenizer = copy.deepcopy(qwen_tokenizer())
    tokenizer.chat_template = "{% for one in messages %}<|im_start|>{{ one.role }}\n{{ one.content[0].text }}<|im_end|>\n{% endfor %}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|image_pad|>"]})
    return tokenizer


def qwen3_encoder(seed: int = 0, width: int = 24) -> Qwen3VLForConditionalGeneration:
    """Two layers of text, one of vision; the last norm is not one, as in the released model."""
    torch.manual_seed(4000 + seed)
    text = {"vocab_size": 512, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 512}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2], "mrope_interleaved": True}}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": width}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    made = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()
    torch.nn.init.uniform_(made.model.language_model.norm.weight, 0.5, 2.0)
    return made


class SavedWithItsProcessor(QwenImage21Pipeline):
    """Saves what the stock pipeline does with a processor of text and images; making one needs torchvision, which tests go without."""

    def save_pretrained(self, folder: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(folder, *args, **kwargs)
        self.processor.tokenizer.save_pretrained(Path(folder) / "processor")
        file = Path(folder) / "model_index.json"
        index = json.loads(file.read_text()) | {"processor": ["transformers", "Qwen3VLProcessor"]}
        file.write_text(json.dumps(index))


SavedWithItsProcessor.__name__ = "QwenImage21Pipeline"


def qwen_image_21_pipeline(seed: int = 0, text_seed: int = 0, **transformer: Any) -> QwenImage21Pipeline:
    """A whole Qwen-Image 2.1 pipeline."""
    return SavedWithItsProcessor(
        transformer=qwen_image_21_transformer(seed, **transformer),
        text_encoder=qwen3_encoder(text_seed),
        processor=TextProcessor(qwen3_tokenizer()),
        vae=transparent_vae(seed),
        scheduler=flow_scheduler(),
    )
