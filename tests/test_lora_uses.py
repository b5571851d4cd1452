"""What else is done with experts that are LoRAs on one base: stored, merged, counted, trained; each as with fused copies."""

import pytest
import torch
from inspected import pipe
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from test_lora_sharing import close, once
from tiny import SMALL, inputs, sd_pipeline, sd_unet
from tiny_loras import write_lora

from afa import Ensemble, merge_experts, merge_pipelines
from afa.aggregators.registry import Recipe, count_parameters
from afa.evaluation.controls import best_expert
from afa.experts.load import load_expert
from afa.experts.lora import fused, lora_numbers, tuner_layers
from afa.experts.quantised import STORES, kept_elsewhere, store_weights, stored_bytes
from afa.inspection import Subject, facts
from afa.models.unet import UNetEnsemble
from afa.sampling.base import own_pipeline
from afa.training.finetune import matching_rank
from afa.training.plan import step_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    sd_pipeline(0).save_pretrained(root / "base")
    for seed, name in enumerate(["ink", "oil"], start=1):
        write_lora("sd", root / f"{name}.safetensors", seed=seed, text=name == "oil")
    return root


def specs(folder):
    return [f"{name}={folder / 'base'}+{folder / name}.safetensors*0.8" for name in ("ink", "oil")]


@pytest.fixture
def ensemble(folder):
    return Ensemble.from_experts(specs(folder), aggregator="mean")


@pytest.fixture(scope="module")
def copies(folder):
    """The same experts, each loaded alone, its LoRA in its weights."""
    return [load_expert(spec) for spec in specs(folder)]


def test_experts_of_these_fixtures_are_shared_and_fused(ensemble, copies):
    assert all(any(tuner_layers(expert.model)) for expert in ensemble.experts)
    assert not any(any(tuner_layers(module)) for expert in copies for module in (expert.model, *expert.text_encoders))


def test_a_merge_sees_fused_weights(ensemble, copies):
    found, expected = merge_experts(ensemble.experts, "weighted"), merge_experts(copies, "weighted")
    for mine, theirs in zip((found.model, *found.text_encoders), (expected.model, *expected.text_encoders), strict=True):
        assert mine.state_dict().keys() == theirs.state_dict().keys()
        assert all(close(mine.state_dict()[key], tensor) for key, tensor in theirs.state_dict().items())
    assert any(tuner_layers(ensemble.experts[0].model))  # the experts stay as they are


def test_a_merge_of_pipelines_sees_fused_weights(folder):
    pipes = [sd_pipeline(0), sd_pipeline(1)]
    pipes[0].load_lora_weights(str(folder / "ink.safetensors"))
    expected = [sd_pipeline(0), sd_pipeline(1)]
    expected[0].load_lora_weights(str(folder / "ink.safetensors"))
    expected[0].fuse_lora()
    expected[0].unload_lora_weights()
    found, expected = (merge_pipelines(each).unet.state_dict() for each in (pipes, expected))
    assert found.keys() == expected.keys()
    assert all(close(found[key], expected[key]) for key in expected)


def test_a_rival_alone_is_the_fused_expert(ensemble, copies):
    for shared, alone in zip(ensemble.experts, copies, strict=True):
        assert close(once(own_pipeline(shared).pipeline), once(own_pipeline(alone).pipeline))


