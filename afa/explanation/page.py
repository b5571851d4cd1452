"""explain.html: one page with everything, without scripts or other files."""

import base64
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from afa.explanation.causes import Unused
from afa.explanation.explanation import ExplainedImage
from afa.explanation.shares import estimates
from afa.explanation.summary import WordMean, word_means
from afa.images import read_pixels
from afa.pages.advice import Advice, for_explanation
from afa.pages.numbers import DASH, plural, with_interval
from afa.pages.page import Advised, ThemedPicture, data_uri, render
from afa.pages.tables import Shown, Table, TableRow
from afa.pictures import COLOURS, DARK
from afa.stats import Estimate
from afa.training.measure import BANDS

BAND_NAMES = ("least noise", "less noise", "more noise", "most noise")
MOST_WORDS = 40
TELLING = ("equal", "frozen", "swapped")  # counterfactuals that say whether weights matter, the best first
PICTURES = {
    "sheet.png": "Who weighs where",
    "strip.webp": "Step by step",
    "words.png": "Words",
    "counterfactuals.png": "What would have been",
}
DOT = Markup('<span class="dot" style="background:rgb({},{},{})"></span>{}')


def as_html(
    folder: Path, entries: Sequence[ExplainedImage], unused: Unused, found: Mapping[str, Any], facts: str
) -> str:
    """Return the page of a folder whose images are explained.

    found: the content of explain.json
    facts: how the images were made, in one line
    """
    images, skipped = len(entries), found["counterfactuals"].get("left out where unused")
    around = (
        "one image has no interval" if images == 1 else "brackets are 95 % bootstrap intervals over images"
    )
    words = word_means(entries)
    return render(
        "explanation.html",
        heading=f"Why these images look as they do: {plural(images, 'image')} by {', '.join(unused.experts)}",
        advice=Advised(advice(entries, unused)),
        command="afa explain",
        facts=facts,
        docs="docs/explain.md",
        over=f"n = {plural(images, 'image')}; {around}.",
        shares=_shares(entries, unused),
        words=_words(words, unused) if words else None,
        more=f" The first {MOST_WORDS} of {len(words)} words; all are in explain.json."
        if len(words) > MOST_WORDS
        else "",
        distances=_distances(found["counterfactuals"]),
        chart=picture(folder / "chart.png"),
        unused=unused.sentences(),
        skipped=None if skipped is None else with_interval(_estimate(skipped), 2),
        images=[_image(folder, entry) for entry in entries],
    )


def advice(entries: Sequence[ExplainedImage], unused: Unused) -> Advice:
    """Return whether the weights matter, who leads where, and who is not used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a band without a pass has no mean
        shares = np.nanmean([entry.shares for entry in entries], axis=2)
    nowhere = [
        name for name, cells in zip(unused.experts, unused.counts, strict=True) if cells == unused.total
    ]
    made = [(one["kind"], place) for place, one in enumerate(entries[0].facts["counterfactuals"])]
    place = next((place for wanted in TELLING for kind, place in made if kind == wanted), None)
    changed = None
    if place is not None:
        changes = [entry.facts["counterfactuals"][place] for entry in entries]
        changed = changes[0]["title"], np.asarray([one["rmse"] for one in changes])
    return for_explanation(unused.experts, entries[0].facts["shares"]["groups"], shares, nowhere, changed)


def _shares(entries: Sequence[ExplainedImage], unused: Unused) -> Table:
    """Return a table of mean weights: a row for each group of stages and expert, a column for each band."""
    groups, found = entries[0].facts["shares"]["groups"], estimates([entry.shares for entry in entries])
    rows = []
    for row, group in enumerate(groups):
        for expert, name in enumerate(unused.experts):
            cells = [_shown(found[row, band, expert], 3) for band in range(BANDS)]
            rows.append(
                TableRow(["" if expert else group, DOT.format(*COLOURS[expert % len(COLOURS)], name), *cells])
            )
    return Table(["stages", "expert", *BAND_NAMES], rows, align="ll" + "r" * BANDS, n_apart=True)


def _words(found: Sequence[WordMean], unused: Unused) -> Table:
    """Return a table of the words' effects, with a row for each word."""
    rows = []
    for one in found[:MOST_WORDS]:
        cells = [
            _shown(one.omitted, 4),
            _shown(one.hidden, 4),
            _shown(one.looked, 3),
            *(_shown(pull, 4) for pull in one.pull),
        ]
        rows.append(TableRow([one.word, str(one.omitted.n), *cells]))
    moves = ["moves, left out of the prompt", "moves, hidden from aggregators", "looked at"]
    return Table(
        ["word", "images", *moves, *(f"pull of {name}" for name in unused.experts)], rows, n_apart=True
    )


def _distances(known: Mapping[str, Any]) -> Table | None:
    rows = [TableRow([title, _shown(_estimate(value), 1)]) for title, value in known.items()]
    return Table(["from the same noise", "RMSE, levels of 255"], rows, n_apart=True) if rows else None


def _image(folder: Path, entry: ExplainedImage) -> dict[str, Any]:
    """Return what the page shows of one image: its pictures, as far as there are any, and remarks."""
    shown = [(title, folder / f"{entry.stem}.{suffix}") for suffix, title in PICTURES.items()]
    return {
        "stem": entry.stem,
        "prompt": entry.facts["prompt"],
        "seed": entry.facts["seed"],
        "pictures": [(title, picture(path)) for title, path in shown if path.is_file()],
        "remarks": " ".join(entry.facts["word_remarks"]),
    }


def dark_twin(path: Path) -> Path:
    """Return the place of the same picture on a dark ground."""
    return path.with_suffix(f"{DARK.suffix}{path.suffix}")


def picture(path: Path) -> ThemedPicture:
    """Return a picture for the page, with its dark twin if there is one (older folders have none)."""
    dark = dark_twin(path)
    return ThemedPicture(_embedded(path), _embedded(dark) if dark.is_file() else "")


def _embedded(path: Path) -> str:
    """Return a picture as a data URI, as WebP, which is a third as large as PNG."""
    if path.suffix == ".webp":  # animated: as it is
        return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return data_uri(Image.fromarray(read_pixels(path)), "webp", quality=88, method=4)


def _shown(found: Estimate | None, digits: int) -> Shown | str:
    return DASH if found is None else Shown(found, digits=digits)


def _estimate(data: Mapping[str, Any]) -> Estimate:
    """Return an estimate of explain.json; that of a single image has no interval."""
    value, n = float(data["value"]), int(data["n"])
    return Estimate(value, value if n == 1 else data["low"], value if n == 1 else data["high"], n)
