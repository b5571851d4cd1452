"""Does the head-room that `afa screen` measures foretell what training then gains? Expert sets of an embedded world, screened and trained.

    python benchmarks/screening.py --world far --output build/screening

For every set: screen it on 64 scenes; train AFA and a prediction router as the demonstration does (fewer steps); judge both, every
expert and the weight average on 96 scenes that neither has seen, each with one noise in every band of timesteps; with --pictures let them
draw, too. Prints one row a set, the rank correlations over sets with bootstrap intervals, and a fit of the gain on the head-room;
--calibrate keeps that fit for `afa screen`.
Experts that the world does not hold are made from those it does, by arithmetic on weights. Interrupted, the same command goes on.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from afa.demo import data as scenes
from afa.demo.draw import draw
from afa.demo.run import training
from afa.demo.settings import DemoSettings
from afa.demo.worlds import WORLDS, World, load_scorer
from afa.ensemble import Ensemble
from afa.experts.spec import ExpertSpec
from afa.files import write_atomically
from afa.latents import latents_of
from afa.sampling.sample import Request, Sampling, sample_all
from afa.screening.comparison import ExpertComparison
from afa.screening.plan import encoded
from afa.screening.predict import ExpertPredictor, SharedParts, load_shared_parts
from afa.screening.run import AnswerCollector
from afa.screening.settings import ScreenSettings
from afa.screening.verdict import CALIBRATION, CalibrationSet, fit
from afa.stats import Estimate, difference, gain
from afa.training.noise import Noising

JUDGED = 96
NOISED, POOR = (
    0.06,
    0.4,
)  # noise on weights, in standard deviations of each tensor: hardly worse; twice the loss
NEAR = 0.002  # as much as rounding might do
SIDE = 64  # pixels
SAMPLING = Sampling(steps=20, guidance=3.0)
KEPT = ("head_room", "afa", "router", "average")

Recipes = dict[str, tuple[dict[str, float], float]]  # expert -> shares of others, and noise on the weights
FAR_MADE: Recipes = {
    "curves-copy": ({"curves": 1.0}, 0.0),
    "curves-near": ({"curves": 1.0}, NEAR),
    "patterns-near": ({"patterns": 1.0}, NEAR),
    "curves-noised": ({"curves": 1.0}, NOISED),
    "angles-noised": ({"angles": 1.0}, NOISED),
    "patterns-noised": ({"patterns": 1.0}, NOISED),
    "curves-half": ({"curves": 0.5, "base": 0.5}, 0.0),
    "angles-half": ({"angles": 0.5, "base": 0.5}, 0.0),
    "patterns-half": ({"patterns": 0.5, "base": 0.5}, 0.0),
    "curves-angles": ({"curves": 0.5, "angles": 0.5}, 0.0),
    "curves-poor": ({"curves": 1.0}, POOR),
    "patterns-poor": ({"patterns": 1.0}, POOR),
}
NEAR_MADE: Recipes = {
    "round-copy": ({"round": 1.0}, 0.0),
    "round-noised": ({"round": 1.0}, NOISED),
    "round-half": ({"round": 0.5, "base": 0.5}, 0.0),
    "sharp-half": ({"sharp": 0.5, "base": 0.5}, 0.0),
    "signs-half": ({"signs": 0.5, "base": 0.5}, 0.0),
    "round-beyond": ({"round": 2.0, "base": -1.0}, 0.0),
    "sharp-beyond": ({"sharp": 2.0, "base": -1.0}, 0.0),
    "signs-beyond": ({"signs": 2.0, "base": -1.0}, 0.0),
}
NEAR_SETS = {
    "three near ones": ["round", "sharp", "signs"],
    "round and sharp": ["round", "sharp"],
    "round and signs": ["round", "signs"],
    "sharp and signs": ["sharp", "signs"],
    "a duplicate": ["round", "round-copy"],
    "an expert and its base": ["round", "base"],
    "a noised copy": ["round", "round-noised"],
    "three half-way": ["round-half", "sharp-half", "signs-half"],
    "three twice as far from the base": ["round-beyond", "sharp-beyond", "signs-beyond"],
}
FAR_SETS = {
    "three good ones": ["curves", "angles", "patterns"],
    "curves and angles": ["curves", "angles"],
    "curves and patterns": ["curves", "patterns"],
    "angles and patterns": ["angles", "patterns"],
    "a duplicate": ["curves", "curves-copy"],
    "a near-duplicate": ["curves", "curves-near"],
    "a near-duplicate of the best": ["patterns", "patterns-near"],
    "two and a duplicate": ["curves", "angles", "curves-copy"],
    "the best and its base": ["patterns", "base"],
    "a narrow one and its base": ["curves", "base"],
    "two narrow ones and their base": ["curves", "angles", "base"],
    "a noised copy": ["curves", "curves-noised"],
    "a noised copy of the best": ["patterns", "patterns-noised"],
    "the best and two noised ones": ["patterns", "curves-noised", "angles-noised"],
    "two noised ones": ["curves-noised", "angles-noised"],
    "half-way copies": ["curves", "curves-half"],
    "three half-way": ["curves-half", "angles-half", "patterns-half"],
    "the best and a merge": ["patterns", "curves-angles"],
    "the best, half-way": ["patterns", "patterns-half"],
    "a narrow one and half of another": ["curves", "angles-half"],
    "a poor copy": ["curves", "curves-poor"],
    "a poor copy of the best": ["patterns", "patterns-poor"],
    "two narrow ones and a poor one": ["curves", "angles", "patterns-poor"],
    "three good ones and their base": ["curves", "angles", "patterns", "base"],
}


SETS = {"far": FAR_SETS, "near": NEAR_SETS}
MADE = {"far": FAR_MADE, "near": NEAR_MADE}


def make_experts(world: World, folder: Path) -> dict[str, Path]:
    """Every expert's folder; those of MADE are written once."""
    places = {name: world.folder(name) for name in ("base", *world.experts)}
    for seed, (name, (shares, noise)) in enumerate(MADE[world.name].items()):
        place = folder / name
        if not (place / "model_index.json").exists():
            _write(place, [(places[source], share) for source, share in shares.items()], noise, seed)
        places[name] = place
    return places


