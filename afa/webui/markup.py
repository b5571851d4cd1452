"""The HTML of the page: runs, weights, settings, reports, about. The macros are in templates/webui.html."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import escape
from PIL import Image

from afa.checkpoint.manifest import read_manifest
from afa.errors import UserError
from afa.files import given_name
from afa.generation.sources import is_saved
from afa.pages.numbers import plural
from afa.pages.page import data_uri, part
from afa.pictures import colour_of, heat, overlay
from afa.places import as_typed
from afa.sampling.regions import Region, pixels_of
from afa.text_files import read_text
from afa.version import __version__
from afa.webui.engine import Engine
from afa.webui.gallery import RecordedWeights
from afa.webui.queue import DrawingJob, GalleryPicture

LARGEST = 512  # pixels: maps are shown no larger
# Settings that are shown elsewhere, or are long.
HIDDEN = ("source", "aggregators", "files", "afa", "experts", "method_options", "prompt")
PROMPT = "a red star left of a blue ring on a dotted mint background"  # of the examples


def head(title: str, experts: Sequence[str]) -> str:
    """What stands above the page."""
    return part("webui.html", "head", title=title, experts=experts)


def note(sentence: str, kind: str = "note") -> str:
    """Return a remark. kind: note or error."""
    return part("webui.html", "note", sentence=sentence, kind=kind)


def warning(sentence: str) -> str:
    """Escape a sentence for gr.Warning, which shows HTML."""
    return str(escape(f"{sentence[:1].upper()}{sentence[1:]}."))


def status(job: DrawingJob | None, before: int = 0) -> str:
    """Return the state of a run with a progress bar; screen readers read it when it changes.

    before: number of runs before it in the queue
    """
    share = None
    if job is None:
        sentence = "Nothing has been made yet."
    elif job.state == "waiting":
        sentence = f"Waiting: {plural(before, 'run')} ahead of it." if before else "Starting …"
    elif job.state == "refused":
        sentence = "Refused: too many runs are waiting."
    elif job.current is not None:
        made, (done, steps) = len(job.current.pictures), job.at
        which = f", picture {made + 1} of {job.request.images}" if job.request.images > 1 else ""
        place = f"method {job.columns.index(job.current) + 1} of {len(job.columns)}"
        left = job.seconds_left
        eta = "" if left is None else f", about {_time(left)} left"
        sentence = f"{job.current.title}: step {done} of {steps}{which} ({place}){eta}"
        finished = sum(job.request.images if column.done else len(column.pictures) for column in job.columns)
        share = min(1.0, (finished + done / max(1, steps)) / (len(job.columns) * job.request.images))
    else:
        made = sum(len(column.pictures) for column in job.columns)
        seconds = sum(column.seconds for column in job.columns)
        how = f" in {seconds:.1f} s" if seconds else ", already there" if made else ""
        sentence = f"{'Cancelled' if job.state == 'cancelled' else 'Done'}: {plural(made, 'picture')}{how}."
    return part("webui.html", "status", sentence=sentence, share=share)


def results(job: DrawingJob | None) -> str:
    """Return a card for each method, with placeholders for missing pictures."""
    if job is None:
        return ""
    cards = []
    for column in job.columns:
        kept = bool(column.pictures) and all(picture.kept for picture in column.pictures)
        cards.append({
            "column": column,
            "pictures": [(picture, address(picture)) for picture in column.pictures],
            "preview": _preview(job) if column is job.current else "",
            "missing": 0 if column.error else job.request.images - len(column.pictures),
            "empty": "cancelled" if job.over else "drawing …" if column is job.current else "waiting",
            "seconds": "already there" if kept else f"{column.seconds:.1f} s" if column.pictures else "",
        })  # fmt: skip
    return part("webui.html", "cards", cards=cards, prompt=job.request.prompt)


def _time(seconds: float) -> str:
    """Write a time to wait: 8 s, 3 min."""
    return f"{max(1, round(seconds))} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _preview(job: DrawingJob) -> str:
    return "" if job.preview is None else data_uri(Image.fromarray(job.preview))


def canvas() -> str:
    """Return the canvas on which regions are painted."""
    return part("webui.html", "canvas")


def regions(found: Sequence[Region]) -> str:
    """Return the list of regions, each with its mask and a sentence."""
    rows = []
    for region in found:
        inside = None if region.mask is None else pixels_of(region.mask)
        uri = "" if inside is None else data_uri(Image.fromarray(inside.astype("uint8") * 255))
        where = "everywhere" if inside is None else f"in {inside.mean():.0%} of the picture"
        when = "all steps" if (region.start, region.end) == (0, 1) else "steps"
        share = "" if when == "all steps" else f" {region.start:.0%} to {region.end:.0%}"
        rows.append((uri, f"{region.expert} × {region.strength:g} {where}, {when}{share}"))
    return part("webui.html", "regions", rows=rows)


def address(picture: GalleryPicture) -> str:
    """Return the address of a picture, relative to the page."""
    return f"gradio_api/file={quote(str(picture.path))}"


def weights(kept: RecordedWeights, step: int, stage: str) -> str:
    """Return the weights at one step and stage; see RecordedWeights.look."""
    maps, count = kept.look(step, stage), len(kept.timesteps)
    when = f"step {step} of {count}, t = {kept.timesteps[step - 1]:.0f}" if step else "mean over all steps"
    where = f"stage {stage}" if stage else f"mean over {len(kept.maps)} stages"
    figures, shares = [("picture", kept.image), ("weights over it", overlay(kept.image, maps))], []
    for index, name in enumerate(kept.experts):
        colour = colour_of(index)
        figures.append((name, heat(maps[index], colour)))
        shares.append((name, colour, 100 * float(maps[index].mean())))
    shown = []
    for name, pixels in figures:
        picture = Image.fromarray(pixels)
        picture.thumbnail((LARGEST, LARGEST))
        shown.append((name, data_uri(picture)))
    return part("webui.html", "weights", caption=f"{when}; {where}", shares=shares, figures=shown)


def settings(metadata: Mapping[str, Any], name: str) -> str:
    """Return the metadata of a picture. name: of its file."""
    shown = [
        (str(key).replace("_", " "), _plain(value))
        for key, value in metadata.items()
        if key not in HIDDEN and value is not None
    ]
    return part(
        "webui.html", "settings", prompt=str(metadata.get("prompt", "")), pairs=[("file", name), *shown]
    )


def _plain(value: Any) -> str:
    """Format the value of a setting for reading."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):  # regions
        return "; ".join(
            _plain({name: "painted" if name == "mask" and part else part for name, part in one.items()})
            for one in value
        )
    pairs = isinstance(value, list) and all(isinstance(one, list) and len(one) == 2 for one in value)
    if pairs and value:  # strength_changes
        return "; ".join(f"after step {step}: {_plain(then)}" for step, then in value)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def about(engine: Engine, url: str) -> str:
    """Return the About tab: version, experts and hashes, methods, the API. url: of the page."""
    denoiser = engine.ensemble.denoiser
    fused = f"{len(engine.ensemble.aggregators)} of {len(denoiser.stages)} stages fused"
    loaded = {
        "afa": __version__,
        "source": ", ".join(engine.sources),
        "family": f"{denoiser.family}, {len(denoiser.stages)} stages",
        "aggregators": f"{fused}, sha256 {engine.aggregators}"
        if engine.aggregators
        else "none that are trained: experts are combined while sampling",
        "dtype": engine.dtype,
        "gallery": str(engine.gallery.folder),
    }
    sections = [
        ("Loaded", list(loaded.items())),
        ("Experts", _experts(engine)),
        ("Methods", [(method.title, method.about) for method in engine.methods.values()]),
        ("Not with these experts", list(engine.refused.items())),
    ]
    methods = "[" + ", ".join(f'"{name}"' for name in list(engine.methods)[:2]) + "]"
    return part("webui.html", "about", sections=sections, url=url, prompt=PROMPT, methods=methods)


