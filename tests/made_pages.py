"""The four reports without a run behind them: their real makers, on figures and pictures that are made up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from made_results import write_results
from PIL import Image

from afa.demo.data import ENSEMBLE
from afa.demo.report import write_report as write_demo
from afa.demo.run import METHODS, MethodResult, Outcome
from afa.demo.settings import DemoSettings
from afa.evaluation.report.files import write_report
from afa.explanation.causes import Unused
from afa.explanation.chart import chart
from afa.explanation.explanation import ExplainedImage
from afa.explanation.page import as_html as explanation_html
from afa.explanation.page import dark_twin
from afa.explanation.summary import as_json
from afa.pictures import DARK, LIGHT, Canvas
from afa.screening.report import as_html as screening_html

LONG = "<b>a_merge_of_checkpoints_whose_name_has_no_place_at_which_a_line_could_end</b>.safetensors"
STAGES = {
    "sd": [f"{part}{index:02d}" for part, count in (("IN", 12), ("M", 1), ("OUT", 12)) for index in range(count)],
    "flux": [f"{kind}{index:02d}" for kind, count in (("D", 19), ("S", 38)) for index in range(count)] + ["OUT"],
    "long names": [f"SINGLE_TRANSFORMER_BLOCK_{index:02d}" for index in range(60)],
}


def noise(side: int = 64, seed: int = 0) -> np.ndarray:
    """A picture."""
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)


def demo_page(folder: Path, names: list[str], stages: list[str]) -> str:
    """Of twelve scenes; its trainings are that of the embedded ensemble."""
    for place in ("ensemble", "compared/trained/prediction_router/seed-0"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(ENSEMBLE)
    Image.fromarray(noise()).save(folder / "a.png")
    rng, rows = np.random.default_rng(0), []
    for name in METHODS.values():
        scores = {score: rng.uniform(0.3 + 0.4 * (name == "AFA"), 1, 12) for score in ("attributes", "shapes", "colours", "texture", "ground", "all")}
        rows.append(MethodResult(name, scores, [folder / "a.png"] * 12, rng.uniform(0.2, 0.3, 3)))
    maps = [[Image.fromarray(noise(600, 1)), Image.fromarray(noise(600, 2))]]
    write_demo(Outcome(DemoSettings(output=str(folder)), [f"scene {place}" for place in range(12)], rows), maps, folder / "page.html")
    return (folder / "page.html").read_text()


def evaluation_page(folder: Path, names: list[str], stages: list[str]) -> str:
    """Of a comparison with studies."""
    write_results(folder / "evaluation", prompts=14, copies=1, resamples=60, few=True)
    write_report([folder / "evaluation"], folder / "page.html")
    return (folder / "page.html").read_text()


def screening_facts(names: list[str], stages: list[str]) -> dict[str, Any]:
    """Of a screening without losses."""
    pairs = [[one, other] for place, one in enumerate(names) for other in names[:place]]
    curves = [{stage: 0.1 + 0.01 * ((place * 7 + index) % 11) for index, stage in enumerate(stages)} for place in range(len(pairs))]
    shared = {"distance": 0.2, "cosine_of_changes": None, "bands": [0.1] * 4}
    both = [{"experts": pair, "stages": curve, **shared} for pair, curve in zip(pairs, curves, strict=True)]
    return {
        "experts": [{"name": name} for name in names],
        "images": 24,
        "data": "scenes:24",
        "prompts": None,
        "timesteps": [[250 * band, 250 * band + 249] for band in range(4)],
        "draws": 4,
        "resolution": 64,
        "verdict": {"headline": "Undecided.", "reasons": ["A reason."], "dropped": {names[0]: "it is another but for rounding"}},
        "parameters": {"pairs": both, "base": None},
        "predictions": both,
        "features": both,
        "only_predictions": [],
    }


def screening_page(folder: Path, names: list[str], stages: list[str]) -> str:
    """Of weights, predictions and features."""
    return screening_html(screening_facts(names, stages))


def explained_image(stem: str, groups: list[str], shares: np.ndarray, rmse: float = 20.0, prompt: str = "a prompt") -> ExplainedImage:
    """One image. shares: (G, N) mean weights, the same in every band."""
    found = {
        "prompt": prompt,
        "seed": 0,
        "shares": {"groups": groups, "weights": np.repeat(shares[:, None], 4, 1).tolist()},
        "words": [{"word": "red", "looked": 0.1, "hidden": 0.01, "omitted": 0.02, "omitted_pull": [0.0] * shares.shape[1]}],
        "word_remarks": ["A remark."],
        "counterfactuals": [{"kind": "off", "title": "one off", "rmse": 9.0}, {"kind": "equal", "title": "equal weights", "rmse": rmse}],
    }
    means = np.full((4, len(groups), shares.shape[1]), 0.3, np.float32)
    return ExplainedImage(stem, found, means, means, (999.0, 700.0, 400.0, 1.0))


def explanation_page(folder: Path, names: list[str], stages: list[str]) -> str:
    """Of one image, with pictures on both grounds."""
    entry = explained_image("00000", ["IN", "OUT"], np.asarray([np.arange(1, len(names) + 1), np.ones(len(names))]) / len(names), prompt=LONG)
    means = np.random.default_rng(0).uniform(0, 0.6, (4, len(stages), len(names))).astype(np.float32)
    unused = Unused(tuple(names), tuple(stages), means, np.ones(len(stages)))
    for name in ("chart.png", "00000.sheet.png", "00000.counterfactuals.png"):
        for ground in (LIGHT, DARK):
            picture = chart(unused, means, entry.timesteps, 1, ground) if name == "chart.png" else Canvas(1160, 300, ground).image
            picture.save(folder / name if ground is LIGHT else dark_twin(folder / name))
    return explanation_html(folder, [entry], unused, as_json({}, [entry], unused, []), "4 steps")


PAGES: dict[str, Callable[[Path, list[str], list[str]], str]] = {
    "demo": demo_page,
    "evaluate": evaluation_page,
    "screen": screening_page,
    "explain": explanation_page,
}
