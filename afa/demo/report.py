"""The demonstration's result.

Tables and a sentence for the terminal, a page for the browser, every number as JSON.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.checkpoint.manifest import read_manifest
from afa.demo.data import EXPERTS
from afa.demo.run import SHOWN, Outcome
from afa.evaluation.columns import Comparison
from afa.pages.advice import WORDS, Advice, for_demonstration
from afa.pages.page import Advised, ThemedPicture, data_uri, render
from afa.pages.tables import Cell, Shown, Table, TableRow
from afa.pictures import grid
from afa.seeds import nth_seed
from afa.significance import difference_tests, holm
from afa.stats import Estimate, estimate, least_items

PARTS = {
    "shapes": "shapes",
    "colours": "colours",
    "texture": "texture",
    "ground": "ground",
    "all": "all six right",
}
OTHERS = {
    "weight average": "the weight average",
    "untrained mean": "the untrained mean",
    "prediction router": "the prediction router",
}
# Trained methods, and their folders.
TRAINED = {"AFA": "ensemble", "prediction router": "compared/trained/prediction_router/seed-0"}


def table(outcome: Outcome) -> Table:
    """Attribute accuracy, the paired lead over the best expert, seconds an image, whose n counts batches."""
    best = outcome.best_single.name
    leads = [
        None if row.name == best else Shown(outcome.lead(row.name, best), True, digits=3)
        for row in outcome.rows
    ]
    rows = [
        TableRow(
            [row.name, _shown(row.value("attributes")), lead, _shown(estimate(row.seconds))],
            strong=row.name == "AFA",
        )
        for row, lead in zip(outcome.rows, leads, strict=True)
    ]
    return Table(["method", "attributes", f"minus {best}", "s/image, n batches"], rows)


def parts(outcome: Outcome) -> Table:
    """What attribute accuracy is made of, and pictures without a mistake."""
    rows = [
        TableRow([row.name, *(_shown(row.value(score)) for score in PARTS)], strong=row.name == "AFA")
        for row in outcome.rows
    ]
    return Table(["method", *PARTS.values()], rows)


def _shown(found: Estimate, digits: int = 3) -> Cell:
    return Shown(found, digits=digits)


def comparisons(outcome: Outcome) -> dict[str, Comparison]:
    """AFA against the best expert and every other way to combine them, in words; corrected together."""
    best, n = outcome.best_single.name, len(outcome.captions)
    others = {f"the best single expert ({best})": best, **{what: name for name, what in OTHERS.items()}}
    scores = {row.name: row.scores["attributes"] for row in outcome.rows}
    tests = difference_tests([(scores["AFA"] - scores[name])[None] for name in others.values()])
    return {
        what: Comparison(
            "AFA", name, outcome.lead("AFA", name), True, p, None, corrected, n, least_items(len(others))
        )
        for (what, name), p, corrected in zip(others.items(), tests, holm(tests), strict=True)
    }


def sentence(outcome: Outcome) -> str:
    """What won, as far as the paired interval and the corrected test allow it."""
    found, n = comparisons(outcome), len(outcome.captions)
    clauses = [
        f"{WORDS[one.verdict]} {what} ({one.difference.words(3, signed=True)})" for what, one in found.items()
    ]
    least = least_items(len(found))
    few = f" A verdict needs at least {least} scenes." if n < least else ""
    return (
        f"On {n} mixed scenes AFA is {'; '.join(clauses)}. Attribute accuracy, paired by scene, 95 %"
        f" bootstrap intervals, {len(found)} comparisons corrected after Holm, one training seed: other seeds"
        f" would spread further.{few}"
    )


def advice(outcome: Outcome) -> Advice:
    """What the reader has just seen."""
    value = next(row for row in outcome.rows if row.name == "AFA").value("attributes")
    found = [(what, one.verdict) for what, one in comparisons(outcome).items()]
    return for_demonstration(value, len(EXPERTS), len(outcome.rows), found)


def as_text(outcome: Outcome) -> str:
    """For the terminal."""
    tables = f"{table(outcome).text()}\n\n{parts(outcome).text()}"
    return f"{tables}\n\nn = {len(outcome.captions)} scenes\n{advice(outcome)}\n{sentence(outcome)}"


def as_json(outcome: Outcome) -> str:
    """Every number of the tables with n and interval."""
    best = outcome.best_single.name
    rows: list[dict[str, Any]] = []
    for row in outcome.rows:
        scores = {score: vars(row.value(score)) for score in ("attributes", *PARTS)}
        lead = vars(outcome.lead(row.name, best))
        rows.append(
            {
                "method": row.name,
                **scores,
                "lead_over_best_expert": lead,
                "seconds": vars(estimate(row.seconds)),
            }
        )
    return json.dumps({"best_expert": best, "rows": rows, "sentence": sentence(outcome)}, indent=2)


def sheet(outcome: Outcome, count: int = SHOWN) -> NDArray[np.uint8]:
    """The first scenes, a row each, a column per method: same noise along a row.

    Not chosen: the first of the list.
    """
    rows = list(zip(*(row.images(count) for row in outcome.rows), strict=True))
    return np.asarray(grid(rows, columns=[row.name for row in outcome.rows], side=128))


def write_report(outcome: Outcome, weight_maps: Sequence[Sequence[Image.Image]], file: Path) -> None:
    """One HTML file that needs nothing else. weight_maps: as weight_pictures() makes them."""
    maps = [ThemedPicture(_embedded(light), _embedded(dark)) for light, dark in weight_maps]
    settings = outcome.settings
    page = render(
        "demo.html",
        heading="Three experts, and every way here to combine them",
        advice=Advised(advice(outcome), [(sentence(outcome), ())]),
        command="afa demo",
        facts=f"{len(outcome.captions)} scenes, {len(outcome.rows)} methods, {settings.steps} steps,"
        f" guidance {settings.guidance:g}, seed {settings.seed}",
        docs="README.md",
        scenes=len(outcome.captions),
        accuracy=table(outcome),
        parts=parts(outcome),
        best=outcome.best_single.name,
        settings=settings,
        sheet=_images(outcome),
        maps=list(zip(outcome.captions, maps, strict=False)),
        trainings=_trainings(Path(settings.output)),
    )
    file.write_text(page)


def _images(outcome: Outcome) -> dict[str, Any]:
    """The first scenes for the macro `image_sheet`: a row each, a column per method."""
    methods = [{"title": row.name, "group": ""} for row in outcome.rows]
    rows = []
    for place, images in enumerate(zip(*(row.images(SHOWN) for row in outcome.rows), strict=True)):
        caption, seed = outcome.captions[place], nth_seed(outcome.settings.seed, place)
        pictures = [
            {"uri": _embedded(Image.fromarray(image)), "words": f"{row.name}: {caption}"}
            for row, image in zip(outcome.rows, images, strict=True)
        ]
        rows.append(({"caption": caption, "seed": seed}, pictures))
    return {"methods": methods, "rows": rows}


def _trainings(output: Path) -> list[tuple[str, dict[str, Any], Table]]:
    """Name, what training recorded, and the loss it measured on the held-out images."""
    found = []
    for name, folder in TRAINED.items():
        record = read_manifest(output / folder).training
        if record:
            losses = record["held_out_loss"].items()
            rows = [
                TableRow([name if kind == "trained" else kind, _shown(Estimate(**loss), 5)])
                for kind, loss in losses
            ]
            found.append((name, record, Table(["weights", "held-out loss"], rows)))
    return found


def _embedded(picture: Image.Image) -> str:
    return data_uri(picture, "webp", lossless=True, method=4)
