"""Transformers in folders, trained: from a cache and without, with sheets, loaded again; planned; screened."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import quiet
from tiny_chroma import chroma_pipeline
from tiny_flux2 import flux2_pipeline, klein_pipeline
from tiny_krea2 import krea2_pipeline
from tiny_lumina2 import lumina2_pipeline
from tiny_qwen_image_21 import qwen_image_21_pipeline
from tiny_transformers import flux_pipeline, qwen_image_pipeline
from tiny_z_image import z_image_pipeline

from afa import Ensemble
from afa.cli.main import main
from afa.training.run import plan, train
from afa.training.settings import TrainSettings

CAPTIONS = ["a red bicycle on a lawn", "a cat", "a dark dog on a blurry red lawn"]


@dataclass(frozen=True)
class Family:
    """make: a whole pipeline, by seed. side: of the training images, in pixels. longest: the third caption.

    drawn: shape of a picture. falls: the held-out loss falls in four steps; else it only changes.
    """

    make: Callable[..., Any]
    side: int = 32
    longest: str = CAPTIONS[2]
    drawn: tuple[int, ...] = (1, 3, 32, 48)
    falls: bool = True


FAMILIES = {
    "qwen-image": Family(qwen_image_pipeline),
    "flux": Family(flux_pipeline),
    "flux2": Family(flux2_pipeline, falls=False),
    "flux2 klein": Family(klein_pipeline, falls=False),
    "z-image": Family(z_image_pipeline, longest=" ".join([CAPTIONS[2]] * 5)),
    "chroma": Family(chroma_pipeline, falls=False),
    "qwen-image-2.1": Family(qwen_image_21_pipeline, side=64, drawn=(1, 4, 32, 64)),
    "krea2": Family(krea2_pipeline),
    "lumina2": Family(lumina2_pipeline, falls=False),
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


@pytest.fixture(scope="module")
def folders(family, tmp_path_factory):
    """Two experts, as folders."""
    place = tmp_path_factory.mktemp("experts")
    for seed in range(2):
        family.make(seed).save_pretrained(place / f"expert_{seed}")
    return [str(place / f"expert_{seed}") for seed in range(2)]


@pytest.fixture
def settings(family, folders, images, tmp_path):
    small = {"hidden": 8, "heads": 2, "depth": 1, "resolution": family.side, "batch_size": 2, "held_out": 2}
    small |= {"aggregator": "sabw", "lr": 1e-3, "device": "cpu"}
    return TrainSettings(experts=folders, data=str(images), output=str(tmp_path / "out"), steps=4, evaluate_every=2, **small)


def test_training_from_a_cache_equals_training_without(family, settings, tmp_path):
    wanted = train(settings)["history"]
    last, first = wanted[-1]["held_out_loss"], wanted[0]["held_out_loss"]
    assert last < first if family.falls else last != first
    for name in ("first", "second"):
        found = train(replace(settings, output=str(tmp_path / name), cache=str(tmp_path / "cache")))["history"]
        assert [entry["held_out_loss"] for entry in found] == pytest.approx([entry["held_out_loss"] for entry in wanted], rel=1e-5)
    mine, theirs = (load_file(tmp_path / name / "aggregators.safetensors") for name in ("out", "second"))
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in mine)


def test_a_trained_ensemble_is_loaded_and_draws(family, settings, tmp_path):
    train(replace(settings, sheet_every=4, sheet_images=2, sheet_steps=2, caption_dropout=0.5))
    assert len(list(tmp_path.glob("out/sheets/*.png"))) == 2
    loaded = Ensemble.load(settings.output)
    assert loaded.denoiser.placement == "every-4" and loaded.training["steps"] == 4
    height, width = family.drawn[2:]
    drawn = quiet(loaded.pipeline())(prompt="a cat", num_inference_steps=2, height=height, width=width, output_type="pt").images
    assert drawn.shape == family.drawn


def test_a_plan_says_memory_and_time(settings):
    planned = plan(replace(settings, dry_run=True))
    assert planned.memory()["expected_memory_gb"] > 0 and planned.time()["seconds_a_step"] > 0


def test_a_screening_measures_each_expert(family, folders, images, tmp_path):
    """One caption is asked at many noises: its states are given once for each."""
    command = ["screen", *folders, "--data", str(images), "--output", str(tmp_path / "screened"), "--resolution", str(family.side)]
    assert main([*command, "--batch-size", "2", "--images", "4", "--draws", "2", "--device", "cpu"]) == 0
    assert list((tmp_path / "screened").iterdir())
