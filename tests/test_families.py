"""Every family from folders to pictures, by the commands people type: inspect, two steps of training, generate; saved and loaded."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ONE_LEVEL, sd_pipeline, sdxl_pipeline
from tiny_chroma import CHROMA_SMALL, chroma_pipeline
from tiny_flux2 import FLUX2_SMALL, flux2_pipeline, klein_pipeline
from tiny_krea2 import KREA2_SMALL, krea2_pipeline
from tiny_lumina2 import LUMINA2_SMALL, lumina2_pipeline
from tiny_qwen_image_21 import QWEN_IMAGE_21_SMALL, qwen_image_21_pipeline
from tiny_transformers import (
    FLUX_SMALL,
    QWEN_IMAGE_SMALL,
    SD3_SMALL,
    flux_pipeline,
    qwen_image_pipeline,
    sd3_pipeline,
)
from tiny_z_image import Z_IMAGE_SMALL, z_image_pipeline

from afa import Ensemble, UserError
from afa.cli.main import main
from afa.experts.shipped import KNOWN_CONFIGS
from afa.models.registry import FAMILIES, denoiser_of

PIPELINES = {
    "sd": partial(sd_pipeline, text_seed=0, **ONE_LEVEL),
    "sdxl": sdxl_pipeline,
    "sd3": partial(sd3_pipeline, **SD3_SMALL),
    "flux": partial(flux_pipeline, **FLUX_SMALL),
    "flux2": partial(flux2_pipeline, **FLUX2_SMALL),
    "flux2 klein": partial(klein_pipeline, **FLUX2_SMALL),
    "qwen-image": partial(qwen_image_pipeline, **QWEN_IMAGE_SMALL),
    "z-image": partial(z_image_pipeline, **Z_IMAGE_SMALL),
    "chroma": partial(chroma_pipeline, **CHROMA_SMALL),
    "qwen-image-2.1": partial(qwen_image_21_pipeline, **QWEN_IMAGE_21_SMALL),
    "krea2": partial(krea2_pipeline, **KREA2_SMALL),
    "lumina2": partial(lumina2_pipeline, **LUMINA2_SMALL),
}
SMALL = "--hidden 8 --heads 2 --depth 1 --resolution 32 --batch-size 2 --held-out 2 --evaluate-every 1 --lr 1e-2 --device cpu".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    rng, lines = np.random.default_rng(0), []
    for index in range(8):
        Image.fromarray(rng.integers(0, 255, (64, 72, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": "a red bicycle" if index % 2 else "a cat on a lawn"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module", params=PIPELINES)
def trained(request, images, tmp_path_factory):
    """Two random experts in folders, and their ensemble after two steps. One predicts too much, so that there is something to learn."""
    place = tmp_path_factory.mktemp(request.param)
    experts = [str(place / name) for name in ("photo", "paint")]
    for seed, expert in enumerate(experts):
        pipe = PIPELINES[request.param](seed)
        for parameter in denoiser_of(pipe).parameters():
            parameter.data.mul_(1 + 2 * seed)
        pipe.save_pretrained(expert)
    assert main(["train", "--experts", *experts, "--data", str(images), "--output", str(place / "out"), "--steps", "2", "--aggregator", "sabw", *SMALL]) == 0
    return place


@pytest.fixture(scope="module")
def loaded(trained):
    return Ensemble.load(trained / "out")


def test_there_is_a_pipeline_of_every_family():
    families = {Ensemble.from_experts([make(0)], aggregator="mean").denoiser.family for make in PIPELINES.values()}
    assert families == set(FAMILIES)


def test_two_steps_of_training_change_the_aggregators_and_are_measured(loaded):
    record = loaded.training
    assert record["steps"] == 2
    assert all(np.isfinite(value["value"]) for value in record["held_out_loss"].values())
    assert any(parameter.abs().max() > 0 for name, parameter in loaded.aggregators.named_parameters() if name.endswith("conv_out.weight"))


def test_what_was_trained_draws_through_the_stock_pipeline_and_is_found_again(loaded, tmp_path):
    loaded.save(tmp_path / "again", bundle=True)
    drawn = []
    for ensemble in (loaded, Ensemble.load(tmp_path / "again")):
        pipe = ensemble.pipeline()
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe).__module__.startswith("diffusers.")
        generator = torch.Generator().manual_seed(0)
        drawn.append(pipe(prompt="a red bicycle", num_inference_steps=2, height=32, width=32, output_type="np", generator=generator).images)
    assert np.isfinite(drawn[0]).all()
    assert np.array_equal(*drawn)


def test_the_commands_take_every_family(trained, tmp_path, capsys):
    assert main(["inspect", str(trained / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["mismatches"] == []
    assert all(stage["fused"] in (True, False) for stage in facts["stages"])
    sides = ["--width", "32", "--height", "32", "--steps", "2", "--device", "cpu"]
    assert main(["generate", str(trained / "out"), "--prompt", "a cat", "--output", str(tmp_path / "drawn"), "--weights", *sides]) == 0
    maps = np.load(tmp_path / "drawn" / "00000-00.weights.npz")
    fused = [stage["name"] for stage in facts["stages"] if stage["fused"]]
    assert [name for name in maps.files if name not in ("timesteps", "experts")] == fused
    assert maps[fused[-1]].shape[:2] == (2, 2)  # steps, experts


def test_fused_text_tokens_are_refused_where_blocks_only_read_them():
    with pytest.raises(UserError, match="text_stream fused is for blocks that change text tokens"):
        Ensemble.from_experts([sd_pipeline(0), sd_pipeline(1)], text_stream="fused")
    assert Ensemble.from_experts([sd3_pipeline(0), sd3_pipeline(1)], text_stream="fused").denoiser.recipe.text_stream == "fused"


def test_the_page_of_families_says_what_registries_and_the_tests_own_list_say():
    """Written by `python docs/family_tables.py --quick`."""
    home = Path(__file__).parent.parent / "docs"
    script = importlib.util.spec_from_file_location("family_tables", home / "family_tables.py")
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    page = (home / "families.md").read_text(encoding="utf-8")
    for name, lines in module.quick_tables().items():
        assert module.part(name).search(page)[2] == "\n".join(lines) + "\n", name


def test_the_page_of_families_has_a_row_for_every_shipped_config_and_family():
    page = (Path(__file__).parent.parent / "docs" / "families.md").read_text(encoding="utf-8")
    assert [name for name in KNOWN_CONFIGS if f"| `{name}` |" not in page] == []
    assert [name for name in FAMILIES if f"| `{name}` |" not in page] == []
