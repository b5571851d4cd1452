"""Trained controls, further laws: fair to the last bit, on every architecture, precision and number of processes."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from processes import in_processes
from test_controls import settings, tensors, tuned  # noqa: F401 (fixtures)
from test_training import experts, images  # noqa: F401 (fixtures)
from tiny import ONE_LEVEL, inputs, sd_unet, sdxl_inputs, sdxl_pipeline

from afa import UserError
from afa.aggregators.registry import Recipe
from afa.cost import count_flops, count_training_flops
from afa.experts.description import describe_config
from afa.experts.load import load_expert
from afa.models.unet import UNetEnsemble
from afa.training.conditions import Conditions
from afa.training.finetune import (
    FILE,
    RECORD,
    add_lora,
    equal_compute_steps,
    finetune,
    fuse_lora,
    matching_rank,
    parameters_at_rank,
    plan_finetune,
)
from afa.training.objectives import Mse
from afa.training.run import train
from afa.training.settings import LoopSettings, TrainSettings


def as_aggregators(settings, experts, output):  # noqa: F811
    """The same run, training an ensemble's aggregators instead."""
    shared = {field.name: getattr(settings, field.name) for field in fields(LoopSettings)}
    return TrainSettings(**{**shared, "output": str(output)}, experts=experts, hidden=8, heads=2, depth=1)


def meta_unet():
    with torch.device("meta"):
        return sd_unet(**ONE_LEVEL | {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}).requires_grad_(False)


def meta_router(count):
    """Experts whose predictions alone are fused."""
    with torch.device("meta"):
        return UNetEnsemble([meta_unet() for _ in range(count)], recipe=Recipe("sabw", {"hidden": 8, "heads": 2, "depth": 1}), placement="out")


def lora_flops(rank, batch=1):
    """Of a training step of a LoRA on the small U-Net."""
    model = meta_unet()
    with torch.device("meta"):
        add_lora(model, rank)
    return count_training_flops(model, 16, 16, batch)


def test_batches_noise_and_dropped_captions_are_those_of_the_aggregators_step_by_step(settings, experts, tmp_path, monkeypatch):  # noqa: F811
    """With micro-batches and many dropped captions: the same examples, latents, noise and timesteps in the same order."""
    seen, loss, encode = [], Mse.loss, Conditions.__call__

    def note_captions(self, captions, sizes, dropped):
        seen.append((captions, sizes.tolist(), dropped.tolist()))
        return encode(self, captions, sizes, dropped)

    def note_batch(self, work):
        found, batch = loss(self, work), work.batch
        if torch.is_grad_enabled():
            seen[-1] += (batch.latents.tolist(), batch.noise.tolist(), batch.steps.tolist())
        return found

    monkeypatch.setattr(Conditions, "__call__", note_captions)
    monkeypatch.setattr(Mse, "loss", note_batch)
    settings = replace(settings, caption_dropout=0.5, accumulate=2, steps=3, evaluate_every=3)
    train(as_aggregators(settings, experts, tmp_path / "ensemble"))
    ensemble = [entry for entry in seen if len(entry) == 6]
    seen.clear()
    finetune(settings)
    assert [entry for entry in seen if len(entry) == 6] == ensemble
    assert len(ensemble) == 6 and {flag for entry in ensemble for flag in entry[2]} == {True, False}


def test_the_loss_before_training_is_the_experts_own(settings, experts, tmp_path):  # noqa: F811
    record = finetune(replace(settings, steps=1))
    alone = train(as_aggregators(replace(settings, steps=1), experts, tmp_path / "ensemble"))
    assert record["held_out_loss"]["expert"] == pytest.approx(alone["held_out_loss"]["photo"], rel=1e-6)
    assert record["history"][0]["held_out_loss"] == pytest.approx(record["held_out_loss"]["expert"]["value"], rel=1e-12)


def test_equal_seeds_give_equal_bits_and_others_do_not(settings, tmp_path):  # noqa: F811
    runs = [replace(settings, output=str(tmp_path / name), seed=seed, steps=1) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    histories = []
    for index, run in enumerate(runs):
        torch.manual_seed(index)
        histories.append(finetune(run)["history"])
    first, second, other = (tensors(run) for run in runs)
    assert histories[0] == histories[1] != histories[2]
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in first.items() if "lora_A" in name)


def test_a_lora_fused_into_the_weights_is_the_trained_model(tuned):  # noqa: F811
    run, _, model = tuned
    expert = load_expert(run.expert)
    fuse_lora(expert.model, Path(run.output) / FILE)
    with torch.no_grad():
        assert torch.allclose(expert.model(**inputs()).sample, model(**inputs()).sample, atol=1e-5)
    assert not [name for name, _ in expert.model.named_parameters() if "lora" in name]


