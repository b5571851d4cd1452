"""Generate images with a trained ensemble, with a single expert, or with experts combined while sampling.

Every PNG contains the settings it was made with. The same command resumes an interrupted run.
"""

import json

from afa.generation.settings import GenerateSettings as Options
from afa.sampling.registry import explain

__doc__ = f"{__doc__}\nmethods (--method NAME) and their options (--method-option KEY=VALUE):\n{explain()}\n"

PROMPT = '"a red star left of a blue ring on a dotted mint background"'
EXAMPLES = [
    f"afa generate demo:curves --prompt {PROMPT} --output out-curves --steps 20 --guidance 3",
    (
        f"afa generate demo:curves demo:angles --method magicfusion --prompt {PROMPT}"
        " --output out-fusion --steps 20 --guidance 3 --weights"
    ),
    (
        f"afa generate demo:curves demo:angles --method noise_average --method-option weights=1,2"
        f" --prompt {PROMPT} --output out-average"
    ),
    f"afa generate demo:ensemble --prompt {PROMPT} --output out --steps 20 --guidance 3 --weights",
    (
        f"afa generate demo:ensemble --prompt {PROMPT} --output weaker --steps 20 --guidance 3"
        " --strength patterns=0.3"
    ),
]


def run(options: Options) -> None:
    """Generate the images and print where they are."""
    from afa.cli.main import hush
    from afa.generation.run import generate

    hush()
    paths = generate(options)
    if options.json:
        print(json.dumps({"images": [str(path) for path in paths]}, indent=2))
    else:
        part = "" if options.shard is None else f": part {options.shard}"
        what = "shard" if any(path.suffix != ".png" for path in paths) else "image"
        print(f"{len(paths)} {what}{'' if len(paths) == 1 else 's'} in {options.output}{part}")
