"""The demonstration's result: a table for the terminal, a page for the browser, and an honest sentence for both."""

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.checkpoint.manifest import read_manifest
from afa.demo.run import SHOWN, Outcome
from afa.stats import Estimate, estimate, least_items
from afa.version import __version__
from afa.visualise.grid import grid

PARTS = {"shapes": "shapes", "colours": "colours", "texture": "texture", "ground": "ground", "all": "all six right"}


def table(outcome: Outcome) -> list[list[str]]:
    """Header and rows: attribute accuracy, the paired lead over the best expert, seconds an image (n: batches)."""
    best = outcome.best_single.name
    lines = [["method", "attributes [95 %]", f"minus {best} [95 %]", "s/image [95 %], n batches"]]
    for row in outcome.rows:
        lead = "" if row.name == best else _signed(outcome.lead(row.name, best))
        seconds = estimate(row.seconds)
        lines.append([row.name, str(row.value("attributes")), lead, f"{seconds}, {seconds.n}"])
    return lines


def parts(outcome: Outcome) -> list[list[str]]:
    """Header and rows: what attribute accuracy is made of, and pictures without a mistake."""
    rows = [[row.name, *(str(row.value(score)) for score in PARTS)] for row in outcome.rows]
    return [["method [95 %]", *PARTS.values()], *rows]


def sentence(outcome: Outcome) -> str:
    """What won, said only where the paired interval allows it."""
    best = outcome.best_single.name
    n = len(outcome.captions)
    parts = []
    for other, what in ((best, f"the best single expert ({best})"), ("weight average", "the weight average"),
                        ("untrained mean", "the untrained mean"), ("prediction router", "the prediction router")):  # fmt: skip
        lead = outcome.lead("AFA", other)
        verdict = {"higher than": "better than", "lower than": "worse than"}.get(lead.verdict, lead.verdict)
        parts.append(f"{verdict} {what} ({_signed(lead)})")
    return (
        f"On {n} mixed scenes AFA is {'; '.join(parts)}. Attribute accuracy, paired by scene, 95 % bootstrap intervals,"
        f" one training seed: other seeds would spread further.{_few(n)}"
    )


def _few(n: int) -> str:
    return f" A verdict needs at least {least_items()} scenes." if n < least_items() else ""


def as_text(outcome: Outcome) -> str:
    """The tables in aligned columns, and the sentence."""
    return "\n".join([_aligned(table(outcome)), "", _aligned(parts(outcome)), "", f"n = {len(outcome.captions)} scenes", sentence(outcome)])


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_json(outcome: Outcome) -> str:
    """Every number of the table with n and interval."""
    best = outcome.best_single.name
    rows: list[dict[str, Any]] = []
    for row in outcome.rows:
        scores = {score: vars(row.value(score)) for score in ("attributes", *PARTS)}
        rows.append({"method": row.name, **scores, "lead_over_best_expert": vars(outcome.lead(row.name, best)), "seconds": vars(estimate(row.seconds))})
    return json.dumps({"best_expert": best, "rows": rows, "sentence": sentence(outcome)}, indent=2)


def sheet(outcome: Outcome, count: int = SHOWN) -> NDArray[np.uint8]:
    """The first scenes, a row each, a column per method: same noise along a row. Not chosen: the first of the list."""
    rows = [[row.images[index] for row in outcome.rows] for index in range(min(count, len(outcome.captions)))]
    return np.asarray(grid(rows, columns=[row.name for row in outcome.rows], side=128))


def write_report(outcome: Outcome, weight_maps: list[NDArray[np.uint8]], file: Path) -> None:
    """One HTML file that needs nothing else."""
    best = outcome.best_single.name
    records = {name: read_manifest(Path(outcome.settings.output) / folder).training for name, folder in (("AFA", "ensemble"), ("prediction router", "router"))}
    captions = "".join(f"<li>{escape(caption)}</li>" for caption in outcome.captions[:SHOWN])
    maps = "".join(f"<figure>{_image(picture)}<figcaption>{escape(caption)}</figcaption></figure>" for picture, caption in zip(weight_maps, outcome.captions, strict=False))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Adaptive Feature Aggregation: demonstration</title><style>{STYLE}</style></head><body>
<h1>Three experts, and every way here to combine them</h1>
<p class="lead">{escape(sentence(outcome))}</p>
<h2>Attribute accuracy on {len(outcome.captions)} mixed scenes</h2>
{_html_table(table(outcome))}
<h3>What it is made of</h3>
{_html_table(parts(outcome))}
<p class="note">n = {len(outcome.captions)} scenes for every score; brackets are 95 % bootstrap intervals over scenes, differences are paired by scene.
A picture has six attributes: two shapes, two colours (each in the place the caption says), the texture and the ground. “All six” is the share of pictures
without a mistake. The scorer is a classifier fixed before any method was compared. The best single expert ({escape(best)}) was chosen on these same scenes,
which favours it. Every method starts from the same noise, {outcome.settings.steps} steps, guidance {outcome.settings.guidance:g}.
Seconds an image are means over batches of up to 32, on the machine that made this page.</p>
<h2>The first {min(SHOWN, len(outcome.captions))} scenes</h2>
<ol>{captions}</ol>
<figure>{_image(sheet(outcome))}<figcaption>A row per scene, the same noise along a row.</figcaption></figure>
<h2>Who draws what: AFA's weights over the steps</h2>
<p>Per expert and step, the mean over all fused stages; white is 0, full colour is 1. The number is the mean over image and steps.
On the right the image, and its mean weights laid over it.</p>
{maps}
<h2>Training</h2>
{"".join(_training(name, record) for name, record in records.items() if record)}
<p class="note">afa {escape(__version__)}, seed {outcome.settings.seed}. Made by: <code>afa demo</code></p>
</body></html>
"""
    file.write_text(page)


def _html_table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(_html_row(row, row[0] == "AFA") for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_row(cells: list[str], ours: bool) -> str:
    columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr{' class=ours' if ours else ''}>{columns}</tr>\n"


def _training(name: str, record: dict[str, Any]) -> str:
    """What training measured on the held-out images."""
    losses = record["held_out_loss"]
    rows = "".join(
        f"<tr><td>{escape(name if which == 'trained' else which)}</td><td>{Estimate(**value).words(5)}</td></tr>"
        for which, value in losses.items()
    )
    return (
        f"<h3>{escape(name)}</h3><p>{record['steps']} steps on {record['training_images']} mixed scenes in {record['seconds']:.0f} s;"
        f" the average of step {record['best_step']} was kept. Held-out loss, n = {losses['trained']['n']}:</p><table><tbody>{rows}</tbody></table>"
    )


def _signed(value: Estimate) -> str:
    return value.words(3, signed=True)


def _image(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


STYLE = """
:root { color-scheme: light; } body { font: 16px/1.55 system-ui, sans-serif; color: #202124; max-width: 1180px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.4rem; font-size: 1.25rem; } .lead { font-size: 1.05rem; background: #f3f6fb; padding: .9rem 1.1rem; border-radius: 8px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th, td { text-align: left; padding: .32rem .9rem .32rem 0; border-bottom: 1px solid #e4e6ea; white-space: nowrap; }
tr.ours td { font-weight: 600; } .scroll { overflow-x: auto; } .note { color: #5f6368; font-size: .9rem; } img { max-width: 100%; } figure { margin: 1rem 0; }
figcaption { color: #5f6368; font-size: .9rem; } ol { padding-left: 1.3rem; }
"""
