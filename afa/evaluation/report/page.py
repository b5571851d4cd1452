"""The report as one HTML file that needs nothing else: no scripts, nothing from elsewhere, pictures inside."""

from collections.abc import Sequence
from html import escape

from afa import __version__
from afa.evaluation.compare import Analysis
from afa.evaluation.report.content import made_of, main_table, metrics_table, overview_table, runs_table, title, training_table
from afa.evaluation.report.forest import Entry, forest
from afa.evaluation.report.headline import Headline, headlines, terms
from afa.evaluation.report.markup import legend, section, table_html
from afa.evaluation.report.numbers import plural
from afa.evaluation.report.pictured import cases_html, costs_html, missing, sheets_html, studies_html
from afa.evaluation.report.style import STYLE
from afa.evaluation.report.thumbnails import Thumbnails

Section = tuple[str, str, str]  # a short name for links, a title, what is in it


def as_html(several: Sequence[Analysis], names: Sequence[str]) -> str:
    """The whole page. names: of the evaluations; their pictures are read from where the analyses say they are."""
    apart = len(several) > 1
    parts = [_evaluation(one, name, f"e{place}", apart) for place, (one, name) in enumerate(zip(several, names, strict=True))]
    if apart:
        parts.insert(0, section("overview", "Side by side", table_html(overview_table(several, names), "All evaluations")))
    heading = title(several, names)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title><style>{STYLE}</style></head><body>
<header><h1>{escape(heading)}</h1></header>
<main>{"".join(parts)}</main>
<footer class="note">Made by afa {escape(__version__)} from results.json: afa report</footer>
</body></html>
"""


def _evaluation(one: Analysis, name: str, key: str, several: bool) -> str:
    """One evaluation: what it allows to be said, then everything that it rests on."""
    level = 3 if several else 2
    sections = [found for found in _sections(one) if found[2]]
    links = "".join(f'<a href="#{key}-{short}">{escape(heading)}</a>' for short, heading, _ in sections)
    body = "".join(section(f"{key}-{short}", heading, content, level) for short, heading, content in sections)
    contents = f'<nav aria-label="Contents of {escape(name, quote=True)}">{links}</nav>'
    top = f'<p class="facts">{escape(_facts(one))}</p>{_verdicts(one)}{contents}'
    return section(key, name, top + body) if several else f'<div id="{key}">{top}{body}</div>'


def _sections(one: Analysis) -> list[Section]:
    """In order; those without data are empty. Errors come after the pictures, as some may not be there."""
    pictures = Thumbnails(one.folder)
    training, runs = training_table(one), runs_table(one)
    made = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in made_of(one))
    return [
        ("table", "Every method", _main(one)),
        ("forest", "Against the best single expert", _forests(one)),
        ("metrics", "All metrics", table_html(metrics_table(one), "All metrics") if len(one.columns) > 1 else ""),
        ("images", "The first prompts", sheets_html(one, pictures)),
        ("cases", "Best and worst cases", cases_html(one, pictures)),
        ("cost", "Quality against cost", costs_html(one)),
        *((f"study{place}", heading, body) for place, (heading, body) in enumerate(studies_html(one))),
        ("training", "Training", table_html(training, "What was trained") if training is not None else ""),
        ("runs", "Run by run", table_html(runs, "Training runs") if runs is not None else ""),
        ("errors", "Could not be computed", _errors([*one.problems, *missing(pictures)])),
        ("made", "How it was made", f'<dl class="made">{made}</dl>' if made else ""),
    ]


def _errors(errors: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(error)}</li>' for error in errors)}</ul>" if errors else ""


def _facts(one: Analysis) -> str:
    """The protocol in a line."""
    protocol, items = one.results.protocol, one.results.items
    counts = [(len({item.prompt for item in items}), "prompt"), (len(items), "image"), (len(one.rows), "method")]
    facts = [plural(count, word) + " a method" * (word == "image") for count, word in counts]
    facts += [f"{protocol['steps']} steps"] if "steps" in protocol else []
    facts += [f"guidance {protocol['guidance']}"] if protocol.get("guidance") is not None else []
    return ", ".join([*facts, "the same noise for every method"])


def _verdicts(one: Analysis) -> str:
    said = headlines(one)
    boxes = "".join(f'<div class="verdicts"><p class="lead">{escape(found.lead)}</p>{_kinds(found)}</div>' for found in said)
    return f'{boxes}<p class="note">{escape(terms(one))}</p>'


def _kinds(found: Headline) -> str:
    kinds = "".join(f"<dt>{escape(kind)}</dt><dd>{escape(sentence)}</dd>" for kind, sentence in found.kinds)
    return f"<dl>{kinds}</dl>" if kinds else ""


def _main(one: Analysis) -> str:
    """A table for each leading metric, with a heading where there are several."""
    tables = [(column.metric, table_html(main_table(one, column), f"By {column.metric}")) for column in one.primary]
    return "".join((f"<h3>By {escape(metric)}</h3>" if len(tables) > 1 else "") + table for metric, table in tables)


def _forests(one: Analysis) -> str:
    """A plot for each leading metric."""
    parts = []
    for column in one.primary:
        found = [(method, column.against(method.name, column.best)) for method in one.rows]
        entries = [Entry(method.title, method.group, known, method.name == one.ours) for method, known in found if known]
        if entries and column.best is not None:
            n = entries[0].found.difference.n
            parts.append(forest(entries, f"{column.metric} minus that of {one.title(column.best)}, n = {n}"))
    return legend(method.group for method in one.rows) + "".join(parts) if parts else ""
