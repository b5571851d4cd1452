"""Whether a merged single file has to carry its configs to be read again, and the text that it carries."""

from pathlib import Path
from typing import Any

from afa.experts.embedded import KEY, LEFT_OUT, SCHEDULER, pack
from afa.experts.folders import read_object
from afa.experts.single_file import clip_vocabulary, config_folder
from afa.merging.plan import Plan

SHIPPED = ("sd15", "sd21", "sd21-base", "sdxl")  # that are found out by a single file's shapes
NOISE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "trained_betas")  # the rest is said by keys, or is a sampler's
UNIMPORTANT = (*LEFT_OUT, "architectures", "dtype", "torch_dtype", "sample_size")
PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}  # as load_tokenizers makes CLIP's


def carried_configs(plan: Plan) -> dict[str, str]:
    """What the header of a merged single file carries besides its recipe: nothing for the architectures that afa ships configs of."""
    first = plan.first
    assert first.outline is not None
    own = plan.origin("vae").config / "vae"
    vae = own if own.is_dir() else plan.origin("vae").config
    parts = {part: (vae if part == "vae" else first.config / part) / "config.json" for part in first.parts}
    files = {f"{part}/config.json": file for part, file in parts.items()} | {SCHEDULER: first.config / SCHEDULER}
    settings = {name: read_object(file) for name, file in files.items() if file.is_file()}
    if any(_agree(settings, config_folder(name)) for name in SHIPPED):
        return {}
    tokenizers = dict(zip(PADS, first.outline.expert.tokenizers, strict=False))
    return {KEY: pack(first.config, vae, {part: one for part, one in tokenizers.items() if not _is_clip(part, one)})}


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