def _experts(engine: Engine) -> list[tuple[str, str]]:
    """Return the name of each expert, and its source with the recorded hash of its denoiser."""
    recorded: dict[str, Any] = {}
    if is_saved(engine.sources[0]):
        recorded = {expert.name: expert for expert in read_manifest(Path(engine.sources[0])).experts}
    rows = []
    for expert in engine.ensemble.experts:
        known = recorded.get(expert.name)
        source = known.source if known else expert.located.spec.source if expert.located else "in memory"
        files = (known.files if known else None) or {}
        denoiser = [digest for name, digest in files.items() if "unet" in name or "transformer" in name]
        digest = next(iter([*denoiser, *files.values()]), "not recorded")
        rows.append((expert.name, f"{as_typed(source)}, sha256 of its denoiser {digest}"))
    return rows


PAGE = "report.html"  # what afa demo and afa screen leave
RESULTS = "results.json"  # what afa evaluate leaves


@dataclass(frozen=True)
class Report:
    """One report.

    name: on its tab
    html: the whole page
    """

    name: str
    html: str

    @property
    def frame(self) -> str:
        """The report in a sandboxed frame without scripts and without access to other addresses."""
        return part("webui.html", "frame", name=self.name, page=self.html)


def read_reports(places: Sequence[str]) -> list[Report]:
    """Read the reports that are named at the start. Raises UserError for a place without a report."""
    reports = [_read_report(Path(place)) for place in places]
    names = [report.name for report in reports]
    return [
        report if names.count(report.name) == 1 else Report(f"{report.name} {index}", report.html)
        for index, report in enumerate(reports, start=1)
    ]


def _read_report(place: Path) -> Report:
    if place.is_file() and place.suffix.lower() in (".html", ".htm"):
        return Report(place.stem if place.name != PAGE else place.resolve().parent.name, read_text(place))
    if (place / PAGE).is_file():
        return Report(given_name(place), read_text(place / PAGE))
    if (place / RESULTS).is_file():
        return Report(given_name(place), _evaluation(place))
    raise UserError(
        f"--reports {place} holds no report: it is neither an .html file nor a folder"
        f" with {PAGE} (afa screen, afa demo) or {RESULTS} (afa evaluate)"
    )


def _evaluation(folder: Path) -> str:
    """Return the page that `afa report` makes of an evaluation."""
    from afa.evaluation.compare import analyse
    from afa.evaluation.report.page import as_html
    from afa.evaluation.results import Results

    results = Results.load(folder)
    return as_html(analyse([results], [folder]), [str(results.protocol.get("name", folder.name))])
