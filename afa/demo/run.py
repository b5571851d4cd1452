"""The demonstration: train an ensemble, compare it with its baselines, and report."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from afa.demo.data import BASE, EXPERTS, SCORER
from afa.demo.scenes import draw, sample_scenes
from afa.demo.scorer import AttributeScorer
from afa.demo.settings import DemoSettings
from afa.denoiser.hooks import record_weights
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.files import locked, read_arrays, replacing
from afa.fingerprint import claim, fingerprint
from afa.sampling.sample import Request, Sampling, sample, sample_all
from afa.seeds import nth_seed
from afa.stats import Estimate, difference, estimate
from afa.training.run import train
from afa.training.settings import TrainSettings

# Small, as the experts are; the paper's 128 would be larger than they. Own paths: see docs/log.md.
AGGREGATORS = {"aggregator": "stitch", "hidden": 32, "heads": 4, "depth": 1}


def methods(settings: DemoSettings) -> dict[str, Callable[[], Ensemble]]:
    """Return the methods by name, as functions that make them. They train if nothing was trained before."""
    output = Path(settings.output)
    sources = [str(path) for path in EXPERTS.values()]
    return {
        **{
            name: lambda source=str(path): Ensemble.from_experts([source], aggregator="mean")
            for name, path in EXPERTS.items()
        },
        "weight average": lambda: weight_average(sources),
        "untrained mean": lambda: Ensemble.from_experts(sources, aggregator="mean"),
        "prediction router": lambda: _trained(settings, sources, output / "router", "out"),
        "AFA": lambda: _trained(settings, sources, output / "ensemble", "layers"),
    }


def training(settings: DemoSettings, folder: Path, placement: str, sources: list[str]) -> TrainSettings:
    """Return the demonstration's training settings, the same for AFA and for the router."""
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


def _trained(settings: DemoSettings, sources: list[str], folder: Path, placement: str) -> Ensemble:
    train(training(settings, folder, placement, sources))
    return Ensemble.load(folder)


def weight_average(sources: list[str]) -> Ensemble:
    """Return one model with the mean of the experts' denoisers and text encoders.

    Source: Wortsman et al., Model soups, arXiv:2203.05482 (the uniform soup).
    """
    alone = [Ensemble.from_experts([source], aggregator="mean") for source in sources]
    networks = [nn.ModuleList([ensemble.denoiser.experts, *ensemble.text_encoders]) for ensemble in alone]
    with torch.no_grad():
        for same in zip(*(network.parameters() for network in networks), strict=True):
            same[0].copy_(torch.stack(same).mean(0))
    return alone[0]


TEST_SCENES, TRAINING_SCENES = 500_000, 600_000  # seeds; neither occurs in the building of the world
SHOWN = 6  # images in the report's sheet
MAPPED = 2  # of them with weight maps


@dataclass(frozen=True)
class MethodResult:
    """The result of one method.

    scores:  (n,) per image, by name
    images:  (n, 64, 64, 3) uint8
    seconds: per image, one value per batch
    """

    name: str
    scores: dict[str, NDArray[np.float64]]
    images: NDArray[np.uint8]
    seconds: NDArray[np.float64]

    def value(self, score: str) -> Estimate:
        return estimate(self.scores[score])


@dataclass(frozen=True)
class Outcome:
    """All methods on the same scenes, and what training measured."""

    settings: DemoSettings
    captions: list[str]
    rows: list[MethodResult]

    @property
    def best_single(self) -> MethodResult:
        """Return the expert with the highest attribute accuracy on these scenes, the strongest baseline."""
        return max(
            (row for row in self.rows if row.name in EXPERTS), key=lambda row: row.scores["attributes"].mean()
        )

    def row(self, name: str) -> MethodResult:
        return next(row for row in self.rows if row.name == name)

    def lead(self, name: str, over: str) -> Estimate:
        """Return attribute accuracy of one method minus another's, paired by scene."""
        return difference(self.row(name).scores["attributes"], self.row(over).scores["attributes"])


def demonstrate(settings: DemoSettings) -> Outcome:
    """Do everything that is missing in settings.output. Raises UserError if it holds something else."""
    for place in (*EXPERTS.values(), BASE):
        if not (place / "model_index.json").is_file():
            raise UserError(
                f"the embedded world is not complete: {place} is missing; install afa again, "
                "or, in a checkout, make it with: python -m scripts.demo_world.build"
            )
    with locked(Path(settings.output)):
        return _demonstrate(settings, Path(settings.output))


def _demonstrate(settings: DemoSettings, output: Path) -> Outcome:
    asked = {name: value for name, value in asdict(settings).items() if name not in ("output", "json")}
    claim(
        output, asked, "the demonstration", fingerprint([str(place) for place in EXPERTS.values()], base=BASE)
    )
    draw(output / "data", "mixed", settings.train_images, TRAINING_SCENES + settings.seed)
    captions = [scene.caption for scene in sample_scenes("mixed", settings.prompts, TEST_SCENES)]
    scorer = AttributeScorer.load(SCORER)
    rows = []
    for name, make in methods(settings).items():
        images, seconds = _images(output, name, make, captions, settings)
        rows.append(MethodResult(name, scorer.score(images, captions), images, seconds))
    return Outcome(settings, captions, rows)


def _images(
    output: Path, name: str, make: Callable[[], Ensemble], captions: list[str], settings: DemoSettings
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return a method's images of all captions, (n, 64, 64, 3), and seconds per image of each batch.

    They are made once and kept as .npz.
    """
    file = output / "images" / f"{name.replace(' ', '_')}.npz"
    kept = read_arrays(file)
    if kept is None:
        batches, seconds = zip(*_sampled(name, make(), captions, settings), strict=True)
        file.parent.mkdir(exist_ok=True)
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, images=np.concatenate(batches), seconds=np.asarray(seconds))
        kept = read_arrays(file)
    assert kept is not None
    return kept["images"], kept["seconds"]


def sampling(settings: DemoSettings) -> Sampling:
    return Sampling(settings.steps, settings.guidance)


def requests(captions: list[str], settings: DemoSettings) -> list[Request]:
    """Return the requests: scene k has the noise of seed + k in all methods."""
    return [Request(caption, nth_seed(settings.seed, index)) for index, caption in enumerate(captions)]


def _sampled(
    name: str, ensemble: Ensemble, captions: list[str], settings: DemoSettings
) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """Yield each batch: images, and seconds per image."""
    pipeline = ensemble.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    started = time.monotonic()
    with tqdm(total=len(captions), desc=name, unit="image", file=sys.stderr) as bar:
        for images in sample_all(pipeline, requests(captions, settings), sampling(settings), batch_size=32):
            bar.update(len(images))
            yield images, (time.monotonic() - started) / len(images)
            started = time.monotonic()


def weight_pictures(settings: DemoSettings, captions: list[str]) -> list[NDArray[np.uint8]]:
    """Return weight maps over steps of the first images, as pictures (H, W, 3) uint8."""
    from afa.pictures import conditional, picture

    ensemble = Ensemble.load(Path(settings.output) / "ensemble")
    pipeline = ensemble.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    with record_weights(ensemble.denoiser) as maps:
        images = sample(pipeline, requests(captions, settings)[:MAPPED], sampling(settings))
    passes = conditional(maps, len(images))
    own = [
        [{name: weights[index] for name, weights in one.items()} for one in passes]
        for index in range(len(images))
    ]
    return [
        np.asarray(picture(image, maps_of, maps.experts, maps.timesteps))
        for image, maps_of in zip(images, own, strict=True)
    ]