def _write(place: Path, sources: list[tuple[Path, float]], noise: float, seed: int) -> None:
    """A weighted sum of denoisers, with noise on it; text encoder and the rest are the first source's."""
    from diffusers import UNet2DConditionModel

    models = [UNet2DConditionModel.from_pretrained(source, subfolder="unet") for source, _ in sources]
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for same in zip(*(model.parameters() for model in models), strict=True):
            mixed = sum(share * tensor for (_, share), tensor in zip(sources, same, strict=True))
            spread = mixed.std() if mixed.numel() > 1 else mixed.abs()
            same[0].copy_(mixed + noise * spread * torch.randn(mixed.shape, generator=rng))
    stage = place.with_name(f".{place.name}")
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(sources[0][0], stage, ignore=shutil.ignore_patterns("unet"))
    models[0].save_pretrained(stage / "unet")
    stage.rename(place)


def judge(ensemble: Ensemble, data: Path) -> list[list[float]]:
    """Squared errors by image and band on scenes nobody has seen, the noise always the same: (JUDGED, BANDS)."""
    cpu, vae = torch.device("cpu"), ensemble.frame.vae
    common = SharedParts(vae, ensemble.frame.scheduler, None, None, torch.float32, cpu)
    noising = Noising(common.scheduler, latents_of(vae), cpu)
    probes = encoded(str(data), vae, noising, images=JUDGED, draws=1, seed=99, resolution=SIDE)
    predictor = ExpertPredictor(ensemble, common.conditions(ensemble), noising, probes, batch_size=4)
    return [predictor.predict(image).errors.square().mean((1, 2, 3, 4)).tolist() for image in range(JUDGED)]


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; made and written if it is not there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(make()))
    return json.loads(file.read_text())


def trained(sources: list[str], folder: Path, placement: str, work: Path, steps: int, seed: int) -> Ensemble:
    from afa.training.run import train

    settings = DemoSettings(output=str(work), train_steps=steps, seed=seed)
    train(replace(training(settings, folder, placement, sources), held_out=16, evaluate_every=steps))
    return Ensemble.load(folder)


def weight_average(sources: list[str]) -> Ensemble:
    """One model with the mean of the experts' denoisers and text encoders.

    Source: Wortsman et al., Model soups, arXiv:2203.05482 (the uniform soup).
    """
    alone = [Ensemble.from_experts([source], aggregator="mean") for source in sources]
    networks = [nn.ModuleList([ensemble.denoiser.experts, *ensemble.text_encoders]) for ensemble in alone]
    with torch.no_grad():
        for same in zip(*(network.parameters() for network in networks), strict=True):
            same[0].copy_(torch.stack(same).mean(0))
    return alone[0]


def draws(world: World, ensemble: Ensemble, count: int) -> list[float]:
    """The scorer's leading score of each of `count` mixed scenes, drawn in 20 steps with guidance 3."""
    pipeline = ensemble.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    captions = [scene.caption for scene in world.sample("mixed", count, scenes.JUDGED + 50_000)]
    asked = [Request(caption, seed) for seed, caption in enumerate(captions)]
    images = np.concatenate(list(sample_all(pipeline, asked, SAMPLING, batch_size=32)))
    return load_scorer(world).score(images, captions)[world.scores[0]].tolist()


