"""The plan's memory is what a step then needs, counted tensor by tensor."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training import experts, images, settings  # noqa: F401 (fixtures)
from tiny import ONE_LEVEL, sd_pipeline

from afa.aggregators.registry import Recipe
from afa.cli.main import main
from afa.devices import LiveBytes
from afa.errors import UserError
from afa.inspection import Subject
from afa.training.loop import Trainer
from afa.training.plan import expected, step_bytes
from afa.training.run import plan, train

FEWER = {"placement": "every-2"}  # operations are counted one by one, those of aggregators above all
WIDE = ONE_LEVEL | {"block_out_channels": (32,)}


def measured(planned, monkeypatch):
    """The most bytes alive in the second step of a real run, with all that the loop holds."""
    found, original = [], Trainer._step

    def step(self):
        if self.progress.step == 0:  # the optimiser has no moments before
            return original(self)
        with LiveBytes() as counter:
            for parameter in self.denoiser.parameters():
                parameter.view(-1)  # seen, though a stage may not be run
            for tensor in [*self.average.shadow_params, *self.best]:
                tensor.view(-1)
            result = original(self)
        found.append(counter.peak)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        train(planned.settings, planned)
    (bytes_alive,) = found
    return bytes_alive


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"placement": "out"},
        {"gradient_checkpointing": True},
        {"checkpoint_large_maps": True},
        {"dtype": "bfloat16", **FEWER},
        {"batch_size": 6, "depth": 2, **FEWER},
        {"store": "int8", **FEWER},
        {"objective": "mse+reward", "reward": "red.py", **FEWER},
    ],
)
def test_a_step_needs_what_the_plan_says(settings, monkeypatch, changes, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("red.py").write_text("def reward(images, captions): return images.mean((1, 2, 3))")
    run = replace(settings, steps=2, **changes)
    planned = plan(run)
    encoders = list(planned.ensemble.text_encoders)  # a step touches them, not the VAE
    vae = planned.ensemble.frame.vae if run.rewarded else None
    dtype = getattr(torch, run.dtype)
    checkpointing, large = run.gradient_checkpointing or run.checkpoint_large_maps, run.checkpoint_large_maps
    found = expected(planned.ensemble.denoiser, encoders, run.batch_size, 4, dtype, checkpointing, run.store, vae, largest_maps_only=large)
    assert found.total == pytest.approx(measured(planned, monkeypatch), rel=0.15)


def test_stages_on_the_largest_maps_save_most_of_what_all_stages_save(settings):  # noqa: F811
    """Counted at the size of SD 1.5, whose large maps keep most; the aggregator of its first stage sends gradients through all others."""
    model = Subject.from_config("sd15", 1, Recipe("sabw", {"hidden": 32, "heads": 4, "depth": 1}, 32), "IN00,OUT11").denoiser()
    whole, large, every = (
        step_bytes(model, 8, 64, torch.bfloat16, some, largest_maps_only=only) for some, only in ((False, False), (True, True), (True, False))
    )
    assert every < large < 0.65 * whole


def test_both_kinds_of_checkpointing_at_once_are_refused(settings):  # noqa: F811
    with pytest.raises(UserError, match="--gradient-checkpointing recomputes all stages, and --checkpoint-large-maps some"):
        replace(settings, gradient_checkpointing=True, checkpoint_large_maps=True)


def test_less_memory_is_proposed_until_everything_is_on(settings, tmp_path):  # noqa: F811
    """Of experts that are large enough beside their aggregators for all of it to pay."""
    for seed in range(2):
        sd_pipeline(seed, **WIDE).save_pretrained(tmp_path / str(seed))
    settings = replace(settings, **FEWER, experts=[f"x{seed}={tmp_path / str(seed)}" for seed in range(2)])
    ways = plan(settings).memory()["for_less_memory"]
    assert [way.split()[0] for way in ways][-4:] == ["--dtype", "--store", "--cache", "--batch-size"]
    low = replace(settings, dtype="bfloat16", cache="somewhere", batch_size=1, gradient_checkpointing=True, store="int8")
    assert plan(low).memory()["for_less_memory"] == []


def test_a_dry_run_says_the_memory(settings, capsys):  # noqa: F811
    small = ["--hidden", "8", "--heads", "2", "--depth", "1", "--resolution", "32", "--batch-size", "2", "--held-out", "2", "--device", "cpu"]
    assert main(["train", "--experts", *settings.experts, "--data", settings.data, "--output", settings.output, *small, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "GB of tensors in a step" in said and "s a step" in said
