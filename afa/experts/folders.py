"""The folder of one component: its config.json, and which of its weight files are read.

All commands find weights here, by the rules of diffusers and transformers. What is inspected, hashed and
merged is therefore what is computed with. Pickled weights are refused, since reading them can run code.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.experts.headers import Tensors, read_file
from afa.files import json_or_none
from afa.places import public_place
from afa.text_files import read_json

NAMES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # of weight files
VARIANTS = ("fp32", "bf16", "fp16")  # the order in which they are taken, if there are no plain weights
CONFIG = 2**24  # bytes of a config.json that are still read
CONFIGS = (
    "config.json",
    "model_index.json",
    "scheduler_config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
)
NOTED = ("name_or_path", "_file")  # ends of the keys under which diffusers and transformers record paths
QUANTISED = "quantization_config"
# Settings that make a library read other files than the folder's, or run code that came with it.
FOREIGN = {
    "auto_map": "names code of its own, which is never run",
    "custom_pipelines": "names code of its own, which is never run",
    QUANTISED: "describes quantised weights, which are not read",
    "transformers_weights": "names a weight file of its own",
}


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a component.

    files:   they hold the weights, whole or in shards
    variant: as from_pretrained takes it, e.g. fp16; None: none
    index:   of shards; None: one file
    """

    files: tuple[Path, ...]
    variant: str | None = None
    index: Path | None = None


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file is missing, broken, or holds no object."""
    try:
        found = read_json(file, CONFIG)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except UserError as error:  # no text, no JSON, too deep
        raise UserError(f"{file} cannot be read: it {str(error).removeprefix(f'{file} ')}") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{file} cannot be read: it holds a {type(found).__name__}, expected an object of settings"
        )
    return found


# The largest whole numbers of a config by what stands in their name; others go up to 2³¹.
MOST = {"layers": 1000, "depth": 1000, "blocks": 1000, "timesteps": 1_000_000}


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The settings of a component.

    folder: of the component
    name:   of the file with the settings
    Raises UserError if it is missing or broken, names code or another weight file, or has impossible numbers.
    """
    file = folder / name
    config = read_object(file)
    for key, why in FOREIGN.items():
        if config.get(key) and key == QUANTISED:
            raise UserError(
                f"{file}: {key} says that the weights are quantised by {_quantiser(config[key])}, which is "
                "not read; take the folder in bf16 or fp16, or a single file in fp8, scaled fp8 or GGUF"
            )
        if config.get(key):
            raise UserError(f"{file}: {key} {why}")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds a PEFT adapter (adapter_config.json), not a model; "
            "merge it into its model and save that"
        )
    for key in (
        "_class_name",
        "model_type",
        "_attn_implementation",
        "attn_implementation",
        "attention_backend",
    ):
        value = config.get(key)
        if not (value is None or (isinstance(value, str) and re.fullmatch(r"[\w-]+", value))):
            raise UserError(f"{file}: {key} is {value!r:.80}, expected a plain name")
    architectures = config.get("architectures")
    if not (
        architectures is None
        or (isinstance(architectures, list) and all(isinstance(one, str) for one in architectures))
    ):
        raise UserError(f"{file}: architectures is {architectures!r:.80}, expected a list of names")
    _check_sizes(config, file, "")
    return config


def _quantiser(settings: Any) -> str:
    """What a quantization_config calls its method: bitsandbytes, torchao, quanto, gguf …, and its kind."""
    if not isinstance(settings, dict):
        return "a method without a name"
    kinds = ("bnb_4bit_quant_type", "quant_type", "weights_dtype", "weights", "load_in_8bit", "bits")
    method = str(settings.get("quant_method", "a method without a name"))
    kind = next((settings[name] for name in kinds if isinstance(settings.get(name), str | int)), None)
    return f"{method:.40}" if kind in (None, True, False) else f"{method:.40} ({kind!s:.40})"


def _check_sizes(value: Any, file: Path, key: str) -> None:
    """Raise UserError for a number that no model has; a library would build layers or tables without end."""
    if isinstance(value, dict):
        for name, child in value.items():
            _check_sizes(child, file, name)
    elif isinstance(value, list):
        for child in value:
            _check_sizes(child, file, key)
    elif isinstance(value, int):
        most = next((most for part, most in MOST.items() if part in key), 2**31)
        if abs(value) > most and "model_max_length" not in key:
            raise UserError(f"{file}: {key:.80} is {value:.6g}, and at most {most:,} is read")


