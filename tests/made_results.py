"""Results of a comparison that never took place: twenty methods of all groups, studies, and tiny pictures."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from afa.evaluation.results import Item, Method, MetricNote, Results, Run, SetScore

# name, group, title, true attribute accuracy, seconds an image, megabytes, trained parameters
ROWS = [
    ("single:curves", "expert", "curves", 0.66, 0.21, 21, 0),
    ("single:angles", "expert", "angles", 0.63, 0.21, 21, 0),
    ("single:patterns", "expert", "patterns", 0.75, 0.21, 21, 0),
    ("weighted", "merge", "weighted merge", 0.59, 0.21, 21, 0),
    ("mbw", "merge", "MBW, presets", 0.60, 0.21, 21, 0),
    ("auto_mbw", "merge", "auto MBW, coordinate search", 0.72, 0.215, 21, 0),
    ("task_arithmetic", "merge", "task arithmetic", 0.61, 0.21, 21, 0),
    ("ties", "merge", "TIES", 0.60, 0.212, 21, 0),
    ("dare", "merge", "DARE", 0.58, 0.21, 21, 0),
    ("slerp", "merge", "slerp", 0.64, 0.209, 21, 0),
    ("random_expert", "sampling", "random expert", 0.68, 0.22, 58, 0),
    ("noise_average", "sampling", "noise average", 0.61, 0.6, 58, 0),
    ("feature_mean", "sampling", "untrained ensemble", 0.60, 0.61, 58, 0),
    ("magicfusion", "sampling", "MagicFusion", 0.74, 0.66, 59, 0),
    ("superdiff_or", "sampling", "SuperDiff OR", 0.66, 0.9, 60, 0),
    ("single_in_ensemble:patterns", "control", "patterns in AFA's frame", 0.75, 0.22, 22, 0),
    ("finetune_best", "control", "LoRA on patterns", 0.83, 0.22, 24, 507_264),
    ("finetune_merge", "control", "LoRA on the weighted merge", 0.81, 0.22, 24, 507_264),
    ("prediction_router", "control", "prediction router", 0.87, 0.63, 60, 50_560),
    ("afa", "ours", "AFA", 0.88, 0.78, 64, 507_264),
    ("best_of_n", "bound", "best of N (oracle)", 0.86, 0.63, None, 0),
]
METRICS = {
    "attributes": MetricNote("image", True, "the embedded scorer: six questions about a scene", True),
    "frechet": MetricNote("set", False, "Fréchet distance on the scorer's features, to 1,000 real scenes", True),
    "colours": MetricNote("image", True, "the embedded scorer: two colours"),
    "all": MetricNote("image", True, "the embedded scorer: pictures without a mistake"),
}
VARIANTS = {"no text": 0.85, "no time": 0.87, "no spatial map": 0.74, "depth 0": 0.86, "depth 2": 0.89, "placement out": 0.87}


FEW = (
    "single:",
    "weighted",
    "auto_mbw",
    "ties",
    "noise_average",
    "magicfusion",
    "finetune_best",
    "prediction_router",
    "afa",
    "best",
)


def made_results(
    prompts: int = 30, copies: int = 2, runs: int = 3, studies: bool = True, resamples: int = 400, few: bool = False
) -> Results:
    """What such a comparison might have found. few: only the rows in FEW."""
    places = [(index, copy) for index in range(prompts) for copy in range(copies)]
    items = [Item(index, f"a red {index} left of a blue cross on a dotted ground", 2 * index + copy) for index, copy in places]
    chosen = [row for row in ROWS if not few or row[0].startswith(FEW)]
    rows = [_method(*row, items=items, runs=runs, resamples=resamples) for row in chosen]
    rows += _studies(items, runs, resamples) if studies else []
    experts = [
        {"name": name, "source": f"assets/{name}", "files": {"unet.safetensors": f"{index:064x}"}}
        for index, name in enumerate(("curves", "angles", "patterns"), 1)
    ]
    protocol = {"name": "scenes", "prompts": prompts, "images": len(items), "steps": 20, "guidance": 3.0, "training_seeds": runs}
    errors = ["model stock: it needs the model the experts were tuned from; give it with --base"]
    versions = {"afa": "0.1.0", "torch": "2.13.0"}
    return Results(protocol, items, METRICS, rows, errors, experts, versions, "cpu, two cores")


def draw_images(results: Results, folder: Path, side: int = 24, items: int = 100) -> None:
    """Every run's pictures where the results say they are; every method has a shade of its own."""
    for place, method in enumerate(results.methods):
        for run in method.runs:
            if run.images:
                (folder / run.images).mkdir(parents=True, exist_ok=True)
                for index in range(min(items, len(results.items))):
                    _picture(index, place, run.seed, side).save(folder / run.images / f"{index:06d}.png")


