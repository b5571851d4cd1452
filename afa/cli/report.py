"""Make a report of one or several evaluations: a self-contained page, Markdown and CSV.

Every number has its n and 95 % interval. Differences are paired by prompt; claims are corrected for the
number of comparisons in the whole report. Several folders (other protocols, other experts) are shown side
by side, then one by one.
"""

from dataclasses import dataclass
from pathlib import Path

from afa.settings import CheckedOptions, option

EXAMPLES = [
    (
        "afa evaluate --ensemble demo:ensemble --protocol scenes --methods single weighted"
        " --prompts 4 --tuning 0 --output compared"
    ),
    "afa report compared --output report.html --csv numbers.csv",
]


@dataclass(frozen=True)
class ReportSettings(CheckedOptions):
    """The settings of `afa report`: the evaluations and the files to write."""

    folders: list[str] = option(
        help="the output of `afa evaluate`: a folder with results.json and its images", positional=True
    )
    output: str = option(help="the page, an .html file")
    markdown: str | None = option(None, help="the tables as Markdown (default: beside the page, .md)")
    csv: str | None = option(
        None, help="all numbers as CSV, one line for each comparison (default: beside the page, .csv)"
    )


Options = ReportSettings


def run(options: Options) -> None:
    """Write the files, and print the tables and conclusions of every evaluation."""
    from afa.evaluation.report.files import as_text, write_report

    markdown, csv = (None if path is None else Path(path) for path in (options.markdown, options.csv))
    several = write_report([Path(folder) for folder in options.folders], Path(options.output), markdown, csv)
    for folder, one in zip(options.folders, several, strict=True):
        print(f"{folder}\n\n{as_text(one)}\n" if len(several) > 1 else f"{as_text(one)}\n")
    print(f"With pictures: {options.output}")
