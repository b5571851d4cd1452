"""Before training: find out whether these experts are worth combining, which of them, and what it would gain.

Every expert, one after another, predicts on the same noisy images. Differences between their errors that
persist when the noise changes can be learned: the learnable head-room. Also finds duplicates and experts
that equal the base, measures what each expert adds, screens the weight average, and forecasts the gain of
training from expert sets that were trained. With --prompts, it shows only where the experts disagree. With
--output, the same command resumes an interrupted screening.
"""

import json

from afa.pages.tables import pairs
from afa.screening.settings import ScreenSettings as Options

EXAMPLES = [
    "afa screen demo:curves demo:angles demo:patterns --data scenes:64 --base demo:base --output screened",
    "afa screen demo:curves demo:patterns again=demo:curves --data scenes:32 --json",
]


def run(options: Options) -> None:
    """Screen the experts and print the verdict and its evidence."""
    from afa.cli.main import hush
    from afa.screening.run import plan, screen

    hush()
    planned = plan(options)
    if options.dry_run:
        facts = planned.facts()
        print(json.dumps(facts, indent=2) if options.json else pairs(facts))
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
