"""A report for the terminal: what can be said, and the main table."""

import textwrap

from afa.evaluation.compare import Analysis, analyse
from afa.evaluation.report.content import GROUP_TITLES, main_table
from afa.evaluation.report.headline import headlines, terms
from afa.evaluation.report.numbers import DASH
from afa.evaluation.report.tables import Table
from afa.evaluation.results import Results

WIDTH = 120


def as_text(results: Results) -> str:
    """One evaluation. Raises UserError for results that nothing can be computed from."""
    return analysis_text(analyse([results])[0])


def analysis_text(one: Analysis) -> str:
    """The tables of the leading metrics, what they allow to be said, and what could not be computed."""
    tables = [main_table(one, column, brief=True) for column in one.primary]
    parts = [f"{aligned(table)}\n\n{_wrapped(table.note)}" for table in tables]
    for headline in headlines(one):
        parts.append(
            "\n".join([_wrapped(headline.lead), *(_wrapped(f"{kind}: {sentence}", "  ") for kind, sentence in headline.kinds)])
        )
    parts.append(_wrapped(terms(one)))
    parts += ["\n".join(["Could not be computed:", *(_wrapped(error, "  ") for error in one.problems)])] if one.problems else []
    return "\n\n".join(parts)


def aligned(table: Table) -> str:
    """Columns two spaces apart, numbers to the right, a line before each group of methods."""
    columns = range(len(table.headers))
    under = [table.under(column) for column in columns]
    headers = [list(table.headers), *([under] if any(under) else [])]
    lines = [[table.words(cell, column, DASH) for column, cell in enumerate(row.cells)] for row in table.rows]
    widths = [max(len(line[column]) for line in [*headers, *lines]) for column in columns]
    found = [*(_line(header, widths) for header in headers), "  ".join("-" * width for width in widths)]
    group = ""
    for row, line in zip(table.rows, lines, strict=True):
        found += [GROUP_TITLES.get(row.group, row.group)] if row.group != group else []
        group = row.group
        found.append(_line([f"{'*' if row.strong else ' '} {line[0]}", *line[1:]], [widths[0] + 2, *widths[1:]]))
    above = len(headers) + 1
    return "\n".join([f"  {line}" for line in found[:above]] + found[above:])


def _line(cells: list[str], widths: list[int]) -> str:
    first, *others = (
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  " * bool(indent))
