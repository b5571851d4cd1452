"""Plain text for people: aligned tables, and numbers with the unit that fits."""

from collections.abc import Sequence

DECIMAL = ("", "k", "M", "G", "T", "P")


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns under their headers, two spaces apart; a header that starts with ">" aligns its column to the right.

    None is shown as a dash.
    """
    names = [header.removeprefix(">") for header in headers]
    cells = [names, *[["-" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    right = [header.startswith(">") for header in headers]
    return "\n".join(_line(row, widths, right) for row in cells)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = [
        cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in zip(cells, widths, right, strict=True)
    ]
    return "  ".join(padded).rstrip()


def section(title: str, body: str) -> str:
    """A titled part of a report, indented by two."""
    return "\n".join([title, *(f"  {line}" if line else "" for line in body.splitlines())])


def scaled(value: float | None, unit: str) -> str | None:
    """1234567890, "B" -> "1.235 GB" (decimal, four digits)."""
    if value is None:
        return None
    step = 0
    while abs(value) >= 999.95 and step < len(DECIMAL) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.4g} {DECIMAL[step]}{unit}"


def count(value: int | None) -> str | None:
    """1234567 -> "1,234,567"."""
    return None if value is None else f"{value:,}"