def weight_files(folder: Path) -> WeightFiles:
    """Find the weight files of a component's folder: those without a variant, or else of one, such as fp16.

    If there are both shards and a whole file, diffusers reads the shards and transformers the whole file.
    Raises UserError if there are none, only pickles, or several variants.
    """
    library = "diffusers" if "_class_name" in read_config(folder) else "transformers"
    stem = NAMES[library]
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    # the libraries have put the variant at three places into the name of an index
    variant = r"(?:\.(\w+))?"
    pattern = re.compile(rf"{stem}{variant}\.safetensors(?:{variant}\.index{variant}\.json)?")
    matches = [match for name in present if (match := pattern.fullmatch(name))]
    of_file = {match[0]: match[1] or match[2] or match[3] for match in matches}
    variants = set(of_file.values())
    if not variants:
        raise UserError(_nothing(folder, stem, present))
    chosen = next((variant for variant in (None, *VARIANTS) if variant in variants), None)
    if chosen not in variants:
        if len(variants) > 1:
            found = ", ".join(sorted(variant or "" for variant in variants))
            raise UserError(
                f"{folder} has its weights in the variants {found} and none without; keep one of them"
            )
        (chosen,) = variants
    names = [name for name, its in of_file.items() if its == chosen]
    (first, *_) = sorted(names, key=lambda name: name.endswith(".json") == (library == "transformers"))
    if not first.endswith(".json"):
        return WeightFiles((folder / first,), chosen)
    return WeightFiles(_shards(folder, folder / first), chosen, folder / first)


def _nothing(folder: Path, stem: str, present: list[str]) -> str:
    """The error for a folder without weight files of a known name."""
    pickles = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles and not any(name.endswith(".safetensors") for name in present):
        return (
            f"the weights in {folder} are pickled ({pickles[0]}), and to read those can run code; "
            "convert them to .safetensors first"
        )
    others = ", ".join(name for name in present if name.endswith(".safetensors")) or "none at all"
    return (
        f"{folder} has no weights under a name that is loaded ({stem}.safetensors, alone or with .fp16); "
        f"found: {others}"
    )


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    """The shards that an index names. Raises UserError for one that is missing, or outside the folder."""
    found = read_object(index)
    weight_map = found.get("weight_map")
    weight_map = (
        weight_map if isinstance(weight_map, dict) and isinstance(found.get("metadata"), dict) else {}
    )
    if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(
            f"{index} has no weight_map of tensors to files, with metadata beside it; download it again"
        )
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{index} names the file {name!r:.80}, expected a .safetensors file beside it; "
                "download it again"
            )
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} lacks {name}, one of {len(files)} files its weights are in; download it again"
            )
    return tuple(folder / name for name in files)


def read_folder(folder: Path) -> Tensors:
    """The headers of the tensors in a component's folder, whole or in shards.

    Raises UserError if there are no weight files, or if one is missing, broken, pickled or quantised.
    """
    found = weight_files(folder)
    tensors: Tensors = {}
    for file in found.files:
        held = read_file(file)
        twice = next((name for name in held if name in tensors), None)
        if twice is not None:
            raise UserError(
                f"{folder}: {twice} is in {file.name} and in {tensors[twice].file.name}; "
                "download the weights again"
            )
        tensors |= held
    return tensors


def forget_places(folder: Path) -> None:
    """Shorten the paths that libraries recorded in the configs of a copied model to names."""
    for file in folder.rglob("*.json") if folder.is_dir() else ():
        public = public_config(file)
        if public is not None:
            file.write_text(public)


def public_config(file: Path) -> str | None:
    """A config with names in place of the paths that libraries recorded; None for a file that may stay."""
    settings = json_or_none(file) if file.name in CONFIGS else None
    if not isinstance(settings, dict):
        return None
    noted = {key: value for key, value in settings.items() if key.endswith(NOTED) and isinstance(value, str)}
    public = {key: public_place(value) for key, value in noted.items()}
    return None if public == noted else json.dumps({**settings, **public}, indent=2) + "\n"
