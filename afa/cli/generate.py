"""Generate images with a trained ensemble, or with a single expert.

Every PNG says how it was made. A run that was interrupted goes on with the same command.
"""

import json

from afa.generation.settings import GenerateSettings as Options

EXAMPLES = [
    'afa generate my-ensemble --prompt "a red star left of a blue ring on a dotted mint background" --output out --guidance 3 --weights',
    "afa generate afa/demo/assets/curves --prompts prompts.txt --output out-curves --steps 20 --guidance 3 --scheduler ddim",
]


def run(options: Options) -> None:
    """Generate, say where the images are."""
    from afa.cli.quiet import hush
    from afa.generation.run import generate

    hush()
    paths = generate(options)
    if options.json:
        print(json.dumps({"images": [str(path) for path in paths]}, indent=2))
    else:
        print(f"{len(paths)} image{'s' if len(paths) > 1 else ''} in {options.output}")
