"""Trained controls: a LoRA sees what the ensemble saw, has as many parameters, and costs as much where it should."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from family_models import MODELS, sample_of
from safetensors.torch import load_file
from test_training import experts, images  # noqa: F401 (fixtures)
from tiny import ONE_LEVEL, inputs, sd_unet
from tiny_transformers import FLUX_SMALL, SD3_SMALL

from afa import Ensemble, UserError
from afa.aggregators.registry import Recipe
from afa.cli.main import main
from afa.models.registry import FAMILIES, family_of
from afa.models.unet import UNetEnsemble
from afa.training.finetune import (
    FILE,
    RECORD,
    adapted,
    add_lora,
    equal_compute_steps,
    finetune,
    matching_rank,
    parameters_at_rank,
    plan_finetune,
)
from afa.training.finetune_settings import LoraSettings
from afa.training.log import LOG
from afa.training.loop import Trainer
from afa.training.run import train
from afa.training.settings import TrainSettings
from afa.training.state import begin_from, state_file

SMALL_RUN = {"rank": 2, "resolution": 32, "batch_size": 2, "held_out": 2, "steps": 4, "evaluate_every": 2, "lr": 1e-2, "device": "cpu"}


@pytest.fixture
def settings(experts, images, tmp_path):  # noqa: F811
    return LoraSettings(expert=experts[0], data=str(images), output=str(tmp_path / "lora"), **SMALL_RUN)


@pytest.fixture(scope="module")
def tuned(experts, images, tmp_path_factory):  # noqa: F811
    """A finished run that tests only read: its settings, its record, and the model as it was trained in memory."""
    settings = LoraSettings(expert=experts[0], data=str(images), output=str(tmp_path_factory.mktemp("tuned") / "lora"), **SMALL_RUN)
    planned = plan_finetune(settings)
    return settings, finetune(settings, planned), planned[0].ensemble.denoiser.experts[0]


def tensors(settings):
    return load_file(Path(settings.output) / FILE)


@pytest.mark.parametrize("family", MODELS)
def test_an_untrained_lora_changes_nothing_and_it_alone_is_trained_to_the_last_parameter_that_was_promised(family):
    """None is counted that cannot change the prediction, such as those of SD3's last question of the text."""
    model, call = MODELS[family].make().requires_grad_(False), MODELS[family].call()
    promised = parameters_at_rank(model, 3)
    with torch.no_grad():
        before = sample_of(model(**call))
        trained = add_lora(model, 3)
        assert torch.equal(sample_of(model(**call)), before)
    assert sum(parameter.numel() for parameter in trained.parameters()) == promised
    assert {parameter for parameter in model.parameters() if parameter.requires_grad} == set(trained.parameters())
    for name, parameter in trained.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if "lora_B" in name else 1)
    sample_of(model(**call)).square().mean().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    assert [name for name, parameter in trained.named_parameters() if not parameter.grad.any()] == []


@pytest.mark.parametrize("family", MODELS)
def test_only_what_has_no_say_is_left_out_for_it(family):
    """Whatever a family calls unheard may be anything, and the prediction stays the same bit for bit."""
    model, call = MODELS[family].make(), MODELS[family].call()
    with torch.no_grad():
        before = sample_of(model(**call))
        for stage in FAMILIES[family_of(model)].stages(model):
            for parameter in (parameter for module in stage.unused_modules() for parameter in module.parameters()):
                torch.nn.init.normal_(parameter)
        assert torch.equal(sample_of(model(**call)), before)


