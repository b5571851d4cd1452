"""Merge experts into one new checkpoint: weighted, by blocks, by differences from their base, and more.

All experts must have one architecture. Folders and single files can be mixed, each with LoRAs
(base.safetensors+style.safetensors*0.8). They are written as a folder, or as a single file of the publisher's
names: of SD 1.x, 2.x and XL whole, of other families the transformer alone. A single file of a denoiser alone
keeps the names of the first expert's. Text encoders are merged like the denoiser; the VAE is copied from the
first expert. Only a few tensors are in memory at a time, however many models are merged.

The header of the written files records the methods, the options and the sha256 of every input. `--recipe`
with such a file repeats the merge. `--recipe` with a TOML file can have several steps: each [[step]] has a
method, experts and options, and later steps use the results of earlier ones.

Methods (θᵢ: the weights of an expert):
"""

import dataclasses
import itertools
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from afa.merging.block_weights import PRESETS
from afa.merging.registry import MERGES
from afa.merging.rules import Merge
from afa.merging.settings import FLAGS
from afa.merging.settings import MergeSettings as Options
from afa.pages.numbers import scaled


def listed(merges: Mapping[str, Merge]) -> str:
    """What the help says of merges: the formula of each, and its options that are no flags."""
    lines = []
    for name, merge in merges.items():
        lines.append(f"  {name:<17}{merge.help}")
        for field in dataclasses.fields(merge.options):
            if field.name not in FLAGS:
                given = field.default not in (None, dataclasses.MISSING)
                default = f" (default: {field.default})" if given else ""
                lines.append(f"{'':19}--method-option {field.name}=…: {field.metadata['help']}{default}")
    return "\n".join(lines)


__doc__ = f"""{__doc__}{listed(MERGES)}

Block weights (--method mbw) can be a preset, numbers, or a TOML file with a line for each stage: IN00 = 0.5
is the share of the second of two experts, IN00 = [2, 1, 1] are weights of three. `base` means everything
except the denoiser, `others` all stages that are not named. Stages: IN00 … M00 … OUT11 of SD 1.x and 2.x,
IN00 … OUT08 of XL, J00 … OUT of SD3, D00 … S00 … OUT of FLUX.1; `afa inspect` lists those of a model.
Presets, for U-Nets:
{textwrap.fill(" ".join(PRESETS), 105)}
"""

EXAMPLES = [
    "afa merge --experts demo:curves demo:angles demo:patterns --weights 2 1 1 --output soup",
    "afa merge --method mbw --experts demo:curves demo:angles --weights GRAD_V --output blocks.safetensors",
    "afa merge --method ties --experts demo:curves demo:angles --base demo:base --output ties --dry-run",
]


def run(options: Options) -> None:
    """Plan, merge, say where it is."""
    from afa.cli.main import hush
    from afa.merging.engine import merge_files
    from afa.merging.plan import make_plan

    hush()
    plan = make_plan(options)
    if options.dry_run:
        facts = plan.facts()
        print(json.dumps(facts, indent=2, default=list) if options.json else _plan(facts))
        return
    facts = merge_files(options, plan)
    print(json.dumps(facts, indent=2, default=list) if options.json else f"{_plan(facts)}\n{_result(facts)}")


def _plan(facts: dict[str, Any]) -> str:
    """The plan as lines."""
    earlier = facts.get("steps", [])
    lines = [line for step in earlier for line in (f"step     {step['name']}", *_step(step))]
    lines += ["step     the result"] if earlier else []
    size = (
        f"{facts['tensors']:,} tensors, {scaled(facts['bytes'], 'B')}, dtype {facts['dtype']},"
        f" {facts['layout']} layout"
    )
    memory = f"memory   about {scaled(facts['memory_bytes'], 'B')} besides the program itself"
    return "\n".join([*lines, *_step(facts), f"output   {facts['output']}: {size}", memory])


def _step(facts: dict[str, Any]) -> list[str]:
    """One merge as lines."""
    by_stage = [value for value in facts["options"].values() if isinstance(value, dict)]
    plain = "".join(
        f"  {name} {_short(value)}" for name, value in facts["options"].items() if value not in by_stage
    )
    lines = [f"method   {facts['method']}{plain}"]
    lines += [f"expert   {name}  {path}" for name, path in facts["experts"].items()]
    lines += [f"base     {facts['base']}"] if facts["base"] else []
    lines += [line for weights in by_stage for line in _stages(weights)]
    vae = {None: "none", "merged": "merged"}.get(facts["vae"], f"of {facts['vae']}")
    return [*lines, f"merged   {', '.join(facts['merged'])}; VAE {vae}"]


def _stages(weights: dict[str, tuple[float, ...]]) -> list[str]:
    """Stages with equal weights side by side in one line."""
    lines = []
    for row, group in itertools.groupby(weights, key=weights.__getitem__):
        first, *more = group
        names = f"{first} … {more[-1]}" if more else first
        lines.append(f"stage    {names}: {_short(row)}")
    return lines


def _short(value: Any) -> str:
    return " ".join(f"{one:.4g}" for one in value) if isinstance(value, (list, tuple)) else f"{value}"


def _result(facts: dict[str, Any]) -> str:
    once = f" Equal in all experts: {', '.join(facts['same_in_all'])}." if facts["same_in_all"] else ""
    return f"Written to {facts['output']} in {facts['seconds']:.1f} s.{once}"
