"""A report as Markdown: sentences and tables; the pictures are in the page."""

from collections.abc import Sequence

from afa.evaluation.compare import Analysis
from afa.evaluation.report.content import (
    GROUP_TITLES,
    made_of,
    main_table,
    metrics_table,
    overview_table,
    runs_table,
    title,
    training_table,
)
from afa.evaluation.report.headline import headlines, terms
from afa.evaluation.report.studies import find_studies, study_table
from afa.evaluation.report.tables import Row, Table
from afa.shareable import markdown_words


def as_markdown(several: Sequence[Analysis], names: Sequence[str]) -> str:
    """All evaluations of a report. names: of the evaluations."""
    parts = [f"# {markdown_words(title(several, names))}"]
    parts += ["## Side by side", table(overview_table(several, names))] if len(several) > 1 else []
    for name, one in zip(names, several, strict=True):
        parts += [f"## {markdown_words(name)}", *_evaluation(one)]
    return "\n\n".join(parts) + "\n"


def table(found: Table) -> str:
    """A pipe table, numbers to the right, our method in bold, a line for each group."""
    lines = ["| " + " | ".join(markdown_words(found.header(column)) for column in range(len(found.headers))) + " |"]
    lines.append("|" + "|".join("---" if column == 0 else "---:" for column in range(len(found.headers))) + "|")
    group = ""
    for row in found.rows:
        if row.group != group and row.group in GROUP_TITLES:
            lines.append(f"| *{GROUP_TITLES[row.group]}* |" + " |" * (len(found.headers) - 1))
        group = row.group
        lines.append(_row(found, row))
    return "\n".join(lines) + (f"\n\n{markdown_words(found.note)}" if found.note else "")


def _row(found: Table, row: Row) -> str:
    cells = [markdown_words(found.words(cell, column)) for column, cell in enumerate(row.cells)]
    return "| " + " | ".join(f"**{cell}**" if row.strong and cell else cell for cell in cells) + " |"


def _evaluation(one: Analysis) -> list[str]:
    parts = []
    for headline in headlines(one):
        parts.append(f"**{markdown_words(headline.lead)}**")
        parts += ["\n".join(f"* {kind}: {markdown_words(sentence)}" for kind, sentence in headline.kinds)] if headline.kinds else []
    parts.append(markdown_words(terms(one)))
    for column in one.primary:
        parts += [f"### By {markdown_words(column.metric)}", table(main_table(one, column))]
    parts += ["### All metrics", table(metrics_table(one))] if len(one.columns) > 1 else []
    for study in find_studies(one):
        parts += [f"### {markdown_words(study.title)}", table(study_table(one, study))]
    for name, made in (("Training", training_table(one)), ("Run by run", runs_table(one))):
        parts += [f"### {name}", table(made)] if made is not None else []
    errors = [f"* {markdown_words(error)}" for error in one.problems]
    parts += ["### Could not be computed", "\n".join(errors)] if errors else []
    return [*parts, "### How it was made", "\n".join(f"* {markdown_words(name)}: {markdown_words(words)}" for name, words in made_of(one))]
