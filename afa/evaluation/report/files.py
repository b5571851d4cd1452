"""A report for the terminal, as Markdown and as CSV, and the files that `afa report` writes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from afa.errors import UserError
from afa.evaluation.columns import Column, Comparison
from afa.evaluation.compare import Analysis, analyse
from afa.evaluation.frontier import Frontier
from afa.evaluation.report.content import (
    find_studies,
    made_of,
    main_table,
    metrics_table,
    overview_table,
    runs_table,
    study_table,
    title,
    training_table,
)
from afa.evaluation.report.frontier import frontier_headlines, frontier_title, gaps_table, points_table
from afa.evaluation.report.headline import advice, headlines, terms
from afa.evaluation.report.page import as_html
from afa.evaluation.results import Method, Results
from afa.files import locked, write_atomically
from afa.pages.tables import Table, TableRow, wrapped
from afa.places import markdown_words
from afa.stats import Estimate

HEADERS = (
    "evaluation method title group study own of training_seeds metric kind higher_is_better leading prompts"
    " value low high n versus shared_seeds diff diff_low diff_high win win_low win_high p p_holm verdict"
    " trained_parameters training_steps seconds seconds_low seconds_high seconds_n memory_mb"
).split()


def write_report(
    folders: Sequence[Path], output: Path, markdown: Path | None = None, csv: Path | None = None
) -> list[Analysis]:
    """Write a report of one or several comparisons: a page, and its numbers as Markdown and CSV.

    folders:  outputs of evaluate
    output:   the page, an .html file
    markdown: None: beside the page, .md
    csv:      None: beside the page, .csv
    Returns the analysis of each folder. Raises UserError for a folder without results.
    """
    markdown, csv = markdown or output.with_suffix(".md"), csv or output.with_suffix(".csv")
    _check(folders, {"--output": output, "--markdown": markdown, "--csv": csv})
    several = analyse([Results.load(folder) for folder in folders], folders)
    protocols = [
        str(one.results.protocol.get("name", folder.name))
        for one, folder in zip(several, folders, strict=True)
    ]
    names = [
        f"{name} ({folder})" if protocols.count(name) > 1 else name
        for name, folder in zip(protocols, folders, strict=True)
    ]
    with locked(output, file=True):
        for path, made in ((output, as_html), (markdown, as_markdown), (csv, as_csv)):
            content = made(several, names)
            with locked(path, file=True):
                write_atomically(path, content)
    return several


def _check(folders: Sequence[Path], outputs: dict[str, Path]) -> None:
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"{folder} is given twice; give each evaluation once")
        seen.add(folder.resolve())
    if outputs["--output"].suffix.lower() not in (".html", ".htm"):
        raise UserError(
            f"--output {outputs['--output']} must end in .html; Markdown and CSV go to --markdown and --csv"
        )
    for flag, path in outputs.items():
        if path.is_dir():
            raise UserError(f"{flag} {path} is a folder; give a file, such as {path / 'report.html'}")
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise UserError(
            f"{' and '.join(f'{flag} {path}' for flag, path in outputs.items())} must be different files"
        )
    for folder in folders:
        if not folder.exists():
            raise UserError(f"there is no folder {folder}; make it with: afa evaluate … --output {folder}")


# --- text ---


def as_text(one: Analysis) -> str:
    """Return the tables of the leading metrics, what follows from them, and what could not be computed."""
    tables = [main_table(one, column, brief=True) for column in one.primary]
    tables += [points_table(one, found) for found in one.frontiers]
    tables += [table for found in one.frontiers if (table := gaps_table(one, found)) is not None]
    parts = [f"{table.text()}\n\n{wrapped(table.note)}" for table in tables]
    parts.append(wrapped(str(advice(one))))
    for found in [*headlines(one), *frontier_headlines(one)]:
        kinds = [wrapped(f"{kind}: {sentence}", "  ", "    ") for kind, sentence in found.kinds]
        parts.append("\n".join([wrapped(found.lead), *kinds]))
    parts.append(wrapped(terms(one)))
    if one.problems:
        parts.append(
            "\n".join(["Could not be computed:", *(wrapped(error, "  ", "    ") for error in one.problems)])
        )
    return "\n\n".join(parts)


# --- Markdown ---


def as_markdown(several: Sequence[Analysis], names: Sequence[str]) -> str:
    """Return all evaluations of a report as sentences and tables; only the page has pictures.

    names: of the evaluations
    """
    parts = [f"# {markdown_words(title(several, names))}"]
    parts += ["## Side by side", overview_table(several, names).markdown()] if len(several) > 1 else []
    for name, one in zip(names, several, strict=True):
        parts += [f"## {markdown_words(name)}", *_sections(one)]
    return "\n\n".join(parts) + "\n"


def _sections(one: Analysis) -> Iterator[str]:
    """Yield the paragraphs and tables of one evaluation."""
    found = advice(one)
    yield f"**{markdown_words(found.sentence)}** {markdown_words(found.because)}".strip()
    for found in [*headlines(one), *frontier_headlines(one)]:
        yield markdown_words(found.lead)
        if found.kinds:
            yield "\n".join(f"* {kind}: {markdown_words(sentence)}" for kind, sentence in found.kinds)
    yield markdown_words(terms(one))
    tables: list[tuple[str, Table | None]] = [
        (f"By {column.metric}", main_table(one, column)) for column in one.primary
    ]
    for curves in one.frontiers:
        tables += [
            (frontier_title(curves), gaps_table(one, curves)),
            (f"All values of {curves.axis}", points_table(one, curves)),
        ]
    tables += [("All metrics", metrics_table(one))]
    tables += [(study.title, study_table(one, study)) for study in find_studies(one)]
    tables += [("Training", training_table(one)), ("Run by run", runs_table(one))]
    for name, table in tables:
        if table is not None:
            yield f"### {markdown_words(name)}"
            yield table.markdown()
    if one.problems:
        yield "### Could not be computed"
        yield "\n".join(f"* {markdown_words(error)}" for error in one.problems)
    yield "### How it was made"
    yield "\n".join(f"* {markdown_words(name)}: {markdown_words(words)}" for name, words in made_of(one))


# --- CSV ---


def as_csv(several: Sequence[Analysis], names: Sequence[str]) -> str:
    """Return a line for each method, metric and method that it is compared with, or one without any."""
    lines = [
        {"evaluation": name, **line} for name, one in zip(names, several, strict=True) for line in _lines(one)
    ]
    return Table(HEADERS, [TableRow([line.get(header) for header in HEADERS]) for line in lines]).csv()


def _lines(one: Analysis) -> Iterator[dict[str, Any]]:
    """Yield lines by column of HEADERS; columns without a value are left out, or None or ""."""
    methods = [*one.rows, *(method for method in one.results.methods if method.axes)]
    for column in one.columns.values():
        for method in (method for method in methods if method.name in column.values):
            shared = _score(one, column, method)
            compared = [found for found in column.comparisons.values() if found.method == method.name]
            yield from ({**shared, **_versus(found)} for found in compared)
            if not compared:
                yield shared
    for curves in one.frontiers:
        for gap in curves.gaps:
            yield from [_gap(one, curves, gap.comparison)] if gap.comparison is not None else []


def _gap(one: Analysis, curves: Frontier, found: Comparison) -> dict[str, Any]:
    """Return the columns of a comparison of curves."""
    quality = curves.quality
    return {
        "method": found.method,
        "title": one.title(found.method),
        "group": one.methods[found.method].group,
        "study": f"curve over {curves.axis}",
        "metric": f"{quality.metric} at equal {curves.distance.metric}",
        "kind": "curve",
        "higher_is_better": int(quality.note.higher_is_better),
        "leading": 1,
        "prompts": found.prompts,
        **_versus(found),
    }


def _score(one: Analysis, column: Column, method: Method) -> dict[str, Any]:
    """Return the columns about a method and its score by one metric."""
    found, sample = column.values[method.name], column.samples[method.name]
    seconds, own = one.seconds.get(method.name), one.results.own.get(method.name, {})
    timed = {} if seconds is None else {"seconds": seconds.value, "seconds_n": seconds.n}
    return {
        "method": method.name,
        "title": method.title,
        "group": method.group,
        "study": "; ".join(f"{axis}={value}" for axis, value in method.axes.items()),
        "own": "; ".join(f"{axis}={value:.16g}" for axis, value in own.items()),
        "of": method.of,
        "trained_parameters": method.trained_parameters,
        "training_steps": method.training_steps,
        "memory_mb": method.memory_mb,
        **timed,
        **_ends(seconds, "seconds_"),
        "training_seeds": len(sample.seeds),
        "metric": column.metric,
        "kind": column.note.kind,
        "higher_is_better": int(column.note.higher_is_better),
        "leading": int(column in one.primary),
        "prompts": sample.prompts,
        "value": found.value,
        **_ends(found),
        "n": found.n,
    }


def _versus(found: Comparison) -> dict[str, Any]:
    return {
        "versus": found.other,
        "shared_seeds": len(found.seeds) or None,
        "diff": found.difference.value,
        **_ends(found.difference, "diff_"),
        **({} if found.wins is None else {"win": found.wins.value}),
        **_ends(found.wins, "win_"),
        "p": found.p,
        "p_holm": found.p_holm,
        "verdict": found.verdict,
    }


def _ends(found: Estimate | None, prefix: str = "") -> dict[str, float]:
    """Return the columns of an interval; none if there is no interval."""
    if found is None or not found.has_interval:
        return {}
    return {f"{prefix}low": found.low, f"{prefix}high": found.high}
