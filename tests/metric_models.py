"""Tiny real models for metrics, saved as their publishers save them, and plain computations to hold them against."""

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from afa.metrics.base import Picture
from afa.metrics.registry import Resources

WORDS = 49408  # CLIP's vocabulary; its tokenizer is shipped
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}


def images(count, side=24, seed=0):
    """Random images of one size."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def pictures(count=5, per_prompt=1, seed=0, side=24):
    """Random pictures, several a prompt; the caption names the prompt."""
    return [
        Picture(image, f"caption number {k // per_prompt}", k // per_prompt) for k, image in enumerate(images(count, side, seed))
    ]


def resources(weights, batch_size=2):
    """What a metric is made with."""
    return Resources(None if weights is None else str(weights), torch.device("cpu"), batch_size)


def shaken(model, seed, amount=0.05):
    """Weights that differ from each other, norms and biases too, so that a mistaken name shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model.eval()


def clip_model(seed=0, side=16, width=None):
    """A CLIP of two layers; width: of its embeddings."""
    torch.manual_seed(seed)
    shape = {**SHAPE, "projection_dim": width or SHAPE["projection_dim"]}
    ends = {"bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1, "pad_token_id": WORDS - 1}
    vision = {**shape, "image_size": side, "patch_size": 8}
    config = CLIPConfig(
        vision_config=vision, text_config={**shape, "vocab_size": WORDS, **ends}, projection_dim=shape["projection_dim"]
    )
    return shaken(CLIPModel(config), seed)


def clip_folder(folder, **shape):
    """A CLIP as transformers saves it."""
    clip_model(**shape).save_pretrained(folder)
    return folder


def dino_folder(folder, seed=0):
    """A DINOv2 as transformers saves it."""
    torch.manual_seed(seed)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    shaken(Dinov2Model(config), seed).save_pretrained(folder)
    return folder


def random_tensors(shapes, seed=0, scale=0.2):
    """Tensors by name; norms' weights lie around one."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + tensor if _is_norm(name) else tensor for name, tensor in found.items()}


def _is_norm(name):
    return name.endswith("weight") and ("ln_" in name or "norm" in name or "LayerNorm" in name)


def attend(query, key, value, heads, mask=None):
    """Attention over (B, T, C), the heads side by side on the channels."""
    split = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)


def norm(tensors, name, hidden, eps):
    return F.layer_norm(hidden, hidden.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def linear(tensors, name, hidden):
    return F.linear(hidden, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


# ---- open_clip: a ViT with 80 channels a head, a text tower with 64 ----


def open_clip_shapes(vision=80, text=64, projected=12, patch=8, side=16, layers=(2, 2), inner=2):
    """What a checkpoint holds, by open_clip's names; inner: how much wider the layers' insides are."""
    shapes = {"visual.class_embedding": (vision,), "visual.positional_embedding": ((side // patch) ** 2 + 1, vision)}
    shapes |= {"visual.conv1.weight": (vision, 3, patch, patch), "visual.proj": (vision, projected), "logit_scale": ()}
    shapes |= {f"visual.{name}.{kind}": (vision,) for name in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    shapes |= {"positional_embedding": (77, text), "token_embedding.weight": (WORDS, text), "text_projection": (text, projected)}
    shapes |= {f"ln_final.{kind}": (text,) for kind in ("weight", "bias")}
    for prefix, width, count in (("visual.", vision, layers[0]), ("", text, layers[1])):
        for layer in range(count):
            shapes |= _open_clip_block(f"{prefix}transformer.resblocks.{layer}", width, inner * width)
    return shapes


def open_clip_tensors(seed=0):
    """A checkpoint of two layers a tower."""
    return random_tensors(open_clip_shapes(), seed)


def _open_clip_block(start, width, inner):
    shapes = {f"{start}.{name}.{kind}": (width,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    for name, (rows, columns) in {
        "attn.out_proj": (width, width),
        "mlp.c_fc": (inner, width),
        "mlp.c_proj": (width, inner),
    }.items():
        shapes |= {f"{start}.{name}.weight": (rows, columns), f"{start}.{name}.bias": (rows,)}
    return {**shapes, f"{start}.attn.in_proj_weight": (3 * width, width), f"{start}.attn.in_proj_bias": (3 * width,)}


def _open_clip_tower(tensors, prefix, hidden, heads, mask=None):
    """As open_clip's residual attention blocks run."""
    for layer in range(2):
        name = f"{prefix}transformer.resblocks.{layer}"
        inner = norm(tensors, f"{name}.ln_1", hidden, 1e-5)
        joined = F.linear(inner, tensors[f"{name}.attn.in_proj_weight"], tensors[f"{name}.attn.in_proj_bias"])
        hidden = hidden + linear(tensors, f"{name}.attn.out_proj", attend(*joined.chunk(3, 2), heads, mask))
        inner = F.gelu(linear(tensors, f"{name}.mlp.c_fc", norm(tensors, f"{name}.ln_2", hidden, 1e-5)))
        hidden = hidden + linear(tensors, f"{name}.mlp.c_proj", inner)
    return hidden


def open_clip_image(tensors, pixels, heads=1):
    """Embeddings of normalised pixels, (B, projected)."""
    patches = (
        F.conv2d(pixels, tensors["visual.conv1.weight"], stride=tensors["visual.conv1.weight"].shape[2])
        .flatten(2)
        .transpose(1, 2)
    )
    first = tensors["visual.class_embedding"].expand(len(pixels), 1, -1)
    hidden = norm(tensors, "visual.ln_pre", torch.cat([first, patches], 1) + tensors["visual.positional_embedding"], 1e-5)
    hidden = _open_clip_tower(tensors, "visual.", hidden, heads)
    return norm(tensors, "visual.ln_post", hidden[:, 0], 1e-5) @ tensors["visual.proj"]


def open_clip_text(tensors, tokens, heads=1):
    """Embeddings of tokens (B, 77), whose highest number is the end."""
    hidden = tensors["token_embedding.weight"][tokens] + tensors["positional_embedding"]
    mask = torch.full((77, 77), float("-inf")).triu(1)
    hidden = norm(tensors, "ln_final", _open_clip_tower(tensors, "", hidden, heads, mask), 1e-5)
    return hidden[torch.arange(len(tokens)), tokens.argmax(1)] @ tensors["text_projection"]


# ---- ImageReward: BLIP's two encoders and a head, 64 channels an attention head ----

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "caption", "number", *"0123456789", "a", "cat", "##s", ","]


