"""Single .safetensors files in their original layout: which architecture, and loading them without a network.

U-Nets come with text encoders and VAE in one file (LDM's layout); of transformers (SD 3, FLUX) only the denoiser is read, since
their fine-tunes share everything else. diffusers converts the keys; what it would fetch from a hub (configs, CLIP's
tokenizer) ships in configs/.
"""

import gzip
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.experts.folders import read_object
from afa.experts.headers import read_header
from afa.lookup import unknown

CONFIGS = Path(__file__).parent / "configs"
KNOWN_CONFIGS = ("sd15", "sd21", "sd21-base", "sdxl", "sd3", "sd35", "sd35-large", "flux", "flux-schnell")
DENOISER = "model.diffusion_model."  # before a denoiser's keys, unless it is alone in its file
FIRST_CONV = f"{DENOISER}input_blocks.0.0.weight"
ATTENTION = f"{DENOISER}input_blocks.{{}}.1.transformer_blocks.0.attn2.to_k.weight"
# (block of the first attention, width of its text input) -> shipped config.
# SD 2.x with and without v-prediction have the same shapes: 2.1 at 768 px is taken, sd21-base must be asked for.
ARCHITECTURES = {(1, 768): "sd15", (1, 1024): "sd21", (4, 2048): "sdxl"}
SD3, FLUX = "joint_blocks.0.x_block.attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight"
TRANSFORMERS = (SD3, FLUX)


def detect_config(file: Path) -> str:
    """Which shipped config fits a single file, from the shapes in its header. Raises UserError if none does."""
    header = read_header(file)
    if is_transformer(header):
        return _transformer_config(file, {name.removeprefix(DENOISER): entry["shape"] for name, entry in header.items()})
    if FIRST_CONV not in header:
        raise UserError(f"{file} is no checkpoint in original layout: it has no {FIRST_CONV}, and is no SD 3 or FLUX; is it a LoRA, a VAE or another family?")
    channels = header[FIRST_CONV]["shape"][1]
    if channels != 4:
        raise UserError(f"{file} takes {channels} input channels, expected 4; inpainting and other conditioned U-Nets are not supported as single files")
    for (block, width), config in ARCHITECTURES.items():
        if header.get(ATTENTION.format(block), {}).get("shape", [0, 0])[1] == width:
            return config
    raise UserError(f"{file} is of no architecture known here ({', '.join(KNOWN_CONFIGS)}); give its config folder with --config")


def is_transformer(names: Collection[str]) -> bool:
    """Whether a single file with these keys has a transformer of SD 3 or FLUX in its original layout."""
    return any(f"{prefix}{mark}" in names for prefix in (DENOISER, "") for mark in TRANSFORMERS)


def is_alone(file: Path) -> bool:
    """Whether of a single file only the denoiser is read. Raises UserError if it is broken."""
    return is_transformer(read_header(file))


def _transformer_config(file: Path, shapes: Mapping[str, list[int]]) -> str:
    """Of SD 3 by depth and by the largest image, of FLUX by whether guidance is told. Raises UserError for what is none of them."""
    if SD3 in shapes:
        if "joint_blocks.37.x_block.attn.qkv.weight" in shapes:
            return "sd35-large"
        return "sd35" if "joint_blocks.0.x_block.attn2.qkv.weight" in shapes else "sd3"
    channels = shapes["img_in.weight"][1]
    if channels != 64:
        kinds = {384: "FLUX.1 Fill", 128: "FLUX.1 Depth or Canny"}
        raise UserError(f"{file} takes {channels} input channels ({kinds.get(channels, 'unknown')}), expected the 64 of FLUX.1; give a diffusers folder")
    return "flux" if "guidance_in.in_layer.weight" in shapes else "flux-schnell"


def config_folder(name_or_folder: str) -> Path:
    """A shipped config by its name, or a user's own folder of configs. Raises UserError if there is neither."""
    if name_or_folder in KNOWN_CONFIGS:
        return CONFIGS / name_or_folder
    folder = Path(name_or_folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(unknown(name_or_folder, KNOWN_CONFIGS, "config (or folder with model_index.json)"))
    return folder


@lru_cache(maxsize=1)
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges: 256 bytes, the same at a word's end, 48,894 merges, two marks.

    Data of OpenAI's CLIP (MIT); see NOTICE.
    """
    merges = [tuple(line.split()) for line in gzip.decompress((CONFIGS / "clip_merges.txt.gz").read_bytes()).decode().split("\n")]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [code for code in range(256) if code not in printable]
    letters = [chr(code) for code in printable] + [chr(256 + index) for index in range(len(others))]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges  # type: ignore[return-value]


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """The tokenizer of all Stable Diffusion models, built from the shipped merges."""
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad_token)


def load_tokenizers(config: Path) -> dict[str, Any]:
    """The tokenizers a config folder asks for: its own, or CLIP's with the architecture's padding."""
    from transformers import CLIPTokenizer

    index = read_object(config / "model_index.json")
    names = [name for name in ("tokenizer", "tokenizer_2") if index.get(name, [None])[0]]
    pads_with_zero = {name: name == "tokenizer_2" or config.name.startswith("sd21") for name in names}  # OpenCLIP's way
    return {
        name: CLIPTokenizer.from_pretrained(config / name)
        if (config / name).is_dir()
        else clip_tokenizer("!" if pads_with_zero[name] else "<|endoftext|>")
        for name in names
    }
