"""The sections of the page that are looked at: image sheets, cases, costs, studies."""

from html import escape

from afa.evaluation.compare import Analysis
from afa.evaluation.report.curves import curves
from afa.evaluation.report.forest import Entry, forest
from afa.evaluation.report.markup import legend, scrolling, table_html
from afa.evaluation.report.numbers import plural
from afa.evaluation.report.scatter import scatter, spots
from afa.evaluation.report.sheets import cases, opponents, sheets, shown_items
from afa.evaluation.report.studies import Study, find_studies, study_table
from afa.evaluation.report.thumbnails import Thumbnails

COSTS = {"seconds": "seconds an image", "memory": "megabytes while drawing one image"}


def sheets_html(one: Analysis, pictures: Thumbnails) -> str:
    """Rows are prompts, columns methods."""
    drawn = sheets(one, pictures)
    first = plural(len(shown_items(one)), "prompt")
    note = f"Not chosen: the first {first}, of each the first image, drawn from the same noise along a row."
    return f'<p class="note">{note}</p>{drawn}' if drawn else ""


def cases_html(one: Analysis, pictures: Thumbnails) -> str:
    """Our method against the best expert and the best rival, by the first metric of images."""
    column = next((column for column in [*one.primary, *one.columns.values()] if column.note.kind == "image"), None)
    if column is None or one.ours is None or one.ours not in column.values or not pictures.available(one.methods[one.ours]):
        return ""
    drawn = "".join(cases(one, column, other, pictures) for other in opponents(one, column))
    note = f"Chosen for the largest differences in {column.metric}, at most one image a prompt"
    return f'<p class="note">{escape(note)}: they show what happens, not how often.</p>{drawn}' if drawn else ""


def costs_html(one: Analysis) -> str:
    """A plot for seconds, one for memory, where they were measured."""
    found = {unit: spots(one, one.lead, what) for what, unit in COSTS.items()}
    parts = [scrolling(scatter(drawn, one.lead, unit), unit) for unit, drawn in found.items() if len(drawn) > 1]
    note = (
        "Measured where the images were made: seconds are means over images, in the batches they were made in;"
        " memory is the largest of a method's runs."
    )
    return f'{legend(method.group for method in one.rows)}{"".join(parts)}<p class="note">{note}</p>' if parts else ""


def studies_html(one: Analysis) -> list[tuple[str, str]]:
    """Title and plot with table of every study."""
    return [(study.title, _study(one, study)) for study in find_studies(one)]


def missing(pictures: Thumbnails) -> list[str]:
    """A sentence about images that are not there, if there are such."""
    if not pictures.missing:
        return []
    found = f"{plural(len(pictures.missing), 'image')} could not be read (first: {pictures.missing[0]})"
    return [f"{found}; afa evaluate makes missing images again"]


def _study(one: Analysis, study: Study) -> str:
    drawn = _curves(one, study) if study.numeric else _differences(one, study)
    return drawn + table_html(study_table(one, study), study.title)


def _curves(one: Analysis, study: Study) -> str:
    lines = {one.title(of) if of in one.methods else of or study.axis: points for of, points in study.lines.items()}
    best = one.lead.best
    level = (f"{one.title(best)}, alone", one.lead.values[best]) if best is not None and best not in study.lines else None
    drawn = curves(lines, one.lead, "denoising steps" if study.axis == "steps" else study.axis, level)
    return scrolling(drawn, study.title)


def _differences(one: Analysis, study: Study) -> str:
    """Every variant minus what it was derived from."""
    parts = []
    for of, points in study.lines.items():
        known = [(point, one.lead.against(point.method.name, of)) for point in points]
        entries = [Entry(str(point.place), point.method.group, found) for point, found in known if found is not None]
        title = f"{one.lead.metric} minus that of {one.title(of) if of in one.methods else of}{_as_it_is(one, of)}"
        parts += [forest(entries, f"{title}, n = {entries[0].found.difference.n}")] if entries else []
    return "".join(parts)


def _as_it_is(one: Analysis, of: str) -> str:
    """Said of rows of the main table; another row of the study is not as it is."""
    return "" if of in one.methods and one.methods[of].axes else " as it is"
