"""A LoRA on every family: trained from files, in diffusers' own form, and again the same model wherever it is loaded."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from family_models import MODELS
from merging_models import PIPELINES, saved
from safetensors import safe_open
from test_training import images  # noqa: F401 (a fixture)

from afa import Ensemble
from afa.cli.main import main
from afa.experts.load import load_expert
from afa.training.finetune import (
    FILE,
    RECORD,
    finetune,
    fuse_lora,
    matching_rank,
    parameters_at_rank,
    plan_finetune,
)
from afa.training.finetune_settings import LoraSettings


@pytest.fixture(scope="module", params=PIPELINES)
def tuned(request, images, tmp_path_factory):  # noqa: F811
    """family, settings, record, and the model as it was trained in memory."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    expert = saved(PIPELINES[family](0), folder / "expert")
    small = {"resolution": 32, "batch_size": 2, "held_out": 2, "steps": 3, "evaluate_every": 3, "lr": 3e-2, "device": "cpu"}
    settings = LoraSettings(expert=str(expert), data=str(images), output=str(folder / "lora"), rank=2, **small)
    planned = plan_finetune(settings)
    record = finetune(settings, planned)
    return family, settings, record, planned[0].ensemble.denoiser.experts[0]


def component(family):
    return "transformer" if family in ("sd3", "flux") else "unet"


def predicted(model, family):
    with torch.no_grad():
        return model(**MODELS[family].call()).sample


def test_training_changes_the_prediction(tuned):
    family, settings, record, trained = tuned
    assert record["parameters"] == parameters_at_rank(load_expert(settings.expert).model, 2)
    assert record["best_step"] > 0
    assert (predicted(trained, family) - predicted(load_expert(settings.expert).model, family)).abs().max() > 1e-3


def test_a_stock_pipeline_loads_the_file(tuned):
    family, settings, _, trained = tuned
    pipe = DiffusionPipeline.from_pretrained(settings.expert, safety_checker=None, local_files_only=True)
    pipe.load_lora_weights(settings.output, local_files_only=True)
    model = getattr(pipe, component(family))
    assert torch.allclose(predicted(model, family), predicted(trained, family), atol=1e-6)


def test_fused_into_the_weights_it_is_the_trained_model(tuned):
    family, settings, _, trained = tuned
    model = load_expert(settings.expert).model
    fuse_lora(model, Path(settings.output) / FILE)
    assert torch.allclose(predicted(model, family), predicted(trained, family), atol=1e-5)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


def test_it_joins_the_expert_by_name(tuned):
    family, settings, _, trained = tuned
    joined = Ensemble.from_experts([f"tuned={settings.expert}+{Path(settings.output) / FILE}"], aggregator="mean", placement="out")
    assert torch.allclose(predicted(joined.denoiser.experts[0], family), predicted(trained, family), atol=1e-5)


def test_the_file_is_in_diffusers_own_form_and_says_what_it_is(tuned):
    family, settings, record, _ = tuned
    with safe_open(Path(settings.output) / FILE, "pt") as file:
        names, strings = list(file.keys()), file.metadata()
    assert all(name.startswith(f"{component(family)}.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert (strings["format"], strings["expert"], strings["rank"]) == ("pt", Path(settings.expert).name, "2")
    assert json.loads((Path(settings.output) / RECORD).read_text())["rank"] == record["rank"] == 2


PUBLISHED = {
    "sd3": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "joint_attention_dim": 4096},
    "flux": {"guidance_embeds": True},
}


@pytest.mark.parametrize(("family", "aggregators", "rank", "parameters"), [("sd3", 61_850_752, 48, 62_668_800), ("flux", 59_887_488, 15, 61_286_400)])
def test_the_rank_that_matches_three_experts_of_published_sizes(family, aggregators, rank, parameters):
    kind = {"sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel}[family]
    with torch.device("meta"):
        ensemble = MODELS[family].ensemble([kind(**PUBLISHED[family])] * 3)
    assert sum(parameter.numel() for parameter in ensemble.aggregators.parameters()) == aggregators
    assert matching_rank(ensemble.experts[0], aggregators) == rank
    assert parameters_at_rank(ensemble.experts[0], rank) == parameters


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_as_many_parameters_as_an_ensemble_of_that_family(family, images, tmp_path, capsys):  # noqa: F811
    experts = [str(saved(PIPELINES[family](seed), tmp_path / f"expert{seed}")) for seed in range(2)]
    Ensemble.from_experts(experts, hidden=8, heads=2, depth=1, placement="layers").save(tmp_path / "ensemble")
    wanted = json.loads((tmp_path / "ensemble/afa.json").read_text())["aggregator"]["parameters"]
    command = ["finetune", experts[0], "--data", str(images), "--output", str(tmp_path / "lora"), "--resolution", "32"]
    assert main([*command, "--like", str(tmp_path / "ensemble"), "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    each = parameters_at_rank(load_expert(experts[0]).model, 1)
    assert facts["trainable_parameters"] == facts["rank"] * each >= wanted > (facts["rank"] - 1) * each
    assert not (tmp_path / "lora").exists()
