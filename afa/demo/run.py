"""The demonstration: train an ensemble on mixed scenes, and compare it as `afa evaluate` does."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from afa.demo.data import BASE, EXPERTS, TRAINING
from afa.demo.draw import draw
from afa.demo.settings import DemoSettings
from afa.denoiser.hooks import record_weights
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.evaluation.results import image_name
from afa.evaluation.run import evaluate
from afa.evaluation.settings import EvaluateSettings
from afa.files import locked
from afa.fingerprint import claim, fingerprint
from afa.images import read_pixels
from afa.pictures import DARK, LIGHT, conditional, picture
from afa.sampling.sample import Request, Sampling, sample
from afa.seeds import nth_seed
from afa.stats import Estimate, difference, estimate
from afa.training.run import train
from afa.training.settings import TrainSettings

# Small, as the experts are; the paper's 128 would be larger than they. Own paths: see docs/log.md.
AGGREGATORS = {"aggregator": "stitch", "hidden": 32, "heads": 4, "depth": 1}
# row of the evaluation -> its name here, in the order of the table
METHODS = {
    **{f"single:{name}": name for name in EXPERTS},
    "weighted": "weight average",
    "feature_mean": "untrained mean",
    "prediction_router": "prediction router",
    "afa": "AFA",
}
BATCH = 32  # images drawn at once
SHOWN = 6  # images in the report's sheet
MAPPED = 2  # of them with weight maps


def training(settings: DemoSettings, folder: Path, placement: str, sources: list[str]) -> TrainSettings:
    """The demonstration's settings of a training; the router's differ in the placement only."""
    return TrainSettings(
        experts=sources,
        data=str(Path(settings.output) / "data"),
        output=str(folder),
        steps=settings.train_steps,
        batch_size=8,
        patience=100,  # as many steps as asked for: the comparison is at equal effort
        lr=2e-3,
        held_out=48,
        ema=0.98,
        seed=settings.seed,
        placement=placement,
        **AGGREGATORS,
    )


def comparison(settings: DemoSettings) -> EvaluateSettings:
    """The settings of the comparison: every method with its default options, on the same scenes and noise."""
    output = Path(settings.output)
    return EvaluateSettings(
        ensemble=str(output / "ensemble"),
        output=str(output / "compared"),
        protocol="scenes",
        methods=list(dict.fromkeys(name.partition(":")[0] for name in METHODS)),
        train_data=str(output / "data"),
        metrics=["attributes"],
        prompts=settings.prompts,
        seed=settings.seed,
        steps=settings.steps,
        guidance=settings.guidance,
        tuning=0,
        batch_size=BATCH,
    )


@dataclass(frozen=True)
class MethodResult:
    """The result of one method.

    scores:  (n,) per image, by name
    files:   of the images
    seconds: per image, one value per batch
    """

    name: str
    scores: dict[str, NDArray[np.float64]]
    files: list[Path]
    seconds: NDArray[np.float64]

    def value(self, score: str) -> Estimate:
        """The mean of a score over scenes."""
        return estimate(self.scores[score])

    def images(self, count: int) -> list[NDArray[np.uint8]]:
        """The first images: (64, 64, 3) each."""
        return [read_pixels(file) for file in self.files[:count]]


@dataclass(frozen=True)
class Outcome:
    """All methods on the same scenes."""

    settings: DemoSettings
    captions: list[str]
    rows: list[MethodResult]

    @property
    def best_single(self) -> MethodResult:
        """The expert with the highest attribute accuracy on these scenes, the strongest baseline."""
        return max(
            (row for row in self.rows if row.name in EXPERTS), key=lambda row: row.scores["attributes"].mean()
        )

    def lead(self, name: str, over: str) -> Estimate:
        """Attribute accuracy of one method minus another's, paired by scene."""
        scores = {row.name: row.scores["attributes"] for row in self.rows}
        return difference(scores[name], scores[over])


def demonstrate(settings: DemoSettings) -> Outcome:
    """Do everything that is missing in settings.output. Raises UserError if it holds something else."""
    for place in (*EXPERTS.values(), BASE):
        if not (place / "model_index.json").is_file():
            raise UserError(
                f"the embedded world is not complete: {place} is missing; install afa again, "
                "or, in a checkout, make it with: python -m scripts.demo_world.build"
            )
    output, sources = Path(settings.output), [str(path) for path in EXPERTS.values()]
    with locked(output):
        asked = {name: value for name, value in asdict(settings).items() if name not in ("output", "json")}
        claim(output, asked, "the demonstration", fingerprint(sources, base=BASE))
        draw(output / "data", "mixed", settings.train_images, TRAINING + settings.seed)
        train(training(settings, output / "ensemble", "layers", sources), keep=False)
        results = evaluate(comparison(settings))
    assert results is not None
    runs = {method.name: method.runs[0] for method in results.methods}
    rows = []
    for row, name in METHODS.items():
        scores = {score: np.asarray(values) for score, values in runs[row].scores.items()}
        folder = output / "compared" / runs[row].images
        files = [folder / image_name(index) for index in range(len(results.items))]
        rows.append(MethodResult(name, scores, files, np.asarray(runs[row].seconds[::BATCH])))
    return Outcome(settings, [item.caption for item in results.items], rows)


def weight_pictures(settings: DemoSettings, captions: list[str]) -> list[list[Image.Image]]:
    """Weight maps over steps of the first images, each on a light and on a dark ground."""
    ensemble = Ensemble.load(Path(settings.output) / "ensemble")
    pipeline = ensemble.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    asked = [
        Request(caption, nth_seed(settings.seed, index)) for index, caption in enumerate(captions[:MAPPED])
    ]
    with record_weights(ensemble.denoiser) as maps:
        images = sample(pipeline, asked, Sampling(settings.steps, settings.guidance))
    passes = conditional(maps, len(images))
    own = [
        [{name: weights[index] for name, weights in one.items()} for one in passes]
        for index in range(len(images))
    ]
    return [
        [picture(image, maps_of, maps.experts, maps.timesteps, ground) for ground in (LIGHT, DARK)]
        for image, maps_of in zip(images, own, strict=True)
    ]
