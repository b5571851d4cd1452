"""Before any training: are these experts worth ensembling, which of them, and what would it gain?

Asks every expert, one after another, about the same noisy images: who is wrong where, and does that survive a change of noise, so that
it could be learnt? Finds duplicates and the base under another name, says what each expert adds, asks the weight average too, and
foretells the gain by that of expert sets that were trained. With --prompts alone it shows only where experts disagree.
With --output the same command goes on after an interruption.
"""

import json

from afa.screening.settings import ScreenSettings as Options

EXAMPLES = [
    "afa screen demo:curves demo:angles demo:patterns --data scenes:64 --base demo:base --output screened",
    "afa screen demo:curves demo:patterns again=demo:curves --data scenes:32 --json",
]


def run(options: Options) -> None:
    """Screen, print the verdict and what it rests on."""
    from afa.cli.main import hush
    from afa.screening.run import plan, screen

    hush()
    planned = plan(options)
    if options.dry_run:
        facts = planned.facts()
        print(json.dumps(facts, indent=2) if options.json else _plan(facts))
        return
    found = screen(options, planned)
    if options.output is not None:
        from afa.screening.report import write

        write(found, options.output)
    if options.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    from afa.screening.report import as_text

    print(as_text(found))
    if options.output is not None:
        print(f"\nreport.html and screen.json in {options.output}")


def _plan(facts: dict[str, object]) -> str:
    width = max(map(len, facts))
    return "\n".join(
        f"{name.replace('_', ' '):<{width}}  {', '.join(value) if isinstance(value, list) else value}"
        for name, value in facts.items()
    )
