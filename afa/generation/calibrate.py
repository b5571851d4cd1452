"""A calibration of speed: which cheaper ways to draw have the score of the exact ensemble, within a margin.

Three knobs are turned one after the other, each until the score falls: fewer steps; features or experts that
are reused between steps; guidance in a part of the steps. The order of all ways is fixed, and scores decide,
not times, so a calibration chooses the same on every device, and resumes. Intervals are corrected for the
number of ways, of which the luckiest would be taken otherwise.
"""

import json
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from afa.checkpoint.manifest import AGGREGATORS, read_manifest
from afa.cost import Prices
from afa.defaults import OUTER_STAGES
from afa.denoiser.reuse import Reuse
from afa.devices import choose_device
from afa.ensemble import Ensemble
from afa.errors import UserError, unknown
from afa.files import json_or_none, locked, refuse_busy, settled, sha256, write_atomically
from afa.fingerprint import digest, saved_fingerprint
from afa.generation.calibrate_settings import CalibrateSettings
from afa.generation.speed import ASKED, SPEED, Speed, Tried, Way
from afa.metrics.base import ImageMetric
from afa.metrics.judging import image_metric, prompt_scores
from afa.metrics.user import try_scorer
from afa.places import on_hub, spelled
from afa.prompts import asked_prompts, prompt_numbers, warn_of_prompts
from afa.sampling.sample import Request, Sampling, image_size, sample, strength
from afa.schedulers import reschedule
from afa.schema import build
from afa.seeds import nth_seed
from afa.settings import Interval
from afa.stats import LEVEL, difference, least_items

PART = ".calibration"  # a file in the ensemble's folder while a calibration is not complete
MARGINS = {"exact": 0.0, "balanced": 1.0, "fast": 3.0}  # level -> times the margin
OF_DEVIATION = 0.1  # the default margin: this share of a standard deviation of scores
FEWER = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)  # of the steps
EVERY = (2, 3, 4, 6, 8)  # steps between whole ones
# Shares of the steps with guidance. It may be left out at the end: at the beginning it is needed.
GUIDED = ("0,0.8", "0,0.7", "0,0.6", "0,0.5")
# What speed.json says of the settings: no places, which are of this machine.
RECORDED = ("metric", "images", "steps", "seed", "dtype", *ASKED)


def calibrate(settings: CalibrateSettings) -> Speed:
    """Find the levels of speed of an ensemble, and write them to speed.json in its folder.

    Resumes after every way that was drawn. Raises UserError for what cannot be calibrated, before anything is
    drawn.
    """
    how = (settings.metric, settings.metric_weights, settings.scorer, settings.device, settings.batch_size)
    metric = image_metric(*how)  # missing weights fail here
    folder = settled(Path(settings.ensemble))
    if spelled(folder) is not None:
        raise UserError(
            f"{spelled(folder)} is part of afa and stays as it is; calibrate an ensemble of your own, "
            "made by afa train or saved by Ensemble.save"
        )
    if on_hub(settings.ensemble) is not None:
        raise UserError(
            f"the levels are written to the ensemble's folder, and {settings.ensemble} is on the hub; get a "
            f"folder of your own first: hf download {settings.ensemble} --local-dir FOLDER"
        )
    read_manifest(folder)
    refuse_busy(folder)
    with locked(folder):
        bench = Bench(settings, folder, metric)
        bar = tqdm(
            total=(1 + bench.most_ways) * settings.images, desc="images", unit="image", file=sys.stderr
        )
        with bar:
            bench.bar = bar
            speed = bench.calibrated()
        write_atomically(folder / SPEED, speed.to_json())
        (folder / PART).unlink(missing_ok=True)
    return speed


def possible_ways(settings: CalibrateSettings) -> list[tuple[str, float]]:
    """Return the ways that each knob alone can give, with prices relative to one expert in as many steps."""
    knobs = Knobs(settings, _loaded(settings, settled(Path(settings.ensemble))))
    exact: Way = {"steps": settings.steps}
    ladders = [[exact], knobs.fewer(exact), *knobs.reusing(exact), knobs.guided_in_part(exact)]
    return [(words(way), knobs.price(way) / settings.steps) for ladder in ladders for way in ladder]


