"""Configs in the header of a single file, so that afa can read its own merges of any architecture.

The shapes of a whole checkpoint tell which of the shipped configs it has. A merge of another architecture
carries its configs in its header, as one JSON object: file -> content. A header may come from a stranger;
only a fixed set of files is read from it, with known classes, bounded numbers and plain words, and never a
path or code.
"""

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.experts.folders import FOREIGN, read_object
from afa.experts.parts import read_index
from afa.text_files import parse_json

KEY = "afa.configs"
LONGEST = 2**24  # characters
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
# component -> the classes that it may have
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = {
    f"{part}/{name}"
    for part in ("tokenizer", "tokenizer_2")
    for name in ("tokenizer.json", "tokenizer_config.json")
}
FILES = {INDEX, SCHEDULER, *TOKENIZERS, *(f"{part}/config.json" for part in MODELS)}
LEFT_OUT = (
    "_name_or_path",
    "name_or_path",
    "_diffusers_version",
    "transformers_version",
    "tokenizer_file",
    "special_tokens_map_file",
)
WORD = re.compile(r"[\w .+-]{0,80}")
LONGEST_LIST, DEEPEST_MODEL, LARGEST = 128, 128, 2**20


def pack(folder: Path, vae: Path, tokenizers: Mapping[str, Any]) -> str:
    """The text for a header that holds a folder of configs.

    folder:     of the configs
    vae:        the folder with the VAE's config.json
    tokenizers: by component, those that are not CLIP's
    """
    index = read_object(folder / INDEX)
    kept = {
        name: entry
        for name, entry in index.items()
        if name in (*CLASSES, "scheduler") or not isinstance(entry, list)
    }
    found: dict[str, Any] = {INDEX: _plain(kept)}
    for name in sorted(FILES - TOKENIZERS - {INDEX}):
        place = vae / "config.json" if name == "vae/config.json" else folder / name
        if place.is_file():
            found[name] = _plain(read_object(place))
    for part, tokenizer in tokenizers.items():
        with tempfile.TemporaryDirectory() as saved:
            tokenizer.save_pretrained(saved)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                content = read_object(Path(saved) / name)
                found[f"{part}/{name}"] = content if name == "tokenizer.json" else _plain(content)
    return json.dumps(found, sort_keys=True)


def unpack(metadata: Mapping[str, str], file: Path) -> Path | None:
    """Write the configs in a file's header to a temporary folder of this process.

    metadata: of the header
    Returns the folder; None if the header has no configs.
    Raises UserError for configs that `pack` does not write.
    """
    return _unpacked(metadata[KEY], file) if KEY in metadata else None


@lru_cache
def _unpacked(text: str, file: Path) -> Path:
    where = f"the configs in the header of {file}"
    found = check(text, where)
    folder = Path(tempfile.mkdtemp(prefix="afa-configs-"))  # only its owner can read it
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, content in found.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    read_index(folder)
    return folder


def check(text: str, where: str) -> dict[str, Any]:
    """The configs in a header, file -> content. Raises UserError for anything that `pack` does not write."""
    if len(text) > LONGEST:
        raise UserError(f"{where} have {len(text)} characters, and at most {LONGEST} are read; give --config")
    found = parse_json(text, where)
    if not isinstance(found, dict) or INDEX not in found or SCHEDULER not in found:
        raise UserError(f"{where} are no object with {INDEX} and {SCHEDULER}; give --config")
    for name, content in found.items():
        if name not in FILES or not isinstance(content, dict):
            raise UserError(f"{where} hold '{name:.80}', which is no config of a checkpoint; give --config")
        foreign = next((key for key in FOREIGN if key in content), None)
        if foreign is not None:
            raise UserError(f"{where}: {name} has {foreign}, which {FOREIGN[foreign]}; give --config")
        if not name.endswith("/tokenizer.json"):  # a vocabulary, which only its own reader understands
            _check_values(content, f"{where}: {name}")
    _check_classes(found, where)
    return found


def _check_classes(found: dict[str, Any], where: str) -> None:
    index = found[INDEX]
    named: dict[str, tuple[Any, tuple[str | None, ...]]] = {
        "the pipeline": (index.get("_class_name"), PIPELINES)
    }
    for part, classes in CLASSES.items():
        entry = index.get(part)
        if entry is not None:
            named[part] = (entry[1] if isinstance(entry, list) and len(entry) == 2 else entry, classes)
    named |= {
        name: (found[name].get("_class_name"), CLASSES[name.partition("/")[0]])
        for name in found
        if name[:3] in ("une", "vae")
    }
    tokenizers = [name for name in found if name.endswith("/tokenizer_config.json")]
    named |= {
        name: (found[name].get("tokenizer_class"), (*CLASSES["tokenizer"], None)) for name in tokenizers
    }
    for what, (name, known) in named.items():
        if name not in known:
            raise UserError(
                f"{where} name the class {name!s:.80} for {what}, expected {known[0]}; give --config"
            )
    for part in ("unet", "scheduler"):
        if not isinstance(index.get(part), list):
            raise UserError(f"{where} name no {part}; give --config")


def _check_values(value: Any, where: str, key: str = "") -> None:
    """Raise UserError for a number out of bounds, a text that is no plain word, or a long list."""
    if isinstance(value, dict):
        for name, child in value.items():
            _check_values(child, where, str(name))
    elif isinstance(value, list):
        if len(value) > (2**16 if key == "trained_betas" else LONGEST_LIST):
            raise UserError(
                f"{where}: {key:.80} has {len(value)} values, and at most {LONGEST_LIST} are read; "
                "give --config"
            )
        for child in value:
            _check_values(child, where, key)
    elif isinstance(value, (int, float)):
        most = DEEPEST_MODEL if "layers" in key and not isinstance(value, bool) else LARGEST
        if not abs(value) <= most and "model_max_length" not in key:
            raise UserError(f"{where}: {key:.80} is {value}, and at most {most} is read; give --config")
    elif (
        isinstance(value, str)
        and not (WORD.fullmatch(value) and ".." not in value)
        and not _is_token(key, value)
    ):
        raise UserError(f"{where}: {key:.80} is '{value:.80}', expected a plain word; give --config")


def _is_token(key: str, value: str) -> bool:
    """Whether a text is a tokenizer's special token, such as <|endoftext|>."""
    return (key.endswith("_token") or key == "content") and len(value) < 40 and "/" not in value


def _plain(content: Any) -> Any:
    """Settings without the keys that name places and versions."""
    if isinstance(content, dict):
        return {name: _plain(value) for name, value in content.items() if name not in LEFT_OUT}
    return [_plain(value) for value in content] if isinstance(content, list) else content
