"""Comparisons of flow models, from saved ensembles to results, as those of U-Nets."""

import functools

import numpy as np
import pytest
from PIL import Image
from tiny import quiet
from tiny_transformers import FLUX_SMALL, SD3_SMALL, flux_pipeline, sd3_pipeline

from afa import Ensemble, UserError
from afa.evaluation.plan import plan
from afa.evaluation.results import Results
from afa.evaluation.run import evaluate
from afa.evaluation.settings import EvaluateSettings
from afa.sampling.sample import Request, Sampling, sample

SCORER = """
def score(images, captions):
    return {"light": images.mean((1, 2, 3)) / 255}
"""
PIPELINES = {"sd3": (functools.partial(sd3_pipeline, **SD3_SMALL), 7.0), "flux": (functools.partial(flux_pipeline, **FLUX_SMALL), 3.5)}


@pytest.fixture(scope="module", params=PIPELINES)
def world(request, tmp_path_factory):
    """Two experts of a family, an untrained ensemble of them, prompts, and a scorer of pixels."""
    folder = tmp_path_factory.mktemp(request.param)
    make, guidance = PIPELINES[request.param]
    for seed, name in enumerate(("photo", "paint")):
        make(seed).save_pretrained(folder / name)
    Ensemble.from_experts([str(folder / "photo"), str(folder / "paint")], hidden=32, heads=2, depth=1).save(folder / "afa")
    (folder / "prompts.txt").write_text("a red cat\na dog on a lawn\n")
    (folder / "scorer.py").write_text(SCORER)
    return folder, make, guidance


def settings(folder, output, **changes):
    small = {"steps": 2, "width": 32, "height": 32, "tuning": 0, "device": "cpu", "scorer": str(folder / "scorer.py")}
    return EvaluateSettings(ensemble=str(folder / "afa"), output=str(output), protocol=str(folder / "prompts.txt"), **{**small, **changes})


def test_methods_are_compared_by_pixels_with_the_familys_own_guidance(world, tmp_path):
    folder, make, guidance = world
    methods = ["random_expert", "noise_average", "timestep_experts", *(["magicfusion"] if make.func is sd3_pipeline else []), "loratorio"]
    results = evaluate(settings(folder, tmp_path / "out", methods=methods, base=str(folder / "photo")))
    assert [method.name for method in results.methods] == ["single:photo", "single:paint", *methods, "afa"]
    assert results.errors == [] and results.protocol["guidance"] == guidance
    assert all(np.isfinite(method.runs[0].scores["light"]).all() for method in results.methods)
    item = results.items[0]
    drawn = sample(quiet(make(1)), [Request(item.caption, item.seed)], Sampling(2, guidance, height=32, width=32))
    batched = np.asarray(Image.open(tmp_path / "out" / "images" / "single-paint" / "000000.png"))
    assert np.abs(drawn[0].astype(int) - batched).max() <= 1
    assert Results.load(tmp_path / "out").protocol["guidance"] == guidance


def test_a_scheduler_by_name_and_what_a_family_cannot_do(world, tmp_path):
    folder, make, _ = world
    asked = settings(folder, tmp_path / "out", methods=["single", "noise_average"], scheduler="unipc")
    assert evaluate(asked).protocol["scheduler"] == "unipc"
    with pytest.raises(UserError, match="'ddim' is for models with a diffusion schedule"):
        evaluate(settings(folder, tmp_path / "ddim", methods=["noise_average"], scheduler="ddim"))
    with pytest.raises(UserError, match=r"SuperDiff OR: superdiff"):
        evaluate(settings(folder, tmp_path / "superdiff", methods=["superdiff_or"]))
    if make.func is sd3_pipeline:
        with pytest.raises(UserError, match="true guidance 2 is for models whose own guidance is built in"):
            plan(settings(folder, tmp_path / "true", methods=["single"], true_guidance=2.0))
