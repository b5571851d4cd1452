"""Transformers in folders, trained: from a cache and without, with sheets, loaded again; planned; screened."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import quiet
from tiny_chroma import CHROMA_SMALL, chroma_pipeline
from tiny_flux2 import FLUX2_SMALL, flux2_pipeline, klein_pipeline
from tiny_krea2 import KREA2_SMALL, krea2_pipeline
from tiny_lumina2 import LUMINA2_SMALL, lumina2_pipeline
from tiny_qwen_image_21 import QWEN_IMAGE_21_SMALL, qwen_image_21_pipeline
from tiny_transformers import FLUX_SMALL, QWEN_IMAGE_SMALL, flux_pipeline, qwen_image_pipeline
from tiny_z_image import Z_IMAGE_SMALL, z_image_pipeline

from afa import Ensemble
from afa.cli.main import main
from afa.training.run import plan, train
from afa.training.settings import TrainSettings

CAPTIONS = ["a red bicycle on a lawn", "a cat", "a dark dog on a blurry red lawn"]


@dataclass(frozen=True)
class Family:
    """make: a whole pipeline, by seed; with `few` of few blocks. side: of the training images, in pixels. longest: the third caption.

    drawn: shape of a picture. falls: the held-out loss falls in so many steps; else it only changes.
    """

    make: Callable[..., Any]
    few: dict[str, int]
    side: int = 32
    longest: str = CAPTIONS[2]
    drawn: tuple[int, ...] = (1, 3, 32, 48)
    falls: bool = True
    steps: int = 4


FAMILIES = {
    "qwen-image": Family(qwen_image_pipeline, QWEN_IMAGE_SMALL),
    "flux": Family(flux_pipeline, FLUX_SMALL, steps=6),
    "flux2": Family(flux2_pipeline, FLUX2_SMALL, falls=False),
    "flux2 klein": Family(klein_pipeline, FLUX2_SMALL, falls=False),
    "z-image": Family(z_image_pipeline, Z_IMAGE_SMALL, longest=" ".join([CAPTIONS[2]] * 5)),
    "chroma": Family(chroma_pipeline, CHROMA_SMALL, falls=False),
    "qwen-image-2.1": Family(qwen_image_21_pipeline, QWEN_IMAGE_21_SMALL, side=64, drawn=(1, 4, 32, 64)),
    "krea2": Family(krea2_pipeline, KREA2_SMALL),
    "lumina2": Family(lumina2_pipeline, LUMINA2_SMALL, falls=False),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def images(family, tmp_path_factory):
    """Ten captioned images; no two neighbours with captions of one length."""
    folder, captions = tmp_path_factory.mktemp("images"), [*CAPTIONS[:2], family.longest]
    rng, lines = np.random.default_rng(0), []
    for index in range(10):
        Image.fromarray(rng.integers(0, 255, (family.side, family.side, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": captions[index % 3]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def save_two(make, place):
    """Two experts, as folders."""
    for seed in range(2):
        make(seed).save_pretrained(place / f"expert_{seed}")
    return [str(place / f"expert_{seed}") for seed in range(2)]


@pytest.fixture(scope="module")
def folders(family, tmp_path_factory):
    return save_two(family.make, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def small(family, tmp_path_factory):
    """Two experts of few blocks: operations are counted, and noises asked, as often as there are blocks."""
    return save_two(functools.partial(family.make, **family.few), tmp_path_factory.mktemp("small"))


def settings_of(family, folders, images, output):
    small = {"hidden": 8, "heads": 2, "depth": 1, "resolution": family.side, "batch_size": 2, "held_out": 2}
    small |= {"aggregator": "sabw", "lr": 1e-3, "device": "cpu", "caption_dropout": 0.5}
    return TrainSettings(experts=folders, data=str(images), output=str(output), steps=family.steps, evaluate_every=family.steps, **small)


@pytest.fixture
def settings(family, folders, images, tmp_path):
    return settings_of(family, folders, images, tmp_path / "out")


@pytest.fixture(scope="module")
def trained(family, folders, images, tmp_path_factory):
    """The folder of a complete run without a cache, with a sheet before and one after, and its record; only to be read."""
    run = settings_of(family, folders, images, tmp_path_factory.mktemp("trained") / "out")
    return Path(run.output), train(replace(run, sheet_every=family.steps, sheet_images=2, sheet_steps=2))


def test_training_from_a_cache_equals_training_without(family, settings, trained, tmp_path):
    """Some of the captions are dropped."""
    wanted = [entry["held_out_loss"] for entry in trained[1]["history"]]
    assert wanted[-1] < wanted[0] if family.falls else wanted[-1] != wanted[0]
    for name in ("first", "second"):
        found = train(replace(settings, output=str(tmp_path / name), cache=str(tmp_path / "cache")))["history"]
        assert [entry["held_out_loss"] for entry in found] == pytest.approx(wanted, rel=1e-5)
    mine, theirs = (load_file(folder / "aggregators.safetensors") for folder in (trained[0], tmp_path / "second"))
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in mine)


def test_a_trained_ensemble_is_loaded_and_draws(family, trained):
    folder, _ = trained
    assert len(list(folder.glob("sheets/*.png"))) == 2
    loaded = Ensemble.load(folder)
    assert loaded.denoiser.placement == "every-4" and loaded.training["steps"] == family.steps
    height, width = family.drawn[2:]
    drawn = quiet(loaded.pipeline())(prompt="a cat", num_inference_steps=2, height=height, width=width, output_type="pt").images
    assert drawn.shape == family.drawn


def test_a_plan_says_memory_and_time(settings, small):
    planned = plan(replace(settings, experts=small, placement="every-2", dry_run=True))
    assert planned.memory()["expected_memory_gb"] > 0 and planned.time()["seconds_a_step"] > 0


def test_a_screening_measures_each_expert(family, small, images, tmp_path):
    """One caption is asked at many noises: its states are given once for each."""
    command = ["screen", *small, "--data", str(images), "--output", str(tmp_path / "screened"), "--resolution", str(family.side)]
    assert main([*command, "--batch-size", "2", "--images", "2", "--draws", "2", "--device", "cpu"]) == 0
    assert list((tmp_path / "screened").iterdir())
