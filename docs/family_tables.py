"""Write the tables of docs/families.md: what is counted of every shipped config, what registries say, what tests try.

    python docs/family_tables.py            # takes a few minutes; nothing is downloaded, models have no content
    python docs/family_tables.py --quick    # without what is counted: seconds

A table stands between two comments, `<!-- NAME -->` and `<!-- end -->`. tests/test_families.py holds the page against the quick ones.
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from afa.aggregators.registry import Recipe
from afa.denoiser.schedule import FLOW, kind_of
from afa.experts.description import describe_config
from afa.experts.layouts import FOREIGN
from afa.experts.shipped import KNOWN_CONFIGS
from afa.experts.transformer_names import TRANSFORMERS
from afa.files import write_atomically
from afa.inspection import Subject, facts
from afa.models.registry import FAMILIES
from afa.stages.transformer_tables import NORMS

PAGE = Path(__file__).parent / "families.md"
EXPERTS = 3
PAPER = {"hidden": 128, "heads": 8, "depth": 2}  # SABW as published
ATTENTION = 65536
# configs whose transformers are those of another
SAME = {
    "sd21-base": "sd21",
    "flux-schnell": "flux",
    "krea2-turbo": "krea2",
    "z-image-turbo": "z-image",
    "flux2-klein-base": "flux2-klein",
    "flux2-klein-base-9b": "flux2-klein-9b",
}


def amount(count: int) -> str:
    """Format a number of parameters."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def in_short(names: list[str]) -> str:
    """List the names of stages by their letters: D00 … D18, S00 … S37, OUT."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+$", "", name), []).append(name)
    parts = [" … ".join(dict.fromkeys((group[0], group[-1]))) for group in groups.values()]
    return ", ".join(parts)


def counted(config: str) -> dict[str, Any]:
    """Return what `afa inspect --config CONFIG --aggregator sabw …` finds."""
    recipe = Recipe("sabw", PAPER, attention_up_to=ATTENTION)
    return facts(Subject.from_config(config, EXPERTS, recipe, None))


def tables() -> dict[str, list[str]]:
    """Return the lines of each table by its name."""
    models = [
        "| `--config` | models | family | diffusers class | stages | parameters | text encoders | VAE | step of one, at |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    places = ["layers", "blocks", "every-2", "double", "every-4", "out"]
    placements = [f"| | {' | '.join(f'`{place}`' for place in places)} |", "|---" * (len(places) + 1) + "|"]
    for config, title in KNOWN_CONFIGS.items():
        if config in SAME:
            models.append(f"| `{config}` | {title} | | as `{SAME[config]}` | | | | | |")
            continue
        print(f"counting {config}", file=sys.stderr)
        found = counted(config)
        expert, cost = found["experts"][0], found["cost"]
        names = [stage["name"] for stage in found["stages"]]
        texts = ", ".join(f"{encoder['class']} {amount(encoder['parameters'])}" for encoder in expert["text_encoders"])
        vae = f"{expert['vae']['latent_channels']} channels, 1/{expert['vae']['factor']}"
        step = f"{cost['flops']['each_expert'][0] / 1e12:.1f} TFLOP, {cost['resolution'][0]} px"
        facts_of = (f"`{expert['family']}`", f"`{expert['class']}`", f"{len(names)}: {in_short(names)}", amount(expert["parameters"]), texts, vae, step)
        models.append(f"| `{config}` | {title} | {' | '.join(facts_of)} |")
        by_name = {entry["placement"]: entry for entry in found["placements"]}
        cells = []
        for place in places:
            if place not in by_name:
                cells.append("-")
                continue
            entry = by_name[place]
            share = 100 * entry["flops"] / cost["flops"]["experts"]
            cell = f"{entry['fused']}, {amount(entry['parameters'])}, +{share:.1f} %"
            cells.append(f"**{cell}**" if entry["default"] else cell)
        placements.append(f"| {title} | {' | '.join(cells)} |")
    return {"models": models, "placements": placements}


def refused() -> list[str]:
    """Return the sentence of single files that are refused by the name of their model; each mark of a file is in FOREIGN."""
    return [f"Refused by name as single files: {', '.join(sorted(set(FOREIGN.values()), key=str.casefold))}."]


def can() -> list[str]:
    """Return what each family can, by its registry entry and its drop-in's signature."""
    lines = [
        "| | takes ControlNet's inputs | skipped layers | both passes at once: MagicFusion, shared weights | SuperDiff | fused text tokens | one file |",
        "|---|---|---|---|---|---|---|",
    ]
    seen = {config: title for config, title in KNOWN_CONFIGS.items() if config not in SAME}
    for config, title in seen.items():
        expert = describe_config(config, config).expert
        family, interface = FAMILIES[expert.family], FAMILIES[expert.family].interface
        arguments = " ".join(inspect.signature(family.denoiser.forward).parameters)
        files = "checkpoint, LoRA" if expert.family == "unet" or expert.family in NORMS else "no"
        reason = interface.why_no_batched_guidance(expert.settings)
        flow = kind_of(expert.scheduler) == FLOW
        cells = [
            "yes" if "control" in arguments or "mid_block_additional_residual" in arguments else "no",
            "yes" if "skip_layers" in arguments else "no",
            f"no: {reason}" if reason else "yes",
            "no: a flow begins without signal" if flow else "yes",
            "yes" if interface.changes_text else "no: blocks only read them",
            files,
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def tried() -> list[str]:
    """Return which kinds of single files are tried of which family, by the tests' own list."""
    sys.path.insert(0, str(PAGE.parents[1] / "tests"))
    from test_transformer_files import OF, TINY, TRIED

    names = {"sd3": "SD 3", "flux": "FLUX.1", "flux2": "FLUX.2 dev", "klein": "FLUX.2 klein"}
    own = {config: entry.family for entry in TRANSFORMERS for config in entry.configs}
    same = {entry.family for entry in TRANSFORMERS if entry.diffusers} - {entry.family for entry in TRANSFORMERS if not entry.diffusers}
    lines = [f"| | {' | '.join(TRIED)} |", "|---" * (len(TRIED) + 1) + "|"]
    for name in TINY:
        cells = ["tried" if name in families else "not tried" for families in TRIED.values()]
        title = names.get(name) or own[OF.get(name, name)]
        cells[0] = "they are diffusers'" if title in same else cells[0]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def quick_tables() -> dict[str, list[str]]:
    """Return the lines of the tables that take seconds."""
    return {"can": can(), "refused": refused(), "tried": tried()}


def part(name: str) -> re.Pattern[str]:
    """Return what finds a table in the page: its beginning, its lines, its end."""
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- end -->)", re.S)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, lines in (quick_tables() | ({} if "--quick" in sys.argv else tables())).items():
        table = "\n".join(lines)
        page = part(name).sub(lambda found, table=table: f"{found[1]}{table}\n{found[3]}", page)
    write_atomically(PAGE, page)


if __name__ == "__main__":
    main()