def words(way: Way) -> str:
    """Return a way as options of afa generate."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in way.items())


def table(speed: Speed, settings: CalibrateSettings) -> str:
    """Return the levels in words: price and time of each, relative to the exact ensemble, and its score."""
    exact = cast(Tried, speed.of(speed.levels["exact"]))
    count = len(exact["scores"])
    allowed = ", ".join(f"{level} {margin:.3f}" for level, margin in speed.margins.items() if margin)
    drawn = f"{len(speed.tried)} ways drawn; scores are of the {count} prompts that chose among them"
    lines = [f"{drawn}; margins: {allowed}"]
    for level, way in speed.levels.items():
        found = cast(Tried, speed.of(way))
        fewer, faster = exact["price"] / found["price"], exact["seconds"] / found["seconds"]
        value, low, high = found["difference"]
        lead = "" if level == "exact" else f", {value:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(
            f"{level:9}{fewer:6.2f} times fewer operations, {faster:.2f} times as fast, "
            f"score {found['score']:.3f}{lead}: {words(way)}"
        )
    return "\n".join([*lines, f"use it: afa generate {settings.ensemble} --speed balanced …"])


def _loaded(settings: CalibrateSettings, folder: Path) -> Ensemble:
    ensemble = Ensemble.load(folder, settings.experts or [], dtype=getattr(torch, settings.dtype))
    if len(ensemble.names) == 1:
        raise UserError(f"{folder} has one expert; levels of speed are for several")
    if settings.scheduler is not None:
        reschedule(ensemble, settings.scheduler)
    return ensemble


class Knobs:
    """What can be turned to make a way cheaper, and what a way costs."""

    def __init__(self, settings: CalibrateSettings, ensemble: Ensemble) -> None:
        pipeline, sampling = ensemble.pipeline(), sampling_of(settings, {"steps": settings.steps})
        denoiser = ensemble.denoiser
        self.prices = Prices(denoiser, max(image_size(pipeline, sampling)) // pipeline.vae_scale_factor)
        self.has_skips = any(stage.takes_skip for stage in denoiser.stages)
        trained = (ensemble.training or {}).get("best_expert", "")
        self.lead = settings.lead or (trained if trained in ensemble.names else ensemble.names[0])
        if self.lead not in ensemble.names:
            raise UserError(unknown(self.lead, ensemble.names, "expert"))
        two_in_one = not denoiser.interface.why_no_batched_guidance(denoiser.config)
        self.guided = two_in_one and (strength(pipeline, sampling) or 0) > 1

    def price(self, way: Way) -> float:
        """Return the price of an image, relative to one step of one expert."""
        return self.prices.of(way["steps"], reuse_of(way), interval_of(way) or (0.0, 1.0))

    def cheaper(self, way: Way, others: Sequence[Way]) -> list[Way]:
        """Return those of a list that are each cheaper than a way and all before them.

        Every eighth of ten steps are as many whole ones as every sixth, so only the latter is kept.
        """
        found, least = list[Way](), self.price(way)
        for other in others:
            if self.price(other) < least:
                found.append(other)
                least = self.price(other)
        return found

    def fewer(self, way: Way) -> list[Way]:
        """Return ways with fewer and fewer steps."""
        steps = way["steps"]
        found = dict.fromkeys(round(steps * share) for share in FEWER)
        return self.cheaper(way, [{**way, "steps": fewer} for fewer in found if fewer >= 2])

    def reusing(self, way: Way) -> list[list[Way]]:
        """Return ways that reuse more and more: features of inner stages, or all but the leading expert."""
        every = [count for count in EVERY if count < way["steps"]]
        inner: list[Way] = [{**way, "reuse": count} for count in every]
        lead: list[Way] = [{**way, "reuse": count, "lead": self.lead} for count in every]
        ladders = [inner, lead] if self.has_skips else [lead]
        return [self.cheaper(way, ladder) for ladder in ladders]

    def guided_in_part(self, way: Way) -> list[Way]:
        """Return ways with guidance in fewer and fewer steps."""
        parts: list[Way] = [{**way, "guidance_interval": part} for part in GUIDED]
        return self.cheaper(way, parts) if self.guided else []


def reuse_of(way: Way) -> Reuse | None:
    """Return what a way reuses between steps."""
    every = way.get("reuse", 1)
    return Reuse(every, way.get("reuse_outer", OUTER_STAGES), way.get("lead")) if every > 1 else None


def interval_of(way: Way) -> Interval | None:
    """Return where a way applies guidance; None: in all steps."""
    if "guidance_interval" not in way:
        return None
    start, end = map(float, way["guidance_interval"].split(","))
    return start, end


def sampling_of(settings: CalibrateSettings, way: Way) -> Sampling:
    """Return how a way samples."""
    sides = {"height": settings.height, "width": settings.width}
    return Sampling(way["steps"], settings.guidance, guidance_interval=interval_of(way), **sides)


class Bench:
    """Draws the same prompts from the same noise in any way, scores them, and keeps what was found."""

    bar: "tqdm[None]"

    def __init__(self, settings: CalibrateSettings, folder: Path, metric: ImageMetric) -> None:
        self.settings, self.metric, self.part = settings, metric, folder / PART
        prompts = asked_prompts(settings.prompt, settings.prompts)
        chosen = [prompts[index % len(prompts)] for index in range(settings.images)]
        independent = len(set(prompt_numbers(chosen)))
        if independent < least_items():
            raise UserError(
                f"{independent} prompts are too few to choose a way by; give at least {least_items()}, "
                f"and --images {least_items()} or more"
            )
        self.requests = [Request(prompt, nth_seed(settings.seed, k)) for k, prompt in enumerate(chosen)]
        self.captions = chosen
        ensemble = _loaded(settings, folder)
        self.knobs = Knobs(settings, ensemble)
        self.denoiser, self.pipeline = ensemble.denoiser, ensemble.pipeline()
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(choose_device(settings.device))
        self.exact: Way = {"steps": settings.steps}
        try_scorer([metric], *image_size(self.pipeline, sampling_of(settings, self.exact)))
        warn_of_prompts(prompts, self.denoiser.interface, ensemble.frame.tokenizers)
        asked = settings.binding() | {"prompt": chosen, "metric": metric.identity}
        files = saved_fingerprint(folder, settings.experts or [])
        self.facts = {"asked": digest(asked), "files": digest(files)}
        recorded = {name: getattr(settings, name) for name in RECORDED}
        self.speed = Speed(
            sha256(folder / AGGREGATORS),
            recorded | {"metric": settings.metric if settings.scorer is None else "a user's scorer"},
        )
        self.warm = False
        found = json_or_none(self.part)
        if isinstance(found, dict) and found.get("facts") == self.facts:
            self.speed.tried = build(list[Tried], found.get("tried"), self.part)

    @cached_property
    def most_ways(self) -> int:
        """How many ways are drawn for a level besides the exact one, if none is refused."""
        ladders = (self.knobs.fewer, self.knobs.guided_in_part)
        return sum(len(ladder(self.exact)) for ladder in ladders) + sum(
            map(len, self.knobs.reusing(self.exact))
        )

    def calibrated(self) -> Speed:
        """Find the way of every level."""
        scores = self.tried(self.exact)["scores"]
        margin = self.settings.margin or OF_DEVIATION * stdev(scores)
        self.speed.margins = {level: times * margin for level, times in MARGINS.items()}
        self.speed.levels = {
            level: self.exact if level == "exact" else self.cheapest(allowed)
            for level, allowed in self.speed.margins.items()
        }
        return self.speed

    def cheapest(self, margin: float) -> Way:
        """Turn all knobs, one after the other, and return the last way within the margin."""
        way = self.climbed([self.exact, *self.knobs.fewer(self.exact)], margin)
        reusing = [self.climbed([way, *ladder], margin) for ladder in self.knobs.reusing(way)]
        way = min(reusing, key=self.knobs.price)
        return self.climbed([way, *self.knobs.guided_in_part(way)], margin)

    def climbed(self, ladder: Sequence[Way], margin: float) -> Way:
        """Return the last way before the first that is not within the margin. The first one is."""
        best = ladder[0]
        for way in ladder[1:]:
            if self.least(self.tried(way)) < -margin:
                break
            best = way
        return best

    def least(self, tried: Tried) -> float:
        """Return the lower end of the difference, widened for as many comparisons as there may be ways.

        Bonferroni's correction; the bootstrap's interval is widened as a normal distribution's would be.
        """
        value, low, _ = tried["difference"]
        one, every = (NormalDist().inv_cdf(1 - LEVEL / 2 / count) for count in (1, self.most_ways))
        return value - (value - low) * every / one

    def tried(self, way: Way) -> Tried:
        """Return what is known of a way; draw and score it if it is new."""
        known = self.speed.of(way)
        if known is None:
            known = self._try(way)
            self.speed.tried.append(known)
            facts = {"facts": self.facts, "tried": self.speed.tried}
            write_atomically(self.part, json.dumps(facts) + "\n")
        return known

    def _try(self, way: Way) -> Tried:
        if not self.warm:  # the first pass allocates and tunes, and would be the exact ensemble's
            sample(
                self.pipeline,
                self.requests[: self.settings.batch_size],
                sampling_of(self.settings, {"steps": 2}),
            )
            self.warm = True
        images, seconds = self._drawn(way)
        scores = prompt_scores(self.metric, images, self.captions)
        exact = scores if not self.speed.tried else self.speed.tried[0]["scores"]
        lead = difference(np.array(scores), np.array(exact))
        return {
            "way": way,
            "price": self.knobs.price(way),
            "seconds": seconds / len(images),
            "scores": scores,
            "score": fmean(scores),
            "difference": [lead.value, lead.low, lead.high],
        }

    def _drawn(self, way: Way) -> tuple[list[NDArray[np.uint8]], float]:
        """Return the images of a way, and the seconds that they took."""
        sampling, size = sampling_of(self.settings, way), self.settings.batch_size
        self.denoiser.reuse = reuse_of(way)
        self.bar.set_postfix_str(words(way))
        images, seconds = [], 0.0
        for start in range(0, len(self.requests), size):
            begun = time.perf_counter()
            images += list(sample(self.pipeline, self.requests[start : start + size], sampling))
            seconds += time.perf_counter() - begun
            self.bar.update(len(images) - start)
        return images, seconds