def test_the_control_is_trained_on_plain_layers_of_its_own(ensemble, copies):
    found = staticmethod(lambda name: ensemble.experts[ensemble.names.index(name)])
    setup = type("Setup", (), {"ensemble": ensemble, "ranking": ("oil", "ink"), "expert": found})()
    best = best_expert(setup).model
    assert best.state_dict().keys() == sd_unet(**SMALL).state_dict().keys()
    with torch.no_grad():
        assert close(best(**inputs()).sample, copies[1].model(**inputs()).sample)
        best.conv_in.weight.zero_()
    assert ensemble.experts[1].model.conv_in.weight.abs().max() > 0
    assert matching_rank(ensemble.experts[0].model, 50_000) == matching_rank(sd_unet(**SMALL), 50_000)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base wide enough to be stored in blocks, and a LoRA on it."""
    root = tmp_path_factory.mktemp("wide")
    base = sd_pipeline(0, block_out_channels=(32, 64))
    base.save_pretrained(root / "base")
    base.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    layers = {key: tensor.contiguous() for key, tensor in get_peft_model_state_dict(base.unet).items()}
    type(base).save_lora_weights(root, unet_lora_layers=layers, weight_name="ink.safetensors")
    return root


@pytest.mark.parametrize("store", STORES)
def test_a_shared_base_is_stored_once(wide, store):
    ensemble = Ensemble.from_experts([f"a={wide / 'base'}+{wide / 'ink.safetensors'}", f"b={wide / 'base'}"], aggregator="mean")
    with torch.no_grad():
        before = ensemble.denoiser(**inputs()).sample
    experts = ensemble.denoiser.experts
    adapters = sum(parameter.numel() * 4 for key, parameter in experts.named_parameters() if "lora_" in key)
    store_weights(experts, store)
    alone = load_expert(str(wide / "base")).model.requires_grad_(False)
    store_weights(alone, "int8" if store.startswith("delta") else store)
    assert stored_bytes(experts) == stored_bytes(alone) + adapters
    assert len({tensor.data_ptr() for tensor in kept_elsewhere(experts)}) == len(kept_elsewhere(alone))
    with torch.no_grad():
        after = ensemble.denoiser.double()(**{key: value.double() if value.is_floating_point() else value for key, value in inputs().items()}).sample
    assert stored_bytes(experts) <= 2 * (stored_bytes(alone) + adapters)  # a cast does not multiply it
    error = (after - before).square().mean() / before.square().mean()
    assert error < {"cpu": 1e-8, "int8": 1e-2, "fp8": 2e-2, "delta1": 1e-2, "delta2": 1e-2}[store]


def test_the_memory_of_training_counts_the_base_once(ensemble, copies):
    def needed(experts):
        denoiser = UNetEnsemble([expert.model for expert in experts], recipe=Recipe("sabw", {"hidden": 8, "heads": 1, "depth": 1}), placement="out")
        return step_bytes(denoiser, 1, 16, torch.float32, checkpointing=True)

    model = stored_bytes(copies[0].model)
    adapters = stored_bytes(ensemble.denoiser.experts) - model
    assert adapters > 0
    saved = needed(copies) - needed(ensemble.experts)
    assert saved == pytest.approx(model - adapters, rel=0.1)  # but for what LoRAs make on the way


def test_inspection_counts_the_base_once(tmp_path):
    pipe(0).save_pretrained(tmp_path / "base")
    lora = pipe(0)
    lora.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = {key: tensor.contiguous() for key, tensor in get_peft_model_state_dict(lora.unet).items()}
    type(lora).save_lora_weights(tmp_path, unet_lora_layers=layers, weight_name="ink.safetensors")
    numbers = sum(tensor.numel() for tensor in layers.values())
    base, text = count_parameters(pipe(0).unet), count_parameters(pipe(0).text_encoder)

    def held(*experts):
        return facts(Subject.from_sources([str(one) for one in experts], None, Recipe("mean"), "out"))["cost"]["parameters"]

    styled = f"styled={tmp_path / 'base'}+{tmp_path / 'ink.safetensors'}"
    assert held(styled, tmp_path / "base")["experts"] == base + numbers
    assert held(styled, tmp_path / "base")["text_encoders"] == text
    assert held(styled)["experts"] == base  # alone on its base, it is in the weights
    ensemble = Ensemble.from_experts([styled, str(tmp_path / "base")], aggregator="mean")
    assert count_parameters(ensemble.denoiser.experts) == base + numbers
    assert lora_numbers(ensemble.experts[0].located) == numbers


def test_a_model_without_loras_is_itself():
    unet = sd_unet()
    assert fused(unet) is unet
