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
from afa.demo.run import SHOWN, Outcome
from afa.pages.page import data_uri, render
from afa.pages.tables import Cell, Shown, Table, TableRow
from afa.pictures import grid
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


def sentence(outcome: Outcome) -> str:
    """What won, as far as the paired interval allows it."""
    best, n = outcome.best_single.name, len(outcome.captions)
    clauses = []
    for other, what in {best: f"the best single expert ({best})", **OTHERS}.items():
        lead = outcome.lead("AFA", other)
        verdict = {"higher than": "better than", "lower than": "worse than"}.get(lead.verdict, lead.verdict)
        clauses.append(f"{verdict} {what} ({lead.words(3, signed=True)})")
    few = f" A verdict needs at least {least_items()} scenes." if n < least_items() else ""
    return (
        f"On {n} mixed scenes AFA is {'; '.join(clauses)}. Attribute accuracy, paired by scene, 95 %"
        f" bootstrap intervals, one training seed: other seeds would spread further.{few}"
    )


def as_text(outcome: Outcome) -> str:
    """For the terminal."""
    tables = f"{table(outcome).text()}\n\n{parts(outcome).text()}"
    return f"{tables}\n\nn = {len(outcome.captions)} scenes\n{sentence(outcome)}"


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


def write_report(outcome: Outcome, weight_maps: Sequence[NDArray[np.uint8]], file: Path) -> None:
    """One HTML file that needs nothing else."""
    maps = zip(outcome.captions, map(_embedded, weight_maps), strict=False)
    page = render(
        "demo.html",
        heading="Three experts, and every way here to combine them",
        sentence=sentence(outcome),
        scenes=len(outcome.captions),
        table=table(outcome),
        parts=parts(outcome),
        best=outcome.best_single.name,
        settings=outcome.settings,
        captions=outcome.captions[:SHOWN],
        sheet=_embedded(sheet(outcome)),
        maps=list(maps),
        trainings=_trainings(Path(outcome.settings.output)),
    )
    file.write_text(page)


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


def _embedded(pixels: NDArray[np.uint8]) -> str:
    return data_uri(Image.fromarray(pixels), "png", optimize=True)
