"""What a merge of files will read and write, checked before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.experts.compatible import mismatches
from afa.experts.headers import DTYPES
from afa.experts.load import check_names
from afa.experts.spec import ExpertSpec
from afa.files import present, refuse_busy
from afa.merging.layout import Item, diffusers_files, original_file
from afa.merging.parts import MERGED, check_same_keys
from afa.merging.settings import MergeSettings
from afa.merging.sources import Source, open_source, open_vae
from afa.merging.stages import stage_names
from afa.merging.table import check_merge, options_of
from afa.merging.weights import stage_weights
from afa.settings import shares

LATENTS = "vae.decoder.conv_in.weight"  # its second dimension is the latents' channels


@dataclass
class Plan:
    """Everything that is decided: sources, which parts are merged, and the files to write, by their path in the output."""

    settings: MergeSettings
    options: dict[str, Any]
    experts: list[Source]
    base: Source | None
    vae: Source | None
    stages: dict[str, str]
    files: dict[str, list[Item]]

    @property
    def first(self) -> Source:
        return self.experts[0]

    @property
    def sources(self) -> list[Source]:
        """All that is read, each once."""
        found = [*self.experts, *(source for source in (self.base, self.vae) if source is not None)]
        return [source for place, source in enumerate(found) if not any(source is other for other in found[:place])]

    @property
    def merged_parts(self) -> list[str]:
        return [part for part in self.first.parts if part in MERGED or (part == "vae" and self.settings.merge_vae)]

    def parts_of(self, source: Source) -> list[str]:
        """What is read of a source."""
        merged = self.merged_parts if any(source is one for one in (*self.experts, self.base)) else []
        return [*merged, *(["vae"] if source is self.vae else [])]

    def origin(self, part: str) -> Source:
        """Where a part comes from that is not merged, and how it is laid out if it is."""
        return self.vae if part == "vae" and self.vae is not None else self.first

    def facts(self) -> dict[str, Any]:
        """The plan as plain data."""
        items = [item for items in self.files.values() for item in items]
        largest = max(prod(item.shape) for item in items)
        sizes: dict[str, int] = {}
        for item in items:
            dtype = DTYPES.get(item.code, item.code)
            sizes[dtype] = sizes.get(dtype, 0) + item.bytes
        return {
            "method": self.settings.method,
            "options": self.options,
            "experts": {source.name: str(source.located.path) for source in self.experts},
            "base": str(self.base.located.path) if self.base else None,
            "vae": "merged" if "vae" in self.merged_parts else self.vae.name if self.vae else None,
            "merged": self.merged_parts,
            "output": self.settings.output,
            "layout": "original" if self.settings.single_file else "diffusers",
            "dtype": self.settings.dtype or max(sizes, key=lambda code: sizes[code]),
            "tensors": len(items),
            "bytes": sum(item.bytes for item in items),
            "memory_bytes": 4 * largest * (len(self.experts) + 3),  # copies in float32 while the largest is merged
        }


def make_plan(settings: MergeSettings) -> Plan:
    """Find and compare all sources, and lay out the result. Raises UserError for whatever cannot be done."""
    options = settings.options()
    check_merge(settings.method, len(settings.experts), settings.base is not None, options)
    specs = [ExpertSpec.parse(text, settings.prediction_type) for text in settings.experts]
    based = [ExpertSpec.parse(settings.base, settings.prediction_type)] if settings.base is not None else []
    check_names(specs)
    check_output(settings, [*specs, *based])
    experts = [open_source(spec, settings.config) for spec in specs]
    base = open_source(based[0], settings.config) if based else None
    if settings.vae is not None and not experts[0].located.whole_pipeline:
        raise UserError(f"--vae {settings.vae} is for whole checkpoints, and '{experts[0].name}' is a denoiser alone; leave it out")
    vae = _vae(settings, experts)
    _check_fit([*experts, *([base] if base else [])], settings.merge_vae)
    layout = (experts[0], vae, settings.dtype)
    files = {settings.output: original_file(*layout)} if settings.single_file else dict(diffusers_files(*layout))
    return Plan(settings, _filled(settings.method, options, experts), experts, base, vae, experts[0].stages, files)


def _filled(method: str, options: dict[str, Any], experts: Sequence[Source]) -> dict[str, Any]:
    """A method's options with its defaults, and weights as shares that sum to 1: all that it takes to repeat the merge."""
    if method == "mbw":
        stages = stage_names(experts[0].model)
        return {"weights": stage_weights(options["weights"], stages, len(experts), options.get("base_alpha"))}
    if method == "weighted":
        return {"weights": shares(options.get("weights"), len(experts))}
    return {**options_of(method), **options}


def check_output(settings: MergeSettings, specs: Sequence[ExpertSpec]) -> None:
    """The output must be new; nothing is overwritten, and no expert least of all."""
    output = Path(settings.output)
    for spec in specs:
        if Path(spec.source).resolve() == output.resolve():
            raise UserError(f"--output {output} is expert '{spec.name}' itself; choose another place")
    if settings.single_file and output.is_dir():
        raise UserError(f"{output} is a folder; a file of that name cannot be written")
    refuse_busy(output, file=settings.single_file)
    if output.is_file() or present(output):
        raise UserError(f"{output} exists already; choose another --output or delete it")


def _vae(settings: MergeSettings, experts: Sequence[Source]) -> Source | None:
    """Where the VAE comes from; None if the first expert has none and none was chosen."""
    if settings.vae is None:
        return experts[0] if "vae" in experts[0].parts else None
    named = next((source for source in experts if source.name == settings.vae), None)
    if named is not None and "vae" not in named.parts:
        raise UserError(f"'{named.name}' has no VAE; choose another with --vae")
    chosen = named or open_vae(settings.vae, experts[0], settings.config)
    mine, theirs = (source.tensors.get(LATENTS) for source in (experts[0], chosen))
    if mine and theirs and mine.shape[1] != theirs.shape[1]:
        raise UserError(
            f"the VAE of '{chosen.name}' has {theirs.shape[1]} latent channels, expected {mine.shape[1]}; choose another with --vae"
        )
    return chosen


def _check_fit(sources: Sequence[Source], vae: bool) -> None:
    """Refuse what cannot be merged: as experts are compared, then weight by weight."""
    first, *others = sources
    reasons = mismatches([source.outline.expert for source in sources if source.outline])
    if reasons:
        raise UserError("; ".join(reasons))
    if vae:
        for source in sources:
            if "vae" not in source.parts:
                raise UserError(f"'{source.name}' has no VAE to merge; leave out --merge-vae")
    for other in others:
        for key, stored in first.tensors.items():
            its = other.tensors.get(key, stored)
            if its.is_float != stored.is_float:
                raise UserError(f"'{other.name}' cannot join '{first.name}': {key} is {its.dtype}, expected {stored.dtype}")
        mine, theirs = (_shapes(source, vae) for source in (first, other))
        check_same_keys(mine, theirs, other.name, first.name)


def _shapes(source: Source, vae: bool) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in source.floats().items() if vae or not key.startswith("vae.")}