def write_results(folder: Path, **changes: Any) -> Results:
    """Results and pictures in a folder, as a comparison leaves them."""
    results = made_results(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder)
    draw_images(results, folder)
    return results


def _picture(index: int, place: int, seed: int, side: int) -> Image.Image:
    rng = np.random.default_rng((index, 7))
    ground, ink = rng.integers(90, 250, 3), rng.integers(0, 160, 3)
    y, x = np.mgrid[:side, :side]
    disc = (x - side * (0.3 + 0.02 * place)) ** 2 + (y - side * (0.5 + 0.05 * seed)) ** 2 < (side / 4) ** 2
    return Image.fromarray(np.where(disc[..., None], ink, ground).astype(np.uint8))


def _method(
    name: str,
    group: str,
    title: str,
    truth: float,
    seconds: float,
    memory: float | None,
    parameters: int,
    *,
    items: list[Item],
    runs: int,
    resamples: int,
    axes: dict[str, Any] | None = None,
    of: str = "",
) -> Method:
    count = runs if parameters else 1
    folder = name.replace(":", "-").replace(", ", "-").replace(" ", "-")
    images = [f"images/{folder}/seed-{run}" if parameters else f"images/{folder}" for run in range(count)]
    if group == "bound":
        images = [""]
    made = [_run(name, truth, seconds, memory, run, images[run], items, resamples) for run in range(count)]
    steps, took = (400, [118.0 + 3 * run for run in range(count)]) if parameters else (0, [])
    return Method(name, group, title, made, axes or {}, of, parameters, steps, took)


def _run(
    name: str, truth: float, seconds: float, memory: float | None, run: int, images: str, items: list[Item], resamples: int
) -> Run:
    """Hard prompts are hard for everybody; sixths, as six questions are asked."""
    own = np.random.default_rng((sum(name.encode()), len(name), run))
    hard = np.random.default_rng(5).normal(0, 0.12, max(item.prompt for item in items) + 1)[[item.prompt for item in items]]
    level = truth + own.normal(0, 0.006)
    scores = {
        metric: _sixths(level - shift + hard + own.normal(0, 0.1, len(items)))
        for metric, shift in (("attributes", 0), ("colours", 0.05))
    }
    scores["all"] = [float(value > 0.9) for value in scores["attributes"]]
    shared = np.random.default_rng(6).normal(0, 3, resamples)
    distance = 120 - 110 * level
    sets = {
        "frechet": SetScore(
            float(distance), (distance + 4 + shared + own.normal(0, 0.6, resamples)).round(3).tolist(), len(items)
        )
    }
    timed = (seconds * own.uniform(0.95, 1.1, len(items))).round(4).tolist()
    return Run(run, images, scores, sets, timed, memory)


def _sixths(values: np.ndarray) -> list[float]:
    return (np.clip(np.round(values * 6), 0, 6) / 6).tolist()


def _studies(items: list[Item], runs: int, resamples: int) -> list[Method]:
    shared: dict[str, Any] = {"items": items, "resamples": resamples}
    ours: dict[str, Any] = {**shared, "runs": runs, "of": "afa"}
    found = []
    for of, title, group, truth, seconds, parameters in (
        ("single:patterns", "patterns", "expert", 0.75, 0.21, 0),
        ("prediction_router", "prediction router", "control", 0.87, 0.63, 50_560),
        ("afa", "AFA", "ours", 0.88, 0.78, 507_264),
    ):
        for steps, loss in ((10, 0.05), (30, -0.01), (50, -0.01)):
            words, long = f", {steps} steps", seconds * steps / 20
            row = (of + words, group, title + words, truth - loss, long, 60, parameters)
            found.append(_method(*row, runs=1, axes={"steps": steps}, of=of, **shared))
    found.append(_method("afa, 2 experts", "ours", "AFA of two", 0.84, 0.55, 50, 380_000, axes={"experts": 2}, **ours))
    for title, truth in VARIANTS.items():
        found.append(_method(f"afa, {title}", "ours", title, truth, 0.78, 64, 500_000, axes={"variant": title}, **ours))
    return found
