"""The files of a merged pipeline's folder that are not weights: configs, tokenizers, scheduler, as the first expert has them."""

import json
import shutil
from pathlib import Path
from typing import Any

from afa.experts.folders import read_object
from afa.experts.parts import read_index
from afa.experts.prediction import keys_of, warn_once
from afa.experts.single_file import load_tokenizers
from afa.merging.plan import Plan
from afa.merging.sources import Source

INDEX = "model_index.json"
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # a download may leave them out
TOKENIZERS = "tokenizer"  # and tokenizer_2 …


def copy_surroundings(plan: Plan, into: Path) -> None:
    """Write everything but the weights. Weights that a merge does not read (a safety checker's) are copied with their folder."""
    first = plan.first
    if not first.located.whole_pipeline:
        own = first.config / first.denoiser if first.located.single_file else first.config
        if keys_of(first.outline.expert.scheduler if first.outline else None):
            warn_once(f"{plan.settings.output}: a folder of a denoiser alone cannot say that it predicts v; give --prediction-type v_prediction with it")
        _write_config(own / "config.json", into / "config.json", plan.settings.dtype)
        return
    index = read_index(first.config)
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        if name in (*first.parts, "vae"):
            _copy_config(plan.origin(name), name, into, plan.settings.dtype)
        elif (first.config / name).is_dir():
            shutil.copytree(first.config / name, into / name)
        elif name in OPTIONAL:
            index[name] = [None, None]
    if first.located.single_file:
        _scheduler(first, index, into)
    _tokenizers(first, into)
    if index.get("safety_checker", [None])[0] is None and "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    (into / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_config(origin: Source, part: str, into: Path, dtype: str | None) -> None:
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


def _scheduler(first: Source, index: dict[str, Any], into: Path) -> None:
    """A single file may say of itself what its configs do not: then the folder has to."""
    assert first.outline is not None
    scheduler = first.outline.expert.scheduler
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    shutil.rmtree(into / "scheduler")
    scheduler.save_pretrained(into / "scheduler")


def _tokenizers(first: Source, into: Path) -> None:
    """A single file brings no tokenizers; they are CLIP's, or those of its config folder."""
    if first.located.single_file:
        for name, tokenizer in load_tokenizers(first.config).items():
            tokenizer.save_pretrained(into / name)
