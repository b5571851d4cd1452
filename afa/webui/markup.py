"""What the page shows of runs, weights and settings, as HTML. Whatever people wrote is escaped here, and only here."""

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.visualise.weights import COLOURS, heat, overlay
from afa.webui.job import Column, Job, Picture
from afa.webui.maps import Kept

LARGEST = 512  # pixels: maps are shown no larger
HIDDEN = ("source", "aggregators", "files", "afa", "experts", "method_options", "prompt")  # shown elsewhere, or long


def note(sentence: str, kind: str = "note") -> str:
    """A sentence in place of what is not there. kind: note or error."""
    return f'<p class="afa-{kind}">{escape(sentence)}</p>'


def status(job: Job | None, before: int = 0) -> str:
    """How a run stands, with a bar; read out by screen readers when it changes. before: how many come before it."""
    if job is None:
        return _status("Nothing has been made yet.")
    if job.state == "waiting":
        return _status(f"Waiting: {before} run{'' if before == 1 else 's'} before it." if before else "Beginning …")
    if job.state == "refused":
        return _status("Not begun: too many runs are waiting.")
    column = job.current
    if column is not None:
        made, (done, steps) = len(column.pictures), job.at
        which = f", picture {made + 1} of {job.order.images}" if job.order.images > 1 else ""
        place = f"method {job.columns.index(column) + 1} of {len(job.columns)}"
        return _status(f"{column.title}: step {done} of {steps}{which} ({place})", _share(job))
    made = sum(len(column.pictures) for column in job.columns)
    seconds = sum(column.seconds for column in job.columns)
    end = "Cancelled" if job.state == "cancelled" else "Done"
    how = f" in {seconds:.1f} s" if seconds else ", made before" if made else ""
    return _status(f"{end}: {made} picture{'' if made == 1 else 's'}{how}.")


def results(job: Job | None) -> str:
    """A card for each method, side by side where there is room."""
    return "" if job is None else f'<div class="afa-cards">{"".join(_card(job, column) for column in job.columns)}</div>'


def weights(kept: Kept, step: int, stage: str) -> str:
    """Who shaped what: the picture, the weights laid over it, each expert's own, and their shares."""
    maps = kept.look(step, stage)
    when = "mean over all steps" if step == 0 else f"step {step} of {len(kept.timesteps)}, t = {kept.timesteps[step - 1]:.0f}"
    where = f"stage {stage}" if stage else f"mean over {len(kept.maps)} stages"
    figures = [_figure(kept.image, "picture"), _figure(overlay(kept.image, maps), "weights over it")]
    figures += [_figure(heat(maps[index], _colour(index)), name) for index, name in enumerate(kept.experts)]
    shares = "".join(_bar(name, index, float(maps[index].mean())) for index, name in enumerate(kept.experts))
    return (
        f'<p class="afa-caption">{escape(when)}; {escape(where)}</p><div class="afa-shares">{shares}</div>'
        f'<div class="afa-maps">{"".join(figures)}</div>'
    )


def settings(metadata: Mapping[str, Any], name: str) -> str:
    """What a picture says of itself."""
    shown = [(key, value) for key, value in metadata.items() if key not in HIDDEN and value is not None]
    rows = "".join(f"<dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd>" for key, value in shown)
    return f'<p class="afa-prompt">{escape(str(metadata.get("prompt", "")))}</p><dl class="afa-settings"><dt>file</dt><dd>{escape(name)}</dd>{rows}</dl>'


def address(picture: Picture) -> str:
    """Where the page finds it, relative to itself."""
    return f"gradio_api/file={quote(str(picture.path))}"


def _status(sentence: str, share: float | None = None) -> str:
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}" aria-label="progress of the run"></progress>'
    return f'<div class="afa-status" role="status"><span>{escape(sentence)}</span>{bar}</div>'


def _share(job: Job) -> float:
    """How much of a run is done."""
    finished = sum(job.order.images if column.done else len(column.pictures) for column in job.columns)
    return min(1.0, (finished + job.at[0] / max(1, job.at[1])) / (len(job.columns) * job.order.images))


def _card(job: Job, column: Column) -> str:
    missing = 0 if column.error else job.order.images - len(column.pictures)
    word = "cancelled" if job.over else "drawing …" if column is job.current else "waiting"
    empty = f'<div class="afa-empty">{word}</div>' * missing
    pictures = "".join(_picture(column, picture, job.order.prompt) for picture in column.pictures)
    kept = bool(column.pictures) and all(picture.kept for picture in column.pictures)
    seconds = "made before" if kept else f"{column.seconds:.1f} s" if column.pictures else ""
    error = note(column.error, "error") if column.error else ""
    return (
        f'<section class="afa-card"><h4>{escape(column.title)}</h4><div class="afa-pictures">{pictures}{empty}</div>{error}'
        f'<p class="afa-under">{seconds}</p></section>'
    )


def _picture(column: Column, picture: Picture, prompt: str) -> str:
    where = escape(address(picture), quote=True)
    said = escape(f"{column.title}, seed {picture.seed}: {prompt}", quote=True)
    return f'<a href="{where}" target="_blank" rel="noopener" title="seed {picture.seed}"><img src="{where}" alt="{said}"></a>'


def _bar(name: str, index: int, share: float) -> str:
    red, green, blue = _colour(index)
    return (
        f'<div class="afa-share"><span class="afa-chip" style="background:rgb({red},{green},{blue})"></span><span class="afa-name">{escape(name)}</span>'
        f'<span class="afa-track"><span style="width:{100 * share:.1f}%;background:rgb({red},{green},{blue})"></span></span>'
        f'<span class="afa-value">{100 * share:.0f} %</span></div>'
    )


def _colour(index: int) -> tuple[int, int, int]:
    return COLOURS[index % len(COLOURS)]


def _figure(pixels: NDArray[np.uint8], caption: str) -> str:
    return f'<figure><img alt="{escape(caption, quote=True)}" src="{_inline(pixels)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _inline(pixels: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(pixels)
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plain(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(one, list) and len(one) == 2 for one in value):  # strength_changes
        return "; ".join(f"after step {step}: {_plain(then)}" for step, then in value)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
