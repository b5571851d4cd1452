"""Tables and sections as HTML."""

from collections.abc import Iterable
from html import escape

from afa.evaluation.report.content import GROUP_TITLES
from afa.evaluation.report.svg import SHAPES
from afa.evaluation.report.tables import MARKS, Cell, Row, Shown, Table


def table_html(table: Table, caption: str) -> str:
    """A table that scrolls sideways where it must; its first column stays. caption: said to those who cannot see it."""
    head = "".join(_header(table, column) for column in range(len(table.headers)))
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    unseen = f'<caption class="unseen">{escape(caption)}</caption>'
    return scrolling(f"<table>{unseen}<thead><tr>{head}</tr></thead>{_bodies(table)}</table>", caption) + note


def scrolling(content: str, label: str) -> str:
    """What may be wider than the window: it scrolls by itself, also by keys. label: read out."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label, quote=True)}">{content}</div>'


def section(name: str, title: str, body: str, level: int = 2) -> str:
    """A titled part that can be linked to."""
    return f'<section id="{name}"><h{level}>{escape(title)}</h{level}>\n{body}\n</section>\n'


def verdict_mark(verdict: str) -> str:
    """▲, ▼ or ○, always as wide, read out as a word."""
    if not verdict:
        return '<span class="verdict"></span>'
    words = f'role="img" aria-label="{verdict}" title="{verdict}, after Holm"'
    return f'<span class="verdict {verdict}" {words}>{MARKS[verdict]}</span>'


def figures(value: str, around: str) -> str:
    """A value and its interval."""
    return f'<span class="v">{value}</span> <span class="ci">{around}</span>'


def key(group: str) -> str:
    """The mark of a group."""
    return f'<svg viewBox="-7 -7 14 14" class="key" aria-hidden="true"><g class="mark {group}">{SHAPES[group]}</g></svg>'


def legend(groups: Iterable[str]) -> str:
    """Which shape and colour is which kind of method, for those that occur."""
    known = set(groups)
    keys = "".join(f"<span>{key(group)}{escape(title)}</span>" for group, title in GROUP_TITLES.items() if group in known)
    return f'<p class="legend">{keys}</p>'


def _header(table: Table, column: int) -> str:
    kind = "" if column == 0 else ' class="num"'
    under = table.under(column)
    return f'<th scope="col"{kind}>{escape(table.headers[column])}{f"<br><small>{escape(under)}</small>" if under else ""}</th>'


def _bodies(table: Table) -> str:
    """A body for each group of methods."""
    parts: list[str] = []
    group = None
    for row in table.rows:
        if row.group != group:
            parts.append(f"{'</tbody>' if parts else ''}<tbody>{_group(row.group, len(table.headers))}")
            group = row.group
        parts.append(_row(table, row))
    return "".join(parts) + ("</tbody>" if parts else "")


def _group(group: str, columns: int) -> str:
    if group not in GROUP_TITLES:
        return ""
    title = f'<th scope="rowgroup">{key(group)}{escape(GROUP_TITLES[group])}</th>'
    return f'<tr class="group">{title}<td colspan="{columns - 1}"></td></tr>\n'


def _row(table: Table, row: Row) -> str:
    marked = {column for column in range(len(table.headers)) if any(shown.verdict for shown in table.estimates(column))}
    first = table.words(row.cells[0], 0)
    cells = "".join(_cell(table, column, cell, column in marked) for column, cell in enumerate(row.cells) if column)
    return f'<tr{" class=ours" if row.strong else ""}><th scope="row">{escape(first)}</th>{cells}</tr>\n'


def _cell(table: Table, column: int, cell: Cell, marked: bool) -> str:
    if not isinstance(cell, Shown):
        return f'<td class="num">{"" if cell is None else escape(cell)}</td>'
    value, around = cell.parts(table.places(column))
    n = "" if table.common_n(column) is not None else f' <span class="ci">n = {cell.estimate.n}</span>'
    mark = verdict_mark(cell.verdict) if marked else ""
    return f'<td class="num">{figures(value, around)}{n}{mark}</td>'
