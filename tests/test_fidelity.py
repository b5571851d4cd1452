"""Experts and aggregators of the reference release give the release's outputs and weight maps."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from afa.aggregators.registry import Recipe
from afa.denoiser.hooks import record_weights
from afa.models.unet import UNetEnsemble

REFERENCE = Path(__file__).parent / "reference"  # made by the unmodified release; see its README.md


@pytest.fixture(scope="module")
def reference_model():
    experts = [UNet2DConditionModel.from_pretrained(REFERENCE / f"unet_{index}").float() for index in range(2)]
    config = json.loads((REFERENCE / "aggregator_0" / "config.json").read_text())
    options = {"hidden": config["hidden_size"], "heads": config["num_attn_heads"], "depth": config["num_layers"]}
    model = UNetEnsemble(experts, recipe=Recipe("sabw", options)).eval()
    for number, aggregator in enumerate(model.aggregators.values()):
        aggregator.load_state_dict(load_file(REFERENCE / f"aggregator_{number}" / "aggregator.safetensors"))
    return model


@pytest.mark.parametrize("case", [0, 1])
def test_the_reference_releases_output_and_every_weight_map(reference_model, case):
    io = {name.split(".", 1)[1]: value.float() for name, value in load_file(REFERENCE / "io.safetensors").items() if name.startswith(f"{case}.")}
    text = torch.cat(list(io["text"]), dim=-1)  # (N, B, T, D) -> (B, T, N·D)
    with torch.no_grad(), record_weights(reference_model) as maps:
        output = reference_model(io["sample"], io["timestep"], text).sample
    assert (output - io["output"]).abs().max() < 1e-4
    for number, stage in enumerate(reference_model.stages):
        assert (maps.maps[0][stage.name] - io[f"map_{number:02}"]).abs().max() < 1e-4, stage.name