def test_sdxl_trains_and_its_file_joins_it(settings, tmp_path):  # noqa: F811
    sdxl_pipeline(0).save_pretrained(tmp_path / "xl")
    settings = replace(settings, expert=str(tmp_path / "xl"), steps=2)
    planned = plan_finetune(settings)
    record = finetune(settings, planned)
    joined = load_expert(f"{settings.expert}+{Path(settings.output) / FILE}")
    assert record["parameters"] == parameters_at_rank(joined.model, 2)
    with torch.no_grad():
        trained = planned[0].ensemble.denoiser.experts[0](**sdxl_inputs()).sample
        assert torch.allclose(joined.model(**sdxl_inputs()).sample, trained, atol=1e-5)


def test_half_precision_experts_get_a_lora_in_full_precision(settings):  # noqa: F811
    planned = plan_finetune(replace(settings, dtype="bfloat16", steps=2, evaluate_every=1))
    first, *later = finetune(planned[0].settings, planned)["history"]
    assert all(entry["held_out_loss"] != first["held_out_loss"] for entry in later)  # eight bits are enough for it to have an effect
    model = planned[0].ensemble.denoiser.experts[0]
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    assert {tensor.dtype for tensor in tensors(settings).values()} == {torch.float32}


def test_the_vae_can_be_the_ensembles(settings, experts, tmp_path):  # noqa: F811
    """Latents of another VAE would be other data."""
    record = finetune(replace(settings, steps=1, vae=experts[1]))
    other = train(replace(as_aggregators(replace(settings, steps=1), experts, tmp_path / "ensemble"), vae="paint"))
    assert record["held_out_loss"]["expert"] == pytest.approx(other["held_out_loss"]["photo"], rel=1e-6)


def test_checkpointing_changes_memory_not_results(settings, tmp_path):  # noqa: F811
    plain, other = (
        finetune(replace(settings, output=str(tmp_path / name), steps=2, gradient_checkpointing=name == "other"))["history"]
        for name in ("plain", "other")
    )
    assert [entry["held_out_loss"] for entry in plain] == pytest.approx([entry["held_out_loss"] for entry in other], rel=1e-5)
    assert plain[-1]["held_out_loss"] != plain[0]["held_out_loss"]


def test_two_processes_train_one_lora(settings):  # noqa: F811
    settings = replace(settings, steps=2)

    def work():
        planned = plan_finetune(settings)
        finetune(settings, planned)
        model = planned[0].ensemble.denoiser.experts[0]
        return sum(float(p.detach().double().abs().sum()) for name, p in model.named_parameters() if "lora_" in name)

    totals = in_processes(work)
    assert totals[0] == totals[1]
    saved = sum(tensor.double().abs().sum().item() for tensor in tensors(settings).values())
    assert saved == pytest.approx(totals[0], rel=1e-9)


def test_a_router_on_predictions_costs_the_forward_passes_and_itself():
    """No gradient crosses an expert there, so the count can be made by hand."""
    router, forward = meta_router(2), count_flops(meta_router(2), 16, 16)
    (own,) = forward.aggregators.values()
    assert forward.total == 2 * count_flops(meta_unet(), 16, 16).total + own
    assert forward.total + own < count_training_flops(router, 16, 16) <= forward.total + 2 * own


def test_every_rank_of_a_lora_costs_the_same_and_so_does_every_sample():
    costs = [lora_flops(rank) for rank in (1, 2, 3)]
    assert costs[2] - costs[1] == costs[1] - costs[0] > 0
    assert lora_flops(2, batch=4) == 4 * costs[1]


def test_equal_compute_follows_from_the_two_counts():
    ratio = count_training_flops(meta_router(2), 16, 16) / lora_flops(2)
    assert equal_compute_steps(1000, meta_router(2), 2, 4) == round(1000 * ratio)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": {"ranks": 2}}'])
def test_a_broken_record_is_one_sentence(settings, content):  # noqa: F811
    Path(settings.output).mkdir()
    (Path(settings.output) / RECORD).write_text(content)
    with pytest.raises(UserError, match=r"finetune\.json.*; choose another --output"):
        finetune(settings)


def test_a_device_that_is_not_there_is_found_by_the_plan(settings):  # noqa: F811
    if torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(UserError, match="--device mps cannot be used here"):
        plan_finetune(replace(settings, device="mps"))


@pytest.mark.parametrize(("config", "aggregators", "rank", "parameters"), [("sd15", 45_132_416, 53, 45_771_648), ("sdxl", 45_750_144, 16, 47_093_760)])
def test_the_rank_that_matches_three_experts_of_published_sizes(config, aggregators, rank, parameters):
    model = describe_config("expert", config).expert.model
    assert matching_rank(model, aggregators) == rank
    assert parameters_at_rank(model, rank) == parameters
