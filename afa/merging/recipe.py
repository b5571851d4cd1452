"""What a merged file says of itself: how it was made, from which files, with which hashes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afa.denoiser.schedule import kind_of
from afa.experts.prediction import EPSILON, V
from afa.files import sha256
from afa.merging.configs import carried_configs
from afa.merging.plan import Plan
from afa.merging.sources import Source
from afa.version import __version__

# ModelSpec's names of architectures (github.com/Stability-AI/ModelSpec), by pipeline and width of the text states.
ARCHITECTURES = {
    ("StableDiffusionPipeline", 768): "stable-diffusion-v1",
    ("StableDiffusionPipeline", 1024): "stable-diffusion-v2",
    ("StableDiffusionXLPipeline", 2048): "stable-diffusion-xl-v1-base",
}

Hashes = dict[Path, str]  # of every file that is read: sha256


def hash_sources(plan: Plan) -> Hashes:
    """sha256 of every file that is read, each read through once for it."""
    files = {file for source in plan.sources for part in plan.parts_of(source) for file in source.files(part)}
    return {file: sha256(file) for file in sorted(files)}


def same_parts(plan: Plan, hashes: Hashes) -> list[str]:
    """Merged parts whose files are the same in all experts (and the base): they are read once."""
    sources = [*plan.experts, *([plan.base] if plan.base else [])]
    digests = {
        part: {tuple(sorted(hashes[file] for file in source.files(part))) for source in sources} for part in plan.merged_parts
    }
    return [part for part, found in digests.items() if len(found) == 1]


def metadata(plan: Plan, hashes: Hashes) -> dict[str, str]:
    """The strings in a merged file's header. Nothing depends on time or place, so the same merge gives the same file."""
    first = plan.first.outline
    recipe = {
        "afa": __version__,
        "method": plan.settings.method,
        "options": plan.options,
        "experts": [described(source, plan.merged_parts, hashes) for source in plan.experts],
        "base": described(plan.base, plan.merged_parts, hashes) if plan.base else None,
        "vae": "merged" if "vae" in plan.merged_parts else described(plan.vae, ["vae"], hashes) if plan.vae else None,
        "dtype": plan.settings.dtype,
    }
    names = [source.name for source in plan.experts]
    found = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"{plan.settings.method} merge of {', '.join(names)}",
        "modelspec.merged_from": ", ".join(names),
        "afa.merge": json.dumps(recipe, sort_keys=True, default=list),
    }
    text = first.expert.model.config.get("cross_attention_dim") if first else None
    architecture = ARCHITECTURES.get((str(first.expert.pipeline), text)) if first and isinstance(text, int) else None
    kind = kind_of(first.expert.scheduler) if first and first.expert.scheduler is not None else None
    found |= {"modelspec.prediction_type": "v" if kind == V else "epsilon"} if kind in (V, EPSILON) else {}
    found |= {"modelspec.architecture": architecture} if architecture else {}
    return found | (carried_configs(plan) if plan.settings.single_file else {})


def described(source: Source, parts: Sequence[str], hashes: Hashes) -> dict[str, Any]:
    """One source: what it is called, whence it comes if it is public, and the sha256 of the files some parts are in."""
    spec, root = source.located.spec, source.located.path
    files = sorted({file for part in parts for file in source.files(part)})
    names = [file.name if root.is_file() else file.relative_to(root).as_posix() for file in files]
    public = {"source": spec.source, "commit": source.located.commit} if source.located.commit else {}
    return {"name": spec.name, **public, "sha256": {name: hashes[file] for name, file in zip(names, files, strict=True)}}
