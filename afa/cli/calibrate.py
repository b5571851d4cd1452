"""Find cheaper ways to draw with an ensemble, for `afa generate --speed balanced|fast`.

The same prompts are drawn from the same noise in fewer steps, with reused features, with one expert between
whole steps, and with guidance in a part of the steps. A way is taken if its score is lower than that of the
exact ensemble by less than a margin, for certain. The levels are written to the ensemble's folder.
The command can be interrupted with Ctrl-C; the same command continues it. Prompts that choose a way prove
nothing about it: compare on others.
"""

import json

from afa.generation.calibrate_settings import CalibrateSettings as Options

DRY = "ways that one knob gives, and the operations of each: one expert in as many steps = 1"
PROMPT = '"a red star left of a blue ring on a dotted mint background"'
EXAMPLES = [
    f"afa calibrate demo:ensemble --prompt {PROMPT} --metric attributes --steps 20 --guidance 3 --dry-run",
    f"afa calibrate demo:ensemble --prompt {PROMPT} --metric attributes --lead curves --dry-run --json",
]


def run(options: Options) -> None:
    """Calibrate, and print the levels."""
    from afa.cli.main import hush
    from afa.generation.calibrate import calibrate, possible_ways, table

    hush()
    if options.dry_run:
        ways = possible_ways(options)
        lines = [f"{price:6.2f}  {way}" for way, price in ways]
        print(json.dumps(ways, indent=2) if options.json else "\n".join([DRY, *lines]))
        return
    speed = calibrate(options)
    print(speed.to_json() if options.json else table(speed, options))
