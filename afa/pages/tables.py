"""One table, as text for the terminal, as Markdown and as CSV; as HTML by a macro of templates/parts.html.

No estimate is shown without its interval and its n.
"""

import csv
import io
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.pages.numbers import DASH, decimals, interval, number
from afa.places import csv_cell, markdown_words

if TYPE_CHECKING:
    from afa.stats import Estimate

WIDTH = 120  # letters: of text for the terminal
MARKS = {"better": "▲", "worse": "▼", "undecided": "○", "": ""}  # verdicts, after Holm's correction
GROUP_TITLES = {
    "expert": "Experts",
    "merge": "Merges",
    "sampling": "Combined while sampling",
    "control": "Controls",
    "ours": "Ours",
    "bound": "Upper bounds",
}


@dataclass(frozen=True)
class Shown:
    """An estimate in a cell, and how it is shown.

    estimate: value, interval and n
    signed:   with a plus sign
    share:    in percent
    coarse:   with one digit less than its interval justifies
    digits:   after the point; None: as the intervals of the column justify
    verdict:  of the comparison that it belongs to: a key of MARKS
    """

    estimate: "Estimate"
    signed: bool = False
    share: bool = False
    coarse: bool = False
    digits: int | None = None
    verdict: str = ""

    def parts(self, places: int) -> tuple[str, str]:
        """Value and interval as texts. places: digits after the point."""
        found, places = self.estimate, places if self.digits is None else self.digits
        if self.share:
            return f"{number(100 * found.value, 0)} %", interval(found, 0, scale=100)
        return number(found.value, places, self.signed), interval(found, places, self.signed)


# An estimate; words, which may be Markup for a page; a counted fact; nothing.
Cell = Shown | str | int | float | None


