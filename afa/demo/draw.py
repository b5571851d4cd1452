"""`python -m afa.demo.draw FOLDER`: captioned images of an embedded world."""

import argparse
import json
from pathlib import Path

from PIL import Image

from afa.demo.worlds import FAR, WORLDS, World
from afa.files import staged


def draw(folder: Path, domain: str, count: int, seed: int, world: World = FAR) -> None:
    """Write `count` PNGs and metadata.jsonl, all or nothing.

    domain: of the world, such as "mixed", "union" or an expert's own
    """
    scenes = world.sample(domain, count, seed)
    with staged(folder, last="metadata.jsonl") as stage:
        lines = []
        for index, (scene, image) in enumerate(zip(scenes, world.render_all(scenes, seed), strict=True)):
            name = f"{index:05d}.png"
            Image.fromarray(image).save(stage / name)
            lines.append(json.dumps({"file_name": name, "text": scene.caption}))
        (stage / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m afa.demo.draw", description=__doc__)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--world", default="far", choices=list(WORLDS))
    flags.add_argument("--domain", default="mixed", help="mixed (default), union, or an expert's name")
    flags.add_argument("--count", type=int, default=200)
    flags.add_argument("--seed", type=int, default=0)
    given = flags.parse_args()
    world = WORLDS[given.world]
    domains = ("mixed", "union", *world.experts)
    if given.domain not in domains:
        flags.error(f"--domain {given.domain}: the {world.name} world has {', '.join(domains)}")
    draw(given.folder, given.domain, given.count, given.seed, world)
    print(f"{given.count} captioned images in {given.folder}")


if __name__ == "__main__":
    main()
