"""A screening as one HTML file that needs nothing else."""

from html import escape

from afa.evaluation.report.markup import section, table_html
from afa.evaluation.report.style import STYLE
from afa.screening.report.stages import stage_chart
from afa.screening.report.tables import Facts, all_tables
from afa.screening.report.text import notes


def as_html(facts: Facts) -> str:
    """The whole page."""
    names = ", ".join(expert["name"] for expert in facts["experts"])
    tables = all_tables(facts)
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in tables)
    body = "".join(section(name, title, _chart(name, facts) + table_html(table, title)) for name, title, table in tables)
    heading = f"Screening of {names}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title><style>{STYLE}</style></head><body>
<header><h1>{escape(heading)}</h1></header>
<main><p class="facts">{escape(_asked(facts))}</p>{_verdict(facts)}<nav aria-label="Contents">{links}</nav>{body}{_notes(facts)}</main>
<footer class="note">Made by afa {escape(facts["afa"])}: afa screen</footer>
</body></html>
"""


def _asked(facts: Facts) -> str:
    given, drawn = f"captioned images of {facts['data']}", f"prompts of {facts['prompts']}, drawn by the experts"
    what = f"{facts['images']} {given if facts['data'] else drawn}"
    return f"{what}; {len(facts['timesteps'])} timesteps an image, {facts['draws']} noises each, {facts['resolution']} pixels."


def _verdict(facts: Facts) -> str:
    verdict = facts["verdict"]
    reasons = "".join(f"<p>{escape(reason)}</p>" for reason in verdict["reasons"])
    dropped = "".join(f"<dt>without {escape(name)}</dt><dd>{escape(why)}</dd>" for name, why in verdict["dropped"].items())
    return f'<div class="verdicts"><p class="lead">{escape(verdict["headline"])}</p>{reasons}{f"<dl>{dropped}</dl>" if dropped else ""}</div>'


def _chart(name: str, facts: Facts) -> str:
    if name == "features":
        return stage_chart([(" and ".join(pair["experts"]), pair["stages"]) for pair in facts["features"]], "distance of features")
    if name == "weights":
        return stage_chart([(" and ".join(pair["experts"]), pair["stages"]) for pair in facts["parameters"]["pairs"]], "distance of weights")
    return ""


def _notes(facts: Facts) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes(facts))