ATTENTION = {"attn.to_q", "attn.to_k", "attn.to_v"}
JOINT = ATTENTION | {"attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"}
FEED_FORWARD = {f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")}
LAST_OF_SD3 = (JOINT | {"ff.net.0.proj", "ff.net.2"}) - {"attn.add_q_proj", "attn.to_add_out"}
ADAPTED = {  # place -> what is adapted there, written out
    "sd": {
        "down_blocks.0.resnets.0": {"conv1", "conv2"},
        "mid_block.attentions.0": {f"transformer_blocks.0.{part}" for part in (
            *(f"attn{number}.{layer}" for number in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")), "ff.net.0.proj", "ff.net.2",
        )},
        "up_blocks.0.upsamplers.0": set(), "time_embedding": set(), "conv_in": set(), "conv_out": set(),
    },
    "sd3": {
        "transformer_blocks.0": JOINT | FEED_FORWARD | {f"attn2.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")},
        "transformer_blocks.2": JOINT | FEED_FORWARD, "transformer_blocks.3": LAST_OF_SD3,
        "norm_out": set(), "proj_out": set(), "context_embedder": set(), "time_text_embed": set(), "pos_embed": set(),
    },
    "flux": {
        "transformer_blocks.1": JOINT | FEED_FORWARD, "single_transformer_blocks.2": ATTENTION | {"proj_mlp", "proj_out"},
        "norm_out": set(), "proj_out": set(), "context_embedder": set(), "x_embedder": set(), "time_text_embed": set(),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", ADAPTED)
def test_attention_feed_forward_and_residual_convolutions_are_adapted(family):
    names = [name for name, _ in adapted(MODELS[family].make())]
    assert len(names) == len(set(names))
    for place, expected in ADAPTED[family].items():
        inside = {name.removeprefix(f"{place}.") for name in names if name == place or name.startswith(f"{place}.")}
        assert inside == expected, place


MODULATES = ("norm", "mod.", "adaLN")  # names of layers that make scales and shifts of the timestep


@pytest.mark.parametrize("family", [name for name in MODELS if not name.startswith("sd") or name == "sd3"])
def test_every_linear_layer_of_a_transformers_blocks_is_adapted_but_those_that_modulate(family):
    model = MODELS[family].make()
    blocks = MODELS[family].ensemble([model]).stages[:-1]
    unused = {part for stage in blocks for module in stage.unused_modules() for part in module.modules()}
    inside = {part for stage in blocks for module in stage.modules() for part in module.modules()} - unused
    linear = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part in inside}
    modulating = {name for name in linear if any(mark in name for mark in MODULATES)}
    assert {name for name, _ in adapted(model)} == linear - modulating


def test_flux_and_sd3_of_published_sizes_have_the_parameters_counted_by_hand():
    """A linear layer of n inputs and m outputs has n + m a rank; in units of the width, an attention of image and text has 16."""
    with torch.device("meta"):
        sd3 = SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
        flux = FluxTransformer2DModel(guidance_embeds=True)
    assert parameters_at_rank(sd3, 1) == (23 * (16 + 10 + 10) + (16 - 4) + 10) * 1536
    assert parameters_at_rank(flux, 4) == 4 * (19 * (16 + 10 + 10) + 38 * (6 + 5 + 6)) * 3072


@pytest.mark.parametrize("family", MODELS)
def test_the_matching_rank_is_the_smallest_with_enough_parameters(family):
    model = MODELS[family].make()
    for wanted in (1, 10_000, 123_456):
        rank = matching_rank(model, wanted)
        assert parameters_at_rank(model, rank) >= wanted
        assert rank == 1 or parameters_at_rank(model, rank - 1) < wanted


@pytest.mark.parametrize(("family", "less"), [("sd", ONE_LEVEL), ("sd3", SD3_SMALL), ("flux", FLUX_SMALL)])
def test_equal_compute_gives_a_single_model_more_steps_the_more_experts_there_are(family, less):
    kind, make, recipe = MODELS[family].ensemble, MODELS[family].make, Recipe("sabw", {"hidden": 8, "heads": 2, "depth": 0})
    made = [kind([make(seed, **less) for seed in range(count)], recipe=recipe, placement="layers") for count in (2, 3)]
    steps = [equal_compute_steps(100, denoiser, 2, 2) for denoiser in made]
    assert 100 < steps[0] < steps[1]


def test_equal_compute_ignores_where_the_experts_lie():
    """Counting touches no weights: not even those of experts that are too large to copy."""
    denoiser = UNetEnsemble([sd_unet(0, **ONE_LEVEL), sd_unet(1, **ONE_LEVEL)], recipe=Recipe("sabw", {"hidden": 8, "heads": 2, "depth": 0}))
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    equal_compute_steps(10, denoiser, 2, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.state_dict().items())


def test_the_file_joins_the_expert_as_it_was_trained(tuned):
    settings, record, model = tuned
    assert record["steps"] == 4 and record["parameters"] == parameters_at_rank(sd_unet(**ONE_LEVEL), 2)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors(settings).items() if "lora_B" in name)
    joined = Ensemble.from_experts([f"tuned={settings.expert}+{Path(settings.output) / FILE}"], aggregator="mean")
    call = inputs()
    with torch.no_grad():
        assert torch.allclose(joined.denoiser.experts[0](**call).sample, model(**call).sample, atol=1e-5)


def test_a_stock_pipeline_loads_the_file(tuned):
    from diffusers import StableDiffusionPipeline

    settings, _, model = tuned
    pipe = StableDiffusionPipeline.from_pretrained(settings.expert, safety_checker=None)
    pipe.load_lora_weights(settings.output)
    with torch.no_grad():
        assert torch.allclose(pipe.unet(**inputs()).sample, model(**inputs()).sample, atol=1e-5)


def test_one_file_of_kohyas_names_changes_the_expert_as_diffusers_file_does(tuned, tmp_path):
    settings, _, _ = tuned
    alone = replace(settings, output=str(tmp_path / "lora.safetensors"))
    finetune(alone)
    names = set(load_file(alone.output))
    assert {name.rpartition(".")[2] for name in names} == {"weight", "alpha"} and all(name.startswith("lora_unet_") for name in names)
    files = [Path(settings.output) / FILE, Path(alone.output)]
    one, other = (Ensemble.from_experts([f"tuned={settings.expert}+{file}"], aggregator="mean").denoiser.experts[0] for file in files)
    assert all(torch.allclose(tensor, other.state_dict()[name], atol=1e-6) for name, tensor in one.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "lora.finetune").iterdir() if path.is_file()) == ["finetune.json", LOG]
    assert finetune(alone)["steps"] == 4
    Path(alone.output).unlink()
    with pytest.raises(UserError, match="is finished, and it is gone"):
        finetune(alone)


