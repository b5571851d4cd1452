"""Explain images of an ensemble: who weighed where, which words decide, what would have been without.

Makes an image of every prompt and leaves in OUTPUT, for each, a sheet of weight maps, an animated strip over the steps, the words that move
the weights, and the same image with experts off, swapped, frozen or alike; over all of them, who weighs how much, where experts are never
used, and what leaving them out there changes. Open explain.html; explain.json and the .npz files have the numbers. An explanation
that was interrupted goes on with the same command.
"""

import dataclasses
import json
from pathlib import Path

from afa.explanation.settings import ExplainSettings as Options

PROMPT = '"a red star left of a blue ring on a dotted mint background"'
EXAMPLES = [
    f"afa explain --prompt {PROMPT} --output why",
    f"afa explain --prompt {PROMPT} --output why-quick --counterfactuals off --word-steps 0",
    f"afa explain demo:ensemble --prompt {PROMPT} --output why-pairs --steps 10 --guidance 3 --counterfactuals off pairs skipped",
]
WORLD = {"steps": 20, "guidance": 3.0}  # what the embedded experts are drawn with everywhere


def run(options: Options) -> None:
    """Explain, say where to look."""
    from afa.cli.main import hush
    from afa.explanation.run import PAGE, run

    hush()
    found = run(options if options.ensemble is not None else _embedded(options))
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    count = len(found["images"])
    print("\n".join(found["unused"]["sentences"]))
    print(f"{count} image{'s' if count > 1 else ''} explained: {Path(options.output) / PAGE}")


def _embedded(options: Options) -> Options:
    """The embedded ensemble, drawn as everywhere unless told otherwise."""
    from afa.demo.data import ENSEMBLE

    chosen = {name: value for name, value in WORLD.items() if getattr(options, name) is None}
    return dataclasses.replace(options, ensemble=str(ENSEMBLE), **chosen)
