"""Compare an ensemble with its experts and with every other way to combine them: same prompts, same noise, same judges.

Leaves images, scores and results.json; `afa report` makes a page of them. Ctrl-C loses at most one batch of images: the
same command goes on. With several devices or machines: `accelerate launch -m afa evaluate …`.
"""

import json
import time

from afa.errors import UserError
from afa.evaluation.settings import EvaluateSettings as Options

EXAMPLES = [
    "afa evaluate --ensemble demo:ensemble --protocol scenes --methods single weighted noise_average --prompts 16 --output compared",
    "afa evaluate --ensemble demo:ensemble --protocol scenes --base demo:base --methods all --seeds 3 --output all-of-them --dry-run",
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


# `--methods list` and so on: what there is, whatever else is given; flag -> lines of name and what it is
LISTS = {"methods": _methods, "metrics": _metrics, "protocol": _protocols}


def run(options: Options) -> None:
    """Compare, print the table."""
    from afa.cli.main import hush
    from afa.evaluation.plan import plan
    from afa.evaluation.run import evaluate

    hush()
    if options.dry_run:
        facts = plan(options)
        print(json.dumps(facts, indent=2) if options.json else _plan(facts))
        return
    began = time.monotonic()
    results = evaluate(options)
    took = (time.monotonic() - began) / 60
    if results is None:
        return  # another process prints
    if not any(run.scores or run.sets for method in results.methods for run in method.runs):
        why = results.errors[-1] if results.errors else "no method could be drawn"
        raise UserError(
            f"nothing could be scored ({why}); the images are kept in {options.output}: the same command goes on from them"
        )
    if options.json:
        from dataclasses import asdict

        print(json.dumps(asdict(results), indent=1, ensure_ascii=False))
    else:
        from afa.evaluation.compare import analyse
        from afa.evaluation.report.files import as_text

        print(
            f"{as_text(analyse([results])[0])}\n\nThis run took {took:.0f} min; what was there before is not counted."
        )
        lost = (
            f" without what could not be computed (see above, {len(results.errors)})"
            if results.errors
            else ""
        )
        print(
            f"results.json in {options.output}{lost}; a page of them: afa report {options.output} --output report.html"
        )


def _plan(facts: dict[str, object]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in facts.items())
