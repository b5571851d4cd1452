"""`python docs/pictures.py [DEMO_FOLDER]`: the README's pictures, from what `afa demo` left (or makes now)."""

import sys
from pathlib import Path

from PIL import Image

from afa.demo.report import sheet
from afa.demo.run import demonstrate, weight_pictures
from afa.demo.settings import DemoSettings

TARGET = Path(__file__).parent / "images"


def main() -> None:
    settings = DemoSettings(output=sys.argv[1] if len(sys.argv) > 1 else "demo")
    outcome = demonstrate(settings)
    TARGET.mkdir(exist_ok=True)
    Image.fromarray(sheet(outcome, 4)).save(TARGET / "sheet.png", optimize=True)
    Image.fromarray(weight_pictures(settings, outcome.captions)[0]).save(TARGET / "weights.png", optimize=True)
    print(f"sheet.png and weights.png in {TARGET}: {outcome.captions[0]}")


if __name__ == "__main__":
    main()
