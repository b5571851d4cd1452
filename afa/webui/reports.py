"""The reports that were named at the start, read once: whoever visits the page names no file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from afa.errors import UserError
from afa.files import given_name
from afa.pages.page import part
from afa.text_files import read_text

PAGE = "report.html"  # what afa demo and afa screen leave
RESULTS = "results.json"  # what afa evaluate leaves


@dataclass(frozen=True)
class Report:
    """One report: its name for a tab, and its page."""

    name: str
    html: str

    @property
    def frame(self) -> str:
        """The page in a frame of its own, in which nothing runs and from which nothing is reached."""
        return part("webui.html", "frame", name=self.name, page=self.html)


def read_reports(places: Sequence[str]) -> list[Report]:
    """Raises UserError for a place without a report, with how to make one."""
    reports = [_read(Path(place)) for place in places]
    names = [report.name for report in reports]
    return [
        report if names.count(report.name) == 1 else Report(f"{report.name} {index}", report.html)
        for index, report in enumerate(reports, start=1)
    ]


def _read(place: Path) -> Report:
    if place.is_file() and place.suffix.lower() in (".html", ".htm"):
        return Report(place.stem if place.name != PAGE else place.resolve().parent.name, read_text(place))
    if (place / PAGE).is_file():
        return Report(given_name(place), read_text(place / PAGE))
    if (place / RESULTS).is_file():
        return Report(given_name(place), _evaluation(place))
    raise UserError(
        f"--reports {place} holds no report: it is neither an .html file nor a folder with {PAGE} (afa screen, afa demo)"
        f" or {RESULTS} (afa evaluate)"
    )


def _evaluation(folder: Path) -> str:
    """As `afa report` would make it."""
    from afa.evaluation.compare import analyse
    from afa.evaluation.report.page import as_html
    from afa.evaluation.results import Results

    results = Results.load(folder)
    return as_html(analyse([results], [folder]), [str(results.protocol.get("name", folder.name))])