@dataclass(frozen=True)
class TableRow:
    """One row.

    cells:  one a column
    group:  a key of GROUP_TITLES, or ""
    strong: whether claims are made about this row
    """

    cells: Sequence[Cell]
    group: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Headers and rows.

    headers: one a column
    rows:    the rows
    note:    what a reader must know to read the table
    align:   "l" or "r" for each column; "": the first column to the left, the others to the right
    n_apart: n stands in a column or a note of its own, and is not repeated beside the numbers
    kind:    class of the HTML table, for style.css
    """

    headers: Sequence[str]
    rows: Sequence[TableRow]
    note: str = ""
    align: str = ""
    n_apart: bool = False
    kind: str = ""

    def is_number(self, column: int) -> bool:
        """Whether a column is aligned to the right."""
        return self.align[column] == "r" if self.align else column > 0

    def estimates(self, column: int) -> list[Shown]:
        """All estimates of a column."""
        return [cell for row in self.rows if isinstance(cell := row.cells[column], Shown)]

    def places(self, column: int) -> int:
        """Digits after the point of a column's estimates."""
        found = self.estimates(column)
        return max(0, decimals([shown.estimate for shown in found]) - any(shown.coarse for shown in found))

    def has_verdicts(self, column: int) -> bool:
        """Whether a column needs room for marks."""
        return any(shown.verdict for shown in self.estimates(column))

    def common_n(self, column: int) -> int | None:
        """The n of all estimates of a column, if it is the same; then it stands in the header."""
        found = {shown.estimate.n for shown in self.estimates(column)}
        return found.pop() if len(found) == 1 else None

    def own_n(self, cell: Shown, column: int) -> str:
        """n = 7, beside an estimate whose n is not in the header; else empty."""
        return "" if self.n_apart or self.common_n(column) is not None else f"n = {cell.estimate.n}"

    def under(self, column: int) -> str:
        """What stands under a header, where there are estimates: [95 %], n = 30."""
        n = None if self.n_apart else self.common_n(column)
        brackets = "[95 %]" if any(shown.estimate.has_interval for shown in self.estimates(column)) else ""
        return ", ".join(part for part in (brackets, "" if n is None else f"n = {n}") if part)

    def header(self, column: int) -> str:
        """A header in one line, with what stands under it."""
        return f"{self.headers[column]} {self.under(column)}".strip()

    def words(self, cell: Cell, column: int, missing: str = "") -> str:
        """A cell as plain text."""
        if not isinstance(cell, Shown):
            return missing if cell is None else str(cell)
        n = self.own_n(cell, column)
        parts = (*cell.parts(self.places(column)), f"({n})" if n else "", MARKS[cell.verdict])
        return " ".join(part for part in parts if part)

    def groups(self) -> Iterator[tuple[str, list[TableRow]]]:
        """Neighbouring rows of one group together."""
        for group, rows in itertools.groupby(self.rows, key=lambda row: row.group):
            yield group, list(rows)

    def text(self, ruled: bool = True, missing: str = DASH) -> str:
        """The table as text, columns two spaces apart.

        ruled:   a line under the headers, group titles, and * before strong rows
        missing: shown for an empty cell
        """
        columns = range(len(self.headers))
        under = [self.under(column) for column in columns]
        heads = [list(self.headers), *([under] if any(under) else [])]
        body = [
            [self.words(cell, place, missing) for place, cell in enumerate(row.cells)] for row in self.rows
        ]
        widths = [max(len(cells[place]) for cells in (*heads, *body)) for place in columns]

        def line(cells: Sequence[str]) -> str:
            padded = [
                cell.rjust(width) if self.is_number(place) else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(padded).rstrip()

        if not ruled:
            return "\n".join(map(line, (*heads, *body)))
        lines = [f"  {line(cells)}" for cells in (*heads, ["-" * width for width in widths])]
        group = ""
        for row, cells in zip(self.rows, body, strict=True):
            lines += [GROUP_TITLES.get(row.group, row.group)] if row.group != group else []
            group = row.group
            lines.append(f"{'*' if row.strong else ' '} {line(cells)}")
        return "\n".join(lines)

    def markdown(self) -> str:
        """The table in Markdown, strong rows in bold, with a line for each group, and the note."""
        columns = range(len(self.headers))
        lines = ["| " + " | ".join(markdown_words(self.header(column)) for column in columns) + " |"]
        lines.append("|" + "|".join("---:" if self.is_number(column) else "---" for column in columns) + "|")
        for group, rows in self.groups():
            if group in GROUP_TITLES:
                lines.append(f"| *{GROUP_TITLES[group]}* |" + " |" * (len(columns) - 1))
            for row in rows:
                cells = [markdown_words(self.words(cell, column)) for column, cell in enumerate(row.cells)]
                shown = (f"**{cell}**" if row.strong and cell else cell for cell in cells)
                lines.append("| " + " | ".join(shown) + " |")
        return "\n".join(lines) + (f"\n\n{markdown_words(self.note)}" if self.note else "")

    def csv(self) -> str:
        """The table as CSV: numbers as they are, texts that a spreadsheet would compute as text."""
        target = io.StringIO()
        writer = csv.writer(target, lineterminator="\n")
        writer.writerow(self.headers)
        for row in self.rows:
            cells = [
                self.words(cell, place) if isinstance(cell, Shown) else cell
                for place, cell in enumerate(row.cells)
            ]
            writer.writerow(map(csv_cell, cells))
        return target.getvalue()


def listing(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table without rules, as text for the terminal.

    headers: ">" before a header aligns its column to the right
    """
    align = "".join("r" if header.startswith(">") else "l" for header in headers)
    names = [header.removeprefix(">") for header in headers]
    return Table(names, [TableRow(cells) for cells in rows], align=align).text(ruled=False, missing="-")


def pairs(facts: Mapping[str, object]) -> str:
    """Facts as text for the terminal, one a line, their names in a column of their own."""
    width = max(map(len, facts))
    shown = {
        name: ", ".join(map(str, fact)) if isinstance(fact, list) else fact for name, fact in facts.items()
    }
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {fact}" for name, fact in shown.items())


def wrapped(text: str, first: str = "", others: str = "") -> str:
    """Text in lines for the terminal. first, others: indents of the first line and of the others."""
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=others)
