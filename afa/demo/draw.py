"""`python -m afa.demo.draw`: write captioned scenes as an image folder, ready for `afa train --data`."""

import argparse
import json
from pathlib import Path

from PIL import Image

from afa.demo.scenes import DOMAINS, render_all, sample_scenes
from afa.files import staged


def draw(folder: Path, domain: str, count: int, seed: int) -> None:
    """`count` PNGs and metadata.jsonl of one domain, of "mixed" or of "union"; all of them appear, or none."""
    scenes = sample_scenes(domain, count, seed)
    with staged(folder, last="metadata.jsonl") as stage:
        lines = []
        for index, (scene, image) in enumerate(zip(scenes, render_all(scenes, seed), strict=True)):
            name = f"{index:05d}.png"
            Image.fromarray(image).save(stage / name)
            lines.append(json.dumps({"file_name": name, "text": scene.caption}))
        (stage / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m afa.demo.draw", description=__doc__)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--domain", default="mixed", choices=[*DOMAINS, "mixed", "union"])
    flags.add_argument("--count", type=int, default=200)
    flags.add_argument("--seed", type=int, default=0)
    given = flags.parse_args()
    draw(given.folder, given.domain, given.count, given.seed)
    print(f"{given.count} captioned images in {given.folder}")


if __name__ == "__main__":
    main()
