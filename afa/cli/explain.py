"""Explain images of an ensemble: weights by place and step, the effect of words, images without an expert.

Makes an image of every prompt. For each image, OUTPUT gets a sheet of weight maps, an animated strip over
the steps, the words that change the weights, and the same image with experts off, swapped, frozen or with
equal weights. Over all images, it shows the mean weights of the experts, where experts are unused, and how
the images change if unused experts are skipped. Open explain.html; the numbers are in explain.json and the
.npz files. The same command resumes an interrupted explanation.
"""

import dataclasses
import json
from pathlib import Path

from afa.explanation.settings import ExplainSettings as Options

PROMPT = '"a red star left of a blue ring on a dotted mint background"'
EXAMPLES = [
    f"afa explain --prompt {PROMPT} --output why",
    f"afa explain --prompt {PROMPT} --output why-quick --counterfactuals off --word-steps 0",
    (
        f"afa explain demo:ensemble --prompt {PROMPT} --output why-pairs --steps 10 --guidance 3"
        " --counterfactuals off pairs skipped"
    ),
]
WORLD = {"steps": 20, "guidance": 3.0}  # the settings of the embedded experts


def run(options: Options) -> None:
    """Explain the images and print where the page is."""
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
    """Return the options with the embedded ensemble and, where none are given, its settings."""
    from afa.demo.data import ENSEMBLE

    chosen = {name: value for name, value in WORLD.items() if getattr(options, name) is None}
    return dataclasses.replace(options, ensemble=str(ENSEMBLE), **chosen)
