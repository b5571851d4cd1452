"""A screening for the terminal: the verdict first, then what it rests on."""

import textwrap

from afa.evaluation.report.text import WIDTH, aligned
from afa.screening.report.tables import Facts, all_tables

LONG = "features"  # a table that only the page shows


def as_text(facts: Facts) -> str:
    """Verdict, reasons, tables."""
    verdict = facts["verdict"]
    lines = [verdict["headline"], *(_wrapped(reason) for reason in verdict["reasons"])]
    lines += [_wrapped(f"Leave out {name}: {why}.") for name, why in verdict["dropped"].items()]
    parts = ["\n".join(lines)]
    for name, title, table in all_tables(facts):
        if name != LONG:
            parts.append(f"{title}\n{aligned(table)}" + (f"\n{_wrapped(table.note)}" if table.note else ""))
    parts += [_wrapped(note) for note in notes(facts)]
    return "\n\n".join(parts)


def notes(facts: Facts) -> list[str]:
    """What could not be found out, and why."""
    found = []
    if isinstance(facts["parameters"], str):
        found.append(f"Weights could not be compared: {facts['parameters']}.")
    if isinstance(facts.get("average"), str):
        found.append(f"The weight average {facts['average']}.")
    found += [f"Only predictions can be combined (--placement out): {reason}." for reason in facts["only_predictions"]]
    return found


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
