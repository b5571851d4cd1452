"""A table before it is text, Markdown or HTML: its cells are words, facts, or estimates; no number is without n and interval."""

from collections.abc import Sequence
from dataclasses import dataclass

from afa.evaluation.report.numbers import decimals, interval, number, percent
from afa.evaluation.statistics import Estimate

MARKS = {"better": "▲", "worse": "▼", "undecided": "○", "": ""}  # after Holm's correction


@dataclass(frozen=True)
class Shown:
    """How an estimate is shown. share: in percent. coarse: with one digit less. verdict: of the comparison it belongs to."""

    estimate: Estimate
    signed: bool = False
    share: bool = False
    coarse: bool = False
    verdict: str = ""

    def parts(self, places: int) -> tuple[str, str]:
        """Value and interval."""
        if self.share:
            return percent(self.estimate)
        return number(self.estimate.value, places, self.signed), interval(self.estimate, places, self.signed)


Cell = Shown | str | None  # words or a counted fact; None: there is none


@dataclass(frozen=True)
class Row:
    """One line. group: of its method; strong: whether it is the one that claims are made about."""

    cells: Sequence[Cell]
    group: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Headers and lines. note: what a reader must know to read it."""

    headers: Sequence[str]
    rows: Sequence[Row]
    note: str = ""

    def places(self, column: int) -> int:
        """Digits after the point of a column's estimates."""
        found = self.estimates(column)
        return max(0, decimals([shown.estimate for shown in found]) - any(shown.coarse for shown in found))

    def estimates(self, column: int) -> list[Shown]:
        """All estimates of a column."""
        return [cell for row in self.rows if isinstance(cell := row.cells[column], Shown)]

    def common_n(self, column: int) -> int | None:
        """The n of all estimates of a column, if it is the same; then it stands in the header."""
        found = {shown.estimate.n for shown in self.estimates(column)}
        return found.pop() if len(found) == 1 else None

    def header(self, column: int) -> str:
        """In one line, with what stands under it."""
        return f"{self.headers[column]} {self.under(column)}".strip()

    def under(self, column: int) -> str:
        """Interval and n, where there are estimates."""
        n = self.common_n(column)
        brackets = "[95 %]" if any(shown.estimate.has_interval for shown in self.estimates(column)) else ""
        return ", ".join(part for part in (brackets, "" if n is None else f"n = {n}") if part)

    def words(self, cell: Cell, column: int, missing: str = "") -> str:
        """A cell as plain words, whole."""
        if not isinstance(cell, Shown):
            return missing if cell is None else cell
        value, around = cell.parts(self.places(column))
        n = "" if self.common_n(column) is not None else f"(n = {cell.estimate.n})"
        return " ".join(part for part in (value, around, n, MARKS[cell.verdict]) if part)
