"""What a merged checkpoint has besides weights: the files of a folder, or configs in a single file's header.

All come from the first expert, except those of the VAE, which come with the VAE.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from afa.experts.embedded import KEY, LEFT_OUT, SCHEDULER, pack
from afa.experts.folders import read_object
from afa.experts.parts import INDEX, read_index
from afa.experts.prediction import keys_of, warn_once
from afa.experts.single_file import clip_vocabulary, config_folder, load_tokenizers
from afa.merging.plan import MergePlan
from afa.merging.sources import FileSource

OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # a download may leave them out
SHIPPED = ("sd15", "sd21", "sd21-base", "sdxl")  # configs that are detected by a single file's shapes
# Of a scheduler; its other settings are a sampler's, or keys in the file.
NOISE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "trained_betas")
UNIMPORTANT = (*LEFT_OUT, "architectures", "dtype", "torch_dtype", "sample_size")
PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}  # as load_tokenizers makes CLIP's


def copy_surroundings(plan: MergePlan, into: Path) -> None:
    """Write everything but the weights.

    Weights that a merge does not read (a safety checker's) are copied with their folder.
    """
    first = plan.first
    if not first.located.whole_pipeline:
        own = first.config / first.denoiser if first.located.single_file else first.config
        if keys_of(first.expert.scheduler):
            cannot = "a folder of a denoiser alone cannot say that it predicts v"
            warn_once(f"{plan.settings.output}: {cannot}; give --prediction-type v_prediction with it")
        _write_config(own / "config.json", into / "config.json", plan.dtype)
        return
    index = read_index(first.config)
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        if name in (*first.parts, "vae"):
            _copy_config(plan.last.origin(name).origin(name), name, into, plan.dtype)
        elif (first.config / name).is_dir():
            shutil.copytree(first.config / name, into / name)
        elif name in OPTIONAL:
            index[name] = [None, None]
    if first.located.single_file:
        _scheduler(first, index, into)
        for name, tokenizer in load_tokenizers(first.config).items():  # CLIP's, or those of its config folder
            tokenizer.save_pretrained(into / name)
    if index.get("safety_checker", [None])[0] is None and "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    (into / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_config(origin: FileSource, part: str, into: Path, dtype: str | None) -> None:
    """A part's config.json, from a pipeline's folder or (a VAE's) own."""
    (into / part).mkdir(exist_ok=True)
    own = origin.config / part
    for file in (own if own.is_dir() else origin.config).glob("*.json"):
        if file.name == "config.json":
            _write_config(file, into / part / file.name, dtype)
        elif not file.name.endswith(".index.json"):
            shutil.copyfile(file, into / part / file.name)


def _write_config(file: Path, target: Path, dtype: str | None) -> None:
    """A config as it is, but for the dtype that some name."""
    config = read_object(file)
    for name in ("dtype", "torch_dtype"):
        if dtype and name in config:
            config[name] = dtype
    target.write_text(json.dumps(config, indent=2) + "\n")


def _scheduler(first: FileSource, index: dict[str, Any], into: Path) -> None:
    """A single file may say of itself what its configs do not: then the folder has to."""
    scheduler = first.expert.scheduler
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    shutil.rmtree(into / "scheduler")
    scheduler.save_pretrained(into / "scheduler")


def carried_configs(plan: MergePlan) -> dict[str, str]:
    """The configs that the header of a merged U-Net carries; none for architectures that afa ships."""
    first = plan.first
    if first.denoiser != "unet":
        return {}
    origin = plan.last.origin("vae").origin("vae")
    vae = origin.config / "vae" if (origin.config / "vae").is_dir() else origin.config
    parts = {part: (vae if part == "vae" else first.config / part) / "config.json" for part in first.parts}
    files = {f"{part}/config.json": file for part, file in parts.items()} | {
        SCHEDULER: first.config / SCHEDULER
    }
    settings = {name: read_object(file) for name, file in files.items() if file.is_file()}
    if any(_agree(settings, config_folder(name)) for name in SHIPPED):
        return {}
    tokenizers = dict(zip(PADS, first.expert.tokenizers, strict=False))
    return {
        KEY: pack(
            first.config, vae, {part: one for part, one in tokenizers.items() if not _is_clip(part, one)}
        )
    }


def _agree(settings: dict[str, dict[str, Any]], shipped: Path) -> bool:
    """Whether a shipped config says the same wherever both say something."""
    for name, mine in settings.items():
        if not (shipped / name).is_file():
            return False
        theirs = read_object(shipped / name)
        names = NOISE if name == SCHEDULER else [one for one in mine if one not in UNIMPORTANT]
        if any(mine[one] != theirs[one] for one in names if one in mine and one in theirs):
            return False
    return True


def _is_clip(part: str, tokenizer: Any) -> bool:
    usual = tokenizer.pad_token == PADS[part] and tokenizer.model_max_length == 77
    return usual and tokenizer.get_vocab() == clip_vocabulary()[0]