def test_a_file_that_is_there_already_is_not_written_over(settings, tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="exists already"):
        plan_finetune(replace(settings, output=str(tmp_path / "lora.safetensors")))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        plan_finetune(replace(settings, output=str(tmp_path / "folder.safetensors")))


def test_resumed_training_equals_uninterrupted(tuned, tmp_path, monkeypatch):
    settings, _, _ = tuned
    again = replace(settings, output=str(tmp_path / "again"))
    step = Trainer._step

    def interrupted(self):
        if self.progress.step == 2:
            self._save()
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(again)
    monkeypatch.setattr(Trainer, "_step", step)
    finetune(again)
    assert all(torch.equal(tensor, tensors(again)[name]) for name, tensor in tensors(settings).items())


def test_a_lora_sees_what_the_ensemble_saw(settings, experts, tmp_path, monkeypatch):  # noqa: F811
    """The same examples, latents, noise and timesteps at every step, and the same held-out measure."""
    from afa.training.objectives import Mse

    seen, loss = [], Mse.loss

    def note(self, work):
        seen.append((work.batch.latents.clone(), work.batch.noise.clone(), work.batch.steps.clone()))
        return loss(self, work)

    monkeypatch.setattr(Mse, "loss", note)
    settings = replace(settings, steps=2)
    finetune(settings)
    shared = {name: getattr(settings, name) for name in ("data", "resolution", "batch_size", "held_out", "steps", "evaluate_every", "lr", "device")}
    tuned = [batch for batch in seen if len(batch[2]) == 2]
    seen.clear()
    train(TrainSettings(experts=experts, output=str(tmp_path / "ensemble"), hidden=8, heads=2, depth=1, **shared))
    ensemble = [batch for batch in seen if len(batch[2]) == 2]
    assert len(tuned) > 2  # of the two steps, and those of the measure
    for one in tuned:
        assert any(all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) for other in ensemble)


