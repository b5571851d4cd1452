"""`python docs/pictures.py [DEMO_FOLDER] [--only demo|explain]`: the README's pictures, from what `afa demo` left (or makes now) and `afa explain` shows."""

import argparse
from pathlib import Path

from PIL import Image

from afa.demo.data import ENSEMBLE
from afa.demo.report import sheet
from afa.demo.run import demonstrate, weight_pictures
from afa.demo.settings import DemoSettings
from afa.ensemble import Ensemble
from afa.explanation import Explanation, explain, pictures
from afa.sampling.sample import Request, Sampling

TARGET = Path(__file__).parent / "images"
PROMPT = (
    "a red star left of a blue ring on a dotted mint background"  # as in the examples of `afa explain --help`
)


def demo_pictures(folder: str) -> None:
    """The methods side by side, and one image's weights."""
    settings = DemoSettings(output=folder)
    outcome = demonstrate(settings)
    Image.fromarray(sheet(outcome, 4)).save(TARGET / "sheet.png", optimize=True)
    weight_pictures(settings, outcome.captions)[0][0].save(TARGET / "weights.png", optimize=True)
    print(f"sheet.png and weights.png in {TARGET}: {outcome.captions[0]}")


def explain_pictures() -> None:
    """One image of the embedded ensemble, explained: what `afa explain --prompt …` leaves of it."""
    found = explain(
        Ensemble.load(ENSEMBLE), Request(PROMPT, 0), Sampling(20, 3.0), ["off", "swapped", "frozen", "equal"]
    )
    _explained(found).save(TARGET / "explain.png", optimize=True)
    pictures.save_strip(found.recording, TARGET / "explain.webp")
    drawn = pictures.words(found.recording, found.causes)
    assert drawn is not None
    drawn.quantize(256).save(TARGET / "explain-words.png", optimize=True)
    print(f"explain.png, explain.webp and explain-words.png in {TARGET}: {PROMPT}")


def _explained(found: Explanation) -> Image.Image:
    """The sheet, and below it what would have been."""
    parts = [
        pictures.sheet(found.recording, "seed 0, 20 steps, guidance 3"),
        pictures.contact(
            "What would have been, from the same noise", found.recording.image, found.counterfactuals
        ),
    ]
    page = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    page.paste(parts[0], (0, 0))
    page.paste(parts[1], (0, parts[0].height))
    return page


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("demo", nargs="?", default="demo")
    flags.add_argument("--only", choices=["demo", "explain"])
    given = flags.parse_args()
    TARGET.mkdir(exist_ok=True)
    if given.only != "explain":
        demo_pictures(given.demo)
    if given.only != "demo":
        explain_pictures()


if __name__ == "__main__":
    main()
