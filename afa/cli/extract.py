"""Make a LoRA of the difference between two checkpoints, for use on the second one.

Every linear and convolution layer gets the LoRA of its rank that is nearest to the difference (by singular
values); what share of the whole squared difference that keeps is printed. Biases, norms and embeddings cannot
be in a LoRA. One layer is in memory at a time.
"""

import json

from afa.distillation.extract_settings import ExtractSettings as Options

EXAMPLES = [
    "afa extract demo:curves --base demo:base --rank 8 --output curves.safetensors",
    "afa extract demo:curves --base demo:base --rank 4 --output curves-lora --dry-run",
]


def run(options: Options) -> None:
    """Extract, and say what was kept."""
    from afa.cli.main import hush
    from afa.distillation.extract import extract, layers_of_lora, open_both
    from afa.places import as_typed

    hush()
    both = open_both(options)
    if options.dry_run:
        tuned, base = both
        found = {"tuned": tuned.place, "base": base.place, "layers": len(layers_of_lora(base))}
        found["rank"] = options.rank
        lines = "\n".join(f"{name}  {value}" for name, value in found.items())
        print(json.dumps(found, indent=2) if options.json else lines)
        return
    facts = extract(options, both)
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    worst = ", ".join(f"{name} {share:.0%}" for name, share in facts["worst"].items())
    share = f"{facts['share_of_the_difference']:.1%}"
    print(
        f"{facts['layers']} layers of rank {facts['rank']} keep {share} of the squared difference (least: "
        f"{worst})\nwritten to {facts['output']}; use it on {as_typed(facts['base'])}"
    )