def pictured(
    world: World, experts: list[str], places: dict[str, Path], work: Path, folder: Path, count: int
) -> dict[str, Any]:
    """The scorer's leading score (count,) of AFA, the weight average and every expert."""

    def alone(expert: str) -> list[float]:
        return draws(world, Ensemble.from_experts([str(places[expert])], aggregator="mean"), count)

    sources = [str(places[expert]) for expert in experts]
    makers = {"afa": lambda: Ensemble.load(folder / "afa"), "average": lambda: weight_average(sources)}
    found = {
        name: kept(folder / f"drawn-{name}-{world.scores[0]}-{count}.json", lambda make=make: draws(world, make(), count))
        for name, make in makers.items()
    }
    found["experts"] = {
        expert: kept(work / "drawn" / f"{expert}-{world.scores[0]}-{count}.json", functools.partial(alone, expert))
        for expert in experts
    }
    return found


def realised(
    experts: list[str], places: dict[str, Path], work: Path, folder: Path, steps: int, seed: int
) -> dict[str, Any]:
    """Losses of AFA, the router, every expert and the weight average, each (JUDGED, BANDS)."""
    sources = [f"{expert}={places[expert]}" for expert in experts]
    test = work / "test"

    def alone(expert: str) -> list[list[float]]:
        return judge(Ensemble.from_experts([str(places[expert])], aggregator="mean"), test)

    losses = {
        expert: kept(work / "judged" / f"{expert}.json", functools.partial(alone, expert))
        for expert in experts
    }
    average = kept(
        folder / "average.json",
        lambda: judge(weight_average([str(places[expert]) for expert in experts]), test),
    )
    router = kept(
        folder / "router.json",
        lambda: judge(trained(sources, folder / "router", "out", work, steps, seed), test),
    )
    afa = kept(
        folder / "afa.json",
        lambda: judge(trained(sources, folder / "afa", "layers", work, steps, seed), test),
    )
    return {"experts": losses, "average": average, "router": router, "afa": afa}


def head_rooms(world: World, places: dict[str, Path], work: Path) -> dict[str, ExpertComparison]:
    """What `afa screen` would find of every set; experts of several sets are asked once."""
    from afa.experts.description import describe_expert

    settings = ScreenSettings([str(places[name]) for name in world.experts], data=str(work.parent / "data"))
    specs = {name: ExpertSpec(name, str(place)) for name, place in places.items()}
    frame = load_shared_parts(describe_expert(specs["base"]).expert, None, None, None, torch.float32, torch.device("cpu"))
    noising = Noising(frame.scheduler, latents_of(frame.vae), frame.device)
    probes = encoded(
        str(work.parent / "data"),
        frame.vae,
        noising,
        images=settings.images,
        draws=settings.draws,
        seed=settings.seed,
        resolution=SIDE,
    )
    stores = dict(
        zip(
            specs,
            AnswerCollector(frame, noising, probes, settings, work).all(list(specs.values())),
            strict=True,
        )
    )
    return {
        name: ExpertComparison(tuple(experts), [stores[expert] for expert in experts])
        for name, experts in SETS[world.name].items()
    }


def row(
    name: str, comparison: ExpertComparison, runs: list[dict[str, Any]], drawn: list[dict[str, Any]]
) -> dict[str, Any]:
    """One set: head-room by place and by element, and the gains that were realised, means over training seeds."""
    members = range(len(comparison.names))
    experts = np.array([np.mean(losses, axis=1) for losses in runs[0]["experts"].values()])  # (N, JUDGED)
    found: dict[str, Any] = {"name": name, "experts": list(comparison.names)}
    found["head_room"], _ = comparison.gains(comparison.routed(members))
    found["head_room_by_element"], _ = comparison.gains(comparison.values("routed"))
    for method in ("afa", "router", "average"):
        found[method] = gain(np.mean([np.mean(run[method], axis=1) for run in runs], axis=0), experts)
    if drawn:
        afa = np.mean([run["afa"] for run in drawn], axis=0)
        best = max(drawn[0]["experts"].values(), key=np.mean)
        found["pictures_over_best"] = difference(afa, np.array(best))
        found["pictures_over_average"] = difference(afa, np.array(drawn[0]["average"]))
    return found


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, ties sharing their mean rank. Source: Spearman (1904)."""
    ranks = [
        (np.searchsorted(np.sort(v), v) + np.searchsorted(np.sort(v), v, side="right") - 1) / 2
        for v in (x, y)
    ]
    return float(np.corrcoef(*ranks)[0, 1])


def correlation(rows: list[dict[str, Any]], one: str, other: str) -> Estimate:
    """Spearman's, with the percentile bootstrap over sets."""
    x, y = (np.array([row[key].value for row in rows]) for key in (one, other))
    rng = np.random.default_rng(0)
    draws = []
    while len(draws) < 10_000:
        chosen = rng.integers(len(rows), size=len(rows))
        if len(set(x[chosen])) > 2:
            draws.append(spearman(x[chosen], y[chosen]))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(spearman(x, y), float(low), float(high), len(rows))


