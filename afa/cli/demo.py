"""See the whole path on small embedded experts: inspect, train, generate, compare, report.

The three experts are small Stable Diffusion models; each draws other things well, and the mixed scenes
need all three. Prints the table and writes OUTPUT/report.html. The comparison is one of `afa evaluate`; its
images and results.json are in OUTPUT/compared. Needs no network, and a few minutes on two CPU cores.
"""

from pathlib import Path

from afa.demo.settings import DemoSettings as Options

EXAMPLES = ["afa demo", "afa demo --output demo-quick --prompts 16 --train-steps 20"]


def run(options: Options) -> None:
    """Inspect the experts, compare the methods, write the report."""
    from afa.cli.main import hush
    from afa.demo.report import as_json, as_text, write_report
    from afa.demo.run import demonstrate, weight_pictures

    hush()
    if not options.json:
        _inspect()
    outcome = demonstrate(options)
    report = Path(options.output) / "report.html"
    write_report(outcome, weight_pictures(options, outcome.captions), report)
    print(as_json(outcome) if options.json else f"{as_text(outcome)}\n\nPictures and weight maps: {report}")


def _inspect() -> None:
    """Print what `afa inspect` shows of the experts."""
    from afa.cli import inspect
    from afa.demo.data import EXPERTS
    from afa.demo.run import AGGREGATORS

    inspect.run(inspect.Options(experts=[str(path) for path in EXPERTS.values()], **AGGREGATORS))
    print(flush=True)
