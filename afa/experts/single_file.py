"""Which configs, scheduler and tokenizers a single file is read with; all of them ship with afa, in configs/.

U-Nets come with text encoders and VAE in one file (LDM's layout), or alone. Of transformers only the denoiser
is read, since their fine-tunes share everything else.
"""

import gzip
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from afa.denoiser.schedule import kind_of
from afa.errors import UserError, unknown
from afa.experts.embedded import SCHEDULER, unpack
from afa.experts.folders import read_object
from afa.experts.headers import read_file, read_metadata
from afa.experts.layouts import layout_of
from afa.experts.locate import Located
from afa.experts.parts import load_part
from afa.experts.prediction import Prediction, predicting, said_by_file, warn_once
from afa.experts.shipped import KNOWN_CONFIGS
from afa.experts.transformer_names import transformer_in
from afa.models.registry import FAMILIES

CONFIGS = Path(__file__).parent / "configs"
# whether names are diffusers' -> names of a U-Net's first convolution and of its first attention's text input
UNET = {
    False: ("input_blocks.0.0.weight", "input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"),
    True: ("conv_in.weight", "down_blocks.{}.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
}
# (block of the first attention, counted in both layouts; width of its text input) -> shipped config.
# SD 2.x with and without v-prediction have the same shapes: 2.1 at 768 px is taken, unless ε is said.
ARCHITECTURES = {(1, 0, 768): "sd15", (1, 0, 1024): "sd21", (4, 1, 2048): "sdxl"}

# Shipped config -> what else a file of its names and shapes may be: the word for that in the file's name, and
# its config. The first is taken where the name says nothing.
ALIKE = {
    "flux2-klein": ("base", "flux2-klein-base"),
    "flux2-klein-9b": ("base", "flux2-klein-base-9b"),
    "z-image": ("turbo", "z-image-turbo"),
    "krea2": ("turbo", "krea2-turbo"),
}
VARIANTS = {other for _, other in ALIKE.values()}  # configs that a file is read with only where it is said
# config of which no setting says how it is drawn -> how
DRAWN = {"z-image-turbo": "--guidance 1 --steps 9"}


def detect_config(file: Path, prediction_type: str | None = None) -> str:
    """The name of the shipped config that fits a single file, by the shapes in its header.

    prediction_type: the user's --prediction-type
    Raises UserError if none fits.
    """
    header = read_file(file)
    layout = layout_of(header, file)
    if layout.part == "vae":
        raise UserError(
            f"{file} is no checkpoint in original layout but a VAE alone; give it as --vae, "
            "or in Python as vae="
        )
    found = transformer_in(header) if layout.part == "transformer" else None
    if found is not None:
        names, prefix = found
        return names.config({name.removeprefix(prefix): entry.shape for name, entry in header.items()}, file)
    first, attention = (layout.prefix + name for name in UNET[layout.diffusers])
    channels = header[first].shape[1] if first in header else 0
    if channels != 4:
        raise UserError(
            f"{file} takes {channels} input channels, expected 4; "
            "inpainting and other conditioned U-Nets are not supported as single files"
        )
    for (*blocks, width), config in ARCHITECTURES.items():
        entry = header.get(attention.format(blocks[layout.diffusers]))
        if entry is not None and entry.shape[1:] == (width,):
            said = said_by_file(file, prediction_type).type if config == "sd21" else None
            return "sd21-base" if said == "epsilon" else config
    own = f"give its folder: {file.parent}, or" if (file.parent / "config.json").is_file() else "give"
    raise UserError(
        f"{file} is of no architecture known here ({', '.join(KNOWN_CONFIGS)}); "
        f"{own} its config folder with --config"
    )


def config_of(located: Located, config: str | None) -> tuple[str, Path]:
    """Find the configs of a single file.

    config: what the user names; None: the configs in the file's header, or those that fit its shapes
    Returns what they are called, and their folder. Raises UserError if there are none.
    """
    own = unpack(read_metadata(located.path), located.path) if config is None else None
    if own is not None:
        return "its header", own
    name = config or detect_config(located.path, located.spec.prediction_type)
    if config is None:
        name = _variant(located.path, name)
    return name, config_folder(name)


def _variant(file: Path, name: str) -> str:
    """The config of a file that may be of several models, by its name or the usual one, with a warning."""
    if name not in ALIKE:
        return name
    word, other = ALIKE[name]
    said = re.search(rf"(?<![a-z]){word}(?![a-z])", file.stem.lower()) is not None
    chosen, left = (other, name) if said else (name, other)
    why = ", as its name says" if said else ""
    drawn = f"; draw {KNOWN_CONFIGS[other]} with {DRAWN[other]}" if other in DRAWN else ""
    warn_once(
        f"{file} may be {KNOWN_CONFIGS[name]} or {KNOWN_CONFIGS[other]}, which its weights do not tell; it "
        f"is read as {KNOWN_CONFIGS[chosen]}{why} ({_settings(chosen)}); if it is the other, give --config "
        f"{left}{drawn}"
    )
    return chosen


def _settings(name: str) -> str:
    """What a shipped config decides besides the architecture, for a warning."""
    folder = config_folder(name)
    index = read_object(folder / "model_index.json")
    family = next(one for one in FAMILIES.values() if one.model == index["transformer"][1])
    guidance = family.interface.default_guidance(index)
    strength = "built in" if guidance is None else f"{guidance:g}"
    return f"guidance {strength}, shift {read_object(folder / SCHEDULER)['shift']:g}"


def scheduler_of(located: Located, config: str | None, folder: Path) -> tuple[Any, Prediction]:
    """The scheduler of a U-Net's single file, and what is said about its kind of prediction.

    config: what the user named
    folder: of the configs that the file is read with
    Raises UserError if the file, the user and the config contradict each other.
    """
    usual = load_part(folder, "scheduler")
    # the names sd15 and sdxl mean shapes only, not a kind of prediction
    named = config is not None and (config not in KNOWN_CONFIGS or config.startswith("sd21"))
    said = said_by_file(located.path, located.spec.prediction_type, kind_of(usual) if named else None)
    if folder.name == "sd21" and said.type is None and config is None:
        warn_once(
            f"{located.path} does not say what it predicts, and is read as v-prediction, "
            "as SD 2.1 at 768 px; if not, --prediction-type epsilon"
        )
    return predicting(usual, said, located.path), said


def config_folder(name_or_folder: str) -> Path:
    """The folder of a shipped config, or a user's folder of configs. Raises UserError if there is neither."""
    if name_or_folder in KNOWN_CONFIGS:
        return CONFIGS / name_or_folder
    folder = Path(name_or_folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(unknown(name_or_folder, KNOWN_CONFIGS, "config (or folder with model_index.json)"))
    return folder


@lru_cache(maxsize=1)
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary (token -> id) and merges.

    The vocabulary is 256 bytes, the same at the end of a word, 48,894 merges and two special tokens.
    Source: OpenAI's CLIP (MIT); see NOTICE.
    """
    merges = [
        tuple(line.split())
        for line in gzip.decompress((CONFIGS / "clip_merges.txt.gz").read_bytes()).decode().split("\n")
    ]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [code for code in range(256) if code not in printable]
    letters = [chr(code) for code in printable] + [chr(256 + index) for index in range(len(others))]
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges  # type: ignore[return-value]


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer, which all Stable Diffusion models use, built from the shipped merges."""
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, pad_token=pad_token)


def load_tokenizers(config: Path) -> dict[str, Any]:
    """The tokenizers of a folder of configs, by component: its own, or CLIP's with the right padding."""
    from transformers import CLIPTokenizer

    index = read_object(config / "model_index.json")
    names = [name for name in ("tokenizer", "tokenizer_2") if index.get(name, [None])[0]]
    pads_with_zero = {
        name: name == "tokenizer_2" or config.name.startswith("sd21") for name in names
    }  # OpenCLIP's way
    return {
        name: CLIPTokenizer.from_pretrained(config / name)
        if (config / name).is_dir()
        else clip_tokenizer("!" if pads_with_zero[name] else "<|endoftext|>")
        for name in names
    }