def report(world: str, rows: list[dict[str, Any]]) -> str:
    """The table and what follows from it, as Markdown."""
    shown = ("head_room", "head_room_by_element", "afa", "router", "average")
    lines = [
        "| expert set | head-room | by element | AFA | router | weight average |",
        "|---|---|---|---|---|---|",
    ]
    drawn = [key for key in ("pictures_over_best", "pictures_over_average") if key in rows[0]]
    if drawn:
        lines = [
            f"{lines[0]} pictures: AFA minus best expert | pictures: AFA minus average |",
            f"{lines[1]}---|---|",
        ]
    for one in sorted(rows, key=lambda one: -one["head_room"].value):
        cells = [
            f"{100 * one[key].value:.1f} [{100 * one[key].low:.1f}, {100 * one[key].high:.1f}]"
            for key in shown
        ]
        cells += [str(one[key]) for key in drawn]
        lines.append(f"| {one['name']} ({', '.join(one['experts'])}) | {' | '.join(cells)} |")
    lines.append("")
    for one in ("head_room", "head_room_by_element"):
        for other in ("afa", "router"):
            lines.append(
                f"rank correlation of {one} with the gain of {other}: {correlation(rows, one, other)}, n = {len(rows)} sets"
            )
    lines += fit_lines([kept_row(world, one) for one in rows])
    return "\n".join(lines)


def kept_row(world: str, one: dict[str, Any]) -> CalibrationSet:
    """What `afa screen` needs to know of a set."""
    values = {key: round(one[key].value, 5) for key in KEPT}
    return {"world": world, "name": one["name"], "experts": one["experts"], **values, "averaging_helps": one["average"].low > 0}


def fit_lines(sets: list[CalibrationSet]) -> list[str]:
    """The fits of `afa screen` to some sets, in words."""
    lines = []
    for helps, words, beyond in ((False, "does not help", ""), (True, "helps", " beyond the weight average")):
        if sum(one["averaging_helps"] == helps for one in sets) > 1:
            lines += [
                f"{found.sets} sets whose average {words}: gain of {method}{beyond} = {found.slope:.3f} · head-room{beyond}, "
                f"within {found.spread:.3f} for 95 % of the sets when forecast by the others"
                for method, found in fit(sets, helps).items()
            ]
    return lines


def main() -> None:
    flags = argparse.ArgumentParser(
        prog="python benchmarks/screening.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--world", choices=list(WORLDS), default="far", help="default: far")
    flags.add_argument("--output", type=Path, default=Path("build/screening"), help="a folder of its own for a world")
    flags.add_argument("--pictures", type=int, default=0, metavar="N", help="scenes that all draw (default: 0)")
    flags.add_argument("--steps", type=int, default=150, help="training steps (default: 150)")
    flags.add_argument("--seeds", type=int, default=1, help="training seeds a set (default: 1)")
    flags.add_argument(
        "--calibrate", action="store_true", help="keep the sets for the predictions of `afa screen`, beside those of the other world"
    )
    given = flags.parse_args()
    work, world = given.output, WORLDS[given.world]
    for folder, count, seed in (("data", 512, scenes.TRAINING), ("test", JUDGED, scenes.JUDGED + 50_000)):
        if not (work / folder).exists():
            draw(work / folder, "mixed", count, seed, world)
    places = make_experts(world, work / "experts")
    screened = head_rooms(world, places, work / "screened")
    rows = []
    sets = SETS[world.name]
    for place, (name, experts) in enumerate(sets.items(), start=1):
        runs, drawn = [], []
        for seed in range(given.seeds):
            folder = work / "sets" / f"{name.replace(' ', '-')}-{seed}"
            runs.append(realised(experts, places, work, folder, given.steps, seed))
            if given.pictures:
                drawn.append(pictured(world, experts, places, work, folder, given.pictures))
        rows.append(row(name, screened[name], runs, drawn))
        print(f"{place} of {len(sets)}: {name}, AFA {rows[-1]['afa']}", file=sys.stderr)
    print(report(world.name, rows))
    if given.calibrate:
        known = json.loads(CALIBRATION.read_text())["sets"]
        others = [one for one in known if one["world"] != world.name]
        sets = [*others, *(kept_row(world.name, one) for one in rows)]
        command = "python benchmarks/screening.py --calibrate, with --world far and with --world near"
        write_atomically(
            CALIBRATION, json.dumps({"command": command, "sets": sets}, indent=1) + "\n"
        )
        print("both worlds:", *fit_lines(sets), sep="\n")


if __name__ == "__main__":
    main()
