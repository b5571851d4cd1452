"""Run a screening: compute the answers of one expert after another, then compare them."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from afa.devices import choose_device, free_memory
from afa.errors import UserError
from afa.experts.spec import ExpertSpec
from afa.files import json_or_none, locked, write_atomically
from afa.fingerprint import claim, fingerprint
from afa.latents import latents_of
from afa.merging.engine import merge_files
from afa.merging.plan import make_plan
from afa.merging.settings import MergeSettings
from afa.merging.sources import FileSource, open_source
from afa.prompts import read_prompts, warn_of_prompts
from afa.screening.comparison import ExpertComparison
from afa.screening.distances import Distances, distances
from afa.screening.facts import facts_of
from afa.screening.plan import Probes, ScreenPlan, encoded, find, plan
from afa.screening.predict import (
    FEATURED,
    AnswerStore,
    ExpertPredictor,
    SharedParts,
    draw_prompts,
    load_shared_parts,
)
from afa.screening.settings import ScreenSettings
from afa.training.data import check_skipped
from afa.training.measure import BANDS
from afa.training.noise import Noising

AVERAGE = "weight-average"
PROBES = "probes.json"  # a hash of the images and captions


def screen(settings: ScreenSettings, planned: ScreenPlan | None = None) -> dict[str, Any]:
    """Compare experts before any training; one expert is in memory at a time.

    settings: as the flags of `afa screen`; with an output, an interrupted screening continues
    planned:  what plan(settings) returned
    Returns everything that was found, ready for JSON. Raises UserError.
    """
    planned = planned or plan(settings)
    with _workplace(planned) as work:
        frame = load_shared_parts(
            planned.first,
            planned.donor,
            settings.vae,
            settings.config,
            getattr(torch, settings.dtype),
            choose_device(settings.device),
        )
        noising = Noising(frame.scheduler, latents_of(frame.vae), frame.device)
        probes = _probes(planned, frame, noising, work)
        sources = _sources(planned)
        apart = _distances(planned, sources)
        collector = AnswerCollector(frame, noising, probes, settings, work)
        comparison = ExpertComparison(
            tuple(spec.name for spec in planned.specs), collector.all(planned.specs)
        )
        return facts_of(planned, comparison, apart, _average(planned, collector, sources), noising.steps)


@contextmanager
def _workplace(planned: ScreenPlan) -> Iterator[Path]:
    """Yield the output folder, locked and claimed, or a temporary one if there is no output."""
    output = planned.settings.output
    if output is None:
        with tempfile.TemporaryDirectory(prefix="afa-screen-") as place:
            yield Path(place)
        return
    settings = planned.settings
    try:
        with locked(Path(output)):
            files = fingerprint(
                planned.specs,
                frame=settings.frame,
                text_encoder=settings.text_encoder,
                vae=settings.vae,
                base=settings.base,
                config=settings.config,
            )
            asked = settings.binding() | (
                {} if settings.prompts is None else {"prompt": read_prompts(Path(settings.prompts))}
            )
            claim(Path(output), asked, "the screening", files)
            yield Path(output)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command goes on with what is in {output}") from None


def _probes(planned: ScreenPlan, frame: SharedParts, noising: Noising, work: Path) -> Probes:
    """Encode the images of --data, or the images that the experts sample from --prompts.

    Raises UserError if images or captions differ from those of the interrupted screening.
    """
    settings, source = planned.settings, planned.source
    if source is None:
        drawn = draw_prompts(settings, planned.specs, frame, planned.resolution, work / "drawn")
        source = find(str(drawn), settings.images)
    found = encoded(
        source,
        frame.vae,
        noising,
        images=settings.images,
        draws=settings.draws,
        seed=settings.seed,
        resolution=planned.resolution,
    )
    check_skipped(source, settings.max_skipped)
    if source.skipped:
        print(f"afa: {source.skipped.summary()}", file=sys.stderr)
    note, now = work / PROBES, {"sha256 of images and captions": found.digest}
    if note.exists() and json_or_none(note) != now:
        raise UserError(
            f"the images or captions have changed since the screening in {work} was begun;"
            " choose another --output"
        )
    write_atomically(note, json.dumps(now))
    return found


class AnswerCollector:
    """Computes the answers of all experts, one expert after another, and keeps them in `work`."""

    def __init__(
        self, frame: SharedParts, noising: Noising, probes: Probes, settings: ScreenSettings, work: Path
    ) -> None:
        self.frame, self.noising, self.probes = frame, noising, probes
        self.settings, self.work = settings, work
        self.shape = (len(probes), BANDS, settings.draws, *probes.latents.shape[1:])

    def all(self, specs: list[ExpertSpec]) -> list[AnswerStore]:
        """Compute the missing answers of every expert; one expert is in memory at a time.

        Raises UserError if the disk cannot hold them.
        """
        stores = [AnswerStore(self.work / "answers" / spec.name, self.shape) for spec in specs]
        missing = sum(len(store.missing()) for store in stores)
        needed, free = 4 * torch.Size(self.shape[1:]).numel() * missing, shutil.disk_usage(self.work).free
        if needed > free:
            raise UserError(
                f"the answers need {needed / 1e9:.1f} GB in {self.work},"
                f" and its disk has {free / 1e9:.1f} GB left; lower --images or --draws"
            )
        total = len(self.probes) * len(specs)
        with tqdm(total=total, desc="predictions of experts", unit="image", file=sys.stderr) as bar:
            for spec, store in zip(specs, stores, strict=True):
                self.collect(spec, store, bar)
        return stores

    def collect(self, spec: ExpertSpec, store: AnswerStore, bar: Any) -> None:
        """Load one expert, compute its missing answers, and free its memory."""
        missing = store.missing()
        bar.set_postfix_str(spec.name)
        bar.update(len(self.probes) - len(missing))
        if not missing:
            return
        ensemble = self.frame.load(spec)
        warn_of_prompts(
            self.probes.captions, ensemble.denoiser.interface, ensemble.frame.tokenizers, "caption"
        )
        predictor = ExpertPredictor(
            ensemble, self.frame.conditions(ensemble), self.noising, self.probes, self.settings.batch_size
        )
        for image in missing:
            store.add(image, predictor.predict(image, features=image < FEATURED))
            bar.update()
        del ensemble, predictor
        free_memory()


def _average(
    planned: ScreenPlan, collector: AnswerCollector, sources: list[FileSource] | str
) -> AnswerStore | str:
    """Return the answers of the experts' weight average, or the reason why there are none."""
    reason = planned.no_average_reason()
    if reason is not None:
        return reason
    if isinstance(sources, str):
        return f"cannot be made: {sources}"
    place = collector.work / f"{AVERAGE}-model"
    spec = ExpertSpec(AVERAGE, str(place))
    store = AnswerStore(collector.work / AVERAGE, collector.shape)
    try:
        if store.missing():
            shutil.rmtree(place, ignore_errors=True)  # of a run that was killed here
            read = {"config": planned.settings.config, "prediction_type": planned.settings.prediction_type}
            merge = MergeSettings(experts=[str(spec) for spec in planned.specs], output=str(place), **read)
            merge_files(merge, make_plan(merge, dict(zip(planned.specs, sources, strict=True))))
        with tqdm(
            total=len(collector.probes), desc="predictions of their average", unit="image", file=sys.stderr
        ) as bar:
            collector.collect(spec, store, bar)
    except UserError as error:
        return f"cannot be made: {error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return store


def _sources(planned: ScreenPlan) -> list[FileSource] | str:
    """Find the experts' tensors, or return the reason why they cannot be read key by key (pickles)."""
    try:
        return [
            open_source(spec, planned.settings.config, description)
            for spec, description in zip(planned.specs, planned.descriptions, strict=True)
        ]
    except UserError as error:
        return str(error)


def _distances(planned: ScreenPlan, sources: list[FileSource] | str) -> Distances | str:
    """Return the distances between weights, or the reason why they cannot be compared."""
    if isinstance(sources, str):
        return sources
    settings, base = planned.settings, planned.settings.base
    try:
        if base is None:
            return distances(sources)
        return distances(
            sources, open_source(ExpertSpec.parse(base, settings.prediction_type), settings.config)
        )
    except UserError as error:
        return str(error)