def test_a_complete_run_is_only_read_and_another_is_refused(tuned, monkeypatch):
    settings, record, _ = tuned
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("trained again"))
    assert finetune(settings) == json.loads((Path(settings.output) / RECORD).read_text()) == json.loads(json.dumps(record))
    with pytest.raises(UserError, match=r"was begun with --rank 2 \(now 3\)"):
        finetune(replace(settings, rank=3))
    with pytest.raises(UserError, match=r"finished with --steps 4 \(now 5\)"):
        finetune(replace(settings, steps=5))


def test_as_many_parameters_as_an_ensemble(settings, experts, tmp_path):  # noqa: F811
    Ensemble.from_experts(experts, hidden=8, heads=2, depth=1).save(tmp_path / "ensemble")
    planned, rank = plan_finetune(replace(settings, rank=None, like=str(tmp_path / "ensemble")))
    wanted = json.loads((tmp_path / "ensemble" / "afa.json").read_text())["aggregator"]["parameters"]
    model = planned.ensemble.denoiser.experts[0]
    assert parameters_at_rank(model, rank) >= wanted > parameters_at_rank(model, rank - 1)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rank", "2", "--like", "x"], "give either --rank N or --like ENSEMBLE"),
        ([], "give either --rank N or --like ENSEMBLE"),
        (["--rank", "0"], "--rank 0 is too small"),
        (["--like", "nowhere"], "nowhere is no ensemble"),
    ],
)
def test_bad_input_is_one_sentence(settings, flags, sentence, capsys):
    command = ["finetune", settings.expert, "--data", settings.data, "--output", settings.output, "--resolution", "32"]
    assert main([*command, *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not Path(settings.output).exists()


def test_a_dry_run_leaves_nothing_behind(settings, capsys):
    command = ["finetune", settings.expert, "--data", settings.data, "--output", settings.output, "--resolution", "32", "--rank", "2"]
    assert main([*command, "--dry-run"]) == 0
    assert "rank 2" in capsys.readouterr().out
    assert not Path(settings.output).exists()


def test_a_longer_run_goes_on_from_a_shorter_one_bit_for_bit(tuned, settings, tmp_path):
    whole, wanted, _ = tuned
    shorter, kept = replace(settings, steps=2, output=str(tmp_path / "shorter")), tmp_path / "kept.pt"
    finetune(shorter, keep=kept)
    assert kept.exists() and sorted(path.name for path in Path(shorter.output).iterdir()) == [RECORD, LOG, FILE]
    begin_from(settings, kept)
    record = finetune(settings)
    assert not kept.exists() and not state_file(settings).exists()
    assert record["history"] == wanted["history"] and record["held_out_loss"] == wanted["held_out_loss"]
    assert all(torch.equal(tensor, tensors(settings)[name]) for name, tensor in tensors(whole).items())


def test_what_was_summed_before_a_longer_run_is_not_lost(tuned, settings, tmp_path):
    """The shorter one ended between two measurements, with one of its own."""
    finetune(replace(settings, steps=1, output=str(tmp_path / "shorter")), keep=tmp_path / "kept.pt")
    begin_from(settings, tmp_path / "kept.pt")
    losses, wanted = ({entry["step"]: entry["training_loss"] for entry in record["history"]} for record in (finetune(settings), tuned[1]))
    assert losses[4] == wanted[4] and (losses[1] + losses[2]) / 2 == pytest.approx(wanted[2])


def test_a_run_begins_anew_where_no_shorter_one_left_its_state(settings, tmp_path):
    settings = replace(settings, steps=1)
    begin_from(settings, tmp_path / "nothing.pt")
    assert finetune(settings)["steps"] == 1