def reward_tensors(seed=0, vision=64, text=128, words=30, patch=8, side=16):
    """A checkpoint of two layers an encoder, by ImageReward's names, with what its file has besides."""
    eye, read = "blip.visual_encoder", "blip.text_encoder"
    shapes = {f"{eye}.cls_token": (1, 1, vision), f"{eye}.pos_embed": (1, (side // patch) ** 2 + 1, vision)}
    shapes |= {f"{eye}.patch_embed.proj.weight": (vision, 3, patch, patch), f"{eye}.patch_embed.proj.bias": (vision,)}
    shapes |= {f"{eye}.norm.{kind}": (vision,) for kind in ("weight", "bias")} | {"blip.vision_proj.weight": (4, vision)}
    for layer in range(2):
        shapes |= _reward_image_block(f"{eye}.blocks.{layer}", vision) | _reward_text_block(
            f"{read}.encoder.layer.{layer}", text, vision
        )
    shapes |= {
        f"{read}.embeddings.word_embeddings.weight": (words, text),
        f"{read}.embeddings.position_embeddings.weight": (40, text),
    }
    shapes |= {f"{read}.embeddings.LayerNorm.{kind}": (text,) for kind in ("weight", "bias")}
    shapes |= {f"mlp.{name}": shape for name, shape in head_shapes(text).items()}
    return {**random_tensors(shapes, seed), f"{read}.embeddings.position_ids": torch.arange(40)[None]}


def head_shapes(width):
    """Of the head that ImageReward and the aesthetic predictor share, by its published names."""
    sizes = dict(zip((0, 2, 4, 6, 7), [(1024, width), (128, 1024), (64, 128), (16, 64), (1, 16)], strict=True))
    weights = {f"layers.{place}.weight": size for place, size in sizes.items()}
    return weights | {f"layers.{place}.bias": size[:1] for place, size in sizes.items()}


def _dense(start, sizes):
    return {
        f"{start}.{name}.{kind}": size if kind == "weight" else size[:1]
        for name, size in sizes.items()
        for kind in ("weight", "bias")
    }


def _reward_image_block(start, width):
    norms = {f"{start}.norm{k}.{kind}": (width,) for k in (1, 2) for kind in ("weight", "bias")}
    sizes = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (2 * width, width),
        "mlp.fc2": (width, 2 * width),
    }
    return norms | _dense(start, sizes)


def _reward_text_block(start, width, seen):
    sizes = {"intermediate.dense": (2 * width, width), "output.dense": (width, 2 * width)}
    for name, source in (("attention", width), ("crossattention", seen)):
        sizes |= {
            f"{name}.self.query": (width, width),
            f"{name}.self.key": (width, source),
            f"{name}.self.value": (width, source),
        }
        sizes |= {f"{name}.output.dense": (width, width)}
    norms = [f"{start}.{name}output.LayerNorm" for name in ("attention.", "crossattention.", "")]
    return _dense(start, sizes) | {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}


def reward(tensors, pixels, tokens, mask, image_heads=1, text_heads=2):
    """The reward of each pair before it is standardised, as ImageReward's release computes it."""
    seen = _see(tensors, "blip.visual_encoder", pixels, image_heads)
    read = _read(tensors, "blip.text_encoder", tokens, mask, seen, text_heads)[:, 0]
    for place in (0, 2, 4, 6, 7):
        read = linear(tensors, f"mlp.layers.{place}", read)
    return read[:, 0]


def _see(tensors, name, pixels, heads):
    patch = tensors[f"{name}.patch_embed.proj.weight"]
    hidden = F.conv2d(pixels, patch, tensors[f"{name}.patch_embed.proj.bias"], stride=patch.shape[2]).flatten(2).transpose(1, 2)
    hidden = torch.cat([tensors[f"{name}.cls_token"].expand(len(pixels), -1, -1), hidden], 1) + tensors[f"{name}.pos_embed"]
    for layer in range(2):
        block = f"{name}.blocks.{layer}"
        joined = linear(tensors, f"{block}.attn.qkv", norm(tensors, f"{block}.norm1", hidden, 1e-6))
        hidden = hidden + linear(tensors, f"{block}.attn.proj", attend(*joined.chunk(3, 2), heads))
        inner = F.gelu(linear(tensors, f"{block}.mlp.fc1", norm(tensors, f"{block}.norm2", hidden, 1e-6)))
        hidden = hidden + linear(tensors, f"{block}.mlp.fc2", inner)
    return norm(tensors, f"{name}.norm", hidden, 1e-6)


def _read(tensors, name, tokens, mask, seen, heads):
    words = tensors[f"{name}.embeddings.word_embeddings.weight"][tokens]
    places = tensors[f"{name}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    hidden = norm(tensors, f"{name}.embeddings.LayerNorm", words + places, 1e-12)
    visible = mask[:, None, None, :].bool()
    for layer in range(2):
        block = f"{name}.encoder.layer.{layer}"
        for kind, source, allowed in (("attention", None, visible), ("crossattention", seen, None)):
            source = hidden if source is None else source
            query, key, value = (
                linear(tensors, f"{block}.{kind}.self.{part}", each)
                for part, each in (("query", hidden), ("key", source), ("value", source))
            )
            added = linear(tensors, f"{block}.{kind}.output.dense", attend(query, key, value, heads, allowed))
            hidden = norm(tensors, f"{block}.{kind}.output.LayerNorm", added + hidden, 1e-12)
        inner = F.gelu(linear(tensors, f"{block}.intermediate.dense", hidden))
        hidden = norm(tensors, f"{block}.output.LayerNorm", linear(tensors, f"{block}.output.dense", inner) + hidden, 1e-12)
    return hidden
