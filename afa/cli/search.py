"""Search for the block weights whose merge draws the best images (auto-MBW).

The experts are merged in memory again and again. Every merge draws the same images, and a metric scores them.
The best weights are written to best.toml, for: afa merge --method mbw --weights best.toml. The search can be
interrupted with Ctrl-C; the same command continues it.
"""

import json
from typing import Any

from afa.merging.settings import SearchSettings as Options

PROMPT = '"a red star left of a blue ring on a dotted mint background"'
EXAMPLES = [
    (
        f"afa search --experts demo:curves demo:angles --prompt {PROMPT} --metric attributes --trials 5"
        " --guidance 3 --output searched"
    ),
    (
        f"afa search --experts demo:curves demo:angles --prompt {PROMPT} --metric attributes --search"
        " coordinate --output by-stage --dry-run"
    ),
]


def run(options: Options) -> None:
    """Search, say what was found."""
    from afa.cli.main import hush
    from afa.merging.search import search

    hush()
    if options.dry_run:
        facts = _facts(options)
        print(
            json.dumps(facts, indent=2)
            if options.json
            else "\n".join(f"{name}  {value}" for name, value in facts.items())
        )
        return
    record = search(options)
    print(json.dumps(record, indent=2) if options.json else _result(record, options))


def _facts(options: Options) -> dict[str, Any]:
    """What a search would do."""
    from afa.experts.load import load_experts
    from afa.merging.memory import InMemoryMerge
    from afa.merging.optimisers import Space
    from afa.merging.search import evaluations

    experts = load_experts(options.experts, config=options.config, prediction_type=options.prediction_type)
    space = Space(InMemoryMerge(experts).stages, len(experts))
    merges = evaluations(options, space)
    return {
        "experts": ", ".join(expert.name for expert in experts),
        "weights": len(space.places),
        "merges": merges,
        "images": merges * options.images,
    }


def _result(record: dict[str, Any], options: Options) -> str:
    first = "equal weights" if record["search"] == "bayesian" else "the first expert"
    return (
        f"score {record['score']:.4f} after {record['merges']} merges ({first}: {record['first_score']:.4f}),"
        " on the images it was chosen by\nuse it: afa merge --method mbw --weights"
        f" {options.output}/best.toml --experts {' '.join(options.experts)} --output merged"
    )
