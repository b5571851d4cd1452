"""explain.html: everything on one page that needs nothing else, without scripts."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from afa import __version__
from afa.evaluation.report.markup import scrolling, section
from afa.evaluation.report.style import STYLE
from afa.evaluation.statistics import Estimate
from afa.explanation.data import Entry
from afa.explanation.shares import estimates, said
from afa.explanation.skipping import Unused
from afa.explanation.summary import WordMean, word_means
from afa.images import read_pixels
from afa.pages.numbers import plural
from afa.training.routing import BANDS
from afa.visualise.weights import COLOURS

EXTRA = """
figure.wide { margin: 1rem 0; } figure.wide img { width: auto; max-width: 100%; border-radius: 0; background: #fff; }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .4em; }
"""
BAND_NAMES = ("least noise", "less noise", "more noise", "most noise")
MOST_WORDS = 40
PICTURES = {"sheet.png": "Who weighs where", "strip.webp": "Step by step", "words.png": "Words", "counterfactuals.png": "What would have been"}


def as_html(folder: Path, entries: Sequence[Entry], unused: Unused, found: Mapping[str, Any], facts: str) -> str:
    """The page of a folder whose images are explained."""
    heading = f"Why these images look as they do: {plural(len(entries), 'image')} by {', '.join(unused.experts)}"
    skipped = found["counterfactuals"].get("left out where unused")
    parts = [
        ("shares", "Who weighs how much", _shares(entries, unused)),
        ("words", "Which words move the weights", _words(word_means(entries), unused)),
        ("counterfactuals", "What would have been", _distances(found, entries)),
        ("unused", "Where experts are not used", _unused(folder, unused, skipped, len(entries))),
        *((f"i{entry.stem}", str(entry.facts["prompt"]), _image(folder, entry)) for entry in entries),
    ]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, body in parts if body)
    body = "".join(section(name, title, content) for name, title, content in parts if content)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(heading)}</title><style>{STYLE}{EXTRA}</style></head><body>
<header><h1>{escape(heading)}</h1></header><p class="facts">{escape(facts)}</p><nav aria-label="Contents">{links}</nav>
<main>{body}</main><footer class="note">Made by afa {escape(__version__)}: afa explain</footer>
</body></html>
"""


def _shares(entries: Sequence[Entry], unused: Unused) -> str:
    """A row a group of stages and an expert, a column a band of the noise schedule."""
    groups, found = entries[0].facts["shares"]["groups"], estimates([entry.shares for entry in entries])
    rows = [
        [escape(group) if not expert else "", _named(unused, expert), *(_cell(found[row, band, expert]) for band in range(BANDS))]
        for row, group in enumerate(groups)
        for expert in range(len(unused.experts))
    ]
    note = _over(len(entries), "Mean weights over places, stages and passes")
    return table(["stages", "expert", *BAND_NAMES], rows, "Mean weights") + note


def _words(found: Sequence[WordMean], unused: Unused) -> str:
    if not found:
        return ""
    rows = [
        [escape(one.word), str(one.omitted.n), _cell(one.omitted, 4), _cell(one.hidden, 4), _cell(one.looked), *(_cell(pull, 4) for pull in one.pull)]
        for one in found[:MOST_WORDS]
    ]
    heads = ["word", "images", "moves, left out of the prompt", "moves, hidden from aggregators", "looked at", *(f"pull of {name}" for name in unused.experts)]
    note = (
        "Moves: the share of the weight that changes hands without the word, on the same latents. Pull: an expert's weight with the word minus"
        " without. Looked at: the share of the aggregators' attention; that is where they look, not why they weigh as they do."
    )
    more = f" The first {MOST_WORDS} of {len(found)} words; all are in explain.json." if len(found) > MOST_WORDS else ""
    return table(heads, rows, "Words") + f'<p class="note">{escape(note + more)} Brackets: 95 % over the images that have the word.</p>'


def _distances(found: Mapping[str, Any], entries: Sequence[Entry]) -> str:
    known = found["counterfactuals"]
    if not known:
        return ""
    rows = [[escape(title), _cell(_estimate(value), 1)] for title, value in known.items()]
    return table(["from the same noise", "RMSE, levels of 255"], rows, "Counterfactuals") + _over(len(entries), "Distance from the image as it is")


def _unused(folder: Path, unused: Unused, skipped: Mapping[str, Any] | None, images: int) -> str:
    said_ = "".join(f"<li>{escape(line)}</li>" for line in unused.sentences())
    apart = "" if skipped is None else _cell(_estimate(skipped), 2)
    tried = apart and f"Tried on the same images: leaving them out there changes an image by {apart} levels of 255 (RMSE)."
    drawn = figure(folder / "chart.png", "Mean weight by stage and step")
    return f"{drawn}<ul>{said_}</ul><p>{tried}</p>{_over(images, 'Found on')}"


def _image(folder: Path, entry: Entry) -> str:
    shown = [(title, folder / f"{entry.stem}.{suffix}") for suffix, title in PICTURES.items()]
    prompt = entry.facts["prompt"]
    parts = [f"<h3>{escape(title)}</h3>{figure(path, f'{title}: {prompt}')}" for title, path in shown if path.is_file()]
    remarks = " ".join(entry.facts["word_remarks"])
    return f'<p class="facts">seed {escape(str(entry.facts["seed"]))}</p>{"".join(parts)}<p class="note">{escape(remarks)}</p>'


def figure(path: Path, words: str) -> str:
    """A picture inside the page, as WebP, a third of the PNG beside it. words: for those who cannot see it."""
    data = base64.b64encode(_as_webp(path)).decode()
    return f'<figure class="wide"><img src="data:image/webp;base64,{data}" alt="{escape(words, quote=True)}" loading="lazy"></figure>'


def _as_webp(path: Path) -> bytes:
    if path.suffix == ".webp":
        return path.read_bytes()
    buffer = io.BytesIO()
    Image.fromarray(read_pixels(path)).save(buffer, "WEBP", quality=88, method=4)
    return buffer.getvalue()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Cells are HTML; the first of a row names it."""
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in heads)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>' for first, *others in rows)
    return scrolling(f'<table><caption class="unseen">{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>', caption)


def _named(unused: Unused, expert: int) -> str:
    red, green, blue = COLOURS[expert % len(COLOURS)]
    return f'<span class="dot" style="background:rgb({red},{green},{blue})"></span>{escape(unused.experts[expert])}'


def _cell(found: Estimate | None, places: int = 3) -> str:
    """Value and interval; n is said once for the table."""
    if found is None:
        return "–"  # noqa: RUF001
    value, _, rest = said(found, places).partition(" ")
    return f'<span class="v">{escape(value.rstrip(","))}</span> <span class="ci">{escape(rest.split(", n =")[0] if found.n > 1 else "")}</span>'


def _estimate(data: Mapping[str, Any]) -> Estimate:
    value, n = float(data["value"]), int(data["n"])
    return Estimate(value, value if n == 1 else data["low"], value if n == 1 else data["high"], n)


def _over(images: int, what: str) -> str:
    around = "; one image has no interval" if images == 1 else "; brackets are 95 % bootstrap intervals over images"
    return f'<p class="note">{escape(what)}, n = {plural(images, "image")}{around}.</p>'
