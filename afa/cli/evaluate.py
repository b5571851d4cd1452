"""Compare an ensemble with its experts and with other ways to combine them: same prompts, noise and metrics.

Writes images, scores and results.json; `afa report` makes a page of them. Ctrl-C loses at most one batch of
images; the same command resumes. With several devices or machines: `accelerate launch -m afa evaluate …`.
"""

import json
import time

from afa.errors import UserError
from afa.evaluation.settings import EvaluateSettings as Options
from afa.pages.tables import pairs

EXAMPLES = [
    (
        "afa evaluate --ensemble demo:ensemble --protocol scenes"
        " --methods single weighted noise_average --prompts 16 --output compared"
    ),
    (
        "afa evaluate --ensemble demo:ensemble --protocol scenes --methods single weighted --prompts 16"
        " --guidance 1.5 3 5 --output curves"
    ),
    (
        "afa evaluate --ensemble demo:ensemble --protocol scenes --base demo:base --methods all"
        " --seeds 3 --output all-of-them --dry-run"
    ),
]


def _methods() -> list[tuple[str, str]]:
    from afa.evaluation.names import known_methods

    return list(known_methods().items())


def _metrics() -> list[tuple[str, str]]:
    from afa.metrics.registry import METRICS

    return [(name, entry.help) for name, entry in METRICS.items()]


def _protocols() -> list[tuple[str, str]]:
    from afa.evaluation.protocols import PROTOCOLS

    return [
        *((name, entry.help) for name, entry in PROTOCOLS.items()),
        ("FILE or FOLDER", "your prompts, or your captioned images"),
    ]


# `--methods list` prints the available names; other flags are not needed: flag -> its (name, help) pairs
LISTS = {"methods": _methods, "metrics": _metrics, "protocol": _protocols}


def run(options: Options) -> None:
    """Compare the methods and print the table."""
    from afa.cli.main import hush
    from afa.evaluation.plan import plan
    from afa.evaluation.run import evaluate

    hush()
    if options.dry_run:
        facts = plan(options)
        print(json.dumps(facts, indent=2) if options.json else pairs(facts))
        return
    began = time.monotonic()
    results = evaluate(options)
    minutes = (time.monotonic() - began) / 60
    if results is None:
        return  # another process prints
    if not any(run.scores or run.sets for method in results.methods for run in method.runs):
        why = results.errors[-1] if results.errors else "no method could be drawn"
        raise UserError(
            f"nothing could be scored ({why}); the images are kept in {options.output}:"
            " the same command goes on from them"
        )
    if options.json:
        print(json.dumps(results.facts(), indent=1, ensure_ascii=False))
        return
    from afa.evaluation.compare import analyse
    from afa.evaluation.report.files import as_text

    lost = f" without what could not be computed (see above, {len(results.errors)})" if results.errors else ""
    print(
        f"{as_text(analyse([results])[0])}\n\n"
        f"This run took {minutes:.0f} min; results of earlier runs are not counted.\n"
        f"results.json in {options.output}{lost};"
        f" a page of them: afa report {options.output} --output report.html"
    )
